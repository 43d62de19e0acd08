"""Scenarios with one injected fault that does not recur: every injector, at several steps.

`causes` are the correct diagnoses of the injected fault, whichever protection gives them. A fault
that is injected once may always be called a "glitch". Imports `lit_stability`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.rescue.disturbances import InjectedFault
from benchmarks.rescue.healthy import CAUSAL, CNN, CNN_SGD, GPT, GRU, TRANSLATION
from benchmarks.rescue.scenario import Scenario
from benchmarks.rescue.tasks import Task
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
OF_NAN = (*GLITCH, "non-finite constant")
"""`NanLoss` multiplies the loss by NaN, so a constant of the program is a correct cause."""
OF_GRADIENTS = (*GLITCH, "exploding gradient")
OF_WEIGHTS = (*GLITCH, "weights damaged from outside")
OF_MOMENTS = (*OF_WEIGHTS, "optimizer state damaged")
OF_RATE = ("learning rate jumped", "learning rate too high")

_NAN, _LOSS, _GRADIENTS = "NaN loss", "loss spike", "gradients"
_RATE, _WEIGHTS, _MOMENTS = "learning rate", "weights", "optimizer state"


def injected(
    family: str,
    causes: tuple[str, ...],
    title: str,
    task: Task,
    kind: Callable[..., Fault],
    step: int,
    **options: Any,
) -> Scenario:
    """Creates a scenario with one injected fault."""
    return Scenario(
        name=f"{title}, {task.name}, step {step}",
        family=family,
        task=task,
        disturbance=InjectedFault(lambda: kind(step=step, **options)),
        step=step,
        causes=causes,
    )


INJECTED: tuple[Scenario, ...] = (
    injected(_NAN, OF_NAN, "NaN loss", GPT, NanLoss, 120),
    injected(_NAN, OF_NAN, "NaN loss", TRANSLATION, NanLoss, 5),
    injected(_NAN, OF_NAN, "NaN loss", CAUSAL, NanLoss, 80),
    injected(_NAN, OF_NAN, "NaN loss", CNN, NanLoss, 355),
    injected(_NAN, OF_NAN, "NaN loss twice", GRU, NanLoss, 180, steps=2),
    injected(_LOSS, OF_GRADIENTS, "loss x 1e4", GPT, ScaleLoss, 120),
    injected(_LOSS, OF_GRADIENTS, "loss x 1e6", TRANSLATION, ScaleLoss, 220, factor=1e6),
    injected(_LOSS, OF_GRADIENTS, "loss x 1e4", CNN, ScaleLoss, 30),
    injected(_LOSS, OF_GRADIENTS, "loss x 30", GRU, ScaleLoss, 180, factor=30.0),
    injected(_LOSS, OF_GRADIENTS, "loss x 1e3", CNN_SGD, ScaleLoss, 180, factor=1e3),
    injected(
        _GRADIENTS,
        OF_GRADIENTS,
        "NaN in one gradient",
        GPT,
        CorruptGradient,
        120,
        parameter="model.blocks.1.up.weight",
    ),
    injected(
        _GRADIENTS,
        OF_GRADIENTS,
        "Inf in one gradient",
        TRANSLATION,
        CorruptGradient,
        120,
        parameter="*decoder*query.weight",
        value=math.inf,
    ),
    injected(
        _GRADIENTS,
        OF_GRADIENTS,
        "one element of 1e6",
        CAUSAL,
        CorruptGradient,
        80,
        parameter="network.*action*",
        value=1e6,
    ),
    injected(
        _GRADIENTS, OF_GRADIENTS, "gradients x 1e3, 5 times", GPT, ScaleGradients, 120, steps=5
    ),
    injected(
        _GRADIENTS,
        OF_GRADIENTS,
        "gradients of one layer x 1e4",
        GRU,
        ScaleGradients,
        180,
        parameter="net.gru.weight_hh_l0",
        factor=1e4,
    ),
    injected(_RATE, OF_RATE, "learning rate x 300", GPT, JumpLearningRate, 120),
    injected(
        _RATE, OF_RATE, "learning rate x 100", TRANSLATION, JumpLearningRate, 120, factor=100.0
    ),
    injected(_RATE, OF_RATE, "learning rate x 30", CAUSAL, JumpLearningRate, 80, factor=30.0),
    injected(_RATE, OF_RATE, "learning rate x 300", CNN, JumpLearningRate, 180),
    injected(_RATE, OF_RATE, "learning rate x 1000", GRU, JumpLearningRate, 300, factor=1000.0),
    injected(
        _WEIGHTS,
        OF_WEIGHTS,
        "NaN in a weight",
        GPT,
        CorruptWeight,
        120,
        parameter="model.blocks.1.up.weight",
    ),
    injected(
        _WEIGHTS,
        OF_WEIGHTS,
        "exponent bit flipped",
        TRANSLATION,
        CorruptWeight,
        120,
        parameter="*encoder*query.weight",
        bit=30,
    ),
    injected(
        _WEIGHTS,
        OF_WEIGHTS,
        "Inf in a gain",
        CNN,
        CorruptWeight,
        60,
        parameter="net.features.0.weight",
        value=math.inf,
    ),
    injected(
        _WEIGHTS,
        OF_WEIGHTS,
        "exponent bit flipped",
        GRU,
        CorruptWeight,
        340,
        parameter="net.gru.weight_hh_l0",
        bit=30,
    ),
    injected(
        _WEIGHTS,
        OF_WEIGHTS,
        "NaN in a head",
        CAUSAL,
        CorruptWeight,
        80,
        parameter="network.*action*",
    ),
    injected(
        _WEIGHTS,
        OF_WEIGHTS,
        "a weight of 100",
        GPT,
        CorruptWeight,
        120,
        parameter="model.blocks.0.qkv.weight",
        value=100.0,
    ),
    injected(_MOMENTS, OF_MOMENTS, "second moment zeroed", GPT, CorruptMoment, 120),
    injected(_MOMENTS, OF_MOMENTS, "second moment zeroed", CNN, CorruptMoment, 180),
    injected(_MOMENTS, OF_MOMENTS, "second moment zeroed", CAUSAL, CorruptMoment, 80),
    injected(
        _MOMENTS,
        OF_MOMENTS,
        "first moment of 1",
        TRANSLATION,
        CorruptMoment,
        120,
        key="exp_avg",
        value=1.0,
    ),
    injected(
        _MOMENTS,
        OF_MOMENTS,
        "NaN in the first moment",
        GRU,
        CorruptMoment,
        180,
        key="exp_avg",
        value=math.nan,
    ),
    injected(
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
