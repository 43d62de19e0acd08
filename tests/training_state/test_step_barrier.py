"""A copy beside training: the next optimizer's step comes after it, or is known to be torn."""

import time

import pytest
import torch

from lit_stability.training_state.copies import Copies, version_of
from lit_stability.training_state.step_barrier import StepBarrier
from tests.delayed import ThreadCopies, Unordered


class OneWeight:
    """A weight with its optimizer, and copies of it that take 50 ms."""

    def __init__(self, kind=ThreadCopies, **options):
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.weight.grad = torch.ones(2)
        self.optimizer = torch.optim.SGD([self.weight], 1.0)
        self.copies = kind(lambda: time.sleep(0.05)) if kind is not Copies else Copies()
        self.barrier = StepBarrier(self.copies, **options)
        self.barrier.follow([self.optimizer])
        self.copy, self.torn = torch.full((2,), -1.0), 0

    def begin(self):
        version = version_of(self.weight)
        self.copies.start([([self.copy], [self.weight.detach()])])
        self.barrier.begin(written=lambda: version_of(self.weight) != version, torn=self.count_one)

    def count_one(self):
        self.torn += 1

    def write(self):
        with torch.no_grad():
            self.weight.add_(5)


@pytest.mark.parametrize(("kind", "expected"), [(ThreadCopies, 0.0), (Unordered, -1.0)])
def test_step_comes_after_the_copy(kind, expected):
    """And so it does not where it is not made to wait."""
    one = OneWeight(kind)
    one.begin()
    one.optimizer.step()
    assert one.copy.tolist() == [expected] * 2
    one.barrier.close()
    assert one.torn == 0


def test_copy_of_a_weight_that_the_program_wrote_is_reported():
    one = OneWeight()
    one.begin()
    one.write()
    one.optimizer.step()
    assert one.torn == 1
    one.begin()
    one.barrier.wait()
    one.write()
    one.optimizer.step()
    assert one.torn == 1, "it was waited for before the write"


@pytest.mark.parametrize(("beside", "seen"), [(False, 0.0), (True, -1.0)])
@pytest.mark.parametrize("by_name", [False, True])
def test_closure_comes_after_the_copy_or_beside_it_but_the_update_always_after(
    by_name, beside, seen
):
    one = OneWeight(beside_passes=beside)
    copied = []

    def closure():
        copied.append(one.copy.tolist()[0])
        return 0.0

    one.begin()
    one.optimizer.step(**{"closure": closure}) if by_name else one.optimizer.step(closure)
    assert copied == [seen]
    assert one.copy.tolist() == [0.0, 0.0], "as the weight was before the update"
    one.barrier.close()


def test_step_that_has_no_hooks_is_taken_for_a_write():
    one = OneWeight()
    one.begin()
    one.barrier.follow([])
    one.optimizer.step()
    one.barrier.finish()
    assert one.torn == 1


def test_write_after_an_immediate_copy_costs_nothing():
    one = OneWeight(Copies)
    one.begin()
    one.write()
    one.barrier.finish()
    assert (one.torn, one.copy.tolist()) == (0, [0.0, 0.0])


def test_barrier_that_is_closed_leaves_the_optimizer_as_it_was():
    one = OneWeight()
    hooks = len(one.optimizer._optimizer_step_pre_hooks)
    one.begin()
    one.barrier.close()
    assert one.copy.tolist() == [0.0, 0.0], "nobody writes into it any more"
    assert len(one.optimizer._optimizer_step_pre_hooks) == hooks - 1
