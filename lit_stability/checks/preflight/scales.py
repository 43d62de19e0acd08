"""The junction of a trunk and its new heads: scales of outputs and gradients, initialisations.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from torch import Tensor, nn

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation, parts
from lit_stability.checks.preflight.report import NotApplicableError

FAR = 100.0
"""Two orders of magnitude. Outputs of modules beside each other differ by a factor of 10 in common
networks, by sqrt(width) where embeddings are scaled."""
FAR_GRADIENT = 1000.0
"""Gradient norms of top-level modules differ more: by the square roots of their sizes and by the
share of an embedding's rows that a batch touches."""
APART = 3.0
"""Factor between the scale of torch's initialisation and that of the others from which it is more
than a note: Xavier on square matrices is at 1.7, normal draws of 0.02 at a width of 768 at 1."""
_ENOUGH = 64
"""Elements of a weight from which its distribution can be told: the largest of 64 uniform draws
is below 0.9 of the bound in one of 1000."""


def check_scales(seen: Observation, model: nn.Module) -> list[Finding]:
    """Top-level modules whose output, or gradient, is orders of magnitude above the others'.

    Too small is no fault here: a head may begin at 0.

    Raises:
        NotApplicableError: there are fewer than two top-level modules.
    """
    modules = parts(model)
    if len(modules) < 2:
        raise NotApplicableError("the model has one top-level module: nothing to compare it with")
    outputs = {n: seen.outputs[n].rms for n in modules if n in seen.outputs}
    gradients = {n: _norm(seen.gradients, n) for n in modules}
    findings = []
    for name, (value, usual) in _outliers(outputs, FAR).items():
        findings.append(
            Finding(
                check="scales",
                severity="error" if value > FAR * FAR * usual else "warning",
                what=f"the outputs have an rms of {value:.3g}, those of the modules beside it "
                f"{usual:.3g}",
                where=(name,),
                why="at such a junction one side drowns the other: the loss starts absurdly high "
                "and clipping cuts the wrong gradients",
                remedy="initialise it small (Xavier with gain 0.1), or put a norm before it",
            )
        )
    for name, (value, usual) in _outliers(gradients, FAR_GRADIENT).items():
        findings.append(
            Finding(
                check="scales",
                severity="warning",
                what=f"the gradient has a norm of {value:.3g}, that of the modules beside it "
                f"{usual:.3g}",
                where=(name,),
                why="a clip by the global norm leaves the others next to nothing",
                remedy="mend the initialisation of the module, or give it a learning rate of its "
                "own",
            )
        )
    return findings


def _norm(gradients: Mapping[str, float | None], name: str) -> float:
    return math.hypot(*(g or 0.0 for key, g in gradients.items() if key.startswith(f"{name}.")))


def _outliers(values: Mapping[str, float], factor: float) -> dict[str, tuple[float, float]]:
    """Values far above the median of the others, each with that median.

    >>> _outliers({"trunk": 1.0, "neck": 2.0, "head": 400.0}, 100.0)
    {'head': (400.0, 1.5)}
    """
    found = {}
    positive = {name: v for name, v in values.items() if 0 < v < math.inf}
    for name, value in positive.items():
        others = [v for n, v in positive.items() if n != name]
        if others and value > factor * (usual := statistics.median(others)):
            found[name] = (value, usual)
    return found


def check_initialisation(model: nn.Module) -> list[Finding]:
    """Linear layers left as torch makes them, beside others that were initialised on purpose.

    torch's own is U(-b, b) with b = 1/sqrt(fan_in), which `kaiming_uniform_(a=sqrt(5))` comes to.
    A model that leaves all of its layers so, or none, chose to.

    Raises:
        NotApplicableError: too few linear layers are large enough to tell.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() >= _ENOUGH
    }
    if len(linears) < 2:
        raise NotApplicableError("fewer than two linear layers are large enough to tell")
    left = {name: m for name, m in linears.items() if is_default(m.weight)}
    chosen = {name: m for name, m in linears.items() if name not in left}
    # Layers of a width at which another rule has the same bound cannot be told apart from chosen.
    if not left or not chosen or len(left) >= len(chosen):
        return []
    # What is frozen was loaded; what trains beside the layers says how they should begin.
    beside = [m for m in chosen.values() if m.weight.requires_grad] or list(chosen.values())
    gain = statistics.median(_rms(m.weight) * math.sqrt(m.in_features) for m in beside)
    return [
        Finding(
            check="initialisation",
            severity="note" if 1 / APART < gain * math.sqrt(3) < APART else "warning",
            what=f"{len(left)} of {len(linears)} linear layers are as torch makes them, "
            f"U(-b, b) with b = 1/sqrt(fan_in), an rms of 0.577/sqrt(fan_in); the others have "
            f"{gain:.3g}/sqrt(fan_in)",
            where=tuple(left),
            why="a layer that the initialisation passed over starts at a scale that the others are "
            "not meant for",
            remedy="initialise these layers as the others, or on purpose as a head, such as Xavier "
            "with gain 0.1",
        )
    ]


def is_default(weight: Tensor) -> bool:
    """Whether a weight of shape (out, in) looks like torch's own initialisation.

    The largest of n draws is within 10/n of the bound but for one in 20,000, and the rms of a
    uniform distribution within 4 standard errors of b/sqrt(3).
    """
    bound = 1 / math.sqrt(weight.shape[1])
    n, largest = weight.numel(), float(weight.detach().abs().max())
    if not bound * (1 - 10 / n) <= largest <= bound * (1 + 1e-6):
        return False
    # The square of a uniform draw has mean b^2/3 and standard deviation b^2 * sqrt(4/45).
    expected = bound**2 / 3
    error = bound**2 * math.sqrt(4 / 45 / n)
    return abs(_rms(weight) ** 2 - expected) <= 4 * error


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())
