"""Finds zero gains and weights, dead ReLUs, and constant outputs.

Weights that start at zero on purpose (the last matrix of a residual branch, a LoRA matrix, a head)
get a gradient and change in the first step, so they are not reported. May import torch; does not
import Lightning.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import NotApplicableError

DEAD = 0.99
"""Share of zeros in a ReLU's output. Half is usual, 0.9 occurs with a negative bias; at 0.99 the
layers before it learn from one element in a hundred."""
_ENOUGH = 1000
"""Smallest number of output elements for which this share is meaningful."""


def check_gains(first: Observation, second: Observation, model: nn.Module) -> list[Finding]:
    """Finds norm layers whose gains are all zero.

    If all norms, or all final norms, have zero gains, the signal is lost: nothing is NaN, but the
    loss stalls. Zero gains in some norms that get a gradient are a common initialisation of
    residual branches.

    Raises:
        NotApplicableError: If there is no norm layer with a gain.
    """
    norms = {name: gain for name, m in model.named_modules() if (gain := _gain(m)) is not None}
    if not norms:
        raise NotApplicableError("there is no norm layer with a gain")
    zero = [name for name, gain in norms.items() if not bool(gain.any())]
    if not zero:
        return []
    # A permanently dead gain has no gradient after small steps either.
    dead = [n for n in zero if not first.gradients.get(f"{n}.weight")]
    dead = [n for n in dead if not second.gradients.get(f"{n}.weight")]
    if len(zero) < len(norms) and not dead:
        return [
            Finding(
                check="gains",
                severity="note",
                what=f"the gains of {len(zero)} of {len(norms)} norm layers are 0",
                where=tuple(zero),
                why="their branches start as constants; the gains get a gradient and can grow",
                remedy="nothing, if the initialisation is intended",
            )
        ]
    return [
        Finding(
            check="gains",
            severity="error",
            what=f"the gains of {len(zero)} of {len(norms)} norm layers are 0"
            + (f", {len(dead)} of them without a gradient" if dead else ""),
            where=tuple(dead or zero),
            why="the input is multiplied by 0: nothing is NaN, but the loss stalls",
            remedy="initialise the gains at 1; a custom initialisation that selects weights by the "
            "number of dimensions, or by 'weight' in the name, must skip norms",
        )
    ]


def _gain(module: nn.Module) -> nn.Parameter | None:
    """Returns the gain of a norm layer of torch, or of a class whose name ends in "norm"."""
    is_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase))
    weight = getattr(module, "weight", None)
    is_norm = is_norm or type(module).__name__.lower().endswith("norm")
    return weight if is_norm and isinstance(weight, nn.Parameter) and weight.ndim == 1 else None


def check_weights(first: Observation, second: Observation, model: nn.Module) -> list[Finding]:
    """Finds matrices that are all zero and stay zero, because they get no gradient."""
    kinds = (nn.Linear, _ConvNd, nn.Embedding)
    dead = []
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or bool(module.weight.any()):
            continue
        key = f"{name}.weight"
        if not (first.gradients.get(key) or second.gradients.get(key)):
            dead.append(name)
    if not dead:
        return []
    return [
        Finding(
            check="dead branches",
            severity="error",
            what=f"{len(dead)} weight matri{'x is' if len(dead) == 1 else 'ces are'} all zero and "
            "get no gradient",
            where=tuple(dead),
            why="their output stays zero, and the layers before them do not learn",
            remedy="start at most the last matrix of a branch at 0, not two in a row",
        )
    ]


def check_relus(seen: Observation) -> list[Finding]:
    """Finds ReLUs whose output is zero almost everywhere."""
    worst = {r.module: r for r in seen.watch.relus if r.elements >= _ENOUGH and r.zeros > DEAD}
    if not worst:
        return []
    share = max(r.zeros for r in worst.values())
    return [
        Finding(
            check="dead branches",
            severity="error" if share == 1.0 else "warning",
            what=f"the output of {len(worst)} ReLU{'s' if len(worst) > 1 else ''} is zero at up to "
            f"{100 * share:.4g} % of its elements",
            where=tuple(name or "training_step" for name in worst),
            why="no gradient passes through a ReLU where its output is zero",
            remedy="look for a large negative bias, or unnormalised inputs, in the layer before it",
        )
    ]


def check_constant(second: Observation) -> list[Finding]:
    """Finds logits that are identical for all targets, even after small steps.

    Raises:
        NotApplicableError: If the step calls no classification loss with more than one target.
    """
    calls = [call for call in second.watch.losses if call.targets > 1]
    if not calls:
        raise NotApplicableError("the step calls no classification loss")
    return [
        Finding(
            check="constant output",
            severity="error",
            what=f"all {call.targets} targets get the same logits, even after small steps",
            where=(call.module,) if call.module else (),
            why="the output does not depend on the input: the model learns at most the class "
            "frequencies",
            remedy="look for the first module with a constant output: a zero gain, a saturated "
            "activation, an unused input",
        )
        for call in calls
        if call.constant
    ]
