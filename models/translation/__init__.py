"""Encoder-decoder Transformer that translates Classical Chinese into modern Chinese.

Import each name from the module that defines it: the network works without Lightning, since
``models.translation.transformer.Transformer`` depends on torch only. A Trainer takes
``models.translation.module.TranslationModule`` and
``models.translation.datamodule.TranslationDataModule``. ``README.md`` describes model and data.
"""
