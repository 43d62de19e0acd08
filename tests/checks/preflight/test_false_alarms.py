"""A false alarm costs as much trust as a miss."""

import pytest

from lit_stability.checks.preflight import preflight
from tests.checks.preflight.zoo import ZOO, from_zoo


@pytest.mark.parametrize("name", ZOO)
def test_preflight_of_a_common_architecture_finds_nothing_but_notes(name):
    for seed in range(5):
        report = preflight(from_zoo(name, seed))
        assert not report.of("error", "warning"), report.text()
        assert not [why for why in report.skipped.values() if "failed" in why]
