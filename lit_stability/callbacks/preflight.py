"""`Preflight`: runs the checks before the first step, on the first training batch.

May import Lightning; the checks themselves, in `lit_stability.checks.preflight`, do not.
"""

import inspect
from collections.abc import Sequence, Sized
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

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
from lit_stability.checks.preflight.inputs import empty_epoch
from lit_stability.detectors.anomaly import require_instance
from lit_stability.lightning_package import LightningModule, Trainer, is_overridden
from lit_stability.trainer_internals import adapter_of, loss_scaler

OnError = Literal["warn", "stop"]
_LARGEST_SCALE = 1024.0
"""Loss scale in fp16: enough for gradients of 6e-11, and far from overflow at the first step."""
_OF_THE_BATCH = ("batch", "targets", "step", "initial loss")


class Preflight(StabilityCallback):
    """Checks model, batch and optimizer once, before the first step.

    The checks use the first training batch that the trainer loads; no extra batch is fetched. They
    run on copies, which temporarily need three times the memory of the weights (the copy, its
    gradients, its previous weights) plus that of the optimizer state. Weights, buffers, gradients,
    optimizers and random generators stay bitwise the same as without the callback. The checks take
    about as long as six steps. A run that resumes from a checkpoint is not checked.

    An epoch without a single batch is reported too, when it ends.

    Each finding is logged once. With ``on_error="stop"`` an error raises `PreflightError` before
    anything is trained; under DDP on all ranks, whichever rank found it. With manual optimization
    only checks that need no step run; with a strategy that shards weights no check runs. The report
    lists the skipped checks.

    A LightningModule may define ``preflight_probes(batch)``, which returns `MaskProbe`s (which
    outputs may depend on a part of the input, and which must) and `PositionProbe`s (which token and
    position embeddings the model adds). Values that the module logs during the checks are
    discarded, except those that it writes directly to a logger's ``experiment``.

    >>> from lit_stability import stability_callbacks
    >>> callbacks = [Preflight(on_error="stop", classes=10), *stability_callbacks()]

    Args:
        on_error: ``warn`` logs errors and trains, ``stop`` raises them.
        classes: Number of classes V of a cross entropy that does not use torch's functions.
        one_vs_rest: Number of summed binary terms, K + 1.
        pretrained: Whether the head is pretrained, so that a low first loss is accepted.
        frozen: Names of parameters meant to be frozen, with wildcards, such as ``backbone.*``.
        memorise: Settings of the memorisation check; None skips it, because it runs many steps.

    Raises:
        ValueError: If an option is out of range.
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
        Expectations(**self._options)  # raises ValueError for options out of range
        self.report: Report | None = None
        """Report of the latest fit that was checked, or None."""
        self._pending = False
        self._batches: int | None = None
        """Batches of the current epoch; None if the fit does not begin it."""
        self._empty = False
        """Whether an epoch without batches was reported."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises an error for a Trainer of another Lightning package."""
        require_package(trainer, self)
        self._empty = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enables the checks for a run that starts at step 0; a checkpoint is loaded by now."""
        self._pending = trainer.global_step == 0
        self._batches = 0 if self._pending else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports an epoch without batches, once."""
        if self._batches == 0:
            self._report_empty(trainer)
        self._batches = 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports a fit without batches, in which no other hook is called."""
        if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
            self._report_empty(trainer)

    def _report_empty(self, trainer: Trainer) -> None:
        if self._empty:
            return
        self._empty = True
        finding = empty_epoch(**_facts_of(trainer.train_dataloader))
        self.report = self.report or Report()
        self.report.findings.append(finding)
        if trainer.is_global_zero:
            _log_finding(finding)
        if self.on_error == "stop" and trainer.global_step == 0:
            self._raise_on_error(trainer, self.report)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Runs the checks on the first batch, and logs or raises the findings."""
        self._batches = None if self._batches is None else self._batches + 1
        if not self._pending:
            return
        self._pending = False
        self.report = self.look(trainer, pl_module, batch)
        _log_report(trainer, self.report)
        if self.on_error == "stop":
            self._raise_on_error(trainer, self.report)

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Report:
        """Runs the checks that apply, without logging or raising their findings.

        Args:
            trainer: In a fit, before its first step.
            pl_module: The module that will be trained.
            batch: The first batch, on the module's device.

        Raises:
            ValueError: If a pattern or a probe does not fit the model.
        """
        adapter = adapter_of(trainer)
        if adapter.sharing not in ("alone", "replicas"):
            reason = f"{type(trainer.strategy).__name__}: no rank has all weights"
            if adapter.sharing == "untried":
                reason = f"{type(trainer.strategy).__name__}: {adapter.why_unsupported}"
            return Report(skipped={"all": reason})
        probes = getattr(pl_module, "preflight_probes", None)
        expect = Expectations(**self._options, probes=tuple(probes(batch)) if probes else ())
        return preflight(subject_of(trainer, pl_module, batch), expect)

    @staticmethod
    def _raise_on_error(trainer: Trainer, report: Report) -> None:
        """Raises an error on all ranks if one rank has found an error."""
        if not trainer.strategy.reduce_boolean_decision(bool(report.errors), all=False):
            return
        errors = "\n".join(finding.text() for finding in report.errors)
        raise PreflightError(
            f"{report.headline()}; nothing was trained\n"
            f"{errors or 'another rank found the errors; see its log'}\n"
            "to train in spite of them, use Preflight(on_error='warn')",
            report,
        )


def subject_of(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Subject:
    """Returns the subject of the checks: a module, as a trainer would train it.

    Args:
        trainer: Gives optimizers, schedulers, precision and gradient clipping.
        pl_module: Copied, but never run itself.
        batch: Copied for each run.
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
    """Runs the `training_step` of a copy, and discards what the copy logs."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._obstacle = _obstacle(pl_module)
        self._prepared = is_overridden("on_train_batch_start", pl_module)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self._obstacle is not None:
            raise NotApplicableError(self._obstacle)
        assert isinstance(model, LightningModule)
        silence(model, self._trainer)
        # Taken from the class, because an instance attribute may be bound to the original module.
        step = type(model).training_step
        takes_index = len(inspect.signature(step).parameters) > 2
        try:
            output = step(model, batch, 0) if takes_index else step(model, batch)
        except (AttributeError, TypeError) as error:
            if not self._prepared:
                raise
            raise NotApplicableError(
                "the step may depend on on_train_batch_start, which the checks do not call: "
                f"{error!r}"
            ) from error
        loss: Any = output.get("loss") if isinstance(output, dict) else output
        return loss  # type: ignore[no-any-return]


def _facts_of(loader: Any) -> dict[str, Any]:
    """Returns what explains that a loader has no batch; nothing for other loaders than torch's."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, Sized):
        return {}
    return {
        "samples": len(loader.dataset),
        "batch_size": loader.batch_size,
        "drops_last": loader.drop_last,
    }


def silence(model: LightningModule, trainer: Trainer) -> None:
    """Attaches a copy to its trainer, and discards everything it logs."""
    model.trainer = trainer
    for module in model.modules():
        if isinstance(module, LightningModule):
            vars(module).update(log=_discard, log_dict=_discard)


def _discard(*args: Any, **kwargs: Any) -> None:
    """Replaces `log` and `log_dict` of a copy."""


def _obstacle(pl_module: LightningModule) -> str | None:
    """Returns the reason why the checks cannot run a step, or None."""
    if not pl_module.automatic_optimization:
        return "with manual optimization a training_step cannot run without its update"
    if "dataloader_iter" in inspect.signature(type(pl_module).training_step).parameters:
        return "a training_step with dataloader_iter cannot run twice on the same batch"
    return None


class _Clip:
    """Clips gradients with the settings of the trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, optimizer: Optimizer) -> None:
        assert isinstance(model, LightningModule)
        silence(model, self._trainer)
        model.configure_gradient_clipping(
            optimizer, self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        )


def _log_report(trainer: Trainer, report: Report) -> None:
    """Logs each finding once: rank 0 logs all, other ranks only errors of their own batch."""
    if not trainer.is_global_zero:
        for finding in report.errors:
            if finding.check in _OF_THE_BATCH:
                log.warning("preflight, rank %d: %s", trainer.global_rank, finding.text())
        return
    log.info("%s (%.1f s)", report.headline(), report.seconds)
    for finding in report.ordered():
        _log_finding(finding)
    for check, reason in report.skipped.items():
        log.debug("preflight skipped the check %s: %s", check, reason)


def _log_finding(finding: Finding) -> None:
    (log.info if finding.severity == "note" else log.warning)("preflight %s", finding.text())
