"""`stability_callbacks`: the default suite, with options by callback."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lit_stability.callbacks.alerts import Alerts
from lit_stability.callbacks.anomaly_checkpoint import AnomalyCheckpoint
from lit_stability.callbacks.attention_probe import AttentionProbe
from lit_stability.callbacks.auto_rollback import AutoRollback
from lit_stability.callbacks.diagnosis import Diagnosis
from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.last_known_good import LastKnownGood
from lit_stability.callbacks.nonfinite_locator import NonFiniteLocator
from lit_stability.callbacks.precision_fallback import PrecisionFallback
from lit_stability.callbacks.preemption_checkpoint import PreemptionCheckpoint
from lit_stability.callbacks.rank_watchdog import RankWatchdog
from lit_stability.lightning_package import Callback

Options: TypeAlias = Mapping[str, Any] | Callback | Literal[False] | None
"""Options of a callback, the callback itself, False to leave it out, None for its defaults."""

_SUITE: dict[str, tuple[type[Callback], dict[str, Any]]] = {
    "monitor": (GradientMonitor, {}),
    "attention": (AttentionProbe, {"quiet": True}),
    "incident_checkpoint": (AnomalyCheckpoint, {}),
    "locator": (NonFiniteLocator, {}),
    "diagnosis": (Diagnosis, {}),
    "watchdog": (RankWatchdog, {}),
    "good": (LastKnownGood, {}),
    "preemption": (PreemptionCheckpoint, {}),
    "precision": (PrecisionFallback, {}),
    "rollback": (AutoRollback, {}),
}
"""Class and options of each callback, in the order in which they respond."""
_OBSERVERS = ("monitor", "attention", "incident_checkpoint", "locator", "diagnosis")
_MODES = ("protect", "observe")


def stability_callbacks(
    *,
    mode: Literal["protect", "observe"] = "protect",
    directory: str | Path | None = None,
    alerts: Alerts | str | Sequence[str] | None = None,
    monitor: Options = None,
    attention: Options = None,
    incident_checkpoint: Options = None,
    locator: Options = None,
    diagnosis: Options = None,
    watchdog: Options = None,
    good: Options = None,
    preemption: Options = None,
    precision: Options = None,
    rollback: Options = None,
) -> list[Callback]:
    """Returns the default suite, in the order in which the callbacks respond to an incident.

    Each call returns a new list, for one Trainer. Unpack it to add callbacks of your own:
    ``Trainer(callbacks=[*stability_callbacks(), ModelCheckpoint()])``. An `AttentionProbe` of your
    own replaces the one in the list.

    >>> for callback in stability_callbacks():
    ...     print(type(callback).__name__)
    GradientMonitor
    AttentionProbe
    AnomalyCheckpoint
    NonFiniteLocator
    Diagnosis
    RankWatchdog
    LastKnownGood
    PreemptionCheckpoint
    PrecisionFallback
    AutoRollback
    >>> suite = stability_callbacks(rollback=dict(snapshot_every=50), preemption=False)
    >>> len(suite), suite[-1].snapshot_every
    (9, 50)
    >>> [type(each).__name__ for each in stability_callbacks(mode="observe")]
    ['GradientMonitor', 'AttentionProbe', 'AnomalyCheckpoint', 'NonFiniteLocator', 'Diagnosis']

    Args:
        mode: ``"observe"`` returns only those that measure, record and explain: no step, no weight
            and no signal is changed, and nothing ends the fit.
        directory: folder below which each run has a folder for records and checkpoints, instead of
            that of the logger; short for ``monitor=dict(directory=...)``.
        alerts: an `Alerts`, or the targets of one, which is added at the end; None for none.
        monitor: options of `GradientMonitor` as a dict, or one of your own. So it is with the
            others; of these, False leaves one out.
        attention: of `AttentionProbe`.
        incident_checkpoint: of `AnomalyCheckpoint`.
        locator: of `NonFiniteLocator`.
        diagnosis: of `Diagnosis`.
        watchdog: of `RankWatchdog`.
        good: of `LastKnownGood`.
        preemption: of `PreemptionCheckpoint`.
        precision: of `PrecisionFallback`.
        rollback: of `AutoRollback`.

    Raises:
        ValueError: if an option does not exist or is out of its range, if a callback is not of the
            expected class, or if an alert's target cannot be used.
    """
    given: dict[str, Options] = {
        "monitor": monitor,
        "attention": attention,
        "incident_checkpoint": incident_checkpoint,
        "locator": locator,
        "diagnosis": diagnosis,
        "watchdog": watchdog,
        "good": good,
        "preemption": preemption,
        "precision": precision,
        "rollback": rollback,
    }
    if mode not in _MODES:
        raise ValueError(f"mode must be 'protect' or 'observe', got {mode!r}")
    if mode == "observe":
        _check_observers(given)
        given |= {name: False for name in given if name not in _OBSERVERS}
        given["diagnosis"] = _with(given["diagnosis"], "stop_on_certain_cause", False)
    if monitor is False:
        raise ValueError("monitor=False: the other callbacks need a GradientMonitor")
    if directory is not None:
        if isinstance(monitor, Callback):
            raise ValueError(
                f"directory={str(directory)!r} and monitor= were both given: write "
                f"monitor=GradientMonitor(directory={str(directory)!r})"
            )
        given["monitor"] = _with(monitor, "directory", directory)
    suite = [_made(name, options) for name, options in given.items() if options is not False]
    if alerts is None:
        return suite
    return [*suite, alerts if isinstance(alerts, Alerts) else Alerts(alerts)]


def name_in_suite(cls: type[Callback]) -> str | None:
    """Returns the option of `stability_callbacks` for a class, or None if it is not in the suite.

    >>> name_in_suite(AutoRollback)
    'rollback'
    """
    return next((name for name, (each, _) in _SUITE.items() if each is cls), None)


def _check_observers(given: Mapping[str, Options]) -> None:
    acting = [name for name, each in given.items() if each and name not in _OBSERVERS]
    if acting:
        name = acting[0]
        raise ValueError(
            f"{name}= was given with mode='observe', which has no {_SUITE[name][0].__name__}: "
            f"leave it out, or use mode='protect' and {name}="
        )


def _with(options: Options, key: str, value: Any) -> Options:
    """Returns options with one more, unless they have it, or are a callback or False."""
    if isinstance(options, Callback) or options is False:
        return options
    return {key: value, **(options or {})}


def _made(name: str, options: Options) -> Callback:
    cls, defaults = _SUITE[name]
    if isinstance(options, cls):
        return options
    if not (options is None or isinstance(options, Mapping)):
        raise ValueError(
            f"{name} must be a dict of options, a callback of {cls.__name__}, False or None, got "
            f"{options!r}"
        )
    options = dict(options or {})
    known = [*inspect.signature(cls).parameters]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            listed = ", ".join(known) or "none"
            raise ValueError(
                f"{name}=dict({key}=...): {cls.__name__} has no such option; {meant}it has: "
                f"{listed}"
            )
    return cls(**{**defaults, **options})
