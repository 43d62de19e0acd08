"""Gains and weights that are zero, ReLUs that let nothing through, outputs that are constant.

What starts at zero on purpose (the last matrix of a residual branch, a LoRA matrix, a head) lets
nothing through at first, gets a gradient itself, and moves at the first step: it is no finding.
May import torch; knows no Lightning.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import NotApplicableError

DEAD = 0.99
"""Share of zeros in a ReLU's output. Half is usual, 0.9 happens with a negative bias; at 0.99 the
layers before it learn from one element in a hundred."""
_ENOUGH = 1000
"""Elements of an output from which such a share means something."""


def check_gains(first: Observation, second: Observation, model: nn.Module) -> list[Finding]:
    """Norm layers whose gains are all zero.

    All of them, or those of every final norm, make the "zombie": the signal is gone, nothing is
    NaN and the loss stalls. Some, that get a gradient, are an initialisation in use (a residual
    branch that starts as a constant).

    Raises:
        NotApplicableError: there is no norm layer with a gain.
    """
    norms = {name: gain for name, m in model.named_modules() if (gain := _gain(m)) is not None}
    if not norms:
        raise NotApplicableError("there is no norm layer with a gain")
    zero = [name for name, gain in norms.items() if not bool(gain.any())]
    if not zero:
        return []
    # One that is shut off for good has no gradient after small steps either.
    shut = [n for n in zero if not first.gradients.get(f"{n}.weight")]
    shut = [n for n in shut if not second.gradients.get(f"{n}.weight")]
    if len(zero) < len(norms) and not shut:
        return [
            Finding(
                check="gains",
                severity="note",
                what=f"the gains of {len(zero)} of {len(norms)} norm layers are 0",
                where=tuple(zero),
                why="their branches start as constants; they get a gradient and can leave it",
                remedy="nothing, if the initialisation means it so",
            )
        ]
    return [
        Finding(
            check="gains",
            severity="error",
            what=f"the gains of {len(zero)} of {len(norms)} norm layers are 0"
            + (f", {len(shut)} of them without a gradient" if shut else ""),
            where=tuple(shut or zero),
            why="the input is multiplied by 0: nothing is NaN, and the loss stalls",
            remedy="initialise the gains at 1; an initialisation that goes by the number of "
            "dimensions, or by 'weight' in the name, must leave norms out",
        )
    ]


def _gain(module: nn.Module) -> nn.Parameter | None:
    is_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase))
    weight = getattr(module, "weight", None)
    looks = is_norm or type(module).__name__.lower().endswith("norm")
    return weight if looks and isinstance(weight, nn.Parameter) and weight.ndim == 1 else None


def check_weights(first: Observation, second: Observation, model: nn.Module) -> list[Finding]:
    """Matrices that are all zero and stay so, as no gradient comes to them."""
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
            "no gradient comes to them",
            where=tuple(dead),
            why="what passes through them is zero for good; layers before them learn nothing",
            remedy="start at most the last matrix of a branch at 0, not two in a row",
        )
    ]


def check_relus(seen: Observation) -> list[Finding]:
    """ReLUs whose output is zero nearly everywhere."""
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
            why="no gradient passes where a ReLU is zero",
            remedy="look for a large negative bias, or unnormalised inputs, in the layer before it",
        )
    ]


def check_constant(second: Observation) -> list[Finding]:
    """Logits that are the same for every target, also after small steps.

    Raises:
        NotApplicableError: no classification loss was called.
    """
    calls = [call for call in second.watch.losses if call.targets > 1]
    if not calls:
        raise NotApplicableError("no classification loss was called")
    return [
        Finding(
            check="constant output",
            severity="error",
            what=f"all {call.targets} targets get the very same logits, after small steps too",
            where=(call.module,) if call.module else (),
            why="the output does not depend on the input: at best the frequencies are learnt",
            remedy="look for the first module whose output is constant: a zero gain, a saturated "
            "activation, an input that is not used",
        )
        for call in calls
        if call.constant
    ]
