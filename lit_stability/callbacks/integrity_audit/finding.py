"""What an audit found on one rank. Imports neither torch nor Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """A number that is wrong, or a rerun that was."""

    tensor: str
    """The first tensor that differs."""
    text: str
    """What differs from what, in one clause."""
    step: int
    """Optimizer step in which it became wrong."""
    state: bool = False
    """Whether weights or moments are damaged, so that skipping the step is not enough."""
    harmless: bool = False
    """Whether only a rerun was wrong, and training is confirmed."""


@dataclass
class RankReport:
    """What one rank has to report of a step; all ranks exchange theirs."""

    place: str
    """Host and device of the rank."""
    audited: bool
    """Whether the step is one that is audited."""
    findings: list[Finding] = field(default_factory=list)
    group: str = ""
    """Ranks with the same text hold the same weights."""
    checksums: dict[str, int] = field(default_factory=dict)
    """Of weights and averaged gradients, by name."""
    off: str | None = None
    """Why this rank cannot run steps again."""
    error: str | None = None
    """Why this rank can check nothing any more."""
