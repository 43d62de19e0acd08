"""Finds problems in the optimizer state, the learning rates, the loss scaler, and the run.

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
"""Tolerated factor above the bound on ``|m| / sqrt(v)``, for rounding and scheduled betas."""
LOWEST_SCALE = 2.0**-10
"""Loss scale below which no training is known to work: gradients that still overflow exceed 6e7."""


def moment_findings(moments: Sequence[MomentHealth]) -> list[Finding]:
    """Returns the findings on the optimizer state.

    Args:
        moments: The measured state.
    """
    return [*_damaged(moments), *_impossible(moments), *_idle(moments), *_unnamed(moments)]


def run_findings(run: RunHealth, moments: Sequence[MomentHealth]) -> list[Finding]:
    """Returns the findings on learning rates, loss scaler, and this package's callbacks.

    Args:
        run: Of the checkpoint.
        moments: The measured state; gives the formats that the optimizer computes in.
    """
    return [
        *_untrained(run),
        *_rates(run),
        *_epsilon(run, moments),
        *_scaler(run),
        *_past(run),
        *_budget(run),
    ]


def _untrained(run: RunHealth) -> Iterable[Finding]:
    if run.global_step == 0:
        yield Finding(
            severity="warning",
            what="untrained",
            where=("run",),
            why="the checkpoint is of step 0, before the first update: these are the weights that "
            "the fit began with",
            remedy="to judge what training made of them, give a later checkpoint",
        )


def _damaged(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    bad = [moment for moment in moments if moment.non_finite]
    if bad:
        keys = ", ".join(dict.fromkeys(key for moment in bad for key in moment.non_finite))
        yield Finding(
            severity="error",
            what="non-finite moment",
            where=tuple(moment.name for moment in bad),
            why=f"NaN or Inf in {keys}: the next update makes the weights non-finite",
            remedy="resume from an earlier checkpoint, or with a new optimizer state",
        )
    negative = [moment for moment in moments if moment.negative]
    if negative:
        yield Finding(
            severity="error",
            what="negative second moment",
            where=tuple(moment.name for moment in negative),
            why="a mean of squares cannot be negative; its square root in the next update is NaN",
            remedy="resume from an earlier checkpoint, or with a new optimizer state",
        )


def _impossible(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    """Finds second moments that are smaller than the betas allow for the first moment."""
    over = [
        (moment.ratio / moment.ratio_bound, moment)
        for moment in moments
        if moment.ratio is not None and moment.ratio_bound and not moment.negative
    ]
    over = [pair for pair in over if pair[0] > RATIO_SLACK]
    if over:
        over.sort(key=lambda pair: -pair[0])
        ratio, bound = over[0][1].ratio, over[0][1].ratio_bound
        yield Finding(
            severity="error",
            what="damaged second moment",
            where=tuple(moment.name for _, moment in over),
            why=f"|exp_avg| / sqrt(exp_avg_sq) is up to {ratio:.3g}, but gradients can make it at "
            f"most {bound:.3g}: the second moment was zeroed or overwritten, and the next update "
            "would be too large by that factor",
            remedy="resume from an earlier checkpoint, or with a new optimizer state and a warm-up",
        )


def _idle(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    """Finds parameters that never got a gradient, or got one in fewer steps than others."""
    idle = [
        moment
        for moment in moments
        if moment.step != 0 and moment.norms and not any(moment.norms.values()) and moment.elements
    ]
    if idle:
        yield Finding(
            severity="warning",
            what="no gradient",
            where=tuple(moment.name for moment in idle),
            why="all moments are exactly 0, so the gradient was 0 in every step of the optimizer",
            remedy="check that its output reaches the loss; if it should not train, use "
            "requires_grad_(False)",
        )
    for optimizer in sorted({moment.optimizer for moment in moments}):
        counted = [moment for moment in moments if moment.optimizer == optimizer and moment.step]
        most = max((moment.step or 0.0 for moment in counted), default=0.0)
        fewer = [moment for moment in counted if moment.step != most]
        if fewer:
            least = min(moment.step or 0.0 for moment in fewer)
            yield Finding(
                severity="note",
                what="fewer updates",
                where=tuple(moment.name for moment in fewer),
                why=f"from {least:g} of {most:g} updates; the other steps had no gradient",
                remedy="nothing, if they were frozen or unused for some time",
            )


def _unnamed(moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    unnamed = tuple(moment.name for moment in moments if moment.name.startswith("unnamed "))
    if unnamed:
        yield Finding(
            severity="note",
            what="unnamed moments",
            where=unnamed,
            why="a checkpoint numbers the optimizer's parameters without names, and more than one "
            "assignment fits these shapes",
            remedy="pass named_parameters() to the optimizer; it then saves the names",
        )


def _rates(run: RunHealth) -> Iterable[Finding]:
    groups = [(group["where"], group.get("lr")) for group in run.groups]
    rates = [(where, float(rate)) for where, rate in groups if isinstance(rate, (int, float))]
    bad = [(where, rate) for where, rate in rates if not isfinite(rate) or rate < 0]
    if bad:
        yield Finding(
            severity="error",
            what="impossible learning rate",
            where=tuple(where for where, _ in bad),
            why=f"the learning rate is {bad[0][1]}",
            remedy="check the scheduler; set the learning rate explicitly when you resume",
        )
    if rates and not any(rate for _, rate in rates):
        yield Finding(
            severity="note",
            what="learning rate of zero",
            where=tuple(where for where, _ in rates),
            why="the next step changes nothing; usual at the end of a schedule, or before its "
            "start",
            remedy="to continue training, give the scheduler more steps",
        )


def _epsilon(run: RunHealth, moments: Sequence[MomentHealth]) -> Iterable[Finding]:
    """Finds an epsilon of Adam that its format rounds to 0; see `measurement.float_formats`."""
    epsilon = {
        (group["optimizer"], index): group["eps"]
        for group in run.groups
        for index in group["params"]
        # A fused optimizer computes in float32, whatever the format of its state.
        if isinstance(group.get("eps"), float) and not group.get("fused")
    }
    vanished = []
    for moment in moments:
        number_format = FORMATS.get(moment.dtypes.get("exp_avg_sq", ""))
        eps = epsilon.get((moment.optimizer, moment.index))
        if number_format is not None and eps is not None and number_format.vanishes(eps):
            vanished.append((moment.name, f"eps={eps:g} is 0 in {number_format.name}"))
    if vanished:
        yield Finding(
            severity="warning",
            what="vanished epsilon",
            where=tuple(name for name, _ in vanished),
            why=f"{vanished[0][1]}, the format the optimizer computes in: where a second moment is "
            "0 too, the update is 0 / 0 or x / 0",
            remedy="train in 16-mixed, which keeps weights in float32, or set eps=1e-4",
        )


def _scaler(run: RunHealth) -> Iterable[Finding]:
    scale = run.scaler.get("scale")
    if scale is not None and not LOWEST_SCALE <= scale < float("inf"):
        yield Finding(
            severity="error",
            what="loss-scale collapse",
            where=("loss scaler",),
            why=f"the loss scale is {scale:g}, because every overflow halves it; below "
            f"{LOWEST_SCALE:g} every step is skipped or its gradients are 0",
            remedy="resume in bf16-mixed or 32-true from an earlier checkpoint, and look for NaN, "
            "which no loss scale prevents",
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
                remedy="read incidents.jsonl of the run: it records what was detected and done",
            )


def _budget(run: RunHealth) -> Iterable[Finding]:
    state = run.callbacks
    spent = [sort for sort, left in state.get("budget left", {}).items() if left <= 0]
    if spent:
        yield Finding(
            severity="warning",
            what="budget spent",
            where=tuple(spent),
            why="AutoRollback has used up these responses; the next anomaly that needs one stops "
            "the run",
            remedy="find the cause in incidents.jsonl before you resume",
        )
    changed = [
        f"{name} is {state[name]:g}"
        for name in ("learning-rate factor", "clip factor")
        if state.get(name, 1.0) != 1.0
    ]
    if state.get("precision") != state.get("precision of the run"):
        changed.append(f"precision is {state['precision']}")
    if state.get("modules in float32"):
        changed.append("modules compute in float32: " + ", ".join(state["modules in float32"]))
    if changed or state.get("incidents"):
        yield Finding(
            severity="note",
            what="incidents",
            where=("run",),
            why="; ".join([f"{state.get('incidents', 0)} so far", *changed]),
            remedy="nothing; a resume restores these settings",
        )
