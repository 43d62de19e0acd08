"""`GradientMonitor`: measures once per optimizer step and opens an incident where one is due."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_stability.callbacks.gradient_monitor.failed_step import failure_anomaly
from lit_stability.callbacks.gradient_monitor.incident_tracker import (
    IncidentTracker,
    PendingVerdict,
)
from lit_stability.callbacks.gradient_monitor.rank_consensus import RankConsensus
from lit_stability.callbacks.gradient_monitor.reporter import Reporter, log
from lit_stability.callbacks.gradient_monitor.schedule_watch import ScheduleWatch
from lit_stability.callbacks.gradient_monitor.step_measurer import StepMeasurer
from lit_stability.callbacks.gradient_monitor.validation import (
    asked_detectors,
    require_bounded_layers,
    require_package,
    why_unwatchable,
)
from lit_stability.callbacks.gradient_monitor.zero_grad_watch import ZeroGradWatch
from lit_stability.callbacks.hooks import (
    StabilityCallback,
    call_hook,
    hide_empty_hooks,
    report_misspelt_hooks,
    show_empty_hooks,
    stand_aside,
)
from lit_stability.detectors import (
    Anomaly,
    Detector,
    DetectorSet,
    RegimeChange,
    disagreement,
    with_damage,
)
from lit_stability.detectors.anomaly import AT_START, require
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.incidents.learning import LossLevels
from lit_stability.incidents.step_history import StepHistory
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.initial_state import (
    DamagedState,
    buffers_with_nan,
    damaged_state,
)
from lit_stability.measurement.step_meter import StepMeter
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import AcceptNewRegime, ClipStep
from lit_stability.trainer_internals import (
    StepFailure,
    adapter_of,
    agreed_failure,
    at_worker_exit,
    callbacks_of,
    keep_runs_below,
    log_every,
    run_id,
    step_failure,
)
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from lit_stability.training_state.skipped_step import skip_gate


class GradientMonitor(StabilityCallback):
    """Monitors loss, gradients, weights and updates of every optimizer step; changes nothing.

    Each step is measured before its update: accumulated, unscaled, unclipped. A step that passes
    all detectors is passed to the callbacks as ``on_healthy_step``; one that does not opens an
    `Incident`, passed as ``on_incident``. Without a callback that responds, the step is taken as it
    is. An incident is closed after ``close_after`` healthy steps; a burst is one incident. Before
    the first step weights, moments and buffers are checked once, see
    `lit_stability.measurement.initial_state`.

    With ``Trainer(gradient_clip_val=...)`` the norm is computed once: the Trainer's clipping uses
    the one measured here, with the same bits as a result. Where a hook of the user's may write to
    the gradients in between, or they are sharded, Lightning computes it a second time.

    Metrics recorded, every ``trainer.log_every_n_steps`` steps, to every logger:

    * ``stability/grad_norm``: norm of all gradients, before clipping.
    * ``stability/update_ratio``: norm of the previous update over the norm of the weights, from a
      sample; absent on the first step.
    * ``stability/learning_rate``: largest effective learning rate of the groups.
    * ``stability/learning_rate_factor``: effective over nominal learning rate, 1 when untouched.
    * ``stability/loss_scale``: factor of the loss scaler; only in fp16.
    * ``stability/overflows``: steps of this fit that the loss scaler skipped; only in fp16.
    * ``stability/stuck_share``: share of 16-bit weights that do not change although their gradient
      is not zero, in [0, 1]; only with 16-bit weights, and on the steps that measure it.
    * ``stability/incidents``: incidents so far.
    * ``stability/QUANTITY/MODULE``: what a probe measured there, on the steps that it measures.

    On several ranks all decide the same, from numbers summed over the ranks, see
    `lit_stability.distributed.collectives`. Under a strategy that is neither supported nor allowed
    each rank observes its own numbers.

    The callback warns once of a metric that is NaN and that ReduceLROnPlateau, EarlyStopping or
    ModelCheckpoint monitors, and of a learning rate that becomes almost 0 before the loss has
    reached its floor.

    With several optimizers, the metrics of the second end in ``_1``, and so on. Incidents go to
    ``incidents.jsonl`` in the folder of the run, and to the loggers: TensorBoard gets reports;
    W&B a table, alerts, a summary and tags; MLflow reports, a table and tags; Comet reports and a
    table; `CSVLogger` ``incidents.csv``. For another logger see `lit_stability.loggers`. Step
    attempts and layers go to the Stability tab, see `lit_stability.incidents.step_history.FIELDS`.
    The folder of the run has ModelCheckpoint's ``checkpoints`` too: ``save_dir/name/version`` of
    the first logger. Without a logger it is ``stability/<time>-<number>`` in ``default_root_dir``,
    where a fit that resumes from one of its checkpoints goes on. Each record has its run's id.
    Incidents add at most 24 MiB per fit to an event file, see
    `lit_stability.loggers.size_limits`.

    >>> from lit_stability.detectors import Spike, default_detectors
    >>> observer = GradientMonitor(detectors=[*default_detectors(), Spike("loss", ratio=50.0)])
    >>> observer.incidents  # of the fit of Trainer(callbacks=[observer])
    []

    Args:
        detectors: those to ask, in order; the first anomaly counts. None for the default set.
        layer_bounds: glob of parameter names -> largest gradient norm, or the smallest and the
            largest, in addition to the detectors; see `LayerBounds`.
        close_after: healthy steps that close an incident.
        scan_weights_every: optimizer steps between full scans of the weights for NaN and Inf.
        details_every: optimizer steps between measurements of every parameter's gradient mean,
            standard deviation, range and share of zeros; 0 for never.
        history: measurements kept in `details`.
        allow_strategies: names of strategy classes that are not supported and are tried all the
            same; numbers are then summed over the ranks at every step.
        directory: folder below which each run has a folder ``stability/<time>-<number>`` for the
            records and checkpoints of all callbacks; None for that of the logger.
        upload_incidents: whether W&B and MLflow get the folder of each incident as an artifact;
            it holds a checkpoint, so that may be gigabytes.

    Raises:
        ValueError: if an argument is out of its range; before the first step, if the Trainer is of
            another package or trains nothing, or if a layer bound fits no parameter.
    """

    ignores_skipped_steps = True

    def __init__(
        self,
        *,
        detectors: list[Detector] | None = None,
        layer_bounds: dict[str, float | tuple[float, float]] | None = None,
        close_after: int = 10,
        scan_weights_every: int = 10,
        details_every: int = 50,
        history: int = 20,
        allow_strategies: Sequence[str] = (),
        upload_incidents: bool = False,
        directory: str | Path | None = None,
    ) -> None:
        require(close_after >= 1, "close_after", close_after, "at least 1")
        require(scan_weights_every >= 1, "scan_weights_every", scan_weights_every, "at least 1")
        require(details_every >= 0, "details_every", details_every, "0 (never) or more")
        require(history >= 1, "history", history, "at least 1")
        require(
            not isinstance(allow_strategies, str), "allow_strategies", allow_strategies, "a list"
        )
        self.detectors = asked_detectors(detectors, layer_bounds)
        self.close_after = close_after
        self.scan_weights_every = scan_weights_every
        self.details_every = details_every
        self.details: deque[StepStats] = deque(maxlen=history)
        """The last measurements that carry details."""
        self.allow_strategies = tuple(allow_strategies)
        self.upload_incidents = upload_incidents
        self.directory = directory
        self._restored: Mapping[str, Any] = {}
        self._detectors = DetectorSet([], [], log.info)
        self._measurer: StepMeasurer | None = None
        self._consensus = RankConsensus(None)
        self._tracker = IncidentTracker(None, close_after, 0)
        self._history = StepHistory()
        self._run: str | None = None
        self._pending: PendingVerdict | None = None
        self._checks_saves = True
        self._cancel_exit: Callable[[], None] = _nothing
        self._nan_before: tuple[str, ...] = ()
        """Buffers that held a NaN before a checkpoint was loaded."""

    @property
    def incidents(self) -> list[Incident]:
        """Incidents of this fit, or of the last one."""
        return self._tracker.incidents

    @property
    def current(self) -> Incident | None:
        """The incident that is open, if one is."""
        return self._tracker.current

    @property
    def run_id(self) -> str | None:
        """Id of the run, which is in the record of each incident; None before the first fit.

        A fit that resumes from a checkpoint in its own folder goes on with that run.
        """
        return self._run

    def amended(self, incident: Incident) -> None:
        """Records again what has changed of an incident that was closed, such as its folder."""
        if self._measurer is not None:
            self._reporter.amended(incident)

    def _outside_a_fit(self) -> dict[str, Any]:
        tracker = IncidentTracker(None, self.close_after, self._tracker.count)
        tracker.incidents = list(self.incidents)
        return {
            **dict.fromkeys(("_measurer", "_reporter", "_schedules", "_zero_grad", "_pending")),
            "_detectors": DetectorSet([], [], log.info),
            "_consensus": RankConsensus(None),
            "_tracker": tracker,
            "_cancel_exit": _nothing,
        }

    def gather(self, value: Any) -> list[Any]:
        """Returns a value of every rank, in their order; on one rank, a list of its own.

        Every rank must call it, or none: in `on_incident` for one, which all ranks run for the
        same step.

        Args:
            value: of this rank, picklable.
        """
        return self._consensus.gather(value)

    @contextlib.contextmanager
    def unchecked_save(self) -> Iterator[None]:
        """Reports no non-finite weights that are saved meanwhile: the caller checks them itself.

        To report those that are sharded, the ranks wait for each other.
        """
        self._checks_saves = False
        try:
            yield
        finally:
            self._checks_saves = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a Trainer of another package; reports hooks whose name is misspelt."""
        require_package(trainer, self)
        # A fit that ended in an exception has had no teardown.
        self._measurer = None
        show_empty_hooks(trainer)
        if self.directory is not None:
            keep_runs_below(trainer, self.directory)
        if stage == "fit":
            report_misspelt_hooks(trainer, pl_module)
            self._nan_before = buffers_with_nan(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Creates one meter and one set of detectors per optimizer; checks the state once."""
        adapter = adapter_of(trainer)
        if not adapter.can_measure():
            if trainer.is_global_zero:
                name = type(trainer.strategy).__name__
                log.warning(
                    "GradientMonitor measures nothing with %s: %s", name, adapter.why_unsupported
                )
            return
        adapter.attach()
        if (reason := why_unwatchable(trainer, pl_module)) is not None:
            if trainer.is_global_zero:
                log.warning("this fit goes on without the suite: %s", reason)
            stand_aside(trainer, pl_module)
            return
        require_bounded_layers(trainer, pl_module, self.detectors)
        adapter.reshard(pl_module)
        ranks = adapter.ranks(self.allow_strategies)
        self._consensus = RankConsensus(ranks)
        self._run = run_id(trainer, self._run)
        self._reporter = Reporter(trainer, self._history, self._run, uploads=self.upload_incidents)
        self._schedules = ScheduleWatch(trainer)
        self._zero_grad = ZeroGradWatch(trainer)
        every = {"scan_weights_every": self.scan_weights_every, "details_every": self.details_every}
        self._measurer = StepMeasurer(
            trainer,
            pl_module,
            ranks,
            **every,
            optimizer_replaced=lambda index: self._detectors.optimizer_replaced(index),
        )
        self._detectors = DetectorSet(
            self.detectors, self._measurer.meters, self._reporter.log_line
        )
        self._detectors.load_state_dict(self._restored)
        self._restored = {}
        if self._detectors.knows_writes:
            self._measurer.watch_writes()
        self._tracker = IncidentTracker(self._reporter, self.close_after, self._tracker.count)
        self._tracker.losses = LossLevels(from_start=trainer.global_step == 0)
        self._pending = None
        self._cancel_exit = at_worker_exit(lambda: self._worker_ended(trainer, pl_module))
        self._check_initial_state(trainer, pl_module)
        hide_empty_hooks(trainer)

    @staticmethod
    def _worker_ended(trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the fit for the whole suite, as Lightning does not in a worker that failed."""
        for each in callbacks_of(trainer):
            if isinstance(each, StabilityCallback):
                each.on_exception(trainer, pl_module, RuntimeError("the worker process ended"))

    def _check_initial_state(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens an incident if the state is damaged before the first step."""
        own = damaged_state(pl_module, self._meters.values(), self._nan_before)
        damaged = DamagedState.of_ranks(self._consensus.gather(own))
        if not damaged:
            return
        file = trainer.ckpt_path
        source = "before the first step" if file is None else f"in the checkpoint {file}"
        anomaly = Anomaly(
            kind=AT_START,
            step=trainer.global_step,
            value=float(len(damaged.names)),
            signal="damaged tensors",
            message=f"{damaged.text()} {source}",
            layers=tuple((name, math.nan) for name in damaged.names[:5]),
            state_corrupted=True,
        )
        incident = self._tracker.recur(trainer, anomaly)
        call_hook("on_incident", trainer, pl_module, incident)
        self._tracker.report()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records the batch that the next measurement belongs to."""
        if self._measurer is not None:
            self._reporter.started(pl_module)
            self._measurer.batch_started(batch, batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Adds the loss of a batch to that of the accumulation window."""
        if self._measurer is not None:
            self._zero_grad.backward()
            self._measurer.take_loss(trainer, loss, scan=self.current is not None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measures the step, asks the detectors, and calls the hooks for the verdict."""
        if self._measurer is None or not adapter_of(trainer).steps_now:
            return
        self._zero_grad.step(optimizer)
        failure = step_failure(trainer)
        stats = self._measurer.measure(
            trainer, optimizer, scan=self.current is not None, failed=failure is not None
        )
        if stats is None:
            return
        self._measurer.report_flags(trainer, stats)
        gate = skip_gate(optimizer)
        gate.before_verdict()
        if stats.raised_on:
            failure = agreed_failure(trainer, self._consensus.gather)
        if failure is not None:
            self._judge_failure(trainer, pl_module, stats, failure)
            gate.after_verdict()
            self._reporter.history.judged(stats, optimizer)
            return
        call_hook("on_step_measured", trainer, pl_module, stats)
        if stats.details:
            self.details.append(stats)
        anomaly, shared = self._detectors.verdict(stats, voting=self._consensus.votes)
        if self._detectors.regime_change is not None:
            change = self._detectors.regime_change
            stats = self._accept_regime(trainer, pl_module, stats, change)
        decide = self._judge if shared else self._judge_alone
        decide(trainer, pl_module, PendingVerdict(stats, anomaly))
        gate.after_verdict()
        self._reporter.history.judged(stats, optimizer)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, pending: PendingVerdict) -> None:
        anomaly, stats = pending.anomaly, pending.stats
        if anomaly is not None:
            anomaly = self._raise(trainer, pl_module, anomaly, stats)
        if anomaly is None or anomaly.warn_only:
            self._accept(trainer, pl_module, stats)
            self._learn(trainer, pl_module, stats)
        elif self.current is not None and isinstance(self.current.response, ClipStep):
            self._reporter.accepted(stats)
            self._detectors.learn(stats)

    def _judge_failure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stats: StepStats,
        failure: StepFailure,
    ) -> None:
        """Raises an anomaly for a ``training_step`` that raised an exception."""
        failure.reported = True
        call_hook("on_step_measured", trainer, pl_module, stats)
        anomaly = failure_anomaly(stats, failure, self._detectors.damage(stats))
        if self._detectors.regime_change is not None:
            change = self._detectors.regime_change
            stats = self._accept_regime(trainer, pl_module, stats, change)
        self._raise(trainer, pl_module, anomaly, stats)

    def _accept_regime(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stats: StepStats,
        change: RegimeChange,
    ) -> StepStats:
        if self.current is not None:
            first, occurrences = self.current.first.step, self.current.occurrences
            stays = f"it stays: {occurrences} rejections in a row from step {first} on"
            self.current.note(
                change.cause, stays if change.cause == "change of regime" else change.what
            )
            if self.current.responses:
                self.current.adjust(AcceptNewRegime())
        call_hook("on_regime_change", trainer, pl_module, stats)
        # Callbacks may have restored learning rates: the next update is compared with these.
        rates = learning_rate_multiplier(trainer.optimizers[stats.optimizer]).effective()
        self._meters[stats.optimizer].expect(rates)
        return replace(stats, learning_rates=tuple(rates))

    def _judge_alone(
        self, trainer: Trainer, pl_module: LightningModule, pending: PendingVerdict
    ) -> None:
        """Skip or accept a step for this rank alone, until all ranks have voted on it."""
        self._pending = pending
        if pending.vote.objected:
            call_hook("on_local_anomaly", trainer, pl_module, pending.anomaly)
        else:
            self._accept(trainer, pl_module, pending.stats)
        self._consensus.vote(pending.vote)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the votes on the step, if there are any, before other callbacks act on it."""
        if self._measurer is None or not adapter_of(trainer).steps_now:
            return
        failure = step_failure(trainer)
        if failure is not None and failure.late:
            stats = self._measurer.measure_state(trainer)
            self._judge_failure(trainer, pl_module, stats, failure)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._count(trainer, pl_module, pending)
        self._reporter.history.batch_ended()
        self._measurer.batch_ended(trainer)

    def _count(self, trainer: Trainer, pl_module: LightningModule, pending: PendingVerdict) -> None:
        votes, stats, anomaly = self._consensus.count(), pending.stats, pending.anomaly
        disagreeing = disagreement(stats, votes)
        if disagreeing is not None:
            self._consensus.sync_from_rank_0(callbacks_of(trainer))
            self._raise(trainer, pl_module, disagreeing, stats)
            return
        if anomaly is not None and all(vote.objected or vote.warned for vote in votes):
            anomaly = self._raise(trainer, pl_module, anomaly, stats)
        if not pending.vote.objected and (anomaly is None or anomaly.warn_only):
            self._learn(trainer, pl_module, stats)

    def _accept(self, trainer: Trainer, pl_module: LightningModule, stats: StepStats) -> None:
        self._reporter.accepted(stats)
        if self._meters[stats.optimizer].count % log_every(trainer) == 0:
            self._reporter.step(stats, self._tracker.count)
        call_hook("on_healthy_step", trainer, pl_module, stats)

    def _learn(self, trainer: Trainer, pl_module: LightningModule, stats: StepStats) -> None:
        """Teach the detectors a step that all ranks accepted."""
        self._detectors.learn(stats)
        self._schedules.stepped(stats)
        self._tracker.losses.rate_is_cut = self._schedules.rate_is_cut
        self._tracker.healthy(trainer, pl_module, stats)

    def _raise(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly, stats: StepStats
    ) -> Anomaly:
        """Open an incident, or add to the open one; on all ranks or none."""
        assert self._measurer is not None
        meter = self._meters[stats.optimizer]
        anomaly = with_damage(anomaly, *self._consensus.audit(*meter.audit()))
        if anomaly.state_corrupted:
            self._detectors.rolled_back_for(anomaly)
            self._measurer.watch_writes()
        incident = self._tracker.recur(trainer, anomaly)
        incident.stats = stats
        incident.recorded_step = self._measurer.recorded_step
        call_hook("on_incident", trainer, pl_module, incident)
        scale = learning_rate_multiplier(trainer.optimizers[stats.optimizer])
        meter.expect(scale.effective())
        self._tracker.report()
        return anomaly

    @property
    def _meters(self) -> dict[int, StepMeter]:
        return {} if self._measurer is None else self._measurer.meters

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last weights: the next update cannot be measured against them."""
        if self._measurer is None:
            return
        self._reporter.history.rolled_back()
        for meter in self._meters.values():
            meter.forget()

    def weights_rescaled(self) -> None:
        """Forgets the last weights; to be called when a callback rescales some in an update.

        The change is then not measured as one that the optimizer made.
        """
        if self._measurer is not None:
            self._measurer.weights_rescaled()

    def on_precision_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces the meters: weights and optimizer state may be other tensors now."""
        if self._measurer is not None:
            self._measurer.renew(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports monitored metrics that are NaN."""
        if self._measurer is not None:
            self._schedules.metrics_known()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports monitored metrics that were NaN at the end of the epoch before."""
        if self._measurer is not None:
            self._schedules.metrics_known()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the open incident, and reports non-finite weights."""
        if self._measurer is None:
            return
        self._schedules.metrics_known()
        self._reporter.ends_with(self._consensus.bad_state(self._meters.values()))
        self._tracker.end(trainer, pl_module)
        self._reporter.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Closes the open incident and the record when the fit ends in an exception."""
        self._cancel_exit()
        if self._measurer is None:
            return
        stopped = isinstance(exception, TrainingStopped)
        self._tracker.end(trainer, pl_module, stopped=stopped)
        self._reporter.end(exception)
        self._reporter.print_summary(self.incidents)
        # A fit that fails has no teardown.
        show_empty_hooks(trainer)
        self._measurer.close()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Reports non-finite weights that are saved outside of an incident, during a fit."""
        if self._measurer is not None and self.current is None and self._checks_saves:
            self._reporter.saved_with(self._consensus.bad_state(self._meters.values()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the summary, and releases the parameters and the process group."""
        if stage == "fit":
            self._cancel_exit()
            show_empty_hooks(trainer)
            if self._measurer is not None:
                # Not earlier: the progress bar is closed only now, and would be drawn over it.
                self._reporter.print_summary(self.incidents)
                self._measurer.close()
            self._measurer = None
            for optimizer in trainer.optimizers:
                skip_gate(optimizer).detach()
            adapter_of(trainer).detach()
            self._consensus.close()

    def rewindable_state(self) -> dict[str, Any]:
        """Returns the windows of the detectors."""
        return self._detectors.state_dict()

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores the windows of the detectors."""
        self._detectors.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts of incidents and step attempts, and the windows of the detectors."""
        counts = {"incidents": self._tracker.count, "attempts": self._history.count}
        return {**counts, "run": self._run, "detectors": self.rewindable_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts; the windows are restored when the detectors exist."""
        self._tracker.count = int(state_dict["incidents"])
        self._history.count = int(state_dict.get("attempts", 0))
        self._run = state_dict.get("run")
        self._restored = state_dict["detectors"]


def _nothing() -> None:
    """Cancels nothing, outside of a fit."""
