"""The proof of the spine: six faults that kill a run, two seeds, and the clean twin's loss."""

import functools

import pytest

from benchmarks.rescue import FAULTS, HEALTHY, STEPS, run

SEEDS = (0, 1)
KINDS = {
    "NaN batch": ("non-finite loss", "step taken again"),
    "loss x1e4": ("gradient spike", "step taken again"),
    "LR x300 by the scheduler": ("learning-rate jump", "learning rate held, x0.00333"),
    "NaN weight": ("non-finite weight", "rolled back and replayed"),
    "Adam v zeroed": ("optimizer state", "rolled back and replayed"),
    "gradients x1e3, 5 steps": (
        "gradient spike",
        "step taken again, step skipped, step taken again, step skipped, step taken again",
    ),
}
EXACT = {"NaN batch", "loss x1e4", "NaN weight", "Adam v zeroed"}
"""Faults that strike once, from outside: nothing is lost."""


@functools.cache
def clean_loss(seed):
    result = run("clean", seed, protected=True)
    assert result.incidents == ()
    return result.loss


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_run_ends_within_five_percent_of_its_clean_twin(fault, seed):
    """K3, N1, N3: one incident, the smallest remedy that is enough, the clean curve."""
    result = run(fault, seed, protected=True)
    assert result.loss <= 1.05 * clean_loss(seed)
    assert result.loss == clean_loss(seed) or fault not in EXACT
    (incident,) = result.incidents
    assert (incident.first.kind, incident.done, incident.outcome) == (*KINDS[fault], "recovered")
    assert result.batches <= STEPS + 30, "no more batches are spent than a rollback goes back"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scenario", [s for s in HEALTHY if s != "clean"])
def test_hard_but_benign_batches_raise_nothing(scenario, seed):
    """A false alarm costs as much trust as a missed death."""
    assert run(scenario, seed, protected=True).incidents == ()
