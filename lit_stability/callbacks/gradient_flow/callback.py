"""`GradientFlow`: pictures of the gradients per layer, in TensorBoard or in the run's folder."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_stability.callbacks.gradient_flow.picture import draw_gradient_flow
from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.detectors import Anomaly
from lit_stability.diagnosis.training_phases import PhaseRanges
from lit_stability.figures import new_figure, to_png
from lit_stability.incidents import Incident
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.gradient_distribution import gradient_details
from lit_stability.measurement.step_stats import GradientDetail, StepStats
from lit_stability.outside import guarded
from lit_stability.tensorboard.images import write_figure
from lit_stability.trainer_internals import adapter_of, callbacks_of, logger_step, run_directory
from lit_stability.training_state.atomic_write import write_and_keep

log = suite_logger()


class GradientFlow(StabilityCallback):
    """Draws the gradients of every layer, regularly during a run and at each incident.

    While the run is healthy, the callback measures nothing itself. It draws the details that the
    `GradientMonitor` before it takes every ``details_every`` steps: the first of them, and then the
    first after every ``every_n_steps``. At the first occurrence of an incident it measures and
    draws the gradients of the bad step, with the range of earlier steps as a tint behind them. The
    callback does not change the run.

    Pictures logged by rank 0:

    * ``stability/gradient_flow``: to each logger that accepts images, such as TensorBoard's.
    * ``stability/gradient_flow_incident``: the same, of a bad step.
    * ``gradient_flow/step=00000500.png`` and ``step=00000731-incident-1.png`` in
      the folder of the run, if no logger accepts images.

    The title shows the range of gradient norms in the current phase of the run so far. The end of
    the fit logs the range of each phase: warm-up, descent, plateau; see `PhaseRanges`, which
    follows the first optimizer. A checkpoint holds these ranges; `lit-stability doctor` prints
    them.

    Place it before the callbacks that respond, because they drop the gradients of the bad step.
    Under FSDP2 the picture shows the shards of rank 0. Other steps cost some microseconds. Training
    waits for a picture, 0.35 to 0.7 s (measured in `draw_gradient_flow`): at most 1.4 ms per step
    for one picture in 500 steps.

    >>> from lit_stability import GradientMonitor
    >>> callbacks = [GradientMonitor(), GradientFlow(every_n_steps=100)]

    Args:
        every_n_steps: optimizer steps between two pictures.
        layers: largest number of rows in a picture.

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
        """Gradient norms of the run so far, by phase."""
        self._history: dict[int, deque[tuple[GradientDetail, ...]]] = {}
        self._drawn: dict[int, int] = {}
        self._suspected: tuple[GradientDetail, ...] = ()
        self._directory: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a fit in which this callback cannot work.

        Raises:
            MatplotlibMissing: if matplotlib is not installed.
            ValueError: without a `GradientMonitor` before it, or if that measures no details.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        monitors = [c for c in callbacks_of(trainer) if isinstance(c, GradientMonitor)]
        if not any(monitor.details_every for monitor in monitors):
            raise ValueError(
                "GradientFlow draws the details of GradientMonitor, which details_every=0 turns "
                "off; write GradientMonitor(details_every=50)"
            )
        new_figure()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clears the history of an earlier fit."""
        self._history, self._drawn, self._suspected = {}, {}, ()
        # All ranks ask for it, so not where one of them draws alone.
        self._directory = run_directory(trainer)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Counts the norm, and draws the measured details if a picture is due."""
        if stats.optimizer == 0:
            rate = max(stats.nominal_learning_rates, default=0.0)
            self.phases.update(stats.step, stats.loss, stats.grad_norm, rate)
        if not stats.details:
            return
        history = self._history_of(stats.optimizer)
        last = self._drawn.get(stats.optimizer)
        if last is None or stats.step - last >= self.every_n_steps:
            self._drawn[stats.optimizer] = stats.step
            title = f"step {stats.step}, loss {stats.loss:.4g}{self._phase_line(stats.optimizer)}"
            name = _name(stats.step, stats.optimizer)
            self._draw(trainer, stats.details, "stability/gradient_flow", title, name, history)
        history.append(stats.details)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Measures the gradients before they are dropped; they are drawn if an incident follows."""
        if trainer.is_global_zero:
            self._suspected = _measured(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Releases the gradient details of a rejected step."""
        self._suspected = ()

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Draws the gradients of the step that opened the incident."""
        if incident.occurrences > 1 or not trainer.is_global_zero:
            return
        details = _measured(trainer, pl_module) or self._suspected
        if not details:
            log.info(
                "no gradient flow of incident %d: its gradients were dropped; place GradientFlow "
                "before the callbacks that respond",
                incident.id,
            )
            return
        anomaly = incident.anomaly
        title = f"incident {incident.id} at step {anomaly.step}: {anomaly.kind}"
        title += self._phase_line(anomaly.optimizer)
        name = f"{_name(anomaly.step, anomaly.optimizer)}-incident-{incident.id}"
        tag = "stability/gradient_flow_incident"
        self._draw(trainer, details, tag, title, name, self._history_of(anomaly.optimizer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the range of gradient norms of each phase."""
        ranges = self.phases.ranges()
        if ranges and trainer.is_global_zero:
            log.info("\n".join(["gradient norms by phase", *(r.in_words() for r in ranges)]))

    def _phase_line(self, optimizer: int) -> str:
        """Returns the second line of a title: the norms so far in the current phase."""
        phase_range = self.phases.range_of(self.phases.phase) if optimizer == 0 else None
        return "" if phase_range is None else f"\nso far in {phase_range.in_words()}"

    def rewindable_state(self) -> dict[str, Any]:
        """Returns the norms by phase, so that replayed steps count only once."""
        return self.phases.state_dict()

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores the norms by phase."""
        self.phases.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns the norms by phase; {} before the first step."""
        return {"phases": self.phases.state_dict()} if self.phases.ranges() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the norms by phase; counting continues from there."""
        if "phases" not in state_dict:
            return
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
        """Draws, and hands the figure to the loggers or writes a file; logs a failure to do so."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        figure = draw_gradient_flow(details, title=title, history=history, layers=self.layers)
        figure.set_dpi(110)

        def write() -> None:
            if write_figure(trainer.loggers, tag, figure, logger_step(trainer)):
                return
            if self._directory is not None:
                write_and_keep(
                    self._directory / "gradient_flow" / f"{name}.png", to_png(figure, dpi=110)
                )

        guarded(self, "a picture of the gradient flow was not written", write)


def _measured(trainer: Trainer, pl_module: LightningModule) -> tuple[GradientDetail, ...]:
    details = gradient_details(adapter_of(trainer).named_parameters(pl_module))
    return tuple(GradientDetail(**detail) for detail in details)


def _name(step: int, optimizer: int) -> str:
    return f"step={step:08d}" + (f"-optimizer-{optimizer}" if optimizer else "")
