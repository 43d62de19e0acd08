"""Causal classifier: predicts the next token and, if that is a number, its value.

A Qwen backbone encodes a sentence. The *abduction* network infers location and scale of a latent
Cauchy vector U from it; the *action* network maps U linearly to a score S_k for every token,
`<NUM>` included, and to a value Y. Linear maps of Cauchy variables are Cauchy, so each score and
the value have a location and a scale, and training needs no sampling.

Import each name from the module that defines it: ``models.causal.cauchy``, ``models.causal.heads``
and ``models.causal.losses`` depend on torch only, ``models.causal.backbone`` on transformers as
well. A Trainer takes ``models.causal.module.CausalModule`` and
``models.causal.datamodule.CausalDataModule``. ``README.md`` describes model and data.
"""
