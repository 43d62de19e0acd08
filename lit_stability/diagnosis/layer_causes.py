"""Causes by type of layer: what exploding, vanishing or oscillating gradients in it usually mean.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from typing import Literal

from lit_stability.diagnosis.cause import Cause, EvidenceRule, register_cause
from lit_stability.diagnosis.context import LARGE, DiagnosisContext
from lit_stability.diagnosis.evidence import no_norms
from lit_stability.diagnosis.layer_types import layer_kind

Symptom = Literal["explode", "vanish", "oscillate"]

_EXPLODE = ("gradient spike", "layer bound", "non-finite gradient", "divergence")
_VANISH = ("vanishing gradient", "dead gradients", "layer bound")


def symptom(context: DiagnosisContext) -> Symptom | None:
    """Returns the symptom of an anomaly, from its kind and the pattern of the loss."""
    anomaly, found = context.anomaly, context.pattern
    if anomaly.kind in _VANISH and anomaly.warn_only:
        return "vanish"
    if found is not None and found.name == "oscillating divergence":
        return "oscillate"
    return "explode" if anomaly.kind in _EXPLODE else None


def in_layers(kind: str, wanted: Symptom) -> EvidenceRule:
    """Returns a rule: a layer of this kind shows the symptom most."""

    def rule(context: DiagnosisContext) -> str | None:
        if symptom(context) != wanted:
            return None
        shown = [(n, v) for n, v in context.layers(3) if layer_kind(n) == kind]
        if wanted == "explode" and context.stats is not None and len(context.history) >= 3:
            shown = [(n, v) for n, v in shown if not math.isfinite(v) or v > LARGE]
        if not shown:
            return None
        article = "an" if kind[0] in "aeiou" else "a"
        return f"{shown[0][0]}, in {article} {kind}, is affected most"

    return rule


ROWS: tuple[tuple[str, Symptom, str, str], ...] = (
    (
        "vision encoder",
        "explode",
        "inputs of the vision encoder not normalised",
        "scale images to [0, 1] or [-1, 1] and normalise with the pretraining's mean and deviation",
    ),
    (
        "encoder",
        "explode",
        "inputs of the encoder out of range",
        "normalise the inputs; look for very long or empty samples",
    ),
    (
        "projection",
        "vanish",
        "projection badly initialised",
        "use Xavier or Kaiming initialisation, and compare the widths of its input and output",
    ),
    (
        "projection",
        "explode",
        "junction of a trunk and a new part",
        "initialise the new part with small weights (gain 0.1), normalise the output of the trunk, "
        "or train the new part alone first",
    ),
    (
        "language model",
        "oscillate",
        "sequence lengths or padding",
        "group batches by length or pad dynamically, and pass an attention mask",
    ),
    (
        "embedding",
        "explode",
        "embeddings with too large gradients",
        "lower their learning rate, or look for a rare token that is frequent in the batch",
    ),
    (
        "attention",
        "explode",
        "attention without normalised queries and keys",
        "normalise queries and keys, divide by the root of the head size, and add AttentionProbe",
    ),
    (
        "norm",
        "explode",
        "norm of a variance near zero",
        "set eps of the norm to 1e-5 or more, and compute it in float32",
    ),
    (
        "head",
        "explode",
        "head at another scale than the trunk",
        "initialise the head with small weights (Xavier, gain 0.1) and its bias near the prior",
    ),
    (
        "head",
        "vanish",
        "saturated outputs",
        "keep logits small: the gradient vanishes at probabilities near 0 or 1",
    ),
)
"""Kind of layer, symptom, name of the cause, and what to try."""


def register_layer_cause(kind: str, wanted: Symptom, cause: str, remedy: str) -> None:
    """Registers the cause of a symptom in one kind of layer.

    Args:
        kind: a key of `lit_stability.diagnosis.layer_types.LAYER_KINDS`, which you may extend.
        wanted: the symptom.
        cause: name of the cause.
        remedy: what to try, in one sentence.
    """
    register_cause(
        Cause(
            name=cause,
            rules=((3, in_layers(kind, wanted)),),
            contradictions=(no_norms,) if kind == "norm" else (),
            remedy=remedy,
            ignore_when="if it was a single step and the loss decreases",
        )
    )


def register_layer_causes() -> None:
    """Registers the causes of this file."""
    for row in ROWS:
        register_layer_cause(*row)
