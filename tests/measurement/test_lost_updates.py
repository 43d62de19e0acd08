"""16-bit weights that stand still while their gradient pulls."""

import pytest
import torch

from lit_stability.measurement.lost_updates import EVERY, Rounding
from lit_stability.measurement.step_meter import StepMeter


def pull(parameters, step, sign=1.0):
    """Gradients of a fixed sign, and updates of a fixed size."""
    for p in parameters:
        p.grad = torch.full_like(p, sign)
        p.data -= step * sign


@pytest.mark.parametrize(
    ("dtype", "step", "share"),
    [
        (torch.bfloat16, 1e-3, 1.0),
        (torch.bfloat16, 1e-2, 0.0),
        (torch.float16, 1e-4, 1.0),
        (torch.float16, 1e-3, 0.0),
    ],
)
def test_weights_of_one_stand_still_below_half_a_unit_in_the_last_place(dtype, step, share):
    """1 - 2**-8 is bfloat16's neighbour of 1, 1 - 2**-11 float16's."""
    p = torch.nn.Parameter(torch.ones(10, 100, dtype=dtype))
    rounding = Rounding([p])
    seen = []
    for _ in range(2 * EVERY):
        pull([p], step)
        seen += rounding.count_stuck()
    (counts,) = seen
    assert counts[0] / counts[1] == share


def test_half_of_the_weights_stuck_is_a_half_and_dead_or_turning_gradients_do_not_count():
    stuck, moving, dead, turning = (
        torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16)) for _ in range(4)
    )
    rounding = Rounding([stuck, moving, dead, turning])
    seen = []
    for i in range(2 * EVERY):
        pull([stuck], 1e-4)
        pull([moving], 1e-2)
        dead.grad = torch.zeros_like(dead)
        turning.grad = torch.full_like(turning, (-1.0) ** (i // EVERY))
        seen += rounding.count_stuck()
    assert seen[0].tolist() == [40, 80]


def test_float32_weights_are_not_looked_at():
    p = torch.nn.Parameter(torch.ones(10))
    rounding = Rounding([p])
    for _ in range(3 * EVERY):
        pull([p], 1e-9)
        assert rounding.count_stuck() == []


def test_nothing_is_reported_of_weights_that_were_restored():
    p = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    rounding = Rounding([p])
    seen = []
    for i in range(2 * EVERY):
        if i == EVERY:
            rounding.forget()
        pull([p], 1e-4)
        seen += rounding.count_stuck()
    assert seen == []


def test_meter_gives_the_share_on_one_step_in_ten():
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    meter = StepMeter([("p", p)], torch.optim.SGD([p], 1e-4))
    shares = []
    for i in range(3 * EVERY):
        pull([p], 1e-4)
        shares.append(meter.measure(i, torch.tensor(1.0)).stuck_share)
    assert shares[2 * EVERY - 1] == shares[3 * EVERY - 1] == 1.0
    assert shares.count(None) == 3 * EVERY - 2
