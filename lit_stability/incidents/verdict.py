"""What the incidents of a run mean for its user: groups of equal ones, and what is left to do.

Works on records, as `Incident.as_dict` returns them and files hold them, so that the console, a
notebook and TensorBoard use the same words. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

Record = Mapping[str, Any]
Level = Literal["ok", "watch", "act"]
"""``ok``: nothing to do. ``watch``: it may need attention, or will come again. ``act``: it does not
pass by itself."""

_NAMED = 2
"""Groups that a verdict names; the others are counted."""
_STOP = "stopped: "


@dataclass(frozen=True)
class IncidentGroup:
    """Incidents of the same cause and, where it is known, the same sample."""

    place: str
    """What they have in common; see `place_in`."""
    records: tuple[Record, ...]
    """The incidents, the oldest first."""

    @property
    def sample(self) -> str:
        """Where the common bad sample is; "" if they have none.

        >>> seen = {"id": 1, "samples": [8], "batch_size": 16, "batch_idx": 12, "epoch": 0}
        >>> again = {**seen, "id": 2, "epoch": 1, "same_sample_as": 1}
        >>> IncidentGroup("log", (seen, again)).sample
        'sample 8 of 16 in batch 12 of every epoch (index 200 of the data, if it is not shuffled)'
        """
        if len(self.records) < 2 or not any(map(_repeats_sample, self.records)):
            return ""
        if len(set(map(_sample_root, self.records))) > 1:
            return ""
        places = {(each.get("batch_idx"), *each.get("samples", ())) for each in self.records}
        first = self.records[0]
        if len(first.get("samples", ())) != 1:
            return f"a sample of batch {first.get('batch_idx')} of epoch {first.get('epoch')}"
        number, size, batch = first["samples"][0], first.get("batch_size"), first.get("batch_idx")
        where = f"sample {number}" + (f" of {size}" if size else "") + f" in batch {batch}"
        if len(places) > 1 or not size or batch is None:
            return f"{where} of epoch {first.get('epoch')}"
        index = f"index {batch * size + number} of the data"
        return f"{where} of every epoch ({index}, if it is not shuffled)"

    @property
    def outcome(self) -> str:
        """Outcome of the latest incident."""
        return str(self.records[-1].get("outcome") or "open")

    @property
    def level(self) -> Level:
        """Whether something is left to do."""
        outcome = self.outcome
        if outcome in ("stopped", "contained") or self.sample:
            return "act"
        if outcome == "recurring":
            return "act" if len(self.records) > 1 else "watch"
        if outcome in ("recovered", "handled"):
            return "watch" if _leave(self.records[-1]).startswith("never:") else "ok"
        return "watch"

    @property
    def text(self) -> str:
        """What happened, in one line."""
        last, count = self.records[-1], len(self.records)
        if self.outcome == "stopped":
            reason = _reason(last)
            return f"stopped at step {last.get('step')}: {reason or self.place}"
        if self.sample:
            return f"{count} times the same bad sample"
        times = f"{count} times {self.place}" if count > 1 else self.place
        return times + _WORDS.get(self.outcome, f", {self.outcome}") + _losses(last)

    @property
    def to_do(self) -> str:
        """What the user should do, in one sentence; "" for nothing."""
        if self.level == "ok":
            return ""
        if self.sample and self.outcome != "stopped":
            return f"fix or remove {self.sample}"
        return str(self.records[-1].get("remedy") or "")

    def as_dict(self) -> dict[str, Any]:
        """Returns the group as JSON types; its incidents by number and second, as in their tags."""
        return {
            "incidents": [f"{each.get('id')}/{int(each.get('time', 0))}" for each in self.records],
            "place": self.place,
            "sample": self.sample,
            "do": self.to_do,
            "ignore": ignore_in(self.records[-1]),
        }


_WORDS = {
    "recurring": ", it comes back",
    "contained": ", and the run does not learn",
    "unresolved": ", and the run ended without a healthy step",
    "observed": ", and nothing was changed",
    "open": ", not over yet",
}
"""Outcome -> what it means for the run."""


@dataclass(frozen=True)
class Verdict:
    """What the incidents of a run mean for its user."""

    level: Level
    text: str
    to_do: str
    """The most urgent thing to do; "" for nothing."""
    groups: tuple[IncidentGroup, ...]

    def line(self) -> str:
        """Returns text and advice in one line."""
        return self.text + (f". To do: {self.to_do}" if self.to_do else "")

    def as_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON types."""
        groups = [group.as_dict() for group in self.groups]
        return {"level": self.level, "text": self.text, "do": self.to_do, "groups": groups}


def place_in(record: Record) -> str:
    """Returns what incidents with the same cause have in common, in a few words.

    It is the operation and source line that made the NaN or Inf, or the cause, or the kind. What
    did not recur when the same steps were run again is not the fault of a line.

    Args:
        record: with ``kind``, ``cause``, ``verdict`` and ``origin``.

    >>> place_in({"kind": "loss spike", "cause": "", "verdict": "", "origin": None})
    'loss spike, cause unknown'
    """
    origin = record.get("origin")
    if origin and origin.get("cause") != "input" and record.get("verdict") != "transient":
        file = origin.get("file")
        line = f" at {PurePath(file).name}:{origin.get('line')}" if file else ""
        return f"{origin.get('op')}{line}"
    return str(record.get("cause") or f"{record.get('kind')}, cause unknown")


def ignore_in(record: Record) -> str:
    """Returns when an incident needs no action; "" if it does, or if its cause is not known.

    What comes back, ends the run or keeps it from learning is not for ignoring.

    Args:
        record: with ``cause``, ``outcome`` and the likely causes.
    """
    when = _leave(record)
    serious = record.get("outcome") in ("recurring", "stopped", "contained")
    return "" if serious or when.startswith("never") else when


def _leave(record: Record) -> str:
    """Returns when the cause of an incident may be ignored; "" if it is not known."""
    best: Record = next(iter(record.get("hypotheses") or ()), {})
    known = bool(record.get("cause")) and best.get("cause") == record.get("cause")
    return str(best.get("leave") or "") if known else ""


def groups_of(records: Sequence[Record]) -> tuple[IncidentGroup, ...]:
    """Groups incidents by cause and sample, in the order of the first of each group.

    One sample that fails again and again is to blame itself; an operation that fails with several
    samples is to blame for all of them.

    Args:
        records: of a run, the oldest first.
    """
    shared = {(each.get("run"), each.get("same_sample_as")) for each in records}
    failed_with: dict[str, set[object]] = {}
    for each in records:
        if _is_operation(each) and each.get("samples"):
            failed_with.setdefault(place_in(each), set()).add(_sample_root(each))
    groups: dict[object, list[Record]] = {}
    for each in records:
        place, sample = place_in(each), _sample_root(each)
        of_sample = _repeats_sample(each) or sample in shared
        several = _is_operation(each) and len(failed_with.get(place, ())) > 1
        groups.setdefault(sample if of_sample and not several else place, []).append(each)
    return tuple(IncidentGroup(place_in(group[0]), tuple(group)) for group in groups.values())


def verdict_of(records: Sequence[Record], steps: int | None = None) -> Verdict:
    """Returns what the incidents of a run mean for its user.

    The groups are those of all incidents; the verdict is on the latest fit that had any, if several
    wrote into the same folder.

    Args:
        records: of the run, the oldest first.
        steps: optimizer steps of the run; None if the number is not known.

    >>> verdict_of([], 2000).line()
    'no incidents in 2,000 steps'
    >>> verdict_of([{"id": 1, "kind": "loss spike", "outcome": "recovered"}]).line()
    '1 incident, handled; nothing to do'
    """
    if not records:
        return Verdict("ok", "no incidents" + (f" in {steps:,} steps" if steps else ""), "", ())
    groups, latest = groups_of(records), records[-1]
    fit = [each for each in records if each.get("run") == latest.get("run")]
    # A run that went on after a stop was started again by its user.
    urgent = sorted(
        (g for g in groups_of(fit) if g.level != "ok" and _counts(g, latest)),
        key=lambda g: (g.outcome != "stopped", g.level != "act", -len(g.records)),
    )
    count = "1 incident" if len(fit) == 1 else f"{len(fit)} incidents"
    if not urgent:
        handled = "handled" if len(fit) == 1 else "all handled"
        return Verdict("ok", f"{count}, {handled}; nothing to do", "", groups)
    named = 1 if urgent[0].outcome == "stopped" else _NAMED
    text = "; ".join(group.text for group in urgent[:named])
    more = len(urgent) - named
    text += f"; and {more} more {'cause' if more == 1 else 'causes'}" if more > 0 else ""
    return Verdict(urgent[0].level, text, urgent[0].to_do, groups)


def _counts(group: IncidentGroup, latest: Record) -> bool:
    return group.outcome != "stopped" or group.records[-1] is latest


def _repeats_sample(record: Record) -> bool:
    return record.get("same_sample_as") is not None


def _sample_root(record: Record) -> tuple[object, object]:
    """Returns the run, and the first incident with the same sample."""
    root = record.get("same_sample_as")
    return record.get("run"), record.get("id") if root is None else root


def _is_operation(record: Record) -> bool:
    """Whether an operation of the program made the NaN or Inf out of finite data."""
    origin = record.get("origin")
    return origin is not None and origin.get("cause") == "operation"


def _reason(record: Record) -> str:
    reasons = (r for r in reversed(record.get("responses") or ()) if r.startswith(_STOP))
    return " ".join(next(reasons, "").removeprefix(_STOP).split())


def _losses(record: Record) -> str:
    """Returns the loss after and before a contained incident."""
    after, before = record.get("loss_after"), record.get("loss_before")
    if record.get("outcome") != "contained" or not isinstance(after, (int, float)):
        return ""
    known = isinstance(before, (int, float))
    return f": loss {after:.3g}" + (f", {before:.3g} before" if known else "")
