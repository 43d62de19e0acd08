"""What a cause is: the clues that speak for it, what to do about it, and when to leave it alone.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lit_stability.diagnosis.context import DiagnosisContext

RecommendedAction = Literal["usual", "lower", "stop"]
"""What the ladder is to do: ``usual``, by the damage that was done; ``lower``, roll back and lower
the learning rate without trying the same once more; ``stop``, as no step that follows can help."""
Certainty = Literal["certain", "likely", "possible"]
EvidenceRule: TypeAlias = Callable[[DiagnosisContext], str | None]
"""What a scene says for a cause, in a sentence, or None."""

_CERTAIN, _LIKELY, _POSSIBLE = 8, 4, 2
_SHOWN = 20
"""Points of what was shown by trial, above all that only speaks for something."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One row of the registry.

    A cause is weighed by points, so that it is plain what a ranking comes from: 8 make it certain,
    4 likely, 2 possible. Points are no probabilities. A clue may speak against it, with points
    below zero.

    Raises:
        ValueError: if it has no name, no clue, or does not say when to leave it alone.
    """

    name: str
    rules: tuple[tuple[int, EvidenceRule], ...]
    remedy: str | Callable[[DiagnosisContext], str]
    """What to try, in one sentence."""
    ignore_when: str
    """When to do nothing."""
    recommended_action: RecommendedAction = "usual"
    """What the ladder is to do once the cause is likely; a stop needs it to be certain."""

    def __post_init__(self) -> None:
        for name in ("name", "ignore_when"):
            if not getattr(self, name):
                raise ValueError(f"{name} of a cause must not be empty, got {self!r}")
        if not self.rules:
            raise ValueError(f"cause {self.name!r} has no rule: nothing could speak for it")

    def weigh(self, context: DiagnosisContext) -> LikelyCause | None:
        """What speaks for it, or None if that is too little."""
        told = [(each, rule(context)) for each, rule in self.rules]
        if self.name in context.shown:
            told.append((_SHOWN, context.shown[self.name]))
        found = [(each, sentence) for each, sentence in told if sentence is not None]
        points = sum(each for each, _ in found)
        if points < _POSSIBLE:
            return None
        for_it = sorted((pair for pair in found if pair[0] > 0), key=lambda pair: -pair[0])
        return LikelyCause(
            cause=self.name,
            points=points,
            evidence=tuple(dict.fromkeys(sentence for _, sentence in for_it)),
            remedy=self.remedy if isinstance(self.remedy, str) else self.remedy(context),
            ignore_when=self.ignore_when,
            recommended_action=self.recommended_action,
        )


@dataclass(frozen=True, kw_only=True)
class LikelyCause:
    """A cause that something speaks for, as `diagnose` gives it.

    ``cause`` is its name, ``evidence`` what speaks for it, ``remedy`` what to try, ``ignore_when``
    when to do nothing; ``certainty`` says in a word what the points amount to, and `text` all in
    one line.
    """

    cause: str
    points: int
    evidence: tuple[str, ...]
    """What speaks for it, a sentence each, the strongest first."""
    remedy: str
    ignore_when: str
    recommended_action: RecommendedAction

    @property
    def certainty(self) -> Certainty:
        """In a word."""
        if self.points >= _CERTAIN:
            return "certain"
        return "likely" if self.points >= _LIKELY else "possible"

    @property
    def decides(self) -> RecommendedAction:
        """What it asks of the ladder, by how certain it is."""
        needed = {"usual": _POSSIBLE, "lower": _LIKELY, "stop": _CERTAIN}[self.recommended_action]
        return self.recommended_action if self.points >= needed else "usual"

    def text(self) -> str:
        """One line: how certain, what, and why."""
        return f"{self.certainty}: {self.cause} ({'; '.join(self.evidence)})"

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "cause": self.cause,
            "certainty": self.certainty,
            "points": self.points,
            "evidence": list(self.evidence),
            "do": self.remedy,
            "leave": self.ignore_when,
        }


CAUSES: dict[str, Cause] = {}
"""By name, in the order in which those with as many points are told."""


def register_cause(cause: Cause) -> None:
    """Add a cause of your own to the registry, or put it in place of the one of that name.

    Args:
        cause: the row.

    >>> from lit_stability.detectors import Anomaly
    >>> late = Cause(
    ...     name="tokenizer was retrained",
    ...     rules=((4, lambda context: "it is step 7" if context.anomaly.step == 7 else None),),
    ...     remedy="use the tokenizer of the checkpoint",
    ...     ignore_when="never",
    ... )
    >>> register_cause(late)
    >>> spike = Anomaly(kind="loss spike", step=7, value=9.0, message="loss 9", signal="loss")
    >>> diagnose(DiagnosisContext(anomaly=spike))[0].text()
    'likely: tokenizer was retrained (it is step 7)'
    >>> del CAUSES["tokenizer was retrained"]
    """
    CAUSES[cause.name] = cause


def diagnose(
    context: DiagnosisContext, causes: Iterable[Cause] | None = None, most: int = 4
) -> list[LikelyCause]:
    """Weigh the causes of the registry, or those given; the best supported first.

    Args:
        context: what is known.
        causes: to choose from, None for all that are registered.
        most: hypotheses given.
    """
    weighed = (cause.weigh(context) for cause in (CAUSES.values() if causes is None else causes))
    found = sorted((h for h in weighed if h is not None), key=lambda h: -h.points)
    return found[:most]
