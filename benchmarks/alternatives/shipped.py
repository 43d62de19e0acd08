"""No protection, Lightning's two protections, and this suite.

Imports Lightning and `lit_stability`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks.spike import SpikeDetection

from benchmarks.alternatives.protection import Protection
from lit_stability import GradientMonitor, Incident, TrainingStopped, stability_callbacks


class Nothing(Protection):
    """A Trainer without protection."""

    name = "none"


class Clipping(Protection):
    """``Trainer(gradient_clip_val=1.0)``."""

    name = "clipping at 1.0"

    def trainer_options(self) -> dict[str, Any]:
        """See `Protection`."""
        return {"gradient_clip_val": 1.0}


class LightningSpikeDetection(Protection):
    """Lightning's `SpikeDetection`: ends the fit if the loss is not finite or has tripled."""

    name = "SpikeDetection"
    raises_alarms = True

    def __init__(self) -> None:
        self.callback: SpikeDetection | None = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        self.callback = SpikeDetection(exclude_batches_path=str(folder / "skip_batches.json"))
        return [self.callback]

    def alarms(self) -> Sequence[str]:
        """Returns the spikes; each excludes two batches."""
        return [] if self.callback is None else ["spike"] * (len(self.callback.bad_batches) // 2)

    def stops(self) -> tuple[type[BaseException], ...]:
        """See `Protection`."""
        return (TrainingSpikeException,)


class Suite(Protection):
    """``stability_callbacks()`` with default options."""

    name = "this suite"
    raises_alarms = True
    options: ClassVar[dict[str, Any]] = {}
    """Options of `stability_callbacks`."""

    def __init__(self) -> None:
        self.monitor: GradientMonitor | None = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        suite = stability_callbacks(**self.options)
        self.monitor = next(c for c in suite if isinstance(c, GradientMonitor))
        return suite

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far."""
        return [] if self.monitor is None else self.monitor.incidents

    def alarms(self) -> Sequence[str]:
        """Returns the kind of the first anomaly of each incident."""
        return [incident.first.kind for incident in self.incidents]

    def stops(self) -> tuple[type[BaseException], ...]:
        """See `Protection`."""
        return (TrainingStopped,)


class ObservingSuite(Suite):
    """``stability_callbacks(mode="observe")``: reports incidents and changes nothing."""

    name = "this suite, observing"
    options: ClassVar[dict[str, Any]] = {"mode": "observe"}
