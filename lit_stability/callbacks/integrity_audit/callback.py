"""`IntegrityAudit`: finds silent data corruption by running healthy steps again."""

import socket
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.integrity_audit.finding import Finding, RankReport
from lit_stability.callbacks.integrity_audit.ledger import AUDITS, RERUN, WRONG, Ledger
from lit_stability.callbacks.integrity_audit.replicas import GRADIENT, ReplicaCheck
from lit_stability.callbacks.integrity_audit.state_check import StateCheck, is_comparable
from lit_stability.callbacks.integrity_audit.step_check import StepCheck
from lit_stability.callbacks.requirements import gather_of, require_monitor
from lit_stability.detectors.anomaly import require
from lit_stability.detectors.silent_corruption import KIND, STATE, STEP, reading
from lit_stability.distributed.dtensor import shard_place
from lit_stability.incidents.incident import Incident
from lit_stability.incidents.log import append_lines
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.bit_patterns import checksums
from lit_stability.measurement.step_stats import ProbeReading
from lit_stability.outside import guarded
from lit_stability.trainer_internals import (
    StepRecording,
    adapter_of,
    run_directory,
    sharing,
    why_not_recorded,
)

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
    ``docs/callbacks/integrity_audit.md``.

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
        self._recording: StepRecording | None = None
        self._state: StateCheck | None = None
        self._error: str | None = None
        """Why this rank can check nothing any more."""
        self._place = ""
        self._seen: set[tuple[int, Finding]] = set()
        """Damage so far, by rank."""
        self._written: set[str] = set()
        """Tensors of which the same damage came again in a replay: the program writes them."""
        self._incident: Incident | None = None
        """The last one of this callback's findings."""

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
            other = "its optimizers train other tensors than the module's"
            why = adapter.why_unsupported if unsupported else other
            name = type(trainer.strategy).__name__
            log.warning("IntegrityAudit does nothing under %s: %s", name, why)
            return
        self._obstacle = why_not_recorded(trainer, pl_module)
        self._state = StateCheck(trainer)
        if trainer.is_global_zero:
            if self._state.obstacle is not None:
                log.warning("IntegrityAudit computes no update again: %s", self._state.obstacle)
            self._log_obstacle()

    def _log_obstacle(self) -> None:
        if self._obstacle is not None:
            left = "memory, replicas"
            left += "" if self._state is None or self._state.obstacle else ", updates"
            log.warning("IntegrityAudit runs no step again: %s; it checks %s", self._obstacle, left)

    def startup_text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Returns how often steps are audited."""
        if self._due == _NEVER:
            return ""
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
        try:
            assert self._state is not None
            self._state.begin(dict(pl_module.named_parameters()))
            if self._obstacle is None:
                self._recording = StepRecording(trainer, pl_module)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Keeps the reason, for the report that all ranks exchange: an audit ends no run."""
        self._error = f"{type(error).__name__}: {error}"

    def _end(self) -> None:
        """Ends an audit at the start of the next step, whose report has what came after it."""
        try:
            assert self._state is not None
            self._state.check("after the update")
        except Exception as error:
            self._failed(error)
        self._close()
        self._reports = True

    def _close(self) -> None:
        """Removes everything that an audit has attached, and releases its copies."""
        if self._recording is not None:
            self._recording.stop()
        if self._state is not None:
            self._state.close()
        self._recording, self._opened = None, False

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
        error = next((report.error for report in reports if report.error is not None), None)
        off = next((report.off for report in reports if report.off is not None), None)
        if error is not None:
            self._close()
            self._due = _NEVER
            if trainer.is_global_zero:
                log.warning("IntegrityAudit is off for this fit: %s", error)
        elif off is not None and self._obstacle is None:
            self._obstacle = off
            if trainer.is_global_zero:
                self._log_obstacle()
        return self._readings(trainer, reports)

    def _report(self, trainer: Trainer, pl_module: LightningModule, audited: bool) -> RankReport:
        assert self._state is not None
        report = RankReport(self._place, audited)
        if audited:
            # All ranks run the step again, whatever one of them has failed to do.
            self._audit_step(trainer, pl_module, report)
            try:
                self._audit_memory(trainer, pl_module, report)
            except Exception as error:
                self._failed(error)
        both = (*self._state.take_findings(), *report.findings)
        report.findings = list({(each.tensor, each.state): each for each in both}.values())
        report.error = self._error
        return report

    def _audit_step(self, trainer: Trainer, pl_module: LightningModule, report: RankReport) -> None:
        """Runs the step again, on all ranks or on none: it may contain collectives."""
        recording, self._recording = self._recording, None
        if self._obstacle is not None:
            return
        if recording is not None:
            recording.stop()
        obstacle = "no step was recorded" if recording is None else recording.obstacle
        incomplete = recording is None or recording.incomplete
        gather = gather_of(trainer)
        if any(obstacle or incomplete for obstacle, incomplete in gather((obstacle, incomplete))):
            report.off = obstacle
            return
        assert recording is not None
        try:
            report.findings += self._check.findings(trainer, pl_module, recording, gather)
        except Exception as error:  # an audit never ends the run
            report.off = f"{type(error).__name__}: {error}"
        report.off = report.off or recording.obstacle or self._check.obstacle

    def _audit_memory(
        self, trainer: Trainer, pl_module: LightningModule, report: RankReport
    ) -> None:
        assert self._state is not None
        self._state.before_gradients()
        named = dict(pl_module.named_parameters())
        grads = {f"{GRADIENT}{n}": p.grad for n, p in named.items() if p.grad is not None}
        grads = {name: grad for name, grad in grads.items() if is_comparable(grad)}
        if sharing(trainer) != "alone":
            shared = {**{n: p for n, p in named.items() if is_comparable(p)}, **grads}
            report.group = _replica_group(named)
            report.checksums = dict(zip(shared, checksums(list(shared.values())), strict=True))
        self._state.watch(grads)

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
                if finding.state and self._is_of_the_program(trainer, rank, report.place, finding):
                    continue
                row = self._count(trainer, report.place, finding)
                rows.append(row)
                if not finding.harmless:
                    quantity = STATE if finding.state else STEP
                    again = f", finding {row['count']} there" if row["count"] > 1 else ""
                    text = f"{finding.text}, on {report.place}{again}"
                    readings.append(reading(quantity, finding.tensor, text, finding.step))
        if readings:  # a replay audits these steps again
            self._due = min(int(each.value) for each in readings)
        self._write(trainer, rows)
        return readings

    def _is_of_the_program(self, trainer: Trainer, rank: int, place: str, finding: Finding) -> bool:
        """Whether damage came again when its step was run again, as no flipped bit does."""
        if finding.tensor in self._written:
            return True
        if (rank, finding) not in self._seen:
            self._seen.add((rank, finding))
            return False
        self._written.add(finding.tensor)
        self._ledger.withdraw(place, WRONG)
        what = f"{finding.text}, also when step {finding.step} was run again: the program does it"
        if trainer.is_global_zero:
            log.warning("IntegrityAudit: %s, and %s is no longer checked", what, finding.tensor)
        if self._incident is not None:
            self._incident.verdict = "deterministic"
            self._incident.note("weights written by the program", what)
        return True

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Keeps an incident of these findings; a replay may show that the program has made it."""
        if incident.anomaly.kind == KIND:
            self._incident = incident

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
        self._forget()

    def _forget(self) -> None:
        self._close()
        if self._state is not None:
            self._state.take_findings()

    def on_precision_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns again how exactly a step repeats itself."""
        self._forget()
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


def _replica_group(named: Mapping[str, Tensor]) -> str:
    """Returns a text that is equal on ranks which hold the same shards of all weights."""
    return repr(list(dict.fromkeys(map(shard_place, named.values()))))


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {getattr(properties, 'uuid', '')}".strip()
