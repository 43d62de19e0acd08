"""`AutoRollback`: undoes bad steps and rolls back damage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from lit_stability.callbacks.auto_rollback.executor import ResponseExecutor
from lit_stability.callbacks.auto_rollback.raising_steps import RaisingSteps
from lit_stability.callbacks.auto_rollback.rollback_engine import RollbackEngine
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import (
    gather_of,
    require_monitor,
    require_supported_strategy,
    require_whole_optimizers,
)
from lit_stability.detectors import Anomaly
from lit_stability.detectors.anomaly import require_instance
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import Stop
from lit_stability.policies.backoff import Backoff
from lit_stability.policies.escalation import Budget, EscalationPolicy
from lit_stability.policies.snapshot_cadence import SnapshotCadence
from lit_stability.renamed import renamed
from lit_stability.trainer_internals import Stateful, can_guard_ranks, sharing
from lit_stability.training_state.byte_sizes import parse_bytes
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from lit_stability.training_state.snapshot_memory import Where

log = suite_logger()


class AutoRollback(StabilityCallback):
    """Undoes bad steps, holds a jumping learning rate, rolls back damage, and stops at its limits.

    With ``after_rollback="replay"`` the fit goes on as if the bad batch had never existed, bit for
    bit: weights, optimizers, schedulers, scaler, RNG, ``global_step``, logged metrics, validation
    points and the decisions of ModelCheckpoint and EarlyStopping. A rejected step is retried once,
    which shows whether the trouble is *transient* or *deterministic*; if it recurs, its batch is
    skipped. Damaged state is rolled back to the newest snapshot from before the suspected cause,
    one confirmed by ``confirm_after`` healthy steps, and all batches since are trained on again. If
    the damage recurs, they are replayed without the suspected batch, then from the snapshot before,
    then with a lower learning rate and a tighter clip. Checkpoint files written since the snapshot
    are renamed to ``NAME.quarantined``.

    What stays, batch after batch and after a rollback, is no fault but a change of regime: a loss
    with another term, data of another scale. The detectors accept it (`Spike` after 30
    rejections), what was lowered for it is restored, and the fit goes on; the batches that were
    skipped stay skipped.

    A ``training_step`` that raises what bad numbers can cause (a `ValueError`, a `RuntimeError`, an
    `IndexError`, an error of ``torch.linalg`` and their like; not their subclasses), or returns a
    loss without a graph, is handled like one with a NaN loss: damaged weights or buffers are rolled
    back; otherwise the step is retried, and its batch is skipped if it raises again. Callbacks see
    a loss of 0 for such a batch. The exception is raised to the user, untouched, before the first
    good step of a fit; with the third such batch in a row (later if many have raised before), if
    batches, weights and buffers are finite; and in manual optimization if the batch cannot be
    replayed, or if it comes from inside ``optimizer.step(closure)``.

    Under DDP an exception in the forward pass of one rank, a lack of memory included, is handled in
    the same way by all ranks together: the batch of that index is retried, and skipped, on each. If
    the fit ends, it does so on all of them; the others name the rank. It is raised as it is, on its
    rank alone, in the backward pass, in the first ``training_step`` of a fit, in one that calls
    collectives itself, as with ``self.log(..., sync_dist=True)`` or SyncBatchNorm, with a static
    graph or sparse gradients, in manual optimization and with sharded weights: then
    `fit_with_recovery` restarts all ranks.

    If a `Diagnosis` before it finds that the learning rate is likely too high, the first rollback
    lowers it; if the architecture is certain to be the cause, the fit stops.

    A fit whose state is damaged before the first step, such as a NaN in the checkpoint that it
    resumes from, is stopped at once with `TrainingStopped`, which names the tensor and the file.

    With ``after_rollback="skip"``, and where batches cannot be replayed, a rejected step costs its
    batch, and a rollback goes on with new data and ``global_step`` rewound. When no response is
    left, the fit ends with `TrainingStopped` and the weights of the last confirmed snapshot.

    Two snapshots of weights, buffers and optimizer state are kept in memory, and the raw batches
    since the older one; their sizes are logged when they are first known, and are in the record of
    each incident. On an accelerator the copies for the host are made beside the next forward and
    backward pass. Where two do not fit, one is kept: damage that is found only after the next one
    was taken cannot be undone. Where none fits, bad steps are still undone, but damaged weights end
    the fit, with the good checkpoint in the message from which `fit_with_recovery` would go on.

    >>> from lit_stability import Budget, stability_callbacks
    >>> suite = stability_callbacks(
    ...     rollback=dict(snapshot_every=50, memory_budget="4 GiB", budget=Budget(rollbacks=3))
    ... )
    >>> suite[-1].snapshot_every
    50

    Args:
        after_rollback: what happens to the batches since the snapshot.
        snapshot_every: healthy optimizer steps between snapshots, if the last one is confirmed and
            they do not cost too much. Damage can be undone that is detected so many steps late.
        snapshot_cost: share of the training time that taking snapshots may cost. What they cost is
            measured; the distance between them is doubled, four times at most and as long as the
            batches to replay have room, until they cost no more. It then depends on the clock to
            which snapshot a run goes back, but not how it goes on. None for a fixed distance.
        confirm_after: healthy steps after which a snapshot is confirmed.
        relax_after: healthy steps after which a lowered learning rate, its limit and a
            tightened clip are doubled, again and again until all are restored. A learning rate
            that is held against a jump of its schedule is released when the schedule comes back.
        budget: how many responses the run may spend.
        max_replay_bytes: bound on the raw batches kept; beyond it they cannot be replayed.
        clone_batches: keep copies from the start, for a ``training_step`` that changes its batch.
            Otherwise they are kept from the first batch on that is seen to be changed.
        snapshot_device: memory for the snapshots: ``"device"``, that of the weights; ``"host"``; or
            ``"auto"``, the device if they fit there after the first steps, else the host. All
            ranks decide together.
        memory_budget: what snapshots, batches to replay and the copies for an incident may take
            together on each rank, on device and host: bytes, or a size such as ``"4 GiB"``. Fewer
            snapshots are kept to stay below it, and then fewer batches. None for what is free.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @renamed(data="after_rollback", max_ring_bytes="max_replay_bytes")
    def __init__(
        self,
        *,
        after_rollback: Literal["replay", "skip"] = "replay",
        snapshot_every: int = 20,
        confirm_after: int = 10,
        relax_after: int = 20,
        budget: Budget | None = None,
        max_replay_bytes: int = 2**30,
        clone_batches: bool = False,
        snapshot_device: Where = "auto",
        memory_budget: int | str | None = None,
        snapshot_cost: float | None = 0.002,
    ) -> None:
        if after_rollback not in ("replay", "skip"):
            raise ValueError(f"after_rollback must be 'replay' or 'skip', got {after_rollback!r}")
        if snapshot_device not in ("auto", "device", "host"):
            raise ValueError(
                f"snapshot_device must be 'auto', 'device' or 'host', got {snapshot_device!r}"
            )
        for name, value in (
            ("snapshot_every", snapshot_every),
            ("confirm_after", confirm_after),
            ("max_replay_bytes", max_replay_bytes),
        ):
            if not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if snapshot_cost is not None and not 0 < snapshot_cost < 1:
            raise ValueError(
                "snapshot_cost must be a share of the training time between 0 and 1, or None, got "
                f"{snapshot_cost!r}"
            )
        require_instance("budget", budget, Budget)
        if memory_budget is not None:
            parse_bytes("memory_budget", memory_budget)
        self.after_rollback = after_rollback
        self.snapshot_every = snapshot_every
        self.snapshot_cost = snapshot_cost
        self.confirm_after = confirm_after
        self.max_replay_bytes = max_replay_bytes
        self.clone_batches = clone_batches
        self.snapshot_device: Where = snapshot_device
        self.memory_budget = memory_budget
        self.backoff = Backoff(relax_after)
        self.escalation = EscalationPolicy(budget)
        self._registered: list[Stateful] = []
        self._executor: ResponseExecutor | None = None
        self._raising: RaisingSteps | None = None
        self._stopped: Incident | None = None
        """The incident for which the fit does not start."""

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_executor": None, "_raising": None, "_stopped": None}

    def register(self, *objects: Stateful) -> None:
        """Adds objects whose state a rollback restores, such as an average of weights.

        A rejected step may have changed them, so it is undone by restoring a snapshot too.

        Args:
            objects: with ``state_dict`` and ``load_state_dict``.

        Raises:
            TypeError: if one lacks them.
        """
        for each in objects:
            if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
                raise TypeError(
                    f"register() needs state_dict and load_state_dict, {type(each).__name__} "
                    "lacks them"
                )
            self._registered.append(each)

    @property
    def can_roll_back(self) -> bool:
        """Returns whether there is a snapshot to go back to."""
        return self._executor is not None and self._executor.can_roll_back

    def recent_batches(self) -> tuple[list[Any], int]:
        """Returns the raw batches that are kept to be replayed, the present one last.

        Also returned is the index of the first that is of the same epoch.
        """
        return ([], 0) if self._executor is None else self._executor.recent_batches()

    @property
    def confirmed_step(self) -> int | None:
        """Returns the step of the newest confirmed snapshot; None if there is none."""
        return None if self._executor is None else self._executor.confirmed_step

    @contextmanager
    def at_confirmed_step(self) -> Iterator[tuple[int, int] | None]:
        """Has the fit in the state of `confirmed_step` while a ``with`` block runs.

        To be used in ``on_train_end`` or ``on_exception``, so that the state can be saved.

        Yields:
            Epoch of the next batch in that state, and its index in the epoch; None if the fit stays
            in its present state, as that state cannot be restored.
        """
        if self._executor is None:
            yield None
            return
        with self._executor.at_confirmed_step() as following:
            yield following

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a fit that this callback cannot protect.

        Raises:
            ValueError: without a `GradientMonitor` before it.
            RuntimeError: under a strategy that is not supported.
        """
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)
            # A fit that ended in an exception has had no teardown.
            self._executor = self._raising = self._stopped = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to record the data, and puts restored factors in force.

        Raises:
            TrainingStopped: if the state is damaged before the first step.
        """
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            raise TrainingStopped(
                f"nothing was trained: {stopped.anomaly.message}. {stopped.advice}", stopped
            )
        require_whole_optimizers(trainer, self)
        limit = self.memory_budget
        engine = RollbackEngine(
            trainer,
            pl_module,
            confirm_after=self.confirm_after,
            cadence=SnapshotCadence(self.snapshot_every, self.snapshot_cost),
            replay=self.after_rollback == "replay",
            max_replay_bytes=self.max_replay_bytes,
            clone=self.clone_batches,
            registered=self._registered,
            snapshot_device=self.snapshot_device,
            memory_budget=None if limit is None else parse_bytes("memory_budget", limit),
            gather=gather_of(trainer),
            owner=self,
        )
        self._executor = ResponseExecutor(trainer, pl_module, engine, self.escalation, self.backoff)
        # Other ranks would wait for one that raises; exceptions of a loader are not of a step.
        possible = sharing(trainer) == "alone" or can_guard_ranks(trainer)
        if possible and engine.records_batches:
            self._raising = RaisingSteps(trainer, pl_module, engine, self)

    def startup_text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Returns how many snapshots are kept, how large they are and how often they are taken."""
        return "" if self._executor is None else self._executor.startup_text()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the data of a new epoch, which may have another loader."""
        if self._executor is not None:
            self._executor.epoch_started()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records to which step the batch belongs."""
        if self._executor is not None:
            self._executor.batch_started()
        if self._raising is not None:
            self._raising.batch_started()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks for the bad batch while an accumulation window is retried."""
        if self._executor is not None:
            self._executor.backward_ended()

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Remembers the measurement of the step that is judged next."""
        if self._executor is not None:
            self._executor.measured(stats)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Counts the step, clips it if the clip is tightened, relaxes what was tightened."""
        if self._executor is not None:
            self._executor.accept(stats)
        if self._raising is not None:
            self._raising.accepted()

    def on_regime_change(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Restores what was lowered for steps that turn out to be the new normal."""
        if self._executor is not None:
            self._executor.accept_regime(stats)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Skips or clips a step that one rank rejects, until all ranks have voted on it."""
        if self._executor is not None:
            self._executor.object_alone(anomaly)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Chooses the response, and does the part of it that must come before the update."""
        if self._executor is not None:
            incident.memory = self._executor.memory_record
            incident.cadence = self._executor.cadence_record
        if incident.at_start and self._executor is None and not incident.resolved:
            incident.resolve(Stop("no snapshot is better than the state that was loaded"))
            self._stopped = incident
        elif self._executor is not None:
            self._executor.respond(incident)
        if self._raising is not None:
            self._raising.explain(incident)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets that the present step was accepted: another rank may have rejected it."""
        if self._raising is not None:
            self._raising.rolled_back()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Does the part of the response that comes after the step.

        Raises:
            TrainingStopped: if no response in budget is left.
        """
        if self._executor is not None:
            self._executor.batch_ended()
        if self._raising is not None:
            self._raising.batch_ended()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undoes what hooks of a rejected batch have done since it was undone."""
        if self._executor is not None:
            self._executor.validation_started()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Releases the schedulers that were held for a rejected batch."""
        if self._executor is not None:
            self._executor.epoch_ended()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the nominal learning rates, as the optimizers may be saved now."""
        self._stop_catching()
        if self._executor is not None:
            self._executor.close()
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves optimizers and memory as they were before the fit."""
        if stage == "fit":
            self._stop_catching()
            for optimizer in trainer.optimizers:
                learning_rate_multiplier(optimizer).detach()
            if self._executor is not None:
                self._executor.close()
            self._executor = self._raising = None

    def _stop_catching(self) -> None:
        if self._raising is not None:
            self._raising.close()

    def lower_learning_rate(self, factor: float) -> bool:
        """Multiplies learning rate and clip by a factor; healthy steps raise both again."""
        self.backoff.cut(factor, factor)
        if self._executor is not None:
            self._executor.apply_learning_rates()
        return True

    def consensus_state(self) -> dict[str, Any]:
        """Returns what was spent, what is in force and what is healthy."""
        running = {} if self._executor is None else self._executor.consensus_state()
        return {**self.state_dict(), **running}

    def load_consensus_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what rank 0 has spent and has in force."""
        self.load_state_dict(state)
        if self._executor is not None:
            self._executor.load_consensus_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns what was spent and what is in force, under the keys of version 0.1.0."""
        return {"ladder": self.escalation.state_dict(), "throttle": self.backoff.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores such a state; it is in force from the start of training."""
        self.escalation.load_state_dict(state_dict["ladder"])
        self.backoff.load_state_dict(state_dict["throttle"])
