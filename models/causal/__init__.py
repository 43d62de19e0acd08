"""A causal classifier: what comes next, and if it is a number, which one.

A Qwen trunk reads a sentence. The *abduction* network infers from it the location and scale of
a hidden Cauchy vector U; the *action* network maps U linearly to a score S_k for every token,
`<NUM>` among them, and to a value Y. As Cauchy variables stay Cauchy under linear maps, each
score and the value come with their own location and scale, and nothing is sampled in training.

Names are imported from the module that defines them: ``models.causal.cauchy``,
``models.causal.heads`` and ``models.causal.losses`` know torch alone, ``models.causal.backbone``
transformers as well; ``models.causal.module.CausalModule`` and
``models.causal.datamodule.CausalDataModule`` are the two classes a Trainer meets.
"""
