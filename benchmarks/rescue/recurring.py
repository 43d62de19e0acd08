"""Scenarios whose fault recurs: faulty data, fp16 overflow, and instabilities of the run itself.

`causes` are the correct diagnoses, whichever protection gives them. Imports `lit_stability`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.instabilities.cases import CASES
from benchmarks.rescue.disturbances import (
    BatchFault,
    CorruptData,
    Disturbance,
    InjectedFault,
    filled,
    scaled,
)
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
from benchmarks.rescue.injected import OF_GRADIENTS, OF_NAN
from benchmarks.rescue.scenario import Scenario
from benchmarks.rescue.tasks import Task
from lit_stability.faults import CorruptGradient, Fault, NanLoss, ScaleGradients, ScaleLoss

OF_DATA = ("bad batch", "loss or labels")
OF_PRECISION = ("numeric precision",)


def with_batch(
    title: str, task: Task, kind: Callable[..., Fault], step: int, **options: Any
) -> Scenario:
    """Creates a scenario whose fault recurs with its batches.

    For faults that inject a NaN, a constant of the program is a correct cause too.
    """
    constant = ("non-finite constant",) if kind in (NanLoss, CorruptGradient) else ()
    return Scenario(
        name=f"{title} with its batch, {task.name}, step {step}",
        family="bound to its data",
        task=task,
        disturbance=BatchFault(lambda: kind(step=step, **options)),
        step=step,
        causes=(*OF_DATA, "exploding gradient", *constant),
    )


def corrupt_data(title: str, task: Task, disturbance: CorruptData) -> Scenario:
    """Creates a scenario whose data are corrupt when loaded."""
    return Scenario(
        name=f"{title}, {task.name}, batch {disturbance.first}",
        family="bound to its data",
        task=task,
        disturbance=disturbance,
        step=disturbance.first,
        causes=OF_DATA,
    )


def overflow(
    title: str, task: Task, disturbance: Disturbance, step: int, causes: tuple[str, ...]
) -> Scenario:
    """Creates a scenario that overflows in fp16."""
    return Scenario(
        name=f"{title}, {task.name.split(',')[0]}, batch {step}",
        family="overflow in fp16",
        task=task,
        disturbance=disturbance,
        step=step,
        causes=causes,
    )


def by_itself(task: Task, cause: str, twin: Task, beyond_remedy: str = "") -> Scenario:
    """Creates a scenario of a run that fails without an injected fault."""
    return Scenario(
        name=task.name,
        family="beyond remedy" if beyond_remedy else "by itself",
        task=task,
        causes=(cause,),
        twin=twin,
        beyond_remedy=beyond_remedy,
    )


RECURRING: tuple[Scenario, ...] = (
    with_batch("NaN loss", GPT, NanLoss, 120),
    with_batch("loss x 1e4", TRANSLATION, ScaleLoss, 120),
    with_batch("gradients x 1e3", CAUSAL, ScaleGradients, 80),
    with_batch("NaN loss, three in a row", GPT, NanLoss, 150, steps=3),
    corrupt_data("NaN in the images", CNN, CorruptData(180, filled(math.nan))),
    corrupt_data("images x 1e4", CNN, CorruptData(180, scaled(1e4))),
    corrupt_data("Inf in the inputs", GRU, CorruptData(180, filled(math.inf))),
    corrupt_data("targets of 1e4", GRU, CorruptData(180, filled(1e4, index=1))),
    corrupt_data("NaN in the numbers read", CAUSAL, CorruptData(80, filled(math.nan))),
    overflow(
        "images x 1e3 from there on",
        CNN_FP16,
        CorruptData(60, scaled(1e3), last=2**62),
        60,
        OF_PRECISION,
    ),
    overflow("images x 1e3 once", CNN_FP16, CorruptData(180, scaled(1e3)), 180, OF_PRECISION),
    overflow("NaN loss", GPT_FP16, InjectedFault(lambda: NanLoss(step=60)), 60, OF_NAN),
    overflow(
        "gradients x 1e3",
        GPT_FP16,
        InjectedFault(lambda: ScaleGradients(step=60)),
        60,
        OF_GRADIENTS,
    ),
    by_itself(from_case(DIVERGES, 200), "learning rate too high", MLP_TWIN),
    by_itself(from_case(STALE, 1000), "stale second moment", STALE_TWIN),
    by_itself(
        from_case(CASES["attention logits grow"], 180, 4),
        "attention-logit growth",
        PRE_NORM_TWIN,
        "once attention has collapsed onto single tokens, its gradients are zero: normalise "
        "queries and keys, or restart the run with a lower learning rate",
    ),
    by_itself(
        from_case(POST_NORM, 180, 4),
        "no warm-up",
        POST_NORM_TWIN,
        "the first steps stall the lower layers of a post-norm Transformer permanently: restart "
        "the run with a warm-up",
    ),
    by_itself(
        from_case(CASES["final gain zeroed"], 120, 4),
        "zeroed gain",
        PRE_NORM_TWIN,
        "the gain is zero and frozen: no gradient passes it",
    ),
)
