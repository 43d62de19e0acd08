"""What trouble in one kind of layer usually means: explosion, vanishing, oscillation.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from typing import Literal

from lit_stability.diagnosis.cause import Cause, EvidenceRule, register_cause
from lit_stability.diagnosis.context import LARGE, DiagnosisContext
from lit_stability.diagnosis.layer_types import layer_kind

Symptom = Literal["explode", "vanish", "oscillate"]

_EXPLODE = ("gradient spike", "layer bound", "non-finite gradient", "divergence")
_VANISH = ("vanishing gradient", "dead gradients", "layer bound")


def symptom(context: DiagnosisContext) -> Symptom | None:
    """What the gradients do, by the anomaly and the pattern of the loss."""
    anomaly, found = context.anomaly, context.pattern
    if anomaly.kind in _VANISH and anomaly.warn_only:
        return "vanish"
    if found is not None and found.name == "oscillating divergence":
        return "oscillate"
    return "explode" if anomaly.kind in _EXPLODE else None


def in_layers(kind: str, wanted: Symptom) -> EvidenceRule:
    """Layers of a kind show the symptom most."""

    def rule(context: DiagnosisContext) -> str | None:
        if symptom(context) != wanted:
            return None
        shown = [(n, v) for n, v in context.layers(3) if layer_kind(n) == kind]
        if wanted == "explode" and context.stats is not None and len(context.history) >= 3:
            shown = [(n, v) for n, v in shown if not math.isfinite(v) or v > LARGE]
        if not shown:
            return None
        article = "an" if kind[0] in "aeiou" else "a"
        return f"of all layers {shown[0][0]}, of {article} {kind}, shows it most"

    return rule


ROWS: tuple[tuple[str, Symptom, str, str], ...] = (
    (
        "vision encoder",
        "explode",
        "inputs of the vision encoder not normalised",
        "bring images to [0, 1] or [-1, 1], with the mean and deviation of the pretraining",
    ),
    (
        "encoder",
        "explode",
        "inputs of the encoder out of range",
        "normalise what goes in; look for overlong or empty samples",
    ),
    (
        "projection",
        "vanish",
        "projection badly initialised",
        "initialise it by Xavier or Kaiming, and compare the widths it joins",
    ),
    (
        "projection",
        "explode",
        "junction of a trunk and a new part",
        "initialise the new part small (gain 0.1), normalise what the trunk gives, or warm the new "
        "part up alone",
    ),
    (
        "language model",
        "oscillate",
        "sequence lengths or padding",
        "group batches by length or pad dynamically, and give an attention mask",
    ),
    (
        "embedding",
        "explode",
        "embeddings with too large gradients",
        "lower their learning rate, or look for a rare token that fills the batch",
    ),
    (
        "attention",
        "explode",
        "attention without normalised queries and keys",
        "normalise queries and keys, scale by the root of the head's width, and add AttentionProbe",
    ),
    (
        "norm",
        "explode",
        "norm of a variance near zero",
        "give the norm an eps of 1e-5 or more, and compute it in float32",
    ),
    (
        "head",
        "explode",
        "head at another scale than the trunk",
        "initialise the head small (Xavier with gain 0.1) and its bias near the prior",
    ),
    (
        "head",
        "vanish",
        "saturated outputs",
        "keep logits small: a loss of probabilities near 0 or 1 has no slope",
    ),
)
"""Kind of layer, symptom, cause, what to try."""


def register_layer_cause(kind: str, wanted: Symptom, cause: str, remedy: str) -> None:
    """Add what a symptom in a kind of layer means; kinds are those of `diagnosis.layer_types`.

    Args:
        kind: a key of ``LAYER_KINDS``, which is yours to extend.
        wanted: the symptom.
        cause: its name.
        remedy: what to try, in one sentence.
    """
    register_cause(
        Cause(
            name=cause,
            rules=((3, in_layers(kind, wanted)),),
            remedy=remedy,
            ignore_when="if it was one step and the loss falls",
        )
    )


def register_layer_causes() -> None:
    """Fill the registry."""
    for row in ROWS:
        register_layer_cause(*row)
