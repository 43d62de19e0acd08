"""The probe that comes with the suite: nobody notices it, until attention is the trouble."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lit_stability import AttentionProbe, GradientMonitor, stability_callbacks
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss, ScaleLoss
from tests.conftest import Regression, by_hand, fit
from tests.distributed import run_ranks
from tests.exact import Batches, differences, loader, run
from tests.probe_models import Attending, SelfAttention
from tests.probe_rank_cases import one_sided


def kept(*given, **options):
    return CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(kept),
    },
}


def recomputed(way):
    """Attention whose forward pass runs again in the backward pass."""

    class Recomputed(Attending):
        def __init__(self):
            super().__init__()
            for part in (self.first, self.second):
                original = part.forward
                part.forward = lambda x, f=original: checkpoint(f, x, **WAYS[way])

    return Recomputed


class Counts(TorchDispatchMode):
    """A mode of the user's own."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class OwnMode(Attending):
    def training_step(self, batch, batch_idx):
        with Counts() as mode:
            loss = super().training_step(batch, batch_idx)
        self.log("kernels", float(mode.seen))
        return loss


class Teacher(Attending):
    """A forward pass without gradients beside the one that is trained."""

    def __init__(self):
        super().__init__()
        self.teacher = SelfAttention().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            h = self.embed(batch[0][..., None])
            soft = self.teacher(h)
        return loss + torch.nn.functional.mse_loss(self.first(h), soft)


class Takes3(LightningModule):
    """Three optimizers in turn, the second of which has the attention, on every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.parts = torch.nn.ModuleList(
            [torch.nn.Linear(8, 8), SelfAttention(width=8), torch.nn.Linear(8, 1)]
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            h = self.parts[0](x)
            h = self.parts[1](h[:, None].expand(-1, 3, -1)).mean(1)
            loss = torch.nn.functional.mse_loss(self.parts[2](h).squeeze(-1), y)
            self.log("train/loss", loss)
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in self.parts]


def fp16():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


RUNS = {
    **{f"checkpointed, {way}": {"module": recomputed(way)} for way in WAYS},
    "a mode of its own": {"module": OwnMode},
    "a teacher without gradients": {"module": Teacher},
    "manual": {"module": by_hand(Attending)},
    "three optimizers, accumulated": {"module": Takes3},
    "accumulated": {"accumulate_grad_batches": 3},
    "fp16": {"plugins": fp16},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", RUNS)
def test_run_with_attention_under_the_suite_is_bit_identical(name, tmp_path):
    """Invariant 1, where the forward pass of a step in three is watched."""
    runs = []
    for callbacks in ([], often(stability_callbacks())):
        options = {"module": Attending, "max_epochs": 2, **RUNS[name]}
        options |= {"plugins": fp16()} if "plugins" in options else {}
        module = options.pop("module")
        runs.append(run(tmp_path, module, loader(Batches()), callbacks, **options))
    assert differences(*runs) == {}


def often(callbacks, every=3):
    for each in callbacks:
        if isinstance(each, AttentionProbe):
            each.every = every
    return callbacks


@pytest.mark.parametrize(
    "fault",
    [
        lambda: NanLoss(step=18),
        lambda: ScaleLoss(step=30),
        lambda: CorruptWeight(step=33, parameter="second.qkv.weight"),
    ],
)
def test_run_with_attention_after_a_fault_is_bit_identical(fault, tmp_path):
    """Invariant 7: watched steps are retried and replayed too."""
    data, options = loader(Batches()), {"max_epochs": 3}
    faulty = [FaultInjector([fault()]), *often(stability_callbacks())]
    with_fault = run(tmp_path, Attending, data, faulty, **options)
    assert [i.outcome for i in faulty[1].incidents] == ["recovered"]
    assert differences(run(tmp_path, Attending, data, **options), with_fault) == {}


class Look(Callback):
    """The steps that are watched, and the modules that are read."""

    def __init__(self):
        self.watched, self.read = [], {}

    def on_step_measured(self, trainer, pl_module, stats):
        if stats.readings:
            self.read[stats.step] = {r.where for r in stats.readings}


def looking(module):
    class Looking(module):
        def training_step(self, batch, batch_idx):
            if hooks._global_forward_hooks:
                look = next(c for c in self.trainer.callbacks if isinstance(c, Look))
                look.watched.append(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    return Looking


class Compiled(Attending):
    def configure_model(self):
        self.embed.compile(backend="eager")


@pytest.mark.parametrize(
    ("module", "watched"),
    [(Regression, [0, 10]), (Compiled, []), (Attending, [0, 10, 20, 30])],
)
def test_probe_of_the_suite_says_nothing_and_looks_rarely_where_nothing_is(
    module, watched, tmp_path, caplog
):
    look = Look()
    with caplog.at_level(logging.DEBUG, "lightning.pytorch.lit_stability"):
        fit(tmp_path, [*often(stability_callbacks(), 10), look], looking(module), max_steps=40)
    assert look.watched == watched
    assert "AttentionProbe" not in caplog.text
    torch.compiler.reset()


class Late(Attending):
    """Attention that a schedule of its own lets in after a while."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 25:
            return super().training_step(batch, batch_idx)
        h = self.embed(batch[0][..., None])
        return torch.nn.functional.mse_loss(h.mean((1, 2)), batch[1])


def test_attention_that_begins_late_is_found(tmp_path):
    look, probe = Look(), AttentionProbe(every=1, quiet=True)
    fit(tmp_path, [GradientMonitor(), probe, look], looking(Late), max_steps=45)
    assert look.watched == [0, 1, 20, 40, 41, 42, 43, 44]
    assert list(look.read) == [40, 41, 42, 43, 44]


@pytest.mark.parametrize("first", [True, False])
def test_probe_of_your_own_takes_the_place_of_the_one_in_the_suite(first, tmp_path):
    look, mine = Look(), AttentionProbe("second", every=15)
    suite = often(stability_callbacks(), 10)
    callbacks = [suite[0], mine, *suite[1:]] if first else [*suite, mine]
    fit(tmp_path, [*callbacks, look], looking(Attending), max_steps=40)
    assert look.read == {step: {"second"} for step in (0, 15, 30)}
    assert look.watched == [0, 15, 30]


def test_several_optimizers_step_over_the_number_that_is_due_and_are_measured(tmp_path):
    """Steps come in threes, and on every other batch only."""
    look = Look()
    fit(tmp_path, [GradientMonitor(), AttentionProbe(every=10), look], Takes3, max_steps=60)
    assert list(look.read) == [0, 12, 21, 30, 42, 51]


def test_attention_is_brought_to_the_host_with_the_steps_own_copy(tmp_path, monkeypatch):
    """Invariant 6: one crossing, on the steps that are measured too."""
    copies, original = [], torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: copies.append(self.numel()) or original(self)
    )
    counts = []
    for probe in ([], [AttentionProbe(every=5)]):
        copies.clear()
        fit(tmp_path, [GradientMonitor(), *probe, Look()], Attending, max_steps=20)
        counts.append(len(copies))
    assert counts[0] == counts[1]


def test_ranks_agree_on_whether_to_look_again(tmp_path):
    """A rank that sees none goes on with one that does; where neither does both look rarely."""
    for found in run_ranks(one_sided, tmp_path, folder=tmp_path):
        assert found == {"one": [0, 3, 6, 9], "none": []}
