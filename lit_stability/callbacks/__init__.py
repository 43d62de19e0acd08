"""The Lightning callbacks of the suite. They call measurements, detectors and policies in order.

One optimizer step, with the hooks in place::

    on_train_batch_start        Preflight runs its checks, before the first step of a run
                                AutoRollback records buffers and epoch metrics
                                CurvatureProbe keeps the batch, if it measures this step
                                IntegrityAudit checks memory, and records the start of the step
      training_step             AttentionProbe records attention kernels, if it measures this step
                                QKClip measures each attention head
                                AutoRollback goes on with a loss of 0 if it raises
      on_before_backward        GradientMonitor reads the loss (DDP: the ranks start to measure)
      backward
      on_before_optimizer_step  GradientMonitor measures (accumulated, unscaled, unclipped), asks
                                the probes and the detectors, and then calls either
                                  on_healthy_step of every callback, in order, or
                                  on_incident     of every callback, in order
                                AdaptiveGradientClipping clips the step, unless it is skipped
      the Trainer's own clipping, update; IntegrityAudit computes it again; at its end QKClip
      rescales queries and keys
      lr_scheduler_step
    on_train_batch_end          GradientMonitor counts the votes of the ranks (DDP)
                                CrashPrediction learns from the accepted step, and may act on it
                                PrecisionFallback changes the precision, if that was the cause
                                AutoRollback undoes a skipped step, or rolls back to a snapshot
    validation, if it is due
    before the next fetch       AutoRollback takes a snapshot, LastKnownGood a copy for the disk
                                PreemptionCheckpoint saves and ends the run after a signal

The hooks of this package are the methods of `StabilityCallback`. To write your own responder,
override `on_incident`. Setting gradients to None skips the update bit for bit. The first callback
that resolves the incident decides the response; callbacks after it see ``incident.resolved``.

>>> import tempfile
>>> from lightning.pytorch import Trainer
>>> from lightning.pytorch.demos.boring_classes import BoringModel
>>> from lit_stability.faults import FaultInjector, NanLoss
>>> from lit_stability.detectors import NonFinite
>>> from lit_stability.policies.actions import SkipStep
>>> class SkipBadSteps(StabilityCallback):
...     '''Skips each bad update, and does nothing else.'''
...     def on_incident(self, trainer, pl_module, incident):
...         anomaly = incident.anomaly
...         if incident.resolved or anomaly.warn_only or anomaly.state_corrupted:
...             return
...         for parameter in pl_module.parameters():
...             parameter.grad = None
...         incident.resolve(SkipStep())
>>> monitor = GradientMonitor(detectors=[NonFinite()])
>>> quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
>>> trainer = Trainer(
...     callbacks=[FaultInjector([NanLoss(step=9)]), monitor, SkipBadSteps()],
...     **(quiet | {"enable_model_summary": False, "limit_val_batches": 0, "max_steps": 30}),
...     **{"accelerator": "cpu", "default_root_dir": tempfile.mkdtemp()},
... )
>>> trainer.fit(BoringModel())
>>> [(i.first.kind, i.responses) for i in monitor.incidents]
[('non-finite loss', ['step skipped'])]
"""

# First, because it checks the versions: with an old torch the imports below fail without a reason.
import lit_stability.lightning_package  # noqa: F401
from lit_stability.callbacks.adaptive_clipping import AdaptiveGradientClipping
from lit_stability.callbacks.alerts import Alerts
from lit_stability.callbacks.anomaly_checkpoint import AnomalyCheckpoint
from lit_stability.callbacks.attention_probe import AttentionProbe
from lit_stability.callbacks.auto_rollback import AutoRollback
from lit_stability.callbacks.crash_prediction import CrashPrediction
from lit_stability.callbacks.curvature_probe import CurvatureProbe
from lit_stability.callbacks.default_suite import stability_callbacks
from lit_stability.callbacks.diagnosis import Diagnosis
from lit_stability.callbacks.gradient_flow import GradientFlow
from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.integrity_audit import IntegrityAudit
from lit_stability.callbacks.last_known_good import LastKnownGood
from lit_stability.callbacks.nonfinite_locator import NonFiniteLocator
from lit_stability.callbacks.precision_fallback import PrecisionFallback
from lit_stability.callbacks.preemption_checkpoint import PreemptionCheckpoint
from lit_stability.callbacks.preflight import Preflight
from lit_stability.callbacks.qk_clip import QKClip
from lit_stability.callbacks.rank_watchdog import RankWatchdog

__all__ = [
    "AdaptiveGradientClipping",
    "Alerts",
    "AnomalyCheckpoint",
    "AttentionProbe",
    "AutoRollback",
    "CrashPrediction",
    "CurvatureProbe",
    "Diagnosis",
    "GradientFlow",
    "GradientMonitor",
    "IntegrityAudit",
    "LastKnownGood",
    "NonFiniteLocator",
    "PrecisionFallback",
    "PreemptionCheckpoint",
    "Preflight",
    "QKClip",
    "RankWatchdog",
    "StabilityCallback",
    "stability_callbacks",
]
