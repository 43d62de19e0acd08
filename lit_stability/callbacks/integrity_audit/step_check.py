"""Compares a step of training with one or two reruns of it. May import torch and Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lit_stability.callbacks.integrity_audit.finding import Finding
from lit_stability.callbacks.integrity_audit.tolerance import Tolerance
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.bit_patterns import SMALL, Difference, difference, differences
from lit_stability.measurement.majority import majority
from lit_stability.outside import tried
from lit_stability.trainer_internals import LOSS, StepRecording, StepResult, loss_scaler, sharing

log = suite_logger()

_IN_A_ROW = 3
"""Consecutive audits with the same verdict from which on it is the program's doing."""


class StepCheck:
    """Judges recorded steps of one fit; the first audits learn how exactly a step repeats itself.

    Args:
        calibration: number of audits that only learn.
    """

    def __init__(self, calibration: int) -> None:
        self.calibration = calibration
        """Audits that still only learn."""
        self.tolerance = Tolerance()
        self.obstacle: str | None = None
        """Why steps cannot be compared, or None."""
        self._written: set[str] = set()
        """Weights and buffers that the program writes between training_step and update."""
        self._changed_gradients: set[str] = set()
        """Gradients that the program, or another rank, changes after the backward pass."""
        self._noisy: str | None = None
        """The first tensor that a rerun did not repeat, in the audits that only learn."""
        self._in_a_row = 0
        self._logged: set[str] = set()

    def findings(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        recording: StepRecording,
        gather: Callable[[Any], list[Any]],
    ) -> list[Finding]:
        """Runs a step again and returns what is wrong; only learns in the first audits.

        Args:
            trainer: before the update of the step.
            pl_module: the module in training.
            recording: of the step, stopped.
            gather: returns the values of all ranks, which run the step equally often.

        Raises:
            Exception: what the ``training_step`` raises in a rerun; the other ranks go on.
        """
        step, training = trainer.global_step, recording.training
        first, error = tried(recording.rerun)
        apart = [] if first is None else differences(training.numbers, first.numbers)
        apart = self.tolerance.beyond(apart)
        changed = [] if first is None else recording.changed_outside(first)
        names = {name for name, _ in pl_module.named_parameters()}
        if any(each.name in self._written and each.name in names for each in changed):
            apart = []  # the backward pass may have used other weights than the forward pass
        changed = [each for each in changed if each.name not in self._written]
        wanted = self.calibration > 0 or bool(apart or changed)
        second = None
        if any(gather(wanted)) and error is None:
            second, error = tried(recording.rerun)
        if error is not None:
            raise error
        assert first is not None
        if self.calibration > 0 and second is not None:
            self._calibrate(trainer, pl_module, recording, first, second)
            return []
        found = self._gradients_at_rest(trainer, pl_module, training, step)
        if second is None or not wanted:
            self._in_a_row = 0
            return found
        weights = [each for each in changed if each.name in names]
        # Buffers follow from a forward pass that was wrong.
        if weights or not apart:
            damaged = self._damaged(recording, first, second, weights or changed)
            if damaged is None:
                return found
            text = f"{damaged.text()} changed in memory during the step"
            return [Finding(damaged.name, text, max(0, step - 1), state=True)]
        return found + self._judge(training, first, second, apart, step)

    def _judge(
        self,
        training: StepResult,
        first: StepResult,
        second: StepResult,
        apart: Sequence[Difference],
        step: int,
    ) -> list[Finding]:
        again = differences(training.numbers, second.numbers)
        reruns = differences(first.numbers, second.numbers)
        wrong = majority(
            first=False,
            second=not self.tolerance.beyond(again),
            reruns=not self.tolerance.beyond(reruns),
        )
        self._in_a_row = self._in_a_row + 1 if wrong == "training" else 0
        text = _text(apart)
        if wrong == "rerun":
            return [
                Finding(apart[0].name, f"{text} in a rerun, not in training", step, harmless=True)
            ]
        if wrong == "training" and self._in_a_row < _IN_A_ROW:
            gradients = [each for each in apart if not each.name.startswith(LOSS)]
            part = "forward" if len(gradients) < len(apart) else "backward"
            first_wrong = gradients[0].name if gradients else LOSS
            what = f"{part} pass: {text} from two reruns, which agree"
            return [Finding(first_wrong, what, step)]
        self.tolerance.learn([*apart, *again, *reruns])
        self._report_tolerance(apart[0].name)
        return []

    def _report_tolerance(self, first: str) -> None:
        """Logs, once, how much the tolerance hides; too much, and steps are not compared."""
        typical = self.tolerance.typical
        if self.tolerance.useless:
            self.obstacle = f"reruns of a step differ too much, first in {first}"
        else:
            self._log_once(
                "IntegrityAudit: a step of this program does not repeat itself to the bit, first "
                "in %s; only relative differences above %.2g are found (median over the tensors)",
                *(first, typical),
            )

    def _calibrate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        recording: StepRecording,
        first: StepResult,
        second: StepResult,
    ) -> None:
        training, changed = recording.training, recording.changed_outside(first)
        weights = {name for name, _ in pl_module.named_parameters()}
        pairs = [(first, second)]
        if any(each.name in weights for each in changed):
            self._learn_written(changed)
        else:
            pairs += [(training, first), (training, second)]
        noise = [d for a, b in pairs for d in differences(a.numbers, b.numbers)]
        self.tolerance.learn(noise)
        self._written |= {d.name for d in changed} | recording.written_outside(first)
        self._changed_gradients |= {
            d.name for d in _gradient_differences(trainer, pl_module, training)
        }
        self.calibration -= 1
        self._noisy = self._noisy or next((each.name for each in noise), None)
        if self.calibration == 0 and self._noisy is not None:
            self._report_tolerance(self._noisy)

    def _damaged(
        self,
        recording: StepRecording,
        first: StepResult,
        second: StepResult,
        changed: Sequence[Difference],
    ) -> Difference | None:
        """Returns the one bit that changed in memory; None if the program may have written."""
        written = recording.written_outside(first)
        only = changed[0]
        stable = difference("", first.state[only.name], second.state[only.name]) is None
        alone = len(changed) == 1 and _is_one_bit(only)
        if alone and stable and only.name not in written:
            return only
        self._learn_written(changed)
        return None

    def _learn_written(self, changed: Sequence[Difference]) -> None:
        self._written |= {each.name for each in changed}
        self._log_once(
            "IntegrityAudit: %s changed during a step by other code than its training_step; steps "
            "in which that happens are not compared",
            _text(changed),
        )

    def _gradients_at_rest(
        self, trainer: Trainer, pl_module: LightningModule, training: StepResult, step: int
    ) -> list[Finding]:
        """Returns a gradient that is no longer what the backward pass has computed."""
        known = self._changed_gradients
        found = _gradient_differences(trainer, pl_module, training)
        new = [each for each in found if each.name not in known]
        if len(new) == 1 and _is_one_bit(new[0]):
            text = f"the gradient of {new[0].text()} changed in memory after the backward pass"
            return [Finding(new[0].name, text, step)]
        known |= {each.name for each in new}
        return []

    def _log_once(self, line: str, *values: object) -> None:
        if line not in self._logged:
            self._logged.add(line)
            log.warning(line, *values)


def _gradient_differences(
    trainer: Trainer, pl_module: LightningModule, training: StepResult
) -> list[Difference]:
    """Returns how the gradients differ from those of the backward pass; averaged ones always do."""
    if sharing(trainer) != "alone" or loss_scaler(trainer) is not None:
        return []
    named: dict[str, Tensor] = {
        name: p.grad
        for name, p in pl_module.named_parameters()
        if p.grad is not None and not p.grad.is_sparse
    }
    return differences(named, training.numbers)


def _is_one_bit(found: Difference) -> bool:
    """Whether one bit differs, in a tensor that is too large for the program to write that."""
    return found.elements == len(found.bits) == 1 and found.size > SMALL


def _text(found: Sequence[Difference]) -> str:
    names = found[0].text()
    return f"{names} differs" if len(found) == 1 else f"{names} and {len(found) - 1} more differ"
