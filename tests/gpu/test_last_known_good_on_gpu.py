"""Good checkpoints on a GPU: copied beside training to pinned memory, each of one moment."""

import functools

import pytest
import torch
from torch import nn

from lit_stability import AutoRollback, GradientMonitor, LastKnownGood
from lit_stability.training_state.copies import copies_to_host
from lit_stability.training_state.good_checkpoints import good_files
from lit_stability.training_state.host_copy import HostCopy
from tests.callbacks.test_last_known_good import Join, States
from tests.exact import Batches, differences, loader, run
from tests.gpu.conftest import ACCELERATOR, ON_GPU
from tests.gpu.test_exact_on_gpu import OnGPU, precise


class Wide(OnGPU):
    """With weights of 64 MiB, so that a copy takes longer than a step."""

    def __init__(self, optimizer="fused AdamW"):
        super().__init__(optimizer)
        self.spare = nn.Linear(4096, 4096 if ON_GPU else 8)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * self.spare.weight.square().mean()


@pytest.mark.parametrize("net", [OnGPU, Wide, functools.partial(Wide, "foreach AdamW")])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
def test_good_checkpoint_is_of_the_step_it_names(net, precision, options, tmp_path):
    options = precise(options, precision)
    states = States()
    good = LastKnownGood(every_n_steps=5, confirm_after=2, keep=99)
    callbacks = [GradientMonitor(), good, AutoRollback(), states, Join()]
    run(tmp_path, net, loader(Batches()), callbacks, **options)
    files = good_files(tmp_path / "good")
    assert len(files) > 5
    assert {file.name: states.differ(file) for file in files} == {f.name: [] for f in files}


def test_healthy_run_with_good_checkpoints_is_bit_identical(options, tmp_path):
    bare = run(tmp_path / "bare", Wide, loader(Batches()), **options)
    good = LastKnownGood(every_n_steps=2, confirm_after=1)
    kept = run(tmp_path / "kept", Wide, loader(Batches()), [GradientMonitor(), good], **options)
    assert differences(bare, kept) == {}


def test_buffers_are_pinned_and_stay():
    device = torch.device(ACCELERATOR)
    held = HostCopy(copies_to_host(device))
    weight, step = torch.ones(2**20, device=device), torch.tensor(1.0)
    held.capture({"weight": weight, "step": step}, steady=[weight])
    held.finish()
    first = held.state["weight"].data_ptr()
    assert held.state["weight"].is_pinned() == ON_GPU
    weight.zero_()
    held.capture({"weight": weight, "step": step}, steady=[weight])
    held.finish()
    assert held.state["weight"].data_ptr() == first
    assert not held.state["weight"].any()
