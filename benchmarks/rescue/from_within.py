"""Trouble that comes back: of the data, of the precision, of the run's own making.

Causes are those that are true of the run, whoever says so. May import `lit_stability`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.instabilities.cases import CASES
from benchmarks.rescue.from_outside import OF_GRADIENTS, OF_NAN
from benchmarks.rescue.healthy import (
    CAUSAL,
    CNN,
    CNN_FP16,
    DIVERGES,
    GPT,
    GPT_FP16,
    GRU,
    MLP_TWIN,
    POST_NORM,
    POST_NORM_TWIN,
    PRE_NORM_TWIN,
    STALE,
    STALE_TWIN,
    TRANSLATION,
    from_case,
)
from benchmarks.rescue.scenario import Scenario
from benchmarks.rescue.tasks import Task
from benchmarks.rescue.troubles import Bound, Spoiled, Struck, Trouble, filled, scaled
from lit_stability.faults import CorruptGradient, Fault, NanLoss, ScaleGradients, ScaleLoss

OF_DATA = ("bad batch", "loss or labels")
OF_PRECISION = ("numeric precision",)


def bound(what: str, task: Task, kind: Callable[..., Fault], step: int, **options: Any) -> Scenario:
    """A fault that returns with its batches; a NaN is then made by an operation, each time."""
    made = ("operation outside its domain",) if kind in (NanLoss, CorruptGradient) else ()
    return Scenario(
        name=f"{what} with its batch, {task.name}, step {step}",
        family="bound to its data",
        task=task,
        trouble=Bound(lambda: kind(step=step, **options)),
        step=step,
        causes=(*OF_DATA, "exploding gradient", *made),
    )


def spoiled(what: str, task: Task, trouble: Spoiled) -> Scenario:
    """Data that are wrong as they are loaded."""
    return Scenario(
        name=f"{what}, {task.name}, batch {trouble.first}",
        family="bound to its data",
        task=task,
        trouble=trouble,
        step=trouble.first,
        causes=OF_DATA,
    )


def overflow(
    what: str, task: Task, trouble: Trouble, step: int, causes: tuple[str, ...]
) -> Scenario:
    """Something that fp16 does not hold."""
    name = f"{what}, {task.name.split(',')[0]}, batch {step}"
    return Scenario(
        name=name, family="overflow in fp16", task=task, trouble=trouble, step=step, causes=causes
    )


def by_itself(task: Task, cause: str, twin: Task, beyond_remedy: str = "") -> Scenario:
    """A run in which nothing is injected."""
    return Scenario(
        name=task.name,
        family="beyond remedy" if beyond_remedy else "by itself",
        task=task,
        causes=(cause,),
        twin=twin,
        beyond_remedy=beyond_remedy,
    )


FROM_WITHIN: tuple[Scenario, ...] = (
    bound("NaN loss", GPT, NanLoss, 120),
    bound("loss x 1e4", TRANSLATION, ScaleLoss, 120),
    bound("gradients x 1e3", CAUSAL, ScaleGradients, 80),
    bound("NaN loss, three in a row", GPT, NanLoss, 150, steps=3),
    spoiled("NaN in the images", CNN, Spoiled(180, filled(math.nan))),
    spoiled("images x 1e4", CNN, Spoiled(180, scaled(1e4))),
    spoiled("Inf in the inputs", GRU, Spoiled(180, filled(math.inf))),
    spoiled("targets of 1e4", GRU, Spoiled(180, filled(1e4, place=1))),
    spoiled("NaN in the numbers read", CAUSAL, Spoiled(80, filled(math.nan))),
    overflow(
        "images x 1e3 from there on",
        CNN_FP16,
        Spoiled(60, scaled(1e3), last=2**62),
        60,
        OF_PRECISION,
    ),
    overflow("images x 1e3 once", CNN_FP16, Spoiled(180, scaled(1e3)), 180, OF_PRECISION),
    overflow("NaN loss", GPT_FP16, Struck(lambda: NanLoss(step=60)), 60, OF_NAN),
    overflow(
        "gradients x 1e3", GPT_FP16, Struck(lambda: ScaleGradients(step=60)), 60, OF_GRADIENTS
    ),
    by_itself(from_case(DIVERGES, 200), "learning rate too high", MLP_TWIN),
    by_itself(from_case(STALE, 1000), "stale second moment", STALE_TWIN),
    by_itself(
        from_case(CASES["attention logits grow"], 180, 4),
        "attention-logit growth",
        PRE_NORM_TWIN,
        "once attention has collapsed onto single tokens, its gradients are zero: queries and keys "
        "have to be normalised, or the run begun anew with a lower learning rate",
    ),
    by_itself(
        from_case(POST_NORM, 180, 4),
        "no warm-up",
        POST_NORM_TWIN,
        "the first steps stall the lower layers of a post-norm Transformer for good: it has to be "
        "begun anew with a warm-up",
    ),
    by_itself(
        from_case(CASES["final gain zeroed"], 120, 4),
        "zeroed gain",
        PRE_NORM_TWIN,
        "the gain is zero and does not train: no gradient passes it, whatever is done",
    ),
)
