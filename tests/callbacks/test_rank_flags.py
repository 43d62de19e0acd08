"""A flag of one rank is known to all ranks in the same step."""

import os

import pytest

from lit_stability import GradientMonitor, StabilityCallback
from tests.conftest import fit
from tests.distributed import run_ranks
from tests.rank_cases import Manual, Net, fit_rank


class Raises(StabilityCallback):
    """Raises a flag at one step, and notes what all ranks raised in each."""

    def __init__(self, step, flag):
        self.step, self.flag, self.seen = step, flag, []

    def rank_flag(self, trainer, pl_module):
        return self.flag if trainer.global_step == self.step else 0.0

    def on_rank_flags(self, trainer, pl_module, flags):
        self.seen.append((trainer.global_step, list(flags)))


def flags_of(folder, name, module, **options):
    """What two flags of this rank's callbacks were seen to be, in each step."""
    callbacks = [GradientMonitor(), Raises(3, 5.0), Raises(4, 7.0)]
    rank = int(os.environ["LOCAL_RANK"])
    callbacks[1].flag *= rank
    callbacks[2].flag *= 1 - rank
    fit_rank(folder, name, callbacks, module=module, max_steps=8, **options)
    return [callback.seen for callback in callbacks[1:]]


@pytest.mark.parametrize(
    ("name", "module", "options"),
    [
        ("ddp", Net, {}),
        ("fsdp2", Net, {}),
        ("ddp", Net, {"accumulate_grad_batches": 3}),
        ("ddp", Manual, {}),
    ],
    ids=["DDP", "FSDP2", "accumulation", "two optimizers by hand"],
)
def test_flag_of_a_rank_is_seen_by_all_ranks_in_the_same_step(name, module, options, tmp_path):
    first, second = run_ranks(Options(options), tmp_path, name, module, folder=tmp_path)
    assert first == second
    raised = [[(step, flags) for step, flags in seen if any(flags)] for seen in first]
    assert raised == [[(3, [0.0, 5.0])], [(4, [7.0, 0.0])]]
    assert [step for step, _ in first[0]] == list(range(8))


class Options:
    """`flags_of` with options, for another process."""

    def __init__(self, options):
        self.options = options

    def __call__(self, *args):
        return flags_of(*args, **self.options)


def test_flag_on_one_device_is_its_own(tmp_path):
    flag = Raises(3, 2.0)
    fit(tmp_path, [GradientMonitor(), flag], max_steps=6)
    assert [flags for _, flags in flag.seen] == [[0.0]] * 3 + [[2.0]] + [[0.0]] * 2
