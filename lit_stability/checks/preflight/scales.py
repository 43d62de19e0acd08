"""Compares top-level modules, such as a trunk and new heads: outputs, gradients, initialisation.

May import torch; does not import Lightning.
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
"""Accepted factor between outputs. Outputs of neighbouring modules differ by a factor of 10 in
common networks, by sqrt(width) if embeddings are scaled."""
FAR_GRADIENT = 1000.0
"""Accepted factor between gradient norms. They differ more: by the square roots of the module
sizes, and by the share of an embedding's rows that a batch uses."""
APART = 3.0
"""Factor between torch's default initialisation and that of the other layers above which the
finding is a warning: Xavier on square matrices has 1.7, normal with 0.02 and a width of 768 1."""
_ENOUGH = 64
"""Smallest number of elements from which a distribution can be recognised: the largest of 64
uniform samples is below 0.9 of the bound in one of 1000 cases."""


def check_scales(seen: Observation, model: nn.Module) -> list[Finding]:
    """Finds top-level modules whose output or gradient is far larger than that of the others.

    Small values are not reported, because a head may start at 0.

    Raises:
        NotApplicableError: If there are fewer than two top-level modules.
    """
    modules = parts(model)
    if len(modules) < 2:
        raise NotApplicableError("the model has fewer than two top-level modules to compare")
    outputs = {n: seen.outputs[n].rms for n in modules if n in seen.outputs}
    gradients = {n: _norm(seen.gradients, n) for n in modules}
    findings = []
    for name, (value, usual) in _outliers(outputs, FAR).items():
        findings.append(
            Finding(
                check="scales",
                severity="error" if value > FAR * FAR * usual else "warning",
                what=f"the outputs have an rms of {value:.3g}, those of the other modules "
                f"{usual:.3g}",
                where=(name,),
                why="this module dominates the others: the first loss is far too high, and "
                "clipping reduces the gradients of all modules",
                remedy="initialise it small (Xavier with gain 0.1), or put a norm before it",
            )
        )
    for name, (value, usual) in _outliers(gradients, FAR_GRADIENT).items():
        findings.append(
            Finding(
                check="scales",
                severity="warning",
                what=f"the gradient has a norm of {value:.3g}, that of the other modules "
                f"{usual:.3g}",
                where=(name,),
                why="clipping by the global norm reduces the gradients of the others to almost 0",
                remedy="fix the initialisation of the module, or give it its own learning rate",
            )
        )
    return findings


def _norm(gradients: Mapping[str, float | None], name: str) -> float:
    return math.hypot(*(g or 0.0 for key, g in gradients.items() if key.startswith(f"{name}.")))


def _outliers(values: Mapping[str, float], factor: float) -> dict[str, tuple[float, float]]:
    """Returns values more than `factor` times the median of the others, each with that median.

    >>> _outliers({"trunk": 1.0, "neck": 2.0, "head": 400.0}, 100.0)
    {'head': (400.0, 1.5)}
    """
    outliers = {}
    positive = {name: v for name, v in values.items() if 0 < v < math.inf}
    for name, value in positive.items():
        others = [v for n, v in positive.items() if n != name]
        if others and value > factor * (usual := statistics.median(others)):
            outliers[name] = (value, usual)
    return outliers


def check_initialisation(model: nn.Module) -> list[Finding]:
    """Finds linear layers with torch's default initialisation in a model with a custom one.

    The default is U(-b, b) with b = 1/sqrt(fan_in), the result of `kaiming_uniform_(a=sqrt(5))`.
    A model in which half of the layers or more have the default is not reported.

    Raises:
        NotApplicableError: If fewer than two linear layers are large enough to tell.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() >= _ENOUGH
    }
    if len(linears) < 2:
        raise NotApplicableError("fewer than two linear layers are large enough to tell")
    default = {name: m for name, m in linears.items() if is_default(m.weight)}
    custom = {name: m for name, m in linears.items() if name not in default}
    # At some widths another rule has the same bound, so custom layers may look like the default.
    if not default or not custom or len(default) >= len(custom):
        return []
    # Frozen layers were probably loaded, so trainable layers show the intended initialisation.
    reference = [m for m in custom.values() if m.weight.requires_grad] or list(custom.values())
    gain = statistics.median(_rms(m.weight) * math.sqrt(m.in_features) for m in reference)
    return [
        Finding(
            check="initialisation",
            severity="note" if 1 / APART < gain * math.sqrt(3) < APART else "warning",
            what=f"{len(default)} of {len(linears)} linear layers are as torch makes them, "
            f"U(-b, b) with b = 1/sqrt(fan_in), an rms of 0.577/sqrt(fan_in); the others have "
            f"{gain:.3g}/sqrt(fan_in)",
            where=tuple(default),
            why="the custom initialisation skipped these layers, so their scale does not match the "
            "others",
            remedy="initialise these layers like the others, or explicitly as a head, for example "
            "Xavier with gain 0.1",
        )
    ]


def is_default(weight: Tensor) -> bool:
    """Returns whether a weight of shape (out, in) matches torch's default initialisation.

    The largest of n samples is within 10/n of the bound in all but one of 20,000 cases, and the rms
    of a uniform distribution is within 4 standard errors of b/sqrt(3).
    """
    bound = 1 / math.sqrt(weight.shape[1])
    n, largest = weight.numel(), float(weight.detach().abs().max())
    if not bound * (1 - 10 / n) <= largest <= bound * (1 + 1e-6):
        return False
    # The square of a uniform sample has mean b^2/3 and standard deviation b^2 * sqrt(4/45).
    expected = bound**2 / 3
    error = bound**2 * math.sqrt(4 / 45 / n)
    return abs(_rms(weight) ** 2 - expected) <= 4 * error


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())
