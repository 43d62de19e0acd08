"""Checks updates, and weights and moments between computations. May import torch and Lightning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_stability.callbacks.integrity_audit.finding import Finding
from lit_stability.distributed.dtensor import is_wrapper
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import Trainer
from lit_stability.measurement.bit_patterns import Difference, RestGuard
from lit_stability.measurement.majority import Majority
from lit_stability.training_state.update_rerun import UpdateRerun, why_no_update_rerun

log = suite_logger()


class StateCheck:
    """Checks that only the optimizer changes weights and moments, and that it does so correctly.

    Args:
        trainer: in its fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        reasons = (why_no_update_rerun(optimizer) for optimizer in trainer.optimizers)
        self.obstacle = next((reason for reason in reasons if reason is not None), None)
        """Why updates are not computed again, or None."""
        self._trainer = trainer
        self._guard = RestGuard()
        self._updates: list[UpdateRerun] = []
        self._findings: list[Finding] = []
        self._named: dict[str, Tensor] = {}
        self._step = 0
        self._trusted = False
        """Whether a rerun of an update was ever equal to it."""

    def begin(self, named: Mapping[str, Tensor]) -> None:
        """Records weights and moments at the start of a step, and watches its update.

        Args:
            named: the parameters of the module by name.
        """
        self._named, self._step = dict(named), self._trainer.global_step
        self._guard.record(self._state())
        if self.obstacle is None:
            names = {id(p): name for name, p in named.items()}
            self._updates = [
                UpdateRerun(o, names, lambda: self.check("before the update"), self._updated)
                for o in self._trainer.optimizers
            ]

    def before_gradients(self) -> None:
        """Checks memory when the gradients of the step are there."""
        # A snapshot of the start of this step may have been copied after a bit had flipped.
        self.check("before the gradients", since=max(0, self._step - 1))

    def watch(self, gradients: Mapping[str, Tensor]) -> None:
        """Records weights, moments and gradients until the update."""
        self._guard.record({**self._state(), **gradients})

    def check(self, when: str, *, since: int | None = None) -> None:
        """Checks what was recorded last, and forgets it.

        Args:
            when: for the message.
            since: step in which a bit may have flipped; None for that of the audit.
        """
        for name, bit in self._guard.check():
            text = f"bit {bit} of {name} flipped in memory {when}"
            step = self._step if since is None else since
            self._findings.append(Finding(name, text, step, state=True))

    def take_findings(self) -> list[Finding]:
        """Returns what was found since the last call."""
        found, self._findings = self._findings, []
        return found

    def close(self) -> None:
        """Removes the hooks from the optimizers, and releases all copies."""
        for update in self._updates:
            update.remove()
            if update.error is not None:
                self._disable(update.error)
        self._updates, self._named = [], {}
        self._guard.forget()

    def _updated(self, found: list[tuple[Majority, Difference]]) -> None:
        """Keeps what was wrong in an update, for the report of the next step."""
        self._guard.record(self._state())
        if not found:
            self._trusted = True
            return
        verdict, first = found[0]
        if verdict == "unreproducible" or not self._trusted:
            self._disable(f"a rerun of an update gave another {first.name}")
        elif verdict == "training":
            text = f"the update of {first.text()} differs from two reruns, which agree"
            self._findings.append(Finding(first.name, text, self._step, state=True))
        else:
            text = f"{first.text()} differs in a rerun of the update, not in training"
            self._findings.append(Finding(first.name, text, self._step, harmless=True))

    def _disable(self, reason: str) -> None:
        self.obstacle = reason
        log.warning("IntegrityAudit computes no update again: %s", reason)

    def _state(self) -> dict[str, Tensor]:
        """Returns the tensors that only an optimizer's step should change."""
        tensors = dict(self._named)
        names = {id(p): name for name, p in self._named.items()}
        for optimizer in self._trainer.optimizers:
            for p, state in optimizer.state.items():
                for key, value in state.items() if isinstance(state, dict) else ():
                    tensors[f"{key} of {names.get(id(p), 'a parameter')}"] = value
        return {name: tensor for name, tensor in tensors.items() if is_comparable(tensor)}


def is_comparable(tensor: object) -> bool:
    """Returns whether the elements of a tensor can be read as integers."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_inference():
        return False
    return tensor.layout is torch.strided and not is_wrapper(tensor)
