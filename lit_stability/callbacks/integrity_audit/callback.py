"""`IntegrityAudit`: finds silent data corruption by running healthy steps again."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.integrity_audit.finding import Finding, RankReport
from lit_stability.callbacks.integrity_audit.ledger import AUDITS, RERUN, WRONG, Ledger
from lit_stability.callbacks.integrity_audit.replicas import GRADIENT, ReplicaCheck
from lit_stability.callbacks.integrity_audit.step_check import StepCheck
from lit_stability.callbacks.requirements import gather_of, require_monitor
from lit_stability.detectors.anomaly import require
from lit_stability.detectors.silent_corruption import STATE, STEP, reading
from lit_stability.distributed.dtensor import shard_place
from lit_stability.incidents.log import append_lines
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.bit_patterns import Difference, RestGuard, checksums
from lit_stability.measurement.majority import Majority
from lit_stability.measurement.step_stats import ProbeReading
from lit_stability.outside import guarded
from lit_stability.trainer_internals import (
    StepRecording,
    adapter_of,
    run_directory,
    sharing,
    why_not_recorded,
)
from lit_stability.training_state.update_rerun import UpdateRerun, why_no_update_rerun

log = suite_logger()

NAME = "integrity.jsonl"
"""Name of the ledger's file in the folder of a run."""
_CALIBRATION = 3
"""First steps of a fit that are audited to learn how exactly a step repeats itself."""

_NEVER = 2**62


class IntegrityAudit(StabilityCallback):
    """Finds silent data corruption: on one step in ``every``, recomputes the step and compares.

    In an audited step:

    * forward and backward pass are run again from the recorded start, in copies and with the same
      random numbers, and loss and gradients are compared to the bit. If they differ, a third run
      decides by majority. If training was wrong, an `Incident` opens before the update, so that
      `AutoRollback` retries the step; if a rerun was wrong, it is logged;
    * the update is computed again in copies, and weights and moments are compared to the bit;
    * between these computations, and until the next step, no bit of a weight, a moment or a
      gradient may change in memory;
    * ranks that hold the same weights compare checksums of weights and averaged gradients: under
      DDP all ranks, under FSDP2 with a two-dimensional mesh those that replicate a shard.

    The first three steps of a fit are audited too. They learn how exactly a step repeats itself:
    where kernels are not deterministic, or the program's ``training_step`` depends on something
    that a rerun does not restore, differences up to ten times the largest seen are tolerated from
    then on. It is logged how much that hides.

    What it cannot see: faults in steps that are not audited, unless they persist; a defect that
    gives the same wrong result each time on the same device; a weight that was wrong before the
    recorded start, which is equal in the reruns (`WeightCorruption` and checksums of replicas are
    for these); several bits that change in memory at once, as programs write weights too. See
    ``docs/integrity.md``.

    A ``training_step`` is run again twice or more, so it must have no effects outside of the
    module, such as steps of an environment. In manual optimization, with LBFGS and with sharded
    weights it is not run again; updates of classes other than torch's are not either. The fit logs
    which checks it has.

    Each finding is a line in ``integrity.jsonl`` in the folder of the run, with rank, host and
    device. The counts are kept in checkpoints and survive a restart; see `suspects`.

    Memory on audited steps: weights and gradients twice more, three times in a second rerun; then
    weights and moments once more. If that is not there, steps are not run again from then on.

    >>> from lit_stability import stability_callbacks
    >>> callbacks = [*stability_callbacks(), IntegrityAudit(every=500)]

    Args:
        every: optimizer steps (Lightning's ``global_step``) between audits.

    Raises:
        ValueError: if ``every`` is less than 1; at `setup` without a `GradientMonitor` before it.
    """

    ignores_skipped_steps = True

    def __init__(self, every: int = 1000) -> None:
        require(every >= 1, "every", every, "at least 1")
        self.every = every
        self._ledger = Ledger()
        self._reset()

    def _reset(self) -> None:
        self._due = 0
        """Step from which on the next audit is due."""
        self._opened = self._reports = False
        self._step = 0
        """The step that is, or was last, audited."""
        self._obstacle: str | None = None
        self._check = StepCheck(_CALIBRATION)
        self._replicas = ReplicaCheck()
        self._updates_known = 0
        """Audited updates that had no difference; a check that never had one is not trusted."""
        self._update_obstacle: str | None = None
        self._recording: StepRecording | None = None
        self._updates: list[UpdateRerun] = []
        self._guard = RestGuard()
        self._pending: list[Finding] = []
        self._names: dict[int, str] = {}
        self._place = ""

    def _outside_a_fit(self) -> dict[str, Any]:
        fresh = IntegrityAudit(self.every)
        return {n: v for n, v in vars(fresh).items() if n not in ("every", "_ledger")}

    def suspects(self) -> list[tuple[str, int]]:
        """Returns ranks with host and device, and how often they were wrong, worst first."""
        return self._ledger.suspects()

    @property
    def audits(self) -> int:
        """Audits so far, summed over the ranks."""
        return sum(own.get(AUDITS, 0) for own in self._ledger.counts.values())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a trainer without a `GradientMonitor` before this callback."""
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out what can be checked in this fit, and logs what cannot."""
        self._close()
        self._reset()
        self._due = trainer.global_step
        self._place = f"rank {trainer.global_rank} on {socket.gethostname()} ({_device(trainer)})"
        adapter = adapter_of(trainer)
        unsupported = adapter.sharing == "untried" or not adapter.can_measure()
        if unsupported or not adapter.trains_own_tensors:
            self._due = _NEVER
            why = adapter.why_unsupported or "its optimizers train other tensors than the module's"
            name = type(trainer.strategy).__name__
            log.warning("IntegrityAudit does nothing under %s: %s", name, why)
            return
        self._obstacle = why_not_recorded(trainer, pl_module)
        reasons = (why_no_update_rerun(optimizer) for optimizer in trainer.optimizers)
        self._update_obstacle = next((reason for reason in reasons if reason is not None), None)
        if trainer.is_global_zero:
            self._log_obstacles()

    def _log_obstacles(self) -> None:
        left = "memory and replicas" if self._update_obstacle else "updates, memory and replicas"
        if self._obstacle is not None:
            log.warning("IntegrityAudit runs no step again: %s; it checks %s", self._obstacle, left)
        if self._update_obstacle is not None:
            log.warning("IntegrityAudit computes no update again: %s", self._update_obstacle)

    def startup_text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Returns how often steps are audited."""
        return f"one step in {self.every} is audited for silent data corruption"

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the last audit, and begins one if it is due."""
        step = trainer.global_step
        if step < self._due and not self._opened:
            return
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches:
            return
        if self._opened:
            self._end()
        if step >= self._due:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._opened, self._step = True, trainer.global_step
        calibrating = self._check.calibration > 1 and self._obstacle is None
        every = self.every
        self._due = self._step + 1 if calibrating else (self._step // every + 1) * every
        named = dict(pl_module.named_parameters())
        self._names = {id(p): name for name, p in named.items()}
        self._guard.record(_at_rest(trainer, named))
        if self._obstacle is None:
            self._recording = StepRecording(trainer, pl_module)
        if self._update_obstacle is None:
            self._updates = [
                UpdateRerun(
                    optimizer,
                    self._names,
                    before=lambda: self._checked_memory("before the update"),
                    after=lambda found: self._updated(trainer, named, found),
                )
                for optimizer in trainer.optimizers
            ]

    def _end(self) -> None:
        """Ends an audit at the start of the next step, whose report has what came after it."""
        self._checked_memory("after the update")
        self._close()
        self._reports = True

    def _close(self) -> None:
        """Removes everything that an audit has attached, and releases its copies."""
        if self._recording is not None:
            self._recording.stop()
        for update in self._updates:
            update.remove()
        self._recording, self._updates, self._opened = None, [], False
        self._guard.forget()

    def _checked_memory(self, when: str, since: int | None = None) -> None:
        since = self._step if since is None else since
        for name, bit in self._guard.check():
            text = f"bit {bit} of {name} flipped in memory {when}"
            self._pending.append(Finding(name, text, since, state=True))

    def _updated(
        self,
        trainer: Trainer,
        named: Mapping[str, Tensor],
        found: list[tuple[Majority, Difference]],
    ) -> None:
        """Keeps what was wrong in an update, for the report of the next step."""
        wrong = [each for verdict, each in found if verdict == "training"]
        reruns = [each for verdict, each in found if verdict == "rerun"]
        if wrong and not self._updates_known:
            self._update_obstacle = f"reruns of the first update give another {wrong[0].name}"
            log.warning("IntegrityAudit computes no update again: %s", self._update_obstacle)
        elif wrong:
            text = f"the update of {wrong[0].text()} differs from two reruns, which agree"
            self._pending.append(Finding(wrong[0].name, text, self._step, state=True))
        elif reruns:
            text = f"{reruns[0].text()} differs in a rerun of the update, not in training"
            self._pending.append(Finding(reruns[0].name, text, self._step, harmless=True))
        else:
            self._updates_known += 1
        self._guard.record(_at_rest(trainer, named))

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | None:
        """Returns what is wrong in this step or since the last audit; on all ranks or on none."""
        audited = self._opened and self._step == trainer.global_step
        if not audited and not self._reports:
            return None
        self._reports = False
        own = self._report(trainer, pl_module, audited)
        reports = gather_of(trainer)(own)
        off = next((report.off for report in reports if report.off is not None), None)
        if off is not None and self._obstacle is None:
            self._obstacle = off
            if trainer.is_global_zero:
                self._log_obstacles()
        return self._readings(trainer, reports)

    def _report(self, trainer: Trainer, pl_module: LightningModule, audited: bool) -> RankReport:
        report = RankReport(self._place, audited)
        if audited:
            # A snapshot of the start of this step may have been copied after that.
            self._checked_memory("before the gradients", since=max(0, self._step - 1))
            self._audit_step(trainer, pl_module, report)
            self._audit_memory(trainer, pl_module, report)
        found = {(each.tensor, each.state): each for each in (*self._pending, *report.findings)}
        report.findings, self._pending = list(found.values()), []
        return report

    def _audit_step(self, trainer: Trainer, pl_module: LightningModule, report: RankReport) -> None:
        """Runs the step again, on all ranks or on none: it may contain collectives."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        recording.stop()
        gather = gather_of(trainer)
        if any(gather(recording.obstacle)):
            report.off = recording.obstacle
            return
        try:
            report.findings += self._check.findings(trainer, pl_module, recording, gather)
        except Exception as error:  # an audit never ends the run
            report.off = f"{type(error).__name__}: {error}"
        report.off = report.off or recording.obstacle

    def _audit_memory(
        self, trainer: Trainer, pl_module: LightningModule, report: RankReport
    ) -> None:
        named = dict(pl_module.named_parameters())
        grads = {f"{GRADIENT}{n}": p.grad for n, p in named.items() if p.grad is not None}
        plain = {name: grad for name, grad in grads.items() if not grad.is_sparse}
        if sharing(trainer) != "alone":
            shared = {**named, **plain}
            report.group = _replica_group(named)
            report.checksums = dict(zip(shared, checksums(list(shared.values())), strict=True))
        self._guard.record({**_at_rest(trainer, named), **plain})

    def _readings(self, trainer: Trainer, reports: list[RankReport]) -> list[ProbeReading]:
        """Counts and records what all ranks have found; returns what training must react to."""
        by_rank = {rank: list(report.findings) for rank, report in enumerate(reports)}
        if all(report.audited for report in reports):
            for rank, found in self._replicas.findings(reports, trainer.global_step).items():
                by_rank[rank] += found
        readings, rows = [], []
        for rank, report in enumerate(reports):
            if report.audited:
                self._ledger.count(report.place, AUDITS)
            for finding in by_rank[rank]:
                row = self._count(trainer, report.place, finding)
                rows.append(row)
                if not finding.harmless:
                    quantity = STATE if finding.state else STEP
                    again = f", finding {row['count']} there" if row["count"] > 1 else ""
                    text = f"{finding.text}, on {report.place}{again}"
                    readings.append(reading(quantity, finding.tensor, text, finding.step))
        if readings:
            self._due = trainer.global_step
        self._write(trainer, rows)
        return readings

    def _count(self, trainer: Trainer, place: str, finding: Finding) -> dict[str, Any]:
        what = RERUN if finding.harmless else WRONG
        count = self._ledger.count(place, what)
        if trainer.is_global_zero and finding.harmless:
            log.warning(
                "step %d: %s: %s; training is confirmed, check that device",
                *(finding.step, place, finding.text),
            )
        return {
            **{"step": finding.step, "place": place, "what": what, "count": count},
            **{"tensor": finding.tensor, "text": finding.text, "state": finding.state},
        }

    def _write(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        folder = run_directory(trainer)
        if folder is not None and trainer.is_global_zero:
            guarded(self, f"{NAME} cannot be written", lambda: append_lines(folder / NAME, rows))

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the audit in progress: its weights are no longer those of the run."""
        self._close()
        self._pending = []

    def on_precision_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns again how exactly a step repeats itself."""
        self._close()
        self._pending = []
        self._check = StepCheck(_CALIBRATION)
        self._due = min(self._due, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports what the last audit has found after its update."""
        if self._opened:
            self._end()
        if self._reports:
            self._reports = False
            own = self._report(trainer, pl_module, audited=False)
            for each in self._readings(trainer, gather_of(trainer)(own)):
                if trainer.is_global_zero:
                    log.warning("after the last step: %s", each.where.partition("\n")[2])
        suspects = self.suspects()
        if suspects and trainer.is_global_zero:
            shown = ", ".join(f"{place}: {count}" for place, count in suspects[:5])
            log.warning("IntegrityAudit has findings of silent data corruption: %s", shown)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Removes what an audit has attached."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what an audit has attached."""
        if stage == "fit":
            self._close()
            self._reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns the ledger's counts, which no rollback restores."""
        return {"ledger": self._ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the ledger's counts."""
        self._ledger.load_state_dict(state_dict["ledger"])


def _at_rest(trainer: Trainer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that only an optimizer's step should change."""
    tensors = dict(named)
    names = {id(p): name for name, p in named.items()}
    for optimizer in trainer.optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    tensors[f"{key} of {names.get(id(p), 'a parameter')}"] = value
    return tensors


def _replica_group(named: Mapping[str, Tensor]) -> str:
    """Returns a text that is equal on ranks which hold the same shards of all weights."""
    return repr(list(dict.fromkeys(map(shard_place, named.values()))))


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {getattr(properties, 'uuid', '')}".strip()
