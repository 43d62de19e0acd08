"""All checks in their order, over one subject, with what could not run and why.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight import (
    branches,
    inputs,
    loss,
    masks,
    modes,
    positions,
    rates,
    scales,
    sharing,
    trainable,
)
from lit_stability.checks.preflight.memorise import Memorise, check_memory
from lit_stability.checks.preflight.observation import Observation, observe
from lit_stability.checks.preflight.report import DeclarationError, NotApplicableError, Report
from lit_stability.checks.preflight.subject import StepError, Subject, rehearsing

Check = Callable[[], list[Finding]]


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """What the checks cannot know by themselves; the options of `Preflight` say what each is.

    Raises:
        ValueError: an option is out of its range, or two contradict each other.
    """

    classes: int | None = None
    """V of a cross entropy that torch's functions do not compute: ln V nats are expected."""
    one_vs_rest: int | None = None
    """K + 1 binary terms that are summed: (K + 1) ln 2 nats are expected."""
    pretrained: bool = False
    """Whether the head has been trained: a first loss below a guess is welcome."""
    frozen: Sequence[str] = ()
    """Names of parameters meant to be frozen, with wildcards, such as ``backbone.*``."""
    memorise: Memorise | None = None
    """Samples to learn by heart; None for none, as it costs steps."""
    probes: Sequence[masks.MaskProbe | positions.PositionProbe] = field(default=())
    """What may and must be seen, and what is added to positions."""

    def __post_init__(self) -> None:
        for name in ("classes", "one_vs_rest"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name}={value} must be at least 2")
        if self.classes and self.one_vs_rest:
            raise ValueError(
                f"classes={self.classes} and one_vs_rest={self.one_vs_rest} expect different "
                "losses; give one of them"
            )


def preflight(subject: Subject, expect: Expectations | None = None) -> Report:
    """Run every check that applies; the subject is as it was afterwards, and so are generators.

    A step that cannot be taken is a finding, and the checks that need one are told as not run.

    Args:
        subject: the model, its batch and its optimizers.
        expect: what cannot be known from them.
    """
    expect = expect or Expectations()
    report, start = Report(), time.monotonic()
    with rehearsing():
        _run(report, _static(subject, expect))
        try:
            first, second = observe(subject)
        except StepError as error:
            report.findings.append(error.finding)
            report.skipped |= dict.fromkeys(_PASS, "the first step cannot be taken")
        except NotApplicableError as reason:
            report.skipped |= dict.fromkeys(_PASS, str(reason))
        except Exception as error:  # as in `_try`
            report.skipped |= dict.fromkeys(_PASS, f"the first pass failed: {error!r}")
        else:
            _run(report, _of_passes(subject, expect, first, second))
    report.seconds = time.monotonic() - start
    return report


def _run(report: Report, checks: dict[str, Check]) -> None:
    for name, check in checks.items():
        reason, found = _try(check)
        report.findings += found
        if reason is None:
            report.ran.append(name)
        else:
            report.skipped[name] = reason


def _try(check: Check) -> tuple[str | None, list[Finding]]:
    """Why a check could not run, or None, and what it found.

    A check is no reason for a run to end: one that fails, as for want of memory, is told as such.
    """
    try:
        return None, check()
    except NotApplicableError as reason:
        return str(reason), []
    except DeclarationError:
        raise
    except Exception as error:
        return f"it failed: {error!r}", []


def _static(subject: Subject, expect: Expectations) -> dict[str, Check]:
    """Checks that need no pass."""
    model, optimizers = subject.original, subject.optimizers
    tables = [p for p in expect.probes if isinstance(p, positions.PositionProbe)]
    return {
        "batch": lambda: inputs.check_batch(subject.batch),
        "frozen": lambda: trainable.check_frozen(model, expect.frozen),
        "optimizer": lambda: trainable.check_optimized(model, optimizers),
        "duplicates": lambda: sharing.check_duplicates(model, optimizers),
        "copies": lambda: sharing.check_copies(model),
        "initialisation": lambda: scales.check_initialisation(model),
        "positions": lambda: positions.check_positions(model, tables),
    }


def _of_passes(
    subject: Subject, expect: Expectations, first: Observation, second: Observation
) -> dict[str, Check]:
    """Checks that look at passes, or make their own."""
    model = subject.original
    probes: list[Any] = [p for p in expect.probes if isinstance(p, masks.MaskProbe)]
    checks: dict[str, Check] = {
        "finite": lambda: loss.check_finite(first),
        "initial loss": lambda: loss.check_initial_loss(
            first,
            classes=expect.classes,
            one_vs_rest=expect.one_vs_rest,
            pretrained=expect.pretrained,
        ),
        "operations": lambda: loss.check_operations(first),
        "targets": lambda: inputs.check_targets(first),
        "scales": lambda: scales.check_scales(first, model),
        "gradients": lambda: trainable.check_gradients(first, second, model),
        "gains": lambda: branches.check_gains(first, second, model),
        "weights": lambda: branches.check_weights(first, second, model),
        "relus": lambda: branches.check_relus(first),
        "constant output": lambda: branches.check_constant(second),
        "modes": lambda: modes.check_modes(subject),
        "learning rate": lambda: rates.check_rates(subject),
        "masks": lambda: masks.check_masks(subject, probes),
        "memorise": lambda: check_memory(subject, expect.memorise),
    }
    assert tuple(checks) == _PASS, "what cannot run without a step is listed once more below"
    return checks


_PASS = (
    *("finite", "initial loss", "operations", "targets", "scales", "gradients", "gains", "weights"),
    *("relus", "constant output", "modes", "learning rate", "masks", "memorise"),
)
