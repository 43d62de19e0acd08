"""Tells weights that the program itself writes from weights that were damaged."""

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly
from lit_stability.measurement.step_stats import StepStats

_LARGE = 0.05
"""Smallest write that is questioned, as a share of the norm of the tensor."""
_ABSURD = 1e3
"""Smallest write between two epochs that is questioned: no program makes a weight so much larger, a
flipped bit of an exponent does."""
_REACH = 2
"""Steps after a write within which trouble is put down to it."""
_ROUTINE = 10
"""A write that comes again within so many steps is routine and explains no sudden trouble."""


class ProgramWrites:
    """Learns which weights the program writes outside of the optimizer's step.

    Programs restart dead codes, reset a layer, project rows or prune on purpose. Damage from
    outside (faulty memory, a stray write) does not come again when the same steps are run again,
    such code does. So a large write is questioned once: it asks for a rollback. A write that is
    seen while those steps run again is the program's, and its tensor is accepted from then on; so
    is one that is questioned a second time, where nothing runs steps again. A write that may be
    what made the weight non-finite or the loss diverge may have been done for one bad batch: it is
    accepted only once it has come again without that batch.
    Between two epochs the hooks of the program run, so what is written there is not questioned
    unless it is absurd.
    Moments of the optimizer that are found damaged, but finite, once more when the steps run again
    are the program's too, as where it prunes them for a fresh start.
    What an accepted write causes, a loss or a gradient far above the window, or a large update
    where moments were written, is no fault either: the detectors learn again, unless such writes
    are routine.

    >>> writes = ProgramWrites()
    >>> reset = StepStats(step=100, loss=1.0, grad_norm=1.0, outside_writes=(("head.weight", 1.2),))
    >>> anomaly = writes.check(reset); anomaly.message
    'head.weight changed by 1.2 of its norm outside of the optimizer step'
    >>> writes.rolled_back_for(anomaly); writes.check(reset), writes.newly_accepted
    (None, ('head.weight',))
    """

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        """Parameters that the program writes."""
        self.newly_accepted: tuple[str, ...] = ()
        """Those of them that the last `check` has accepted."""
        self._runs_again_until = -1
        """Step up to which steps are run again, after state was found damaged."""
        self.writes_moments = False
        """Whether the program is known to write moments of the optimizer."""
        self._moments_written_at: int | None = None
        """Step of the last write to moments that is no damage."""
        self._moments_at = -1
        """Step whose moments were found damaged, for which steps run again."""
        self._harm: Anomaly | None = None
        """What made them run again, if it is more than that weights have changed."""
        self._questioned: dict[str, int] = {}
        """Parameter -> step of a write that was questioned."""
        self._written_at: dict[str, int] = {}
        """Parameter -> step of its last write that is no damage."""
        self._writes: list[int] = []
        """Steps of the last two writes to accepted parameters."""

    @property
    def has_learnt(self) -> bool:
        """Whether the program is known to write anything."""
        return bool(self.accepted) or self.writes_moments

    def rolled_back_for(self, anomaly: Anomaly) -> None:
        """Records that the state was found damaged, so the steps before are replayed."""
        self._runs_again_until = anomaly.step
        self._moments_at = anomaly.step if anomaly.kind == "optimizer state" else -1
        self._harm = anomaly if anomaly.kind in ("non-finite weight", "divergence") else None

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if a weight was written that the program is not known to write."""
        written = dict(stats.outside_writes)
        unknown = {name: share for name, share in written.items() if name not in self.accepted}
        if stats.starts_epoch:
            unknown = {name: share for name, share in unknown.items() if share > _ABSURD}
        runs_again = stats.step <= self._runs_again_until
        repeated = [
            name
            for name in unknown
            if name in self._questioned or (runs_again and not self._is_suspect(name, stats.step))
        ]
        self.newly_accepted = tuple(n for n in repeated if math.isfinite(unknown[n]))
        self.accepted.update(self.newly_accepted)
        unknown = {n: share for n, share in unknown.items() if n not in self.accepted}
        # What does not come again was damage, however often it hits this parameter.
        passed = [n for n, step in self._questioned.items() if step == stats.step]
        for each in passed:
            del self._questioned[each]
        if written and not unknown:
            self._written_at |= dict.fromkeys(written, stats.step)
            if stats.step not in self._writes:
                self._writes = [*self._writes[-1:], stats.step]
        name = max(unknown, key=unknown.__getitem__, default=None)
        if name is None or not unknown[name] > _LARGE:
            return None
        self._questioned |= dict.fromkeys(unknown, stats.step)
        return Anomaly(
            kind="weight corruption",
            step=stats.step,
            value=unknown[name],
            signal="outside_writes",
            threshold=_LARGE,
            optimizer=stats.optimizer,
            state_corrupted=True,
            since=max(0, stats.step - 1),
            layers=tuple(unknown.items())[:5],
            message=f"{name} changed by {unknown[name]:.2g} of its norm outside of the optimizer "
            "step",
        )

    def _is_suspect(self, name: str, step: int) -> bool:
        """Returns whether a write may have done the harm for which steps run again."""
        if self._harm is None:
            return False
        if self._harm.kind == "divergence":
            return abs(step - self._harm.suspect) <= _REACH
        return name in dict(self._harm.layers)

    def explains(self, anomaly: Anomaly) -> bool:
        """Returns whether an anomaly follows from an accepted write, and so is no fault."""
        if anomaly.kind == "weight corruption":
            names = [name for name, _ in anomaly.layers]
            return bool(names) and all(self._explains_change(n, anomaly.suspect) for n in names)
        if anomaly.kind == "optimizer state":
            if not math.isfinite(anomaly.value):
                return False
            self.writes_moments |= anomaly.step == self._moments_at
            if self.writes_moments:
                self._moments_written_at = anomaly.step
            return self.writes_moments
        if anomaly.kind == "update spike" and self._moments_written_at is not None:
            return 0 <= anomaly.suspect - self._moments_written_at <= _REACH
        if anomaly.kind not in ("gradient spike", "loss spike", "divergence") or not self._writes:
            return False
        last = self._writes[-1]
        if len(self._writes) > 1 and last - self._writes[0] <= _ROUTINE:
            return False
        return last <= anomaly.step and anomaly.suspect <= last + _REACH

    def _explains_change(self, name: str, since: int) -> bool:
        return name in self.accepted or self._written_at.get(name, -1) >= since

    def state_dict(self) -> dict[str, Any]:
        """Returns the names of the accepted parameters, and whether moments are written."""
        moments = {"moments": True} if self.writes_moments else {}
        return {"accepted": sorted(self.accepted), **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adds the accepted parameters of a state; no restore takes any back."""
        self.accepted |= set(state["accepted"])
        self.writes_moments |= bool(state.get("moments"))
