"""The checks before the first step, on the batch that training is about to take.

May import Lightning; the checks themselves, in `lit_stability.checks.preflight`, know none.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.callbacks.gradient_monitor.reporter import log
from lit_stability.callbacks.gradient_monitor.validation import require_package
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.checks.preflight import (
    Expectations,
    Finding,
    Memorise,
    NotApplicableError,
    PreflightError,
    Report,
    Subject,
    preflight,
)
from lit_stability.detectors.anomaly import require_instance
from lit_stability.trainer_internals import loss_scaler, sharing, why_unsupported

OnError = Literal["warn", "stop"]
_LARGEST_SCALE = 1024.0
"""Of the loss in fp16: enough for gradients of 6e-11, and far from overflow at the first step."""
_OF_THE_BATCH = ("batch", "targets", "step", "initial loss")


class Preflight(StabilityCallback):
    """Checks model, batch and optimizer once, before the first step.

    It looks at the first training batch when the trainer has it at hand: nothing is fetched for
    it. Everything is tried on copies, which for a moment take as much memory as the weights three
    times (the copy, its gradients, what it was) and the optimizer's state; weights, buffers,
    gradients, optimizers and generators are to the bit what they are without it. It takes about
    as long as six steps. A run that goes on from a checkpoint is not checked.

    Each finding is logged once. With ``on_error="stop"`` an error raises `PreflightError` before
    anything is trained; under DDP on all ranks, whichever found it. Under manual optimization only
    what needs no step is checked, under a strategy that shards weights nothing; it is said.

    A LightningModule may define ``preflight_probes(batch)``: `MaskProbe`s, which say what may and
    what must be seen, and `PositionProbe`s, which say what is added to positions. What it logs
    during the checks goes nowhere; what it writes to a logger's ``experiment`` itself does not.

    Args:
        on_error: ``warn`` to log and train, ``stop`` to raise.
        classes: V of a cross entropy that torch's functions do not compute.
        one_vs_rest: K + 1 binary terms that are summed.
        pretrained: whether the head has been trained, so that a low first loss is no leak.
        frozen: names of parameters meant to be frozen, with wildcards, such as ``backbone.*``.
        memorise: samples to learn by heart; None for none, as it costs steps.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        on_error: OnError = "warn",
        classes: int | None = None,
        one_vs_rest: int | None = None,
        pretrained: bool = False,
        frozen: Sequence[str] = (),
        memorise: Memorise | None = None,
    ) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error={on_error!r} is unknown; choose 'warn' or 'stop'")
        if isinstance(frozen, str):
            raise ValueError(f"frozen={frozen!r} must be a list of names; write [{frozen!r}]")
        require_instance("memorise", memorise, Memorise)
        self.on_error = on_error
        self._options: dict[str, Any] = {
            "classes": classes,
            "one_vs_rest": one_vs_rest,
            "pretrained": pretrained,
            "frozen": tuple(frozen),
            "memorise": memorise,
        }
        Expectations(**self._options)  # refuses what is out of range now
        self.report: Report | None = None
        """Of the latest fit that was checked; None before, and where none was."""
        self._pending = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of another package."""
        require_package(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch of a run that begins; a checkpoint's step is known by now."""
        self._pending = trainer.global_step == 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check on the first batch; see the class."""
        if not self._pending:
            return
        self._pending = False
        self.report = self.look(trainer, pl_module, batch)
        _tell(trainer, self.report)
        if self.on_error == "stop":
            self._stop(trainer, self.report)

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Report:
        """Run the checks that apply; nothing is logged and nothing raised for a finding.

        Args:
            trainer: in a fit, before its first step.
            pl_module: that is going to train.
            batch: on the module's device.

        Raises:
            ValueError: what was declared does not fit the model.
        """
        if sharing(trainer) not in ("alone", "replicas"):
            reason = f"{type(trainer.strategy).__name__}: a rank has no whole copy of the weights"
            if sharing(trainer) == "untried":
                reason = f"{type(trainer.strategy).__name__}: {why_unsupported(trainer)}"
            return Report(skipped={"all": reason})
        probes = getattr(pl_module, "preflight_probes", None)
        expect = Expectations(**self._options, probes=tuple(probes(batch)) if probes else ())
        return preflight(subject_of(trainer, pl_module, batch), expect)

    @staticmethod
    def _stop(trainer: Trainer, report: Report) -> None:
        """Raise on all ranks if one has found an error."""
        if not trainer.strategy.reduce_boolean_decision(bool(report.errors), all=False):
            return
        errors = "\n".join(each.text() for each in report.errors)
        raise PreflightError(
            f"{report.headline()}; nothing was trained\n{errors or 'another rank has the errors'}\n"
            "Preflight(on_error='warn') trains all the same",
            report,
        )


def subject_of(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Subject:
    """What the checks are to look at: the module as it stands in a trainer.

    Args:
        trainer: its optimizers, schedulers, precision and clipping are those of the checks.
        pl_module: copied, never run.
        batch: copied for each run.
    """
    scaler = loss_scaler(trainer)
    return Subject(
        original=pl_module,
        step=_Step(trainer, pl_module),
        batch=batch,
        optimizers=trainer.optimizers,
        schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
        clip=_Clip(trainer),
        context=trainer.precision_plugin.train_step_context,
        scale=min(scaler.get_scale(), _LARGEST_SCALE) if scaler else 1.0,
        steps=trainer.estimated_stepping_batches,
        shared=(trainer,),
    )


class _Step:
    """Runs the `training_step` of a copy; what the copy logs goes nowhere."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._obstacle = _obstacle(pl_module)
        self._prepared = is_overridden("on_train_batch_start", pl_module)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self._obstacle is not None:
            raise NotApplicableError(self._obstacle)
        assert isinstance(model, LightningModule)
        silence(model, self._trainer)
        # By the class: an attribute of that name may be bound to the module that is training.
        step = type(model).training_step
        takes_index = len(inspect.signature(step).parameters) > 2
        try:
            output = step(model, batch, 0) if takes_index else step(model, batch)
        except (AttributeError, TypeError) as error:
            if not self._prepared:
                raise
            raise NotApplicableError(
                f"on_train_batch_start, which is not called for a check, may be what the step "
                f"lacks: {error!r}"
            ) from error
        loss: Any = output.get("loss") if isinstance(output, dict) else output
        return loss  # type: ignore[no-any-return]


def silence(model: LightningModule, trainer: Trainer) -> None:
    """Give a copy its trainer, and let what it logs go nowhere."""
    model.trainer = trainer
    for module in model.modules():
        if isinstance(module, LightningModule):
            vars(module).update(log=_nothing, log_dict=_nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _obstacle(pl_module: LightningModule) -> str | None:
    """Why no step can be tried, or None."""
    if not pl_module.automatic_optimization:
        return "in manual optimization a training_step cannot be run without its update"
    if "dataloader_iter" in inspect.signature(type(pl_module).training_step).parameters:
        return "a training_step that draws from dataloader_iter cannot be run twice on a batch"
    return None


class _Clip:
    """Clips as the trainer is told to."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, optimizer: Optimizer) -> None:
        assert isinstance(model, LightningModule)
        silence(model, self._trainer)
        model.configure_gradient_clipping(
            optimizer, self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        )


def _tell(trainer: Trainer, report: Report) -> None:
    """Log each finding once: rank zero all, the others the errors of their own batch."""
    if not trainer.is_global_zero:
        for each in report.errors:
            if each.check in _OF_THE_BATCH:
                log.warning("preflight, rank %d: %s", trainer.global_rank, each.text())
        return
    log.info("%s (%.1f s)", report.headline(), report.seconds)
    for each in report.ordered():
        _log(each)
    for check, reason in report.skipped.items():
        log.debug("preflight did not run %s: %s", check, reason)


def _log(finding: Finding) -> None:
    (log.info if finding.severity == "note" else log.warning)("preflight %s", finding.text())
