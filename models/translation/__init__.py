"""Classical to modern Chinese: an encoder-decoder Transformer, its data and its decoding.

Names are imported from the module that defines them, so that the network can be had without
Lightning: ``models.translation.transformer.Transformer`` knows torch alone, while
``models.translation.module.TranslationModule`` and
``models.translation.datamodule.TranslationDataModule`` are the two classes a Trainer meets.
"""
