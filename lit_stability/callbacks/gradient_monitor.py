"""`GradientMonitor`: measures once per optimizer step and opens an incident where one is due."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.callbacks.council import Council
from lit_stability.callbacks.dispatch import call_hook
from lit_stability.callbacks.measuring import Measuring
from lit_stability.callbacks.reporting import Reporter, log
from lit_stability.detectors import (
    Anomaly,
    Detector,
    LayerBounds,
    Panel,
    Replicas,
    damage,
    default_detectors,
    disagreement,
    rates_differ,
    with_damage,
)
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.lr_scale import learning_rate_scale
from lit_stability.meter import StepMeter
from lit_stability.stats import StepStats
from lit_stability.trainer_state import callbacks_of, log_every, ranks_of, reshard, sharing


class GradientMonitor(Callback):
    """Watches loss, gradients, weights and updates of every optimizer step; changes nothing.

    Each step is measured before its update: accumulated, unscaled, unclipped. A step that passes
    all detectors is offered to the callbacks as ``on_healthy_step``; one that does not opens an
    `Incident`, offered as ``on_incident``. Without a callback that responds the step is taken as
    it is. An incident is closed after ``close_after`` healthy steps; a burst is one incident.

    Metrics recorded, every ``trainer.log_every_n_steps`` steps, to every logger:

    * ``stability/grad_norm``: norm of all gradients, before clipping.
    * ``stability/update_ratio``: norm of the previous update over the norm of the weights, from a
      sample; absent on the first step.
    * ``stability/learning_rate``: largest effective learning rate of the groups.
    * ``stability/learning_rate_factor``: effective over nominal learning rate, 1 when untouched.
    * ``stability/loss_scale``: factor of the loss scaler; only in fp16.
    * ``stability/incidents``: incidents so far.

    On several ranks all decide the same, from numbers added up over the ranks: under DDP while
    backward runs; under FSDP2, in manual optimization and with LBFGS in one collective that is
    waited for before each optimizer step. See `lit_stability.ranks`. Under a strategy that is
    neither run nor allowed, each rank observes what is its own.

    With several optimizers, those of the second carry ``_1`` and so on. Incidents go to
    ``incidents.jsonl`` in ``trainer.log_dir`` and, as markdown, to the loggers that take text.

    Args:
        detectors: what to ask, in order, the first objection counts; None for the default set.
        layer_bounds: glob of parameter names -> largest gradient norm, or the smallest and the
            largest, on top of the detectors; see `LayerBounds`.
        close_after: healthy steps that close an incident.
        scan_weights_every: optimizer steps between full scans of the weights for NaN and Inf.
        details_every: optimizer steps between measurements of every parameter's gradient mean,
            standard deviation, range and share of zeros; 0 for never.
        history: details kept for `details`.
        allow_strategies: names of strategy classes that the suite was never run under and is to
            work with all the same; it adds up its numbers over the ranks at every step, then.

    Raises:
        ValueError: if an argument is out of its range.
    """

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
    ) -> None:
        for name, value in (
            ("close_after", close_after),
            ("scan_weights_every", scan_weights_every),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if details_every < 0:
            raise ValueError(f"details_every must be 0 (never) or more, got {details_every!r}")
        self.detectors = default_detectors() if detectors is None else list(detectors)
        if layer_bounds:
            self.detectors.append(LayerBounds(layer_bounds))
        self.close_after = close_after
        self.scan_weights_every = scan_weights_every
        self.details_every = details_every
        self.details: deque[StepStats] = deque(maxlen=history)
        """The last measurements that carry details."""
        self.incidents: list[Incident] = []
        """Incidents of this fit."""
        self.current: Incident | None = None
        """The incident that is open, if one is."""
        self.allow_strategies = tuple(allow_strategies)
        self._count = 0
        self._healthy = 0
        self._restored: Mapping[str, Any] = {}
        self._panel = Panel([], [], log.info)
        self._measuring: Measuring | None = None
        self._council = Council(None)
        self._voted: _Voted | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare one meter and one set of detectors per optimizer."""
        if sharing(trainer) == "shards":
            reshard(pl_module)
        ranks = ranks_of(trainer, self.allow_strategies)
        self._council = Council(ranks)
        self._measuring = Measuring(
            trainer,
            pl_module,
            ranks,
            scan_weights_every=self.scan_weights_every,
            details_every=self.details_every,
        )
        self._reporter = Reporter(trainer)
        self._panel = Panel(self.detectors, self._measuring.meters, self._reporter.say)
        self._panel.load_state_dict(self._restored)
        self._restored = {}
        self._replicas = Replicas()
        self.incidents, self.current, self._voted = [], None, None

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Add up the loss of the accumulation window."""
        if self._measuring is not None:
            self._measuring.take_loss(trainer, loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, ask, and pass the verdict on."""
        assert self._measuring is not None
        stats = self._measuring.measure(trainer, optimizer)
        if stats is None:
            return
        if stats.details:
            self.details.append(stats)
        anomaly, shared = self._ask(stats)
        books = None
        if anomaly is not None:
            books = self._books()
            anomaly = self._raise(trainer, pl_module, anomaly, stats, shared)
        if anomaly is None or anomaly.observe_only:
            self._accept(trainer, pl_module, stats, shared)
        if not shared:
            self._voted = _Voted(stats, anomaly, books)
            self._council.vote(objected=self._voted.objected, grad_norm=stats.grad_norm)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the votes on the step, if it was voted on, before anything else sees it."""
        voted, self._voted = self._voted, None
        if voted is None:
            return
        votes = self._council.count()
        apart = disagreement(voted.stats, votes)
        if apart is not None:
            self._go_on_from_rank_zero(trainer, voted.books)
            self._raise(trainer, pl_module, apart, voted.stats, shared=True)
            return
        damaged = damage(voted.stats, votes, voted.anomaly)
        if damaged is not None:
            self._raise(trainer, pl_module, damaged, voted.stats, shared=True)
        elif not voted.objected:
            self._settle(trainer, pl_module, voted.stats)
        if voted.opening and self.current is not None:
            self._reporter.opened(self.current)

    def _ask(self, stats: StepStats) -> tuple[Anomaly | None, bool]:
        """What is wrong with a step, and whether all ranks are known to have found the same."""
        voting = self._council.votes
        anomaly = rates_differ(stats) or self._panel.ask(stats, "shared" if voting else "all")
        anomaly = self._compare_weights(anomaly, stats)
        if not voting:
            return anomaly, True
        if anomaly is None or anomaly.observe_only:
            return self._panel.ask(stats, "own") or anomaly, False
        if anomaly.signal == "loss" and not anomaly.layers:
            anomaly = replace(anomaly, layers=tuple(stats.worst_layers()))
        return anomaly, True

    def _compare_weights(self, anomaly: Anomaly | None, stats: StepStats) -> Anomaly | None:
        compared = not self._replicas.given_up
        if anomaly is None:
            anomaly = self._replicas.check(stats)
        else:
            anomaly = self._replicas.explain(anomaly, stats)
        if compared and self._replicas.given_up:
            self._reporter.say(
                f"step {stats.step}: the ranks' weights differ from the start of the fit on, and "
                "are not compared"
            )
        return anomaly

    def _accept(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats, shared: bool
    ) -> None:
        if shared:
            self._settle(trainer, pl_module, stats)
        if self._meters[stats.optimizer].count % log_every(trainer) == 0:
            self._reporter.step(stats, self._count)
        call_hook("on_healthy_step", trainer, pl_module, stats)

    def _settle(self, trainer: Trainer, pl_module: LightningModule, stats: StepStats) -> None:
        """Learn from a step that all ranks have accepted."""
        self._panel.learn(stats)
        self._healthy += 1
        if self.current is not None and self._healthy >= self.close_after:
            outcome = "recovered" if self.current.responses else "observed"
            self._close(trainer, pl_module, outcome)

    def _raise(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        anomaly: Anomaly,
        stats: StepStats,
        shared: bool,
    ) -> Anomaly:
        weights, moments = self._meters[stats.optimizer].audit()
        anomaly = with_damage(anomaly, *self._council.audit(weights, moments, shared=shared))
        self._healthy = 0
        opening = self.current is None
        incident = self._open_or_strike(trainer, anomaly)
        incident.stats = stats
        self._council.open(incident, shared=shared)
        call_hook("on_incident", trainer, pl_module, incident)
        incident.agree = bool
        scale = learning_rate_scale(trainer.optimizers[stats.optimizer])
        self._meters[stats.optimizer].expect(scale.effective())
        if opening and shared:
            self._reporter.opened(incident)
        return anomaly

    def _open_or_strike(self, trainer: Trainer, anomaly: Anomaly) -> Incident:
        if self.current is not None:
            self.current.strike(anomaly)
            return self.current
        self._count += 1
        self.current = Incident(
            self._count,
            anomaly,
            epoch=trainer.current_epoch,
            batch_idx=trainer.fit_loop.epoch_loop.batch_idx,
            record=self._reporter.record_path,
        )
        self.incidents.append(self.current)
        return self.current

    def _go_on_from_rank_zero(self, trainer: Trainer, books: _Books | None) -> None:
        """Forget what this rank alone found, and adopt what rank 0 has spent and put in force."""
        if books is not None:
            self._count, self._healthy = books.count, books.healthy
            self.current = books.incident
            if self.current is None:
                self.incidents.pop()
            else:
                vars(self.current).update(books.fields)
        owners = [c for c in callbacks_of(trainer) if hasattr(c, "load_books")]
        for owner, adopted in zip(
            owners, self._council.from_first([o.books() for o in owners]), strict=True
        ):
            owner.load_books(adopted)

    def _books(self) -> _Books:
        fields = {} if self.current is None else vars(self.current)
        copied = {k: list(v) if isinstance(v, list) else v for k, v in fields.items()}
        return _Books(self._count, self._healthy, self.current, copied)

    def _close(self, trainer: Trainer, pl_module: LightningModule, outcome: Any) -> None:
        incident, self.current = self.current, None
        if incident is None:
            return
        incident.outcome, incident.closed_step = outcome, trainer.global_step
        self._reporter.closed(incident)
        call_hook("on_incident_closed", trainer, pl_module, incident)

    @property
    def _meters(self) -> dict[int, StepMeter]:
        return {} if self._measuring is None else self._measuring.meters

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights were put back: the next update cannot be measured against the last."""
        for meter in self._meters.values():
            meter.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close what is open and print the summary."""
        self._close(trainer, pl_module, "unresolved")
        self._reporter.summary(self.incidents)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep the record complete when the fit ends in an exception."""
        if self._measuring is None:
            return
        outcome = "stopped" if isinstance(exception, TrainingStopped) else "unresolved"
        self._close(trainer, pl_module, outcome)
        self._reporter.summary(self.incidents)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so when somebody saves weights that are non-finite, outside of an incident."""
        if self.current is not None or self._measuring is None:
            return
        bad = [name for meter in self._meters.values() for name in meter.audit()[0]]
        if self._council.sharded:
            bad = [*self._council.audit(bad, (), shared=True)[0]]
        if bad:
            self._reporter.say(
                f"a checkpoint saved at step {trainer.global_step} holds non-finite weights, first "
                f"{bad[0]}: do not go on from it"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the parameters and the other ranks."""
        self._measuring = None
        self._council.close()

    def rewindable_state(self) -> dict[str, Any]:
        """The detectors' windows."""
        return self._panel.state_dict()

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Put the detectors' windows back."""
        self._panel.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Incidents so far and the detectors' windows."""
        return {"incidents": self._count, "detectors": self.rewindable_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back; the windows once the detectors exist."""
        self._count = int(state_dict["incidents"])
        self._restored = state_dict["detectors"]


@dataclass(frozen=True)
class _Books:
    """Where a monitor stands, before a step that the ranks may turn out to disagree on."""

    count: int
    healthy: int
    incident: Incident | None
    fields: dict[str, Any]


@dataclass(frozen=True)
class _Voted:
    """A step whose votes are on their way."""

    stats: StepStats
    anomaly: Anomaly | None
    books: _Books | None

    @property
    def objected(self) -> bool:
        """Whether this rank did not take it."""
        return self.anomaly is not None and not self.anomaly.observe_only

    @property
    def opening(self) -> bool:
        """Whether it opened an incident."""
        return self.books is not None and self.books.incident is None
