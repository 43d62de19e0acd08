"""`AnomalyCheckpoint`: saves a checkpoint, the batch and the history of an incident."""

import platform
import shutil
import tempfile
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import (
    monitor_of,
    require_monitor,
    require_supported_strategy,
)
from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident
from lit_stability.incidents.folders import HISTORY, REPORT, delete_parts, part_prefix, prune
from lit_stability.incidents.log import to_json
from lit_stability.incidents.report import PRUNED, markdown
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LIGHTNING_VERSION, LightningModule, Trainer
from lit_stability.measurement.gradient_distribution import gradient_details
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import guarded
from lit_stability.trainer_internals import adapter_of, run_directory
from lit_stability.training_state.rng import capture_rng

log = suite_logger()


class AnomalyCheckpoint(StabilityCallback):
    """Saves one folder per incident, before any callback responds to it.

    The folder ``incidents/<step>-<id>`` in the folder of the run
    (`lit_stability.trainer_internals.run_directory`) is written completely or not at all:

    * ``checkpoint.ckpt``: the complete state as Lightning saves it (model, optimizers, schedulers,
      scaler, loops, callbacks), including the damaged values: for analysis, not for a resume.
    * ``scene.pt``: the bad batch, gradient statistics per parameter, RNG states.
    * ``history.json``: the last losses and gradient norms, those of the bad step last; versions,
      precision, accumulation and optimizer options.
    * ``config.yaml``: the run's config, if it has one.
    * ``report.md``: a readable report; rewritten when the outcome is known.

    Every rank other than 0 writes a folder ``<step>-<id>-rank<r>`` with its own batch. Under DDP no
    rank waits for another, and only rank 0 writes ``checkpoint.ckpt``, without what user hooks
    would add; with sharded weights it is Lightning's folder of shards.

    If saving fails (a full disk, a read-only folder, a batch that cannot be pickled), the callback
    logs a warning and training continues.

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(incident_checkpoint=dict(max_incidents=10, max_bytes=2**30))

    Args:
        history: number of losses and gradient norms kept.
        max_incidents: number of folders kept whole. The first and the newest are never pruned; of
            the others, the oldest is pruned first: all but its ``report.md`` is deleted. Folders of
            another run are not counted, and not touched.
        max_bytes: total size of the folders kept whole, in bytes, by the same rule.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self, *, history: int = 100, max_incidents: int = 5, max_bytes: int = 10 * 2**30
    ) -> None:
        for name, value, least in (
            ("history", history, 1),
            ("max_incidents", max_incidents, 2),
            ("max_bytes", max_bytes, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.max_incidents = max_incidents
        self.max_bytes = max_bytes
        self._history: deque[tuple[int, float, float]] = deque(maxlen=history)
        self._root: Path | None = None
        """The folder of the incident folders, in a fit that writes files."""
        self._batch: Any = None
        self._suspected: list[dict[str, Any]] = []

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_batch": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a fit in which this callback cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
            RuntimeError: under a strategy that is not supported.
        """
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the incident folder, and deletes partial folders left by a killed run."""
        directory = run_directory(trainer)
        self._root = None if directory is None else directory / "incidents"
        if self._root is not None and trainer.is_global_zero:
            run = str(monitor_of(trainer).run_id)
            what = f"partial folders in {self._root} cannot be deleted"
            guarded(self, what, partial(delete_parts, self._root, run))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps a reference to the batch, not a copy."""
        self._batch = batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Releases the batch."""
        self._batch, self._suspected = None, []

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Adds loss and gradient norm to the history."""
        self._history.append((stats.step, stats.loss, stats.grad_norm))

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Records gradient statistics before the gradients are dropped."""
        self._suspected = gradient_details(adapter_of(trainer).named_parameters(pl_module))

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Saves the incident folder at the first occurrence."""
        stats = incident.stats
        if stats is not None:
            self._history.append((stats.step, stats.loss, stats.grad_norm))
        if incident.occurrences > 1 or self._root is None:
            return
        folder = self._root / f"{incident.first.step:08d}-{incident.id}{_suffix(trainer)}"
        # A full disk, a batch that cannot be pickled, a user's save hook that raises: a failed
        # save must never end the run.
        guarded(
            *(self, f"the folder of an incident was not saved in {self._root}"),
            lambda: self._save(trainer, pl_module, incident, folder),
        )

    def on_incident_closed(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> None:
        """Rewrites the report with the outcome."""
        if trainer.is_global_zero:
            guarded(self, "a report was not updated", partial(_rewrite_report, incident))

    def on_outcome_changed(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> None:
        """Rewrites the report with the other outcome."""
        if trainer.is_global_zero:
            guarded(self, "a report was not updated", partial(_rewrite_report, incident))

    def _save(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident, folder: Path
    ) -> None:
        part = self._create_folder(trainer, folder, incident.run)
        try:
            adapter = adapter_of(trainer)
            if trainer.is_global_zero or adapter.saves_incidents_together:
                adapter.save_incident(part / "checkpoint.ckpt")
            context = {
                "batch": self._batch,
                "gradients": gradient_details(adapter.named_parameters(pl_module))
                or self._suspected,
                "rng": capture_rng(),
                "step": incident.first.step,
                "batch_idx": incident.batch_idx,
                "epoch": incident.epoch,
            }
            torch.save(context, part / "scene.pt")
            record = self._history_record(trainer) | {"run": incident.run}
            (part / HISTORY).write_text(to_json(record), encoding="utf8")
            config = folder.parent.parent / "config.yaml"
            if config.is_file():
                shutil.copy(config, part)  # with its mode, so that only the user can read it
            (part / REPORT).write_text(markdown(incident), encoding="utf8")
            if folder.exists():
                folder = folder.with_name(f"{folder.name}-{part.name.removeprefix('.part-')}")
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        incident.path = str(folder)
        limits = self.max_incidents, self.max_bytes
        for pruned in prune(folder, incident.run, trainer.global_rank, *limits):
            _report_pruned(trainer, pruned)

    @staticmethod
    def _create_folder(trainer: Trainer, folder: Path, run: str) -> Path:
        """Returns a partial folder to write into; ranks that save together all need one."""
        error: OSError | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=part_prefix(run), dir=folder.parent))
        except OSError as caught:
            error = caught
        collective = trainer.world_size > 1 and adapter_of(trainer).saves_incidents_together
        if collective and not trainer.strategy.reduce_boolean_decision(error is None):
            error = error or OSError("another rank cannot write its folder")
        if error is not None:
            raise error
        return part

    def _history_record(self, trainer: Trainer) -> dict[str, Any]:
        steps, losses, norms = zip(*self._history, strict=True) if self._history else ((), (), ())
        return {
            "steps": steps,
            "losses": losses,
            "grad_norms": norms,
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "optimizers": [
                {"class": type(o).__name__, "groups": [_options(g) for g in o.param_groups]}
                for o in trainer.optimizers
            ],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": LIGHTNING_VERSION,
                "platform": platform.platform(),
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the history as lists of floats."""
        return {"history": [list(row) for row in self._history]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the history."""
        self._history.extend((int(s), float(a), float(b)) for s, a, b in state_dict["history"])


def _suffix(trainer: Trainer) -> str:
    return f"-rank{trainer.global_rank}" if trainer.global_rank else ""


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a parameter group as JSON types."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in group.items() if k != "params"}


def _report_pruned(trainer: Trainer, folder: Path) -> None:
    """Says in the log, the report, the record and the loggers that a folder was pruned."""
    if not trainer.is_global_zero:
        return
    log.info("%s was pruned to make room; its %s stays", folder, REPORT)
    monitor = monitor_of(trainer)
    for incident in monitor.incidents:
        if incident.path == str(folder):
            incident.pruned = True
            _rewrite_report(incident)
            monitor.amended(incident)
            return
    # An incident from before a restart, of which only the report is known.
    with (folder / REPORT).open("a", encoding="utf8") as report:
        report.write(f"\n* **saved to**: {PRUNED}\n")


def _rewrite_report(incident: Incident) -> None:
    # The folder may have been deleted by somebody.
    if incident.path is None or not Path(incident.path).is_dir():
        return
    (Path(incident.path) / REPORT).write_text(markdown(incident), encoding="utf8")
