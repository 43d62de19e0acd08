"""What is wrong with the optimizer's state, learning rates, the loss scaler, and the run.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from lit_stability.checks.checkpoint.report import MomentHealth, RunHealth
from lit_stability.checks.checkpoint.tensor_findings import LARGE_GRADIENT
from lit_stability.checks.finding import Finding
from lit_stability.measurement.float_formats import FORMATS

RATIO_SLACK = 10.0
"""Times the bound on ``|m| / sqrt(v)``: rounding, and betas that a schedule has moved since."""
LOWEST_SCALE = 2.0**-10
"""Loss scale under which no training is known to work: what still overflows is above 6e7."""


def moment_findings(moments: Sequence[MomentHealth]) -> list[Finding]:
    """Look at the optimizer's state.

    Args:
        moments: measured.
    """
    return [*_damaged(moments), *_impossible(moments), *_idle(moments), *_unnamed(moments)]


def run_findings(run: RunHealth, moments: Sequence[MomentHealth]) -> list[Finding]:
    """Look at learning rates, the loss scaler, and what this package's callbacks have saved.

    Args:
        run: of the checkpoint.
        moments: measured; for the formats that the optimizer computes in.
    """
    return [*_rates(run), *_epsilon(run, moments), *_scaler(run), *_past(run), *_budget(run)]


def _damaged(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    bad = [each for each in moments if each.non_finite]
    if bad:
        keys = ", ".join(dict.fromkeys(key for each in bad for key in each.non_finite))
        yield Finding(
            severity="error",
            what="non-finite moment",
            where=tuple(each.name for each in bad),
            why=f"NaN or Inf in {keys}: the next update carries it into the weights",
            remedy="go on from an earlier checkpoint, or with a new optimizer state",
        )
    negative = [each for each in moments if each.negative]
    if negative:
        yield Finding(
            severity="error",
            what="negative second moment",
            where=tuple(each.name for each in negative),
            why="a mean of squares cannot be below zero; its root in the next update is NaN",
            remedy="go on from an earlier checkpoint, or with a new optimizer state",
        )


def _impossible(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    """The second moment too small for the first: a bound that betas alone set."""
    over = [
        (each.ratio / each.ratio_bound, each)
        for each in moments
        if each.ratio is not None and each.ratio_bound and not each.negative
    ]
    over = [pair for pair in over if pair[0] > RATIO_SLACK]
    if over:
        over.sort(key=lambda pair: -pair[0])
        ratio, bound = over[0][1].ratio, over[0][1].ratio_bound
        yield Finding(
            severity="error",
            what="damaged second moment",
            where=tuple(each.name for _, each in over),
            why=f"|exp_avg| / sqrt(exp_avg_sq) is up to {ratio:.3g}, and no gradients whatever "
            "take "
            f"it beyond {bound:.3g}: the second moment was zeroed or overwritten, and the next "
            "update would be that much too large",
            remedy="go on from an earlier checkpoint, or with a new optimizer state and a warm-up",
        )


def _idle(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    idle = [
        each
        for each in moments
        if each.step != 0 and each.norms and not any(each.norms.values()) and each.elements
    ]
    if idle:
        yield Finding(
            severity="warning",
            what="no gradient",
            where=tuple(each.name for each in idle),
            why="all moments are exactly 0: in every step that the optimizer took for it the "
            "gradient "
            "was",
            remedy="see whether its output reaches the loss; requires_grad_(False) if it is not "
            "meant to",
        )
    for optimizer in sorted({each.optimizer for each in moments}):
        counted = [each for each in moments if each.optimizer == optimizer and each.step]
        most = max((each.step or 0.0 for each in counted), default=0.0)
        fewer = [each for each in counted if each.step != most]
        if fewer:
            least = min(each.step or 0.0 for each in fewer)
            yield Finding(
                severity="note",
                what="fewer updates",
                where=tuple(each.name for each in fewer),
                why=f"from {least:g} of {most:g}: in the other steps there was no gradient",
                remedy="nothing, if they were frozen or unused for a while",
            )


def _unnamed(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    unnamed = tuple(each.name for each in moments if each.name.startswith("unnamed "))
    if unnamed:
        yield Finding(
            severity="note",
            what="unnamed moments",
            where=unnamed,
            why="a checkpoint counts the optimizer's parameters without naming them, and more "
            "than one "
            "order fits these shapes",
            remedy="give the optimizer named_parameters(): it stores the names then",
        )


def _rates(run: RunHealth) -> Iterable[Finding]:
    rates = [(group["where"], group.get("lr")) for group in run.groups]
    told = [(where, float(rate)) for where, rate in rates if isinstance(rate, (int, float))]
    bad = [(where, rate) for where, rate in told if not isfinite(rate) or rate < 0]
    if bad:
        yield Finding(
            severity="error",
            what="impossible learning rate",
            where=tuple(where for where, _ in bad),
            why=f"the learning rate is {bad[0][1]}",
            remedy="look at the scheduler; set the learning rate anew when going on",
        )
    if told and not any(rate for _, rate in told):
        yield Finding(
            severity="note",
            what="learning rate of zero",
            where=tuple(where for where, _ in told),
            why="a step from here moves nothing: usual at the end of a schedule, or before its "
            "start",
            remedy="to go on, give the scheduler more steps",
        )


def _epsilon(run: RunHealth, moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    """Adam's epsilon where its format makes 0 of it; see `measurement.float_formats`."""
    epsilon = {
        (group["optimizer"], index): group["eps"]
        for group in run.groups
        for index in group["params"]
        # A fused one computes in float32, whatever it stores.
        if isinstance(group.get("eps"), float) and not group.get("fused")
    }
    lost = []
    for each in moments:
        kept = FORMATS.get(each.dtypes.get("exp_avg_sq", ""))
        eps = epsilon.get((each.optimizer, each.index))
        if kept is not None and eps is not None and kept.vanishes(eps):
            lost.append((each.name, f"eps={eps:g} is 0 in {kept.name}"))
    if lost:
        yield Finding(
            severity="warning",
            what="vanished epsilon",
            where=tuple(name for name, _ in lost),
            why=f"{lost[0][1]}, in which the optimizer computes: where a second moment is 0 too, "
            "the "
            "update is 0 / 0 or x / 0",
            remedy="train in 16-mixed, with weights in float32, or set eps=1e-4",
        )


def _scaler(run: RunHealth) -> Iterable[Finding]:
    scale = run.scaler.get("scale")
    if scale is not None and not LOWEST_SCALE <= scale < float("inf"):
        yield Finding(
            severity="error",
            what="loss-scale collapse",
            where=("loss scaler",),
            why=f"the loss scale is {scale:g}: it was halved at overflow after overflow, and under "
            f"{LOWEST_SCALE:g} every step is left out or its gradients are 0",
            remedy="go on in bf16-mixed or 32-true from before, and look for NaN, which no scale "
            "cures",
        )


def _past(run: RunHealth) -> Iterable[Finding]:
    bad = [step for step, loss, norm in run.history if not (isfinite(loss) and isfinite(norm))]
    large = [step for step, _, norm in run.history if isfinite(norm) and norm > LARGE_GRADIENT]
    for steps, what, severity in (
        (bad, "non-finite step", "note"),
        (large, "large gradient", "warning"),
    ):
        if steps:
            yield Finding(
                severity=severity,  # type: ignore[arg-type]
                what=what,
                where=tuple(f"step {step}" for step in steps),
                why=f"{len(steps)} of the last {len(run.history)} steps had "
                + (
                    "a loss or gradient norm that is NaN or Inf"
                    if what == "non-finite step"
                    else f"a gradient norm above {LARGE_GRADIENT:g}, before clipping"
                ),
                remedy="read incidents.jsonl of the run: what was found, and what was done",
            )


def _budget(run: RunHealth) -> Iterable[Finding]:
    state = run.callbacks
    spent = [sort for sort, left in state.get("budget left", {}).items() if left <= 0]
    if spent:
        yield Finding(
            severity="warning",
            what="budget spent",
            where=tuple(spent),
            why="AutoRollback has none of these responses left, and the next anomaly that needs "
            "one "
            "stops the run",
            remedy="find the cause in incidents.jsonl before going on",
        )
    changed = [
        f"{name} is {state[name]:g}"
        for name in ("learning-rate factor", "clip factor")
        if state.get(name, 1.0) != 1.0
    ]
    if state.get("precision") != state.get("precision of the run"):
        changed.append(f"precision is {state['precision']}")
    if state.get("float32 islands"):
        changed.append("modules compute in float32: " + ", ".join(state["float32 islands"]))
    if changed or state.get("incidents"):
        yield Finding(
            severity="note",
            what="incidents",
            where=("run",),
            why="; ".join([f"{state.get('incidents', 0)} so far", *changed]),
            remedy="nothing: what is in force is restored on resume",
        )
