"""Examines a loaded checkpoint: measures its tensors and state, and looks for problems.

May import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_stability.checks.checkpoint.measure import measure_tensors
from lit_stability.checks.checkpoint.optimizer_state import measure_moments
from lit_stability.checks.checkpoint.report import HealthReport, RunHealth
from lit_stability.checks.checkpoint.run_findings import moment_findings, run_findings
from lit_stability.checks.checkpoint.tensor_findings import gradient_findings, tensor_findings
from lit_stability.checks.finding import worst_first
from lit_stability.diagnosis.training_phases import PhaseRanges
from lit_stability.measurement.step_stats import GradientDetail

_PLAIN = (bool, int, float, str)


def examine(
    checkpoint: Mapping[str, Any], *, gradients: Sequence[GradientDetail] = ()
) -> HealthReport:
    """Measures a checkpoint and looks for problems, without changing it.

    Args:
        checkpoint: A Lightning checkpoint or a bare state dict, loaded to the CPU.
        gradients: Of the offending step, if the checkpoint is an incident checkpoint.

    Raises:
        ValueError: If it contains no tensor.
    """
    state = state_dict_of(checkpoint)
    run = _run(checkpoint)
    tensors = measure_tensors(state)
    moments = measure_moments(checkpoint.get("optimizer_states", ()), state)
    findings = [
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


def _run(checkpoint: Mapping[str, Any]) -> RunHealth:
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
        scaler=_scaler(checkpoint),
        callbacks=_callbacks(callbacks),
        history=tuple(
            (int(step), float(loss), float(norm))
            for step, loss, norm in _state_of(callbacks, "AnomalyCheckpoint").get("history", ())
        ),
    )


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


def _callbacks(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what this package's callbacks saved, under the names that the report uses."""
    monitor = _state_of(callbacks, "GradientMonitor")
    rollback = _state_of(callbacks, "AutoRollback")
    precision = _state_of(callbacks, "PrecisionFallback")
    entries: dict[str, Any] = {}
    if "incidents" in monitor:
        entries["incidents"] = int(monitor["incidents"])
    if "ladder" in precision:
        names, at = precision["ladder"]["names"], int(precision["ladder"]["at"])
        entries |= {"precision": names[at], "precision of the run": names[0]}
        entries["modules in float32"] = list(precision.get("islands", ()))
    if "ladder" in rollback:
        entries["budget left"] = {str(k): int(n) for k, n in rollback["ladder"]["left"].items()}
    phases = _state_of(callbacks, "GradientFlow").get("phases")
    if phases:
        ranges = PhaseRanges()
        ranges.load_state_dict(phases)
        entries["gradient norms by phase"] = [phase.in_words() for phase in ranges.ranges()]
    if "throttle" in rollback:
        entries["learning-rate factor"] = float(rollback["throttle"]["lr_factor"])
        entries["clip factor"] = float(rollback["throttle"]["clip_factor"])
    return entries
