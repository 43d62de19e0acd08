"""Reports what makes a schedule end the training unnoticed. May import Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lit_stability.callbacks.gradient_monitor.reporter import log
from lit_stability.detectors.dead_learning_rate import DEAD_SHARE, DeadLearningRate, DeadRate
from lit_stability.lightning_package import EarlyStopping, ModelCheckpoint, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.trainer_internals import callbacks_of, describe_scheduler, known_metrics

_UNTRAINED = 20
"""First steps at a learning rate of 0 after which a schedule by epochs is reported."""


class ScheduleWatch:
    """Reports a monitored metric that is NaN, and a learning rate that is almost 0; each once.

    A learning rate is almost 0 because its schedule ends, because responses have cut it, or because
    a warm-up from 0 is stepped once per epoch, so that the whole first epoch trains nothing.

    `ReduceLROnPlateau` takes a NaN for no improvement and lowers the learning rate, `EarlyStopping`
    stops and `ModelCheckpoint` cannot rank. Lightning says that of `EarlyStopping` only.

    Args:
        trainer: at the start of its fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._rate = DeadLearningRate()
        self._untrained: int | None = 0
        """Steps so far, all at a learning rate of 0; None once that is over or was reported."""
        self._reported: set[str] = set()
        """Metrics that were NaN."""
        self._largest = 0.0
        """The largest learning rate that was in force."""
        self.rate_is_cut = self._reported_cut = False
        """Whether responses have cut the learning rate so far that nothing is learnt."""

    def stepped(self, stats: StepStats) -> None:
        """Adds an accepted step."""
        plateaus = {c.monitor for c in self._trainer.lr_scheduler_configs if c.reduce_on_plateau}
        dead = self._rate.update(
            stats.step,
            stats.optimizer,
            stats.loss,
            stats.nominal_learning_rates,
            metric=None if not plateaus else math.nan if plateaus & self._reported else 0.0,
        )
        if dead is not None:
            self._warn(f"step {stats.step}: {self._text(dead)}")
        self._look_at_start(stats)
        self._look_at_cuts(stats)

    def _look_at_start(self, stats: StepStats) -> None:
        """Reports once a fit that begins with many steps at a learning rate of 0, by epochs.

        One step at 0 is how a warm-up of steps begins. A rate that is 0 without a schedule, or for
        some groups only, is meant.
        """
        if self._untrained is None:
            return
        if any(rate > 0 for rate in stats.nominal_learning_rates):
            self._untrained = None
            return
        self._untrained += 1
        if self._untrained < _UNTRAINED:
            return
        self._untrained = None
        if not self._trainer.lightning_module.automatic_optimization:
            return  # the module steps its schedulers itself
        configs = (c for c in self._trainer.lr_scheduler_configs if not c.reduce_on_plateau)
        by_epoch = [describe_scheduler(c.scheduler) for c in configs if c.interval == "epoch"]
        if by_epoch:
            names = " and ".join(by_epoch)
            self._warn(
                f"step {stats.step}: the learning rate is 0 since the start, and {names} changes "
                "it once per epoch: nothing is learnt until then; set its interval to 'step' if "
                "it counts steps, or let it start above 0"
            )

    def _look_at_cuts(self, stats: StepStats) -> None:
        """Reports once a learning rate of which the responses to incidents have left nothing.

        One that is held against a schedule that jumped is as large as before, and no fault.
        """
        rate = max(stats.learning_rates, default=0.0)
        self._largest = max(self._largest, rate)
        cut = stats.share_of_schedule < DEAD_SHARE and rate < DEAD_SHARE * self._largest
        self.rate_is_cut = cut
        if cut and not self._reported_cut:
            self._reported_cut = True
            nominal = max(stats.nominal_learning_rates)
            self._warn(
                f"step {stats.step}: the learning rate is cut to {rate / nominal:.0e} of its "
                f"schedule ({nominal:.3g} -> {rate:.3g}): nothing is learnt any more; stop the "
                "run, and mend what the incidents name as their cause"
            )

    def _text(self, dead: DeadRate) -> str:
        names = [describe_scheduler(c.scheduler) for c in self._trainer.lr_scheduler_configs]
        return (
            f"the learning rate is {dead.rate:.3g} since step {dead.since}, after "
            f"{dead.peak:.3g}: nothing is learnt any more, and the loss had not reached its floor; "
            f"check {' and '.join(names) or 'what sets it'}"
        )

    def metrics_known(self) -> None:
        """Checks the metrics that are monitored, after an epoch or a validation."""
        if self._trainer.sanity_checking:
            return
        users: dict[str, list[str]] = {}
        for name, user in self._monitored():
            if name not in self._reported:
                users.setdefault(name, []).append(user)
        for name, value in known_metrics(self._trainer, users).items():
            if math.isnan(value):
                self._reported.add(name)
                self._warn(
                    f"step {self._trainer.global_step}: {name} is NaN, and "
                    f"{' and '.join(dict.fromkeys(users[name]))} monitors it: no later value can "
                    "be compared with it; find the sample or batch that makes it NaN"
                )

    def _monitored(self) -> Iterator[tuple[str, str]]:
        """Yields the name of each monitored metric, and who monitors it."""
        for config in self._trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor:
                yield config.monitor, type(config.scheduler).__name__
        for callback in callbacks_of(self._trainer):
            if not isinstance(callback, EarlyStopping | ModelCheckpoint):
                continue
            # A subclass with an `__init__` of its own may have none.
            if monitor := getattr(callback, "monitor", None):
                yield monitor, type(callback).__name__

    def _warn(self, line: str) -> None:
        if self._trainer.is_global_zero:
            log.warning("%s", line)
