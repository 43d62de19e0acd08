"""Examines a loaded checkpoint: measures its tensors and state, and looks for problems.

May import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from lit_stability.checks.checkpoint.measure import measure_tensors
from lit_stability.checks.checkpoint.optimizer_state import measure_moments
from lit_stability.checks.checkpoint.report import HealthReport, RunHealth
from lit_stability.checks.checkpoint.run_findings import moment_findings, run_findings
from lit_stability.checks.checkpoint.structure import file_findings, structure_findings, well_formed
from lit_stability.checks.checkpoint.tensor_findings import gradient_findings, tensor_findings
from lit_stability.checks.finding import worst_first
from lit_stability.diagnosis.training_phases import PhaseRanges
from lit_stability.measurement.step_stats import GradientDetail

_T = TypeVar("_T")
_PLAIN = (bool, int, float, str)


def examine(
    checkpoint: Mapping[str, Any],
    *,
    gradients: Sequence[GradientDetail] = (),
    damage: str | None = None,
) -> HealthReport:
    """Measures a checkpoint and looks for problems, without changing it.

    Args:
        checkpoint: A Lightning checkpoint or a bare state dict, loaded to the CPU.
        gradients: Of the offending step, if the checkpoint is an incident checkpoint.
        damage: What is wrong with the file that it was loaded from, if anything.

    Raises:
        ValueError: If it contains no tensor.
    """
    state = state_dict_of(checkpoint)
    checkpoint, problems = well_formed(checkpoint)
    run = _run(checkpoint, problems)
    tensors = measure_tensors(state)
    moments = measure_moments(checkpoint.get("optimizer_states", ()), state)
    findings = [
        *file_findings(damage),
        *structure_findings(problems),
        *tensor_findings(tensors, trained=run.trained),
        *gradient_findings(gradients),
        *moment_findings(moments),
        *run_findings(run, moments),
    ]
    report = HealthReport(run=run, tensors=tensors, moments=moments, gradients=tuple(gradients))
    return replace(report, findings=tuple(worst_first(findings)))


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of the model in a checkpoint.

    Args:
        checkpoint: A Lightning checkpoint, another one with the key ``state_dict``, ``model`` or
            ``model_state_dict``, or a bare state dict.

    Raises:
        ValueError: If it contains no tensor.
    """
    keys = [k for k in ("state_dict", "model_state_dict", "model") if k in checkpoint]
    inner: Any = next((checkpoint[k] for k in keys if isinstance(checkpoint[k], Mapping)), None)
    state = checkpoint if inner is None else inner
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"no tensor among the keys {sorted(map(str, state))[:8]}; give a Lightning checkpoint "
            "or a state dict"
        )
    return tensors


def _run(checkpoint: Mapping[str, Any], problems: list[str]) -> RunHealth:
    version = checkpoint.get("pytorch-lightning_version")
    if version is None and "optimizer_states" not in checkpoint:
        return RunHealth()
    callbacks = checkpoint.get("callbacks", {})
    return RunHealth(
        source=f"a checkpoint of lightning {version or 'unknown'}",
        epoch=checkpoint.get("epoch"),
        global_step=checkpoint.get("global_step"),
        groups=tuple(_groups(checkpoint.get("optimizer_states", ()))),
        schedulers=tuple(_plain(state) for state in checkpoint.get("lr_schedulers", ())),
        scaler=_read(_scaler, checkpoint, "the state of the loss scaler", problems) or {},
        callbacks=_callbacks(callbacks, problems),
        history=_read(_history, callbacks, "the state of AnomalyCheckpoint", problems) or (),
    )


def _read(reader: Callable[[Any], _T], state: Any, what: str, problems: list[str]) -> _T | None:
    """Returns what a reader finds in a state; None if the state is malformed, which is noted."""
    try:
        return reader(state)
    except Exception as error:  # the state of another version, or of another class of this name
        problems.append(f"{what} ({type(error).__name__}: {error})")
        return None


def _groups(optimizers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.get("param_groups", ())):
            rate = group.get("lr")
            numbers = {"lr": float(rate)} if isinstance(rate, Tensor) else {}
            place = {"where": f"optimizer {number}, group {index}", "optimizer": number}
            rest = {"params": list(group.get("params", ())), "betas": group.get("betas")}
            groups.append(_plain(group) | numbers | rest | place)
    return groups


def _plain(state: Any) -> dict[str, Any]:
    """Returns the entries of a state that are numbers, strings, or lists of them."""
    if not isinstance(state, Mapping):
        return {}
    return {
        str(key): list(value) if isinstance(value, (list, tuple)) else value
        for key, value in state.items()
        if isinstance(value, _PLAIN)
        or (isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value))
    }


def _scaler(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Returns the loss scaler's state, which Lightning saves under the class name of its plugin."""
    for value in checkpoint.values():
        if isinstance(value, Mapping) and {"scale", "growth_factor"} <= set(value):
            return {str(k): float(v) for k, v in value.items() if not isinstance(v, str)}
    return {}


def _state_of(callbacks: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the state of a callback by its class name; a state key may also contain options."""
    for key, state in callbacks.items():
        if str(key).split("{")[0] == name and isinstance(state, Mapping):
            return state
    return {}


def _history(callbacks: Mapping[str, Any]) -> tuple[tuple[int, float, float], ...]:
    """Returns step, loss and gradient norm of the recent steps."""
    history = _state_of(callbacks, "AnomalyCheckpoint").get("history", ())
    return tuple((int(step), float(loss), float(norm)) for step, loss, norm in history)


def _callbacks(callbacks: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns what this package's callbacks saved, under the names that the report uses."""
    entries: dict[str, Any] = {}
    for name, reader in _READERS.items():
        state = _state_of(callbacks, name)
        entries |= _read(reader, state, f"the state of {name}", problems) or {}
    return entries


def _monitor(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"incidents": int(state["incidents"])} if "incidents" in state else {}


def _precision(state: Mapping[str, Any]) -> dict[str, Any]:
    if "ladder" not in state:
        return {}
    names, at = [str(name) for name in state["ladder"]["names"]], int(state["ladder"]["at"])
    return {
        "precision": names[at],
        "precision of the run": names[0],
        "modules in float32": [str(name) for name in state.get("islands", ())],
    }


def _rollback(state: Mapping[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if "ladder" in state:
        entries["budget left"] = {str(k): int(n) for k, n in state["ladder"]["left"].items()}
    if "throttle" in state:
        entries["learning-rate factor"] = float(state["throttle"]["lr_factor"])
        entries["clip factor"] = float(state["throttle"]["clip_factor"])
    return entries


def _phases(state: Mapping[str, Any]) -> dict[str, Any]:
    if not state.get("phases"):
        return {}
    ranges = PhaseRanges()
    ranges.load_state_dict(state["phases"])
    return {"gradient norms by phase": [phase.in_words() for phase in ranges.ranges()]}


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "GradientMonitor": _monitor,
    "PrecisionFallback": _precision,
    "AutoRollback": _rollback,
    "GradientFlow": _phases,
}
