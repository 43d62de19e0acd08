"""`GradientFlow`: the gradients layer by layer, as pictures in TensorBoard or beside the run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.gradient_flow.picture import draw_gradient_flow
from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.detectors import Anomaly
from lit_stability.diagnosis.training_phases import PhaseRanges
from lit_stability.figures import new_figure, to_png
from lit_stability.incidents import Incident
from lit_stability.measurement.gradient_distribution import gradient_details
from lit_stability.measurement.step_stats import GradientDetail, StepStats
from lit_stability.tensorboard.images import write_figure
from lit_stability.trainer_internals import callbacks_of, logger_step, run_directory
from lit_stability.training_state.atomic_write import write_and_keep

log = logging.getLogger("lightning.pytorch.lit_stability")


class GradientFlow(StabilityCallback):
    """Draws the gradients layer by layer, in the course of a run and at each incident.

    Nothing is measured for it while the run is healthy: what is drawn are the details that the
    `GradientMonitor` before it takes every ``details_every`` steps, of the first of them and then
    of the first after every ``every_n_steps``. At the first strike of an incident the gradients of
    the offending step are measured and drawn, before the tint of what they were before. Nothing in
    the run is changed by it.

    Pictures recorded, by rank 0:

    * ``stability/gradient_flow``: to each logger that takes images, such as TensorBoard's.
    * ``stability/gradient_flow_incident``: the same, of an offending step.
    * ``gradient_flow/step=00000500.png`` and ``step=00000731-incident-1.png`` in
      ``trainer.log_dir``, where no logger takes images.

    The title says what norms the run itself has had in the phase it is in, and the end of the fit
    says it for each: warm-up, descent, plateau; see `PhaseRanges`, which follows the first
    optimizer. A checkpoint has these ranges, and `lit-stability doctor` prints them.

    Put it before the callbacks that respond, which drop the gradients of the offending step. Under
    FSDP2 the picture is of the shards that rank 0 holds. Other steps cost some microseconds; a
    picture, on which training waits, 0.35 to 0.7 s (measured in `draw_gradient_flow`): 1.4 ms a
    step at most, at one in 500.

    Args:
        every_n_steps: optimizer steps between two pictures.
        layers: most rows of a picture.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, *, every_n_steps: int = 500, layers: int = 40) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("layers", layers)):
            if not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.phases = PhaseRanges()
        """The gradient norms of the run so far, by phase."""
        self._history: dict[int, deque[tuple[GradientDetail, ...]]] = {}
        self._drawn: dict[int, int] = {}
        self._suspected: tuple[GradientDetail, ...] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            MatplotlibMissing: if matplotlib is not installed.
            ValueError: without a `GradientMonitor` before it, or one that measures no details.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        monitors = [c for c in callbacks_of(trainer) if isinstance(c, GradientMonitor)]
        if not any(monitor.details_every for monitor in monitors):
            raise ValueError(
                "GradientFlow draws what GradientMonitor measures, and details_every=0 measures "
                "nothing; write GradientMonitor(details_every=50)"
            )
        new_figure()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another fit, other pictures."""
        self._history, self._drawn, self._suspected = {}, {}, ()

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Count the norm, and draw what was measured, if it is time."""
        if stats.optimizer == 0:
            rate = max(stats.nominal_learning_rates, default=0.0)
            self.phases.update(stats.step, stats.loss, stats.grad_norm, rate)
        if not stats.details:
            return
        history = self._history_of(stats.optimizer)
        last = self._drawn.get(stats.optimizer)
        if last is None or stats.step - last >= self.every_n_steps:
            self._drawn[stats.optimizer] = stats.step
            title = f"step {stats.step}, loss {stats.loss:.4g}{self._usual(stats.optimizer)}"
            name = _name(stats.step, stats.optimizer)
            self._draw(trainer, stats.details, "stability/gradient_flow", title, name, history)
        history.append(stats.details)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Look at the gradients before they are dropped; they are drawn if all ranks object."""
        if trainer.is_global_zero:
            self._suspected = _measured(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of them."""
        self._suspected = ()

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Draw the gradients of the step that opened it."""
        if incident.occurrences > 1 or not trainer.is_global_zero:
            return
        details = _measured(pl_module) or self._suspected
        if not details:
            log.info("no gradient flow of incident %d: its gradients were dropped", incident.id)
            return
        anomaly = incident.anomaly
        title = f"incident {incident.id} at step {anomaly.step}: {anomaly.kind}"
        title += self._usual(anomaly.optimizer)
        name = f"{_name(anomaly.step, anomaly.optimizer)}-incident-{incident.id}"
        tag = "stability/gradient_flow_incident"
        self._draw(trainer, details, tag, title, name, self._history_of(anomaly.optimizer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what norms each phase has had."""
        ranges = self.phases.ranges()
        if ranges and trainer.is_global_zero:
            log.info("\n".join(["gradient norms by phase", *(r.in_words() for r in ranges)]))

    def _usual(self, optimizer: int) -> str:
        """The norms so far of the phase that the run is in, behind a title."""
        found = self.phases.range_of(self.phases.phase) if optimizer == 0 else None
        return "" if found is None else f"\nso far in {found.in_words()}"

    def rewindable_state(self) -> dict[str, Any]:
        """What was counted: steps that are taken again count once."""
        return self.phases.state_dict()

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self.phases.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The norms by phase; {} before the first step."""
        return {"phases": self.phases.state_dict()} if self.phases.ranges() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.phases.load_state_dict(state_dict["phases"])

    def _history_of(self, optimizer: int) -> deque[tuple[GradientDetail, ...]]:
        return self._history.setdefault(optimizer, deque(maxlen=20))

    def _draw(
        self,
        trainer: Trainer,
        details: Sequence[GradientDetail],
        tag: str,
        title: str,
        name: str,
        history: Sequence[Sequence[GradientDetail]],
    ) -> None:
        """Draw, and give it to the loggers, or write it; what fails is logged, training goes on."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        figure = draw_gradient_flow(details, title=title, history=history, layers=self.layers)
        figure.set_dpi(110)
        try:
            if write_figure(trainer.loggers, tag, figure, logger_step(trainer)):
                return
            directory = run_directory(trainer)
            if directory is not None:
                write_and_keep(directory / "gradient_flow" / f"{name}.png", to_png(figure, dpi=110))
        except Exception as error:
            # A full disk, a logger that refuses: a picture must never be what ends the run.
            log.warning("the gradient flow of %s was not written (%s)", title, error)


def _measured(pl_module: LightningModule) -> tuple[GradientDetail, ...]:
    found = gradient_details(pl_module.named_parameters())
    return tuple(GradientDetail(**each) for each in found)


def _name(step: int, optimizer: int) -> str:
    return f"step={step:08d}" + (f"-optimizer-{optimizer}" if optimizer else "")
