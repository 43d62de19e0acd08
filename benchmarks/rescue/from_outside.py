"""Faults from outside that do not come back: every injector, at several places and steps.

Causes are those that are true of what was done to the run, whoever says so; what strikes once from
outside is a "glitch" whatever else it is. May import `lit_stability`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.rescue.healthy import CAUSAL, CNN, CNN_SGD, GPT, GRU, TRANSLATION
from benchmarks.rescue.scenario import Scenario
from benchmarks.rescue.tasks import Task
from benchmarks.rescue.troubles import Struck
from lit_stability.faults import (
    CorruptGradient,
    CorruptMoment,
    CorruptWeight,
    Fault,
    JumpLearningRate,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)

GLITCH = ("glitch",)
OF_NAN = (*GLITCH, "operation outside its domain")
"""`NanLoss` is an operation: it multiplies the loss by NaN."""
OF_GRADIENTS = (*GLITCH, "exploding gradient")
OF_WEIGHTS = (*GLITCH, "weights damaged from outside")
OF_MOMENTS = (*OF_WEIGHTS, "optimizer state damaged")
OF_RATE = ("learning rate jumped", "learning rate too high")

_NAN, _LOSS, _GRADIENTS = "NaN loss", "loss spike", "gradients"
_RATE, _WEIGHTS, _MOMENTS = "learning rate", "weights", "optimizer state"


def struck(
    family: str,
    causes: tuple[str, ...],
    what: str,
    task: Task,
    kind: Callable[..., Fault],
    step: int,
    **options: Any,
) -> Scenario:
    """A fault from outside, once."""
    trouble = Struck(lambda: kind(step=step, **options))
    name = f"{what}, {task.name}, step {step}"
    return Scenario(name=name, family=family, task=task, trouble=trouble, step=step, causes=causes)


FROM_OUTSIDE: tuple[Scenario, ...] = (
    struck(_NAN, OF_NAN, "NaN loss", GPT, NanLoss, 120),
    struck(_NAN, OF_NAN, "NaN loss", TRANSLATION, NanLoss, 5),
    struck(_NAN, OF_NAN, "NaN loss", CAUSAL, NanLoss, 80),
    struck(_NAN, OF_NAN, "NaN loss", CNN, NanLoss, 355),
    struck(_NAN, OF_NAN, "NaN loss twice", GRU, NanLoss, 180, steps=2),
    struck(_LOSS, OF_GRADIENTS, "loss x 1e4", GPT, ScaleLoss, 120),
    struck(_LOSS, OF_GRADIENTS, "loss x 1e6", TRANSLATION, ScaleLoss, 220, factor=1e6),
    struck(_LOSS, OF_GRADIENTS, "loss x 1e4", CNN, ScaleLoss, 30),
    struck(_LOSS, OF_GRADIENTS, "loss x 30", GRU, ScaleLoss, 180, factor=30.0),
    struck(_LOSS, OF_GRADIENTS, "loss x 1e3", CNN_SGD, ScaleLoss, 180, factor=1e3),
    struck(
        _GRADIENTS,
        OF_GRADIENTS,
        "NaN in one gradient",
        GPT,
        CorruptGradient,
        120,
        parameter="model.blocks.1.up.weight",
    ),
    struck(
        _GRADIENTS,
        OF_GRADIENTS,
        "Inf in one gradient",
        TRANSLATION,
        CorruptGradient,
        120,
        parameter="*decoder*query.weight",
        value=math.inf,
    ),
    struck(
        _GRADIENTS,
        OF_GRADIENTS,
        "one element of 1e6",
        CAUSAL,
        CorruptGradient,
        80,
        parameter="network.*action*",
        value=1e6,
    ),
    struck(_GRADIENTS, OF_GRADIENTS, "gradients x 1e3, 5 times", GPT, ScaleGradients, 120, steps=5),
    struck(
        _GRADIENTS,
        OF_GRADIENTS,
        "gradients of one layer x 1e4",
        GRU,
        ScaleGradients,
        180,
        parameter="net.gru.weight_hh_l0",
        factor=1e4,
    ),
    struck(_RATE, OF_RATE, "learning rate x 300", GPT, JumpLearningRate, 120),
    struck(_RATE, OF_RATE, "learning rate x 100", TRANSLATION, JumpLearningRate, 120, factor=100.0),
    struck(_RATE, OF_RATE, "learning rate x 30", CAUSAL, JumpLearningRate, 80, factor=30.0),
    struck(_RATE, OF_RATE, "learning rate x 300", CNN, JumpLearningRate, 180),
    struck(_RATE, OF_RATE, "learning rate x 1000", GRU, JumpLearningRate, 300, factor=1000.0),
    struck(
        _WEIGHTS,
        OF_WEIGHTS,
        "NaN in a weight",
        GPT,
        CorruptWeight,
        120,
        parameter="model.blocks.1.up.weight",
    ),
    struck(
        _WEIGHTS,
        OF_WEIGHTS,
        "exponent bit flipped",
        TRANSLATION,
        CorruptWeight,
        120,
        parameter="*encoder*query.weight",
        bit=30,
    ),
    struck(
        _WEIGHTS,
        OF_WEIGHTS,
        "Inf in a gain",
        CNN,
        CorruptWeight,
        60,
        parameter="net.features.0.weight",
        value=math.inf,
    ),
    struck(
        _WEIGHTS,
        OF_WEIGHTS,
        "exponent bit flipped",
        GRU,
        CorruptWeight,
        340,
        parameter="net.gru.weight_hh_l0",
        bit=30,
    ),
    struck(
        _WEIGHTS,
        OF_WEIGHTS,
        "NaN in a head",
        CAUSAL,
        CorruptWeight,
        80,
        parameter="network.*action*",
    ),
    struck(
        _WEIGHTS,
        OF_WEIGHTS,
        "a weight of 100",
        GPT,
        CorruptWeight,
        120,
        parameter="model.blocks.0.qkv.weight",
        value=100.0,
    ),
    struck(_MOMENTS, OF_MOMENTS, "second moment zeroed", GPT, CorruptMoment, 120),
    struck(_MOMENTS, OF_MOMENTS, "second moment zeroed", CNN, CorruptMoment, 180),
    struck(_MOMENTS, OF_MOMENTS, "second moment zeroed", CAUSAL, CorruptMoment, 80),
    struck(
        _MOMENTS,
        OF_MOMENTS,
        "first moment of 1",
        TRANSLATION,
        CorruptMoment,
        120,
        key="exp_avg",
        value=1.0,
    ),
    struck(
        _MOMENTS,
        OF_MOMENTS,
        "NaN in the first moment",
        GRU,
        CorruptMoment,
        180,
        key="exp_avg",
        value=math.nan,
    ),
    struck(
        _MOMENTS,
        OF_MOMENTS,
        "momentum of 10",
        CNN_SGD,
        CorruptMoment,
        180,
        key="momentum_buffer",
        value=10.0,
    ),
)
