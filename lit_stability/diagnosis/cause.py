"""Causes: their evidence rules, remedy and recommended action; the registry and `diagnose`.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lit_stability.diagnosis.context import DiagnosisContext

RecommendedAction = Literal["usual", "lower", "stop"]
"""Recommendation to the escalation policy: ``usual``, a response to the damage; ``lower``, a
rollback with a lower learning rate, without a retry; ``stop``, as no further step can help."""
Certainty = Literal["certain", "likely", "possible"]
EvidenceRule: TypeAlias = Callable[[DiagnosisContext], str | None]
"""Returns the evidence that a context contains, as a sentence, or None."""

_CERTAIN, _LIKELY, _POSSIBLE = 8, 4, 2
_SHOWN = 20
"""Points of a cause that an experiment has confirmed: more than all other evidence."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One entry of the registry.

    The points of its evidence are added, so that a ranking can be traced: 8 points make a cause
    certain, 4 likely, 2 possible. Points are not probabilities. Evidence against the cause has
    negative points; evidence that contradicts it clears it, whatever its points are.

    Raises:
        ValueError: if ``name``, ``rules`` or ``ignore_when`` is empty.
    """

    name: str
    rules: tuple[tuple[int, EvidenceRule], ...]
    """Points of each evidence rule, and the rule."""
    remedy: str | Callable[[DiagnosisContext], str]
    """What to try, in one sentence, or a function of the context that returns it."""
    ignore_when: str
    """When no action is needed."""
    recommended_action: RecommendedAction = "usual"
    """What to do if the cause is likely; "stop" requires that it is certain."""
    contradictions: tuple[EvidenceRule, ...] = ()
    """Rules whose evidence clears the cause, unless an experiment has confirmed it."""

    def __post_init__(self) -> None:
        for name in ("name", "ignore_when"):
            if not getattr(self, name):
                raise ValueError(f"{name} of a cause must not be empty, got {self!r}")
        if not self.rules:
            raise ValueError(f"cause {self.name!r} must have at least one rule, got ()")

    def weigh(self, context: DiagnosisContext) -> LikelyCause | RuledOut | None:
        """Weighs the evidence in a context.

        Returns:
            The cause with its evidence; or with what clears it, if there is evidence for it too;
            None if the evidence is too weak.
        """
        found = self._found(context)
        supporting = sorted((pair for pair in found if pair[0] > 0), key=lambda pair: -pair[0])
        if sum(weight for weight, _ in supporting) < _POSSIBLE:
            return None
        contradiction = self._contradiction(context)
        if contradiction is not None:
            return RuledOut(self.name, contradiction)
        points = sum(weight for weight, _ in found)
        if points < _POSSIBLE:
            return None
        return LikelyCause(
            cause=self.name,
            points=points,
            evidence=tuple(dict.fromkeys(sentence for _, sentence in supporting)),
            remedy=self.remedy if isinstance(self.remedy, str) else self.remedy(context),
            ignore_when=self.ignore_when,
            recommended_action=self.recommended_action,
        )

    def _found(self, context: DiagnosisContext) -> list[tuple[int, str]]:
        results = [(weight, rule(context)) for weight, rule in self.rules]
        if self.name in context.shown:
            results.append((_SHOWN, context.shown[self.name]))
        return [(weight, sentence) for weight, sentence in results if sentence is not None]

    def _contradiction(self, context: DiagnosisContext) -> str | None:
        if self.name in context.shown:
            return None
        return next(filter(None, (rule(context) for rule in self.contradictions)), None)


@dataclass(frozen=True, slots=True)
class RuledOut:
    """A cause for which there was evidence, and the evidence that clears it."""

    cause: str
    why: str

    def text(self) -> str:
        """Returns cause and evidence in one line."""
        return f"{self.cause} ({self.why})"


@dataclass(frozen=True, kw_only=True)
class LikelyCause:
    """A cause that has evidence, as `diagnose` returns it."""

    cause: str
    """Name of the cause."""
    points: int
    evidence: tuple[str, ...]
    """Evidence for the cause, one sentence each, the strongest first."""
    remedy: str
    """What to try."""
    ignore_when: str
    """When no action is needed."""
    recommended_action: RecommendedAction

    @property
    def certainty(self) -> Certainty:
        """The points as a word."""
        if self.points >= _CERTAIN:
            return "certain"
        return "likely" if self.points >= _LIKELY else "possible"

    @property
    def action(self) -> RecommendedAction:
        """The recommended action if the cause is certain enough for it, else "usual"."""
        needed = {"usual": _POSSIBLE, "lower": _LIKELY, "stop": _CERTAIN}[self.recommended_action]
        return self.recommended_action if self.points >= needed else "usual"

    def text(self) -> str:
        """Returns certainty, cause and evidence in one line."""
        return f"{self.certainty}: {self.cause} ({'; '.join(self.evidence)})"

    def as_dict(self) -> dict[str, Any]:
        """Returns the cause as JSON types."""
        return {
            "cause": self.cause,
            "certainty": self.certainty,
            "points": self.points,
            "evidence": list(self.evidence),
            "do": self.remedy,
            "leave": self.ignore_when,
        }


CAUSES: dict[str, Cause] = {}
"""Name -> cause; causes with equal points are ranked in this order."""


def register_cause(cause: Cause) -> None:
    """Adds a cause to the registry; replaces a cause of the same name.

    Args:
        cause: to register.

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
    """Weighs causes and returns those with enough evidence, the best supported first.

    Beside a certain cause, no weaker one is returned.

    Args:
        context: what is known of the anomaly.
        causes: causes to weigh; None for all registered ones.
        most: largest number of causes returned.
    """
    return weigh_all(context, causes)[0][:most]


def weigh_all(
    context: DiagnosisContext, causes: Iterable[Cause] | None = None
) -> tuple[list[LikelyCause], list[RuledOut]]:
    """Returns the causes with enough evidence, and those that other evidence clears.

    Args:
        context: what is known of the anomaly.
        causes: causes to weigh; None for all registered ones.
    """
    weighed = [cause.weigh(context) for cause in (CAUSES.values() if causes is None else causes)]
    found = sorted((c for c in weighed if isinstance(c, LikelyCause)), key=lambda c: -c.points)
    certain = [cause for cause in found if cause.certainty == "certain"]
    return certain or found, [cause for cause in weighed if isinstance(cause, RuledOut)]
