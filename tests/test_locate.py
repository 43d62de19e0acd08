"""Where NaNs are born, case by case; what a search leaves behind: nothing."""


import pytest
import torch

from lit_stability import locate_nonfinite
from tests import locate_cases
from tests.locate_cases import BAD, HEALTHY

EXPECTED = {"phase": "forward", "cause": "operation"}


@pytest.mark.parametrize(("build", "expected"), [pytest.param(*c, id=c[0].__name__) for c in BAD])
def test_locate_bad_step_names_the_origin(build, expected):
    """S15, S4: module, operation, line, phase and cause."""
    torch.manual_seed(0)
    model, step = build()
    found = locate_nonfinite(model, step)
    assert found is not None
    wanted = EXPECTED | expected
    assert {key: getattr(found, key) for key in wanted} == wanted, found.describe()
    assert found.file == locate_cases.__file__
    assert type(model.get_submodule(found.module)).__name__ == found.module_type


@pytest.mark.parametrize("build", HEALTHY, ids=lambda b: b.__name__)
def test_locate_healthy_step_finds_nothing(build):
    """S15."""
    torch.manual_seed(0)
    assert locate_nonfinite(*build()) is None
