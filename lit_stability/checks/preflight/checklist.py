"""Runs all checks on a model in order, and records which checks were skipped and why.

May import torch; does not import Lightning.
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
    """What the user declares, because the checks cannot find it out from the model.

    Raises:
        ValueError: If an option is out of range, or two options contradict each other.
    """

    classes: int | None = None
    """Number of classes V of a custom cross entropy; the expected first loss is ln V nats."""
    one_vs_rest: int | None = None
    """Number of summed binary terms, K + 1; the expected first loss is (K + 1) ln 2 nats."""
    pretrained: bool = False
    """Whether the head is pretrained, so that a first loss below that of a guess is accepted."""
    frozen: Sequence[str] = ()
    """Names of parameters meant to be frozen, with wildcards, such as ``backbone.*``."""
    memorise: Memorise | None = None
    """Settings of the memorisation check; None skips it, because it runs many steps."""
    probes: Sequence[masks.MaskProbe | positions.PositionProbe] = field(default=())
    """Mask probes (which inputs an output may depend on) and position probes."""

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
    """Runs every check that applies; the subject and the random generators are unchanged.

    A failing step is reported as a finding; the checks that need a step are reported as skipped.

    Args:
        subject: The model, its batch and its optimizers.
        expect: What the checks cannot find out from these.
    """
    expect = expect or Expectations()
    report, start = Report(), time.monotonic()
    with rehearsing():
        _run(report, _checks_without_step(subject, expect))
        try:
            first, second = observe(subject)
        except StepError as error:
            report.findings.append(error.finding)
            report.skipped |= dict.fromkeys(_NEED_STEP, "the first step failed")
        except NotApplicableError as reason:
            report.skipped |= dict.fromkeys(_NEED_STEP, str(reason))
        except Exception as error:  # as in `_try`
            report.skipped |= dict.fromkeys(_NEED_STEP, f"the first pass failed: {error!r}")
        else:
            _run(report, _checks_with_step(subject, expect, first, second))
    report.seconds = time.monotonic() - start
    return report


def _run(report: Report, checks: dict[str, Check]) -> None:
    for name, check in checks.items():
        reason, findings = _try(check)
        report.findings += findings
        if reason is None:
            report.ran.append(name)
        else:
            report.skipped[name] = reason


def _try(check: Check) -> tuple[str | None, list[Finding]]:
    """Returns the reason why a check did not run (None if it ran), and its findings.

    A check must not end the run: if it fails, for example without memory, it counts as skipped.
    """
    try:
        return None, check()
    except NotApplicableError as reason:
        return str(reason), []
    except DeclarationError:
        raise
    except Exception as error:
        return f"the check failed: {error!r}", []


def _checks_without_step(subject: Subject, expect: Expectations) -> dict[str, Check]:
    """Returns the checks that need neither a forward nor a backward pass."""
    model, optimizers = subject.original, subject.optimizers
    probes = [p for p in expect.probes if isinstance(p, positions.PositionProbe)]
    return {
        "batch": lambda: inputs.check_batch(subject.batch),
        "frozen": lambda: trainable.check_frozen(model, expect.frozen),
        "optimizer": lambda: trainable.check_optimized(model, optimizers),
        "registered": lambda: trainable.check_registered(model),
        "duplicates": lambda: sharing.check_duplicates(model, optimizers),
        "copies": lambda: sharing.check_copies(model),
        "initialisation": lambda: scales.check_initialisation(model),
        "positions": lambda: positions.check_positions(model, probes),
    }


def _checks_with_step(
    subject: Subject, expect: Expectations, first: Observation, second: Observation
) -> dict[str, Check]:
    """Returns the checks that use the observed passes, or run their own."""
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
        "comparisons": lambda: loss.check_comparisons(first),
        "probabilities": lambda: loss.check_probabilities(first),
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
    assert tuple(checks) == _NEED_STEP, "_NEED_STEP must list the same checks"
    return checks


_NEED_STEP = (
    *("finite", "initial loss", "comparisons", "probabilities", "operations", "targets", "scales"),
    *("gradients", "gains", "weights"),
    *("relus", "constant output", "modes", "learning rate", "masks", "memorise"),
)
