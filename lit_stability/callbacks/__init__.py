"""Lightning callbacks: they order the work and do none of the arithmetic.

One optimizer step, with the hooks in place::

    on_train_batch_start        Preflight checks, before the first step of a run
                                AutoRollback remembers buffers and epoch metrics
                                CurvatureProbe keeps the batch, if it is its turn
      training_step             AttentionProbe watches its kernels, if it is its turn
      on_before_backward        GradientMonitor takes the loss (DDP: the ranks begin to measure)
      backward
      on_before_optimizer_step  GradientMonitor measures (accumulated, unscaled, unclipped), asks
                                the probes and the detectors, and then either
                                  on_healthy_step of every callback, in order, or
                                  on_incident     of every callback, in order, until settled
                                AdaptiveGradientClipping clips the step, unless it was vetoed
      the Trainer's own clipping, update
      lr_scheduler_step
    on_train_batch_end          GradientMonitor counts the votes of the ranks (DDP)
                                CrashPrediction learns the accepted step, and may slow the next
                                PrecisionFallback changes the precision, if that was the cause
                                AutoRollback undoes a vetoed step, or goes back to a snapshot
    validation, if it is due
    before the next fetch       AutoRollback takes a snapshot, LastKnownGood a copy for the disk

Any callback, and the LightningModule, may define:

* ``on_step_measured(trainer, pl_module, stats)``: any step, before the detectors are asked;
* ``probe_readings(trainer, pl_module)``: asked before each step is measured; a list of
  `ProbeReading`, or what is `lit_stability.norms.Unread`, where it is the probe's turn, else None;
  on all ranks alike;
* ``on_healthy_step(trainer, pl_module, stats)``: an accepted step, before its update;
* ``on_incident(trainer, pl_module, incident)``: a strike, before its update; on all ranks alike;
* ``on_suspicion(trainer, pl_module, anomaly)``: this rank objects to its gradients, and whether all
  do is known at the end of the batch: veto what must not be taken, and wait for nobody (DDP);
* ``on_incident_closed(trainer, pl_module, incident)``: the outcome is known;
* ``on_rollback(trainer, pl_module)``: a snapshot was just put back;
* ``on_new_regime(trainer, pl_module, stats)``: values refused for long are taken for the normal;
* ``takes_steps_again = True``: ``incident.tape`` is wanted, to take the step again beside training;
* ``on_precision_changed(trainer, pl_module)``: another precision is in force, between two steps;
* ``books()`` and ``load_books(books)``: what ranks that disagree take over from rank 0;
* ``rewindable_state()`` and ``load_rewindable_state(state)``: what a rollback takes back. A vetoed
  step may have moved it too, and is taken back by way of a snapshot, unless the owner says by
  ``ignores_vetoed_steps = True`` that it never does.

A responder of your own needs one of them. Gradients of None veto the update, to the bit; who
settles an incident says with what, and those after it see that it is settled.

>>> import tempfile
>>> from lightning.pytorch import Trainer
>>> from lightning.pytorch.demos.boring_classes import BoringModel
>>> from lit_stability.faults import FaultInjector, NanLoss
>>> from lit_stability.detectors import NonFinite
>>> from lit_stability.responses import SkipStep
>>> class LeaveOut(Callback):
...     '''Leaves out each bad update, and does nothing else.'''
...     def on_incident(self, trainer, pl_module, incident):
...         anomaly = incident.anomaly
...         if incident.settled or anomaly.observe_only or anomaly.state_is_bad:
...             return
...         for parameter in pl_module.parameters():
...             parameter.grad = None
...         incident.settle(SkipStep())
>>> monitor = GradientMonitor(detectors=[NonFinite()])
>>> quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
>>> trainer = Trainer(
...     callbacks=[FaultInjector([NanLoss(step=9)]), monitor, LeaveOut()],
...     **(quiet | {"enable_model_summary": False, "limit_val_batches": 0, "max_steps": 30}),
...     **{"accelerator": "cpu", "default_root_dir": tempfile.mkdtemp()},
... )
>>> trainer.fit(BoringModel())
>>> [(i.first.kind, i.responses, i.outcome) for i in monitor.incidents]
[('non-finite loss', ['step skipped'], 'recovered')]
"""

# ruff: noqa: E402 - what follows would fail with a Lightning too old to say why.
from lit_stability.versions import require_versions

require_versions()

from lightning.pytorch import Callback

from lit_stability.callbacks.adaptive_clipping import AdaptiveGradientClipping
from lit_stability.callbacks.anomaly_checkpoint import AnomalyCheckpoint
from lit_stability.callbacks.attention_probe import AttentionProbe
from lit_stability.callbacks.auto_rollback import AutoRollback
from lit_stability.callbacks.crash_prediction import CrashPrediction
from lit_stability.callbacks.curvature_probe import CurvatureProbe
from lit_stability.callbacks.diagnosis import Diagnosis
from lit_stability.callbacks.gradient_flow import GradientFlow
from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.last_known_good import LastKnownGood
from lit_stability.callbacks.nonfinite_locator import NonFiniteLocator
from lit_stability.callbacks.precision_fallback import PrecisionFallback
from lit_stability.callbacks.preflight import Preflight

__all__ = [
    "AdaptiveGradientClipping",
    "AnomalyCheckpoint",
    "AttentionProbe",
    "AutoRollback",
    "CrashPrediction",
    "CurvatureProbe",
    "Diagnosis",
    "GradientFlow",
    "GradientMonitor",
    "LastKnownGood",
    "NonFiniteLocator",
    "PrecisionFallback",
    "Preflight",
    "stability_callbacks",
]


def stability_callbacks() -> list[Callback]:
    """The default suite, in the order in which an incident is treated.

    A new list each time, for one Trainer. Beside callbacks of your own it is unpacked:
    ``Trainer(callbacks=[*stability_callbacks(), ModelCheckpoint()])``. An `AttentionProbe` of your
    own takes the place of the one in it.

    >>> for callback in stability_callbacks():
    ...     print(type(callback).__name__)
    GradientMonitor
    AttentionProbe
    AnomalyCheckpoint
    NonFiniteLocator
    Diagnosis
    LastKnownGood
    PrecisionFallback
    AutoRollback
    """
    return [
        GradientMonitor(),
        AttentionProbe(quiet=True),
        AnomalyCheckpoint(),
        NonFiniteLocator(),
        Diagnosis(),
        LastKnownGood(),
        PrecisionFallback(),
        AutoRollback(),
    ]
