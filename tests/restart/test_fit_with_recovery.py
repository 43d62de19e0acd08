"""Fits that crash and are restarted: each kind of crash in a real, small fit."""

import gc
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    TrainingStopped,
    fit_with_recovery,
    read_incidents,
    stability_callbacks,
)
from lit_stability.checks.preflight import PreflightError, Report
from lit_stability.detectors import Anomaly
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.incidents import Incident
from lit_stability.restart.crashes import kind_of
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from tests.conftest import flat, make_trainer

SAMPLES, SIZE = 64, 8
EPOCH = SAMPLES // SIZE


class Net(LightningModule):
    """Linear regression in double precision; records the samples of every optimizer step."""

    def __init__(self, optimizer=torch.optim.AdamW, limit=None, recur=None, every=2):
        super().__init__()
        self.layer = nn.Linear(4, 1).double()
        self.optimizer, self.limit, self.recur = optimizer, limit, recur
        self.every = every
        self.seen, self.rates, self.modes, self.starts = [], [], [], []

    def on_train_start(self):
        self.starts.append(len(self.seen))

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        self.seen.append((self.trainer.global_step, index.tolist()))
        self.modes.append(self.training)
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.limit is not None and len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if self.recur is not None:
            self.recur(self)
        return nn.functional.mse_loss(self.layer(x).squeeze(-1), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.mse_loss(self.layer(batch[1]).squeeze(-1), batch[2]))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": self.every}]


class Numbered(Dataset):
    """Samples that know their index; some cannot be read."""

    def __init__(self, bad=(), count=SAMPLES):
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 4, generator=g).double()
        self.y = self.x.sum(1)
        self.bad = bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"sample {index} is damaged")
        return index, self.x[index], self.y[index]


class Data(LightningDataModule):
    def __init__(self, batch_size=SIZE, bad=(), count=SAMPLES, **options):
        super().__init__()
        self.batch_size, self.data, self.options = batch_size, Numbered(bad, count), options

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size, **self.options)

    def val_dataloader(self):
        return DataLoader(Numbered(), 64)


class Crashes:
    """Raises at a step, ``times`` times."""

    def __init__(self, step, error=lambda: RuntimeError("crashed"), times=1):
        self.step, self.error, self.times = step, error, times

    def __call__(self, module):
        if module.trainer.global_step == self.step and self.times:
            self.times -= 1
            raise self.error()


def newest(folder):
    found = list((folder / "saved").glob("*.ckpt"))
    return max(found, key=lambda p: p.stat().st_mtime_ns, default=None)


def maker(root, callbacks=lambda: [], made=None, **options):
    """Trainers that save a checkpoint at the end of every epoch."""
    defaults = {"max_epochs": 3, "max_steps": -1, "enable_checkpointing": True}

    def make(**overrides):
        saves = ModelCheckpoint(root / "saved", filename="{step}", save_top_k=-1)
        trainer = make_trainer(root, [*callbacks(), saves], **(defaults | options | overrides))
        if made is not None:
            made.append(trainer)
        return trainer

    return make


def recovered(root, net=Net, data=None, seed=0, saves=newest, **options):
    """Run with recovery; returns the module and the result."""
    own = ("max_crashes", "progress_steps", "ckpt_path")
    limits = {k: options.pop(k) for k in own if k in options}
    seed_everything(seed, verbose=False)
    module = net()
    result = fit_with_recovery(
        maker(root, **options), module, Data() if data is None else data, find=saves, **limits
    )
    return module, result


def plain(root, net=Net, data=None, seed=0, **options):
    """Run without, and return the module."""
    seed_everything(seed, verbose=False)
    module = net()
    maker(root, **options)().fit(module, datamodule=Data() if data is None else data)
    return module


def record(root):
    return [json.loads(line) for line in (root / "recoveries.jsonl").read_text().splitlines()]


def steps(module):
    """The samples of each optimizer step, of the last fit that took it."""
    found = {}
    for start, end in zip(module.starts, [*module.starts[1:], None], strict=True):
        taken = module.seen[start:end]
        found = {step: x for step, x in found.items() if step < taken[0][0]}
        for step, samples in taken:
            found.setdefault(step, []).extend(samples)
    return found


def test_fit_without_a_crash_equals_one_without_recovery(tmp_path):
    options = {"callbacks": stability_callbacks}
    module, result = recovered(tmp_path / "a", data=Data(shuffle=True, num_workers=1), **options)
    generators = torch.get_rng_state()
    wanted = plain(tmp_path / "b", data=Data(shuffle=True, num_workers=1), **options)
    assert torch.equal(flat(module), flat(wanted))
    assert torch.equal(generators, torch.get_rng_state())
    assert module.seen == wanted.seen
    assert (result.attempts, result.remedies) == (1, ())
    saved = [torch.load(newest(tmp_path / d), weights_only=True) for d in "ab"]
    assert saved[0].keys() == saved[1].keys()
    assert saved[0]["loops"] == saved[1]["loops"]
    assert len(saved[0]["callbacks"]) == len(saved[1]["callbacks"])
    assert not (tmp_path / "a" / "recoveries.jsonl").exists()


# --- out of memory


@pytest.mark.each_value
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("shuffle", [False, True])
def test_out_of_memory_equals_small_batches_with_accumulation_bit_by_bit(
    optimizer, shuffle, tmp_path
):
    net = lambda: Net(optimizer, limit=4)  # noqa: E731
    module, result = recovered(tmp_path / "a", net, Data(shuffle=shuffle))
    small = lambda: Net(optimizer, every=4)  # noqa: E731 (Lightning counts it in batches)
    data = Data(4, shuffle=shuffle)
    wanted = plain(tmp_path / "b", small, data, accumulate_grad_batches=2)
    assert torch.equal(flat(module), flat(wanted))
    assert result.remedies == ("batch_size 8 -> 4, accumulate_grad_batches 1 -> 2",)
    assert result.trainer.global_step == 3 * EPOCH


def test_out_of_memory_in_a_later_epoch_keeps_effective_batches_and_schedule(tmp_path):
    class Late(Net):
        def training_step(self, batch, batch_idx):
            self.limit = 4 if self.trainer.global_step >= EPOCH + 3 else None
            return super().training_step(batch, batch_idx)

    options = {"val_check_interval": 4, "limit_train_batches": EPOCH}
    data = Data()
    module, result = recovered(tmp_path / "a", Late, data, **options)
    wanted = plain(tmp_path / "b", **options)
    assert steps(module) == steps(wanted)
    assert data.batch_size == 4
    assert torch.allclose(flat(module), flat(wanted), rtol=1e-12, atol=0)
    assert result.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3 * EPOCH // 2
    (line,) = record(tmp_path / "a")
    assert (line["kind"], line["step"], line["epoch"]) == ("out of memory", EPOCH + 3, 1)
    assert line["checkpoint"].endswith(f"step={EPOCH}.ckpt")


class Resumable(DataLoader):
    """Goes on at a sample, as loaders with a state of their own do."""

    skip = given = 0

    def state_dict(self):
        return {"samples": self.given}

    def load_state_dict(self, state):
        self.skip = state["samples"] % SAMPLES

    def __iter__(self):
        skip, self.skip, self.given = self.skip, 0, 0
        for batch in super().__iter__():
            self.given += len(batch[0])
            if self.given > skip:
                yield batch


class Keeper(Callback):
    """Counts batches in a state of its own, saves in mid-epoch, records halved batches."""

    def __init__(self, at):
        self.at, self.batches, self.rescaled = at, 0, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if trainer.global_step == self.at and not trainer.ckpt_path:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved" / "middle.ckpt")

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]

    def rescale_batch_counts(self, state, parts):
        self.rescaled.append(parts)
        state["batches"] *= parts


@pytest.mark.parametrize("twice", [False, True])
def test_out_of_memory_in_mid_epoch_resumes_at_the_same_sample(twice, tmp_path):
    class Late(Net):
        def training_step(self, batch, batch_idx):
            late = self.trainer.global_step >= 13
            self.limit = (2 if twice else 4) if late else None
            return super().training_step(batch, batch_idx)

    class Stateful(Data):
        def train_dataloader(self):
            return Resumable(self.data, self.batch_size)

    keepers = []

    def callbacks():
        keepers.append(Keeper(11))
        return keepers[-1:]

    data = Stateful()
    module, result = recovered(tmp_path / "a", Late, data, callbacks=callbacks)
    wanted = plain(tmp_path / "b")
    assert steps(module) == steps(wanted)
    assert torch.allclose(flat(module), flat(wanted), rtol=1e-12, atol=0)
    factor = 4 if twice else 2
    assert data.batch_size == 8 // factor
    assert [k.rescaled for k in keepers] == [[], [2], [4]][: len(keepers)]
    assert keepers[-1].batches == factor * 3 * EPOCH
    assert result.trainer.global_step == 3 * EPOCH


def test_checkpoint_of_halved_batches_is_resumed_with_batches_as_small(tmp_path):
    kill = Crashes(13, lambda: KeyboardInterrupt())
    with pytest.raises(SystemExit):
        recovered(tmp_path, lambda: Net(limit=4, recur=kill))
    net, data = Net(limit=4), Data()
    result = fit_with_recovery(maker(tmp_path), net, data, ckpt_path=newest(tmp_path), find=newest)
    assert result.crashes == ()
    assert (data.batch_size, result.trainer.accumulate_grad_batches) == (4, 2)
    wanted = plain(tmp_path / "b", lambda: Net(every=4), Data(4), accumulate_grad_batches=2)
    assert torch.equal(flat(net), flat(wanted))
    with pytest.raises(
        ValueError, match=r"split into 2, and .*batch_size=7 cannot be halved.*resume"
    ):
        recovered(tmp_path, data=Data(7), ckpt_path=newest(tmp_path))


def test_out_of_memory_with_samples_left_over_keeps_the_number_of_steps(tmp_path):
    net = lambda: Net(limit=4)  # noqa: E731
    module, result = recovered(tmp_path, net, Data(count=SAMPLES + 5, drop_last=True))
    assert result.trainer.global_step == 3 * EPOCH
    assert {len(samples) for samples in steps(module).values()} == {SIZE}


class Checkpoints(Net):
    def __init__(self):
        super().__init__()
        self.limit, self.enabled = 1, 0

    def enable_activation_checkpointing(self):
        self.enabled += 1
        self.limit = None


class Transformer(Net):
    def __init__(self):
        super().__init__(limit=1)
        self.body = nn.Identity()
        self.body.gradient_checkpointing_enable = self.enable
        self.refuses = nn.Identity()
        self.refuses.gradient_checkpointing_enable = self.refuse
        self.enabled = 0

    def enable(self):
        self.enabled += 1
        self.limit = None

    def refuse(self):
        raise ValueError("Identity does not support gradient checkpointing")


@pytest.mark.parametrize("net", [Checkpoints, Transformer])
def test_out_of_memory_of_an_odd_batch_checkpoints_activations(net, tmp_path):
    module, result = recovered(tmp_path, net, Data(7), max_epochs=1)
    assert module.enabled == 1
    assert result.remedies == ("activation checkpointing (batch_size=7 cannot be halved)",)


@pytest.mark.parametrize(
    ("data", "callbacks", "message"),
    [
        (lambda: Data(1), lambda: [], "batch_size=1 cannot be halved"),
        (lambda: Data(7), lambda: [], "has no activation checkpointing: define a method"),
        (Data, lambda: [GradientAccumulationScheduler({0: 1})], "GradientAccumulationScheduler"),
    ],
)
def test_out_of_memory_with_no_remedy_says_what_to_add(data, callbacks, message, tmp_path):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        recovered(tmp_path, lambda: Net(limit=0), data(), callbacks=callbacks)
    assert message in caught.value.__notes__[0]


def test_out_of_memory_of_loaders_passed_to_fit_says_what_to_add(tmp_path):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit_with_recovery(
            maker(tmp_path), Net(limit=4), train_dataloaders=DataLoader(Numbered(), 8), find=newest
        )
    assert "define train_dataloader() with self.batch_size" in caught.value.__notes__[0]


def test_batch_size_that_the_loader_does_not_read_is_found_before_the_first_step(tmp_path):
    class Deaf(Data):
        def train_dataloader(self):
            return DataLoader(self.data, 8)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        recovered(tmp_path, lambda: Net(limit=4), Deaf())
    assert "has batches of 8 instead of 4" in caught.value.__notes__[0]


def test_memory_of_a_failed_fit_is_free_before_the_next(tmp_path):
    alive, left = [], []

    class Hungry(Net):
        def training_step(self, batch, batch_idx):
            activations = torch.zeros(1000)
            alive.extend(map(weakref.ref, (activations, self.trainer, self.trainer.optimizers[0])))
            alive.extend(map(weakref.ref, batch[1:]))
            try:
                raise KeyError("behind the one that is seen")
            except KeyError:
                super().training_step(batch, batch_idx)
                return activations.sum() + self.layer(batch[1]).sum()

    def make(**overrides):
        left.append([each() is not None for each in alive])
        return maker(tmp_path, max_epochs=1)(**overrides)

    error = lambda: torch.OutOfMemoryError("out of memory")  # noqa: E731
    gc.disable()
    try:
        net = Hungry(recur=Crashes(3, error))
        fit_with_recovery(make, net, Data(), find=newest)
        assert all(p.grad is None or p.grad.numel() for p in net.parameters())
    finally:
        gc.enable()
    assert [len(each) > 0 for each in left] == [False, True]
    assert not any(left[1])


# --- data


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_that_cannot_be_read_is_skipped_and_named(workers, tmp_path, caplog):
    data = Data(bad=(19,), num_workers=workers)
    module, result = recovered(tmp_path / "a", data=data)
    kept = [i for i in range(SAMPLES) if i // SIZE != 19 // SIZE]
    seen = [samples for _, samples in module.seen]
    again = seen.index(list(range(SIZE)), 1)
    assert seen[again:] == 3 * [kept[i : i + SIZE] for i in range(0, len(kept), SIZE)]
    assert result.remedies == ("batch 2 of epoch 0 is skipped, samples 16 to 23",)
    assert "batch 2 of epoch 0 is skipped, samples 16 to 23" in caplog.text
    (line,) = record(tmp_path / "a")
    assert (line["kind"], line["error"], line["batch_idx"]) == ("data", "OSError", 2)
    assert line["samples"] == list(range(16, 24))
    assert line["message"].endswith("sample 19 is damaged")


@pytest.mark.each_value
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", [3, 0, EPOCH - 1])
def test_epoch_that_lacks_a_batch_ends_validates_and_saves_as_ever(workers, where, tmp_path):
    bad = Data(bad=(where * SIZE,), num_workers=workers)
    module, result = recovered(tmp_path / "a", data=bad, accumulate_grad_batches=2)
    good = Data()
    kept = [i for i in range(SAMPLES) if i // SIZE != where]
    good.data.x, good.data.y = good.data.x[kept], good.data.y[kept]
    wanted = plain(tmp_path / "b", data=good, accumulate_grad_batches=2)
    assert torch.equal(flat(module), flat(wanted))
    assert result.trainer.global_step == 3 * (EPOCH // 2)
    assert (
        result.trainer.callback_metrics["val/loss"] == wanted.trainer.callback_metrics["val/loss"]
    )
    names = [sorted(p.name for p in (tmp_path / d / "saved").iterdir()) for d in "ab"]
    assert names[0] == names[1]


@pytest.mark.parametrize("where", [3, EPOCH - 1])
def test_rollback_and_replay_work_in_an_epoch_that_lacks_a_batch(where, tmp_path):
    def callbacks():
        return [FaultInjector([NanLoss(step=EPOCH + 4)]), *stability_callbacks()]

    kept = [i for i in range(SAMPLES) if i // SIZE != where]
    good = Data()
    good.data.x, good.data.y = good.data.x[kept], good.data.y[kept]
    bad = Data(bad=(where * SIZE,))
    module, result = recovered(tmp_path / "a", data=bad, callbacks=callbacks)
    wanted = plain(tmp_path / "b", data=good, callbacks=callbacks)
    assert torch.equal(flat(module), flat(wanted))
    assert result.trainer.global_step == 3 * (EPOCH - 1)
    assert len(read_incidents(tmp_path / "a")) == 1


def test_shuffled_bad_sample_costs_one_batch_of_each_epoch(tmp_path):
    class Data5(Data):
        def train_dataloader(self):
            seed_everything(5, verbose=False)
            return super().train_dataloader()

    module, result = recovered(tmp_path, data=Data5(bad=(19,), shuffle=True), max_epochs=2)
    assert len(result.crashes) == 2
    assert {crash.epoch for crash in result.crashes} == {0, 1}
    assert all(19 in crash.samples for crash in result.crashes)
    assert not any(19 in samples for _, samples in module.seen)


def test_data_of_a_stream_cannot_be_skipped_and_it_is_reported(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (Numbered()[i] for i in range(16))
            raise OSError("damaged")

    with pytest.raises(OSError, match="damaged") as caught:
        fit_with_recovery(
            maker(tmp_path), Net(), train_dataloaders=DataLoader(Stream(), 8), find=newest
        )
    assert "catch the error where the data are read" in caught.value.__notes__[0]


def test_error_of_validation_data_skips_no_training_batch(tmp_path):
    class Bad(Data):
        def val_dataloader(self):
            return DataLoader(Numbered(bad=(9,)), 8)

    with pytest.raises(OSError, match="sample 9"):
        recovered(tmp_path, data=Bad())
    assert [line["kind"] for line in record(tmp_path)] == ["other", "other"]


# --- instability


def nan_at(step, times):
    return Crashes(step, lambda: RuntimeError("Function 'MulBackward0' returned nan values"), times)


def test_instability_halves_the_learning_rate_then_forgets_moments_then_leaves_bf16(tmp_path):
    made, states = [], []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            states.append(len(trainer.optimizers[0].state))

    module, result = recovered(
        tmp_path,
        lambda: Net(recur=nan_at(EPOCH + 2, 3)),
        callbacks=lambda: [Watch()],
        made=made,
        precision="bf16-mixed",
        gradient_clip_val=2.0,
    )
    assert result.remedies == (
        "learning rate x0.5, gradient_clip_val 2 -> 1",
        "learning rate x0.25, gradient_clip_val 1 -> 0.5, new optimizer state",
        "learning rate x0.125, gradient_clip_val 0.5 -> 0.25, new optimizer state, "
        "precision bf16-mixed -> 32-true",
    )
    assert states == [0, 2, 0, 0]
    assert [t.gradient_clip_val for t in made] == [2.0, 1.0, 0.5, 0.25]
    assert [t.precision for t in made] == [*["bf16-mixed"] * 3, "32-true"]
    begun = [i for i, (step, _) in enumerate(module.seen) if step == EPOCH]
    # The last rate is that of the schedule times a cut of an eighth, seen inside a step.
    assert len(begun) == 4
    assert module.rates[begun[-1]] == pytest.approx(module.rates[begun[0]] / 8)


class RaisesLate(Net):
    """The exception comes after the step, where nothing can be retried."""

    def __init__(self):
        super().__init__()
        self.late = nan_at(12, 1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.late(self)


def test_instability_cuts_by_way_of_the_suite_where_it_is_attached(tmp_path):
    suites = []

    def callbacks():
        suites.append([GradientMonitor(), AutoRollback(relax_after=1000)])
        return suites[-1]

    _, result = recovered(tmp_path, RaisesLate, callbacks=callbacks)
    assert result.remedies == ("learning rate x0.5, clip x0.5",)
    backoff = suites[-1][1].backoff
    assert (backoff.lr_factor, backoff.clip_factor) == (0.5, 0.5)


def test_cut_of_a_restart_multiplies_with_the_factor_of_a_rollback(tmp_path):
    held = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            scale = learning_rate_multiplier(trainer.optimizers[0])
            scale.set([0.25], "rollback")
            held.append((scale.held_by("restart"), scale.held_by("rollback"), scale.factors))

    recovered(tmp_path, lambda: Net(recur=nan_at(12, 1)), callbacks=lambda: [Watch()])
    assert held == [((), (0.25,), (0.25,)), ((0.5,), (0.25,), (0.125,))]


# --- everything else


def test_transient_error_is_restarted_and_the_result_is_that_of_a_clean_run(tmp_path):
    module, result = recovered(tmp_path / "a", lambda: Net(recur=Crashes(13)))
    assert torch.equal(flat(module), flat(plain(tmp_path / "b")))
    assert result.attempts == 2
    assert result.remedies == ("plain restart",)
    assert [step for step, _ in module.seen] == [*range(14), *range(EPOCH, 3 * EPOCH)]


def test_crash_before_any_checkpoint_begins_from_the_initial_state(tmp_path):
    data = Data(shuffle=True)
    module, result = recovered(tmp_path / "a", lambda: Net(recur=Crashes(5)), data)
    assert torch.equal(flat(module), flat(plain(tmp_path / "b", data=Data(shuffle=True))))
    assert record(tmp_path / "a")[0]["checkpoint"] is None
    assert result.crashes[0].step == 5


def test_checkpoint_of_an_earlier_run_is_not_resumed(tmp_path):
    plain(tmp_path)
    module, _ = recovered(tmp_path, lambda: Net(recur=Crashes(5)))
    assert [step for step, _ in module.seen] == [*range(6), *range(3 * EPOCH)]


def test_given_checkpoint_is_resumed_until_there_is_a_better(tmp_path):
    plain(tmp_path, max_epochs=1)
    net = Net(recur=Crashes(10))
    fit_with_recovery(maker(tmp_path), net, Data(), ckpt_path=newest(tmp_path), find=newest)
    assert [step for step, _ in net.seen] == [8, 9, 10, *range(EPOCH, 3 * EPOCH)]


def test_deterministic_error_is_raised_as_it_came_with_what_was_tried(tmp_path):
    error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug") as caught:
        recovered(tmp_path, lambda: Net(recur=Crashes(5, lambda: error, times=9)))
    assert caught.value is error
    assert any(entry.name == "__call__" for entry in caught.traceback)
    (note,) = error.__notes__
    assert "it is deterministic" in note
    assert "crash 1 at step 5 (epoch 0, batch 5): other: ValueError: a bug -> plain restart" in note
    assert [line["event"] for line in record(tmp_path)] == ["restart", "give up"]


@pytest.mark.parametrize(
    ("error", "limit", "reason"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), 3, "cannot use the device"),
        (torch.OutOfMemoryError("out of memory"), 0, "1 crashes in a row, max_crashes=0"),
    ],
)
def test_error_that_nothing_can_be_done_about_is_raised_at_once(error, limit, reason, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        recovered(tmp_path, lambda: Net(recur=Crashes(5, lambda: error)), max_crashes=limit)
    assert caught.value is error
    assert reason in error.__notes__[0]
    assert [line["event"] for line in record(tmp_path)] == ["give up"]


def test_several_devices_are_rejected_before_the_first_fit(tmp_path):
    with pytest.raises(RuntimeError, match="start the program with torchrun --nproc-per-node=2"):
        recovered(tmp_path, devices=2)


def test_crashes_in_a_row_are_limited(tmp_path):
    def recur(module):
        if len(module.seen) in (3, 8, 14, 21):
            raise RuntimeError(f"number {len(module.seen)}")

    with pytest.raises(RuntimeError, match="number 14") as caught:
        recovered(tmp_path, lambda: Net(recur=recur), max_crashes=2)
    assert "3 crashes in a row, max_crashes=2" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("progress", "in_a_row"),
    [pytest.param(3, [1, 1, 1], marks=pytest.mark.long), (5, [1, 2, 3]), (4, [1, 1, 1])],
)
def test_progress_past_the_furthest_crash_resets_the_count(progress, in_a_row, tmp_path):
    at = [EPOCH + 1, EPOCH + 5, EPOCH + 9]

    def recur(module):
        if at and module.global_step == at[0]:
            raise RuntimeError(f"crashed at {at.pop(0)}")

    _, result = recovered(tmp_path, lambda: Net(recur=recur), progress_steps=progress)
    assert [crash.in_a_row for crash in result.crashes] == in_a_row


def test_crash_in_validation_leaves_no_module_in_eval_mode(tmp_path):
    class Fragile(Net):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 2 * EPOCH and self.recur.times:
                self.recur.times = 0
                raise RuntimeError("crashed")
            super().validation_step(batch, batch_idx)

    module, result = recovered(tmp_path / "a", lambda: Fragile(recur=Crashes(-1)))
    assert result.attempts == 2
    assert all(module.modes)
    assert torch.equal(flat(module), flat(plain(tmp_path / "b")))


def test_nothing_good_on_disk_is_modified(tmp_path):
    hashes = []

    def make(**overrides):
        hashes.append({p.name: hashlib.sha256(p.read_bytes()).digest() for p in saved.glob("*")})
        return maker(tmp_path)(**overrides)

    saved = tmp_path / "saved"
    errors = [RuntimeError("out of memory"), RuntimeError("nan"), RuntimeError("returned nan")]
    recur = Crashes(EPOCH + 3, lambda: errors.pop(), times=3)
    result = fit_with_recovery(make, Net(recur=recur), Data(), find=newest)
    assert result.attempts == 4
    last = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in saved.glob("*")}
    assert all(last[name] == value for each in hashes for name, value in each.items())
    assert f"step={EPOCH}.ckpt" in hashes[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruption_is_not_recovered_from(error, tmp_path):
    with pytest.raises(SystemExit):
        recovered(tmp_path, lambda: Net(recur=Crashes(5, error)))
    assert not (tmp_path / "recoveries.jsonl").exists()


def test_failing_callback_does_not_hide_what_it_failed_over(tmp_path):
    class Fails(Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise OSError("disk full")

    _, result = recovered(
        tmp_path,
        lambda: Net(recur=Crashes(5, lambda: torch.OutOfMemoryError("out of memory"))),
        callbacks=lambda: [Fails()],
    )
    assert [crash.kind for crash in result.crashes] == ["out of memory"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "write def make_trainer"),
        (3, "must be a function"),
        (lambda **overrides: None, "must return a Trainer, got None"),
    ],
)
def test_unfit_make_trainer_is_rejected_before_the_first_fit(make, message):
    with pytest.raises(ValueError, match=message):
        fit_with_recovery(make, Net(), Data())


def test_loader_in_the_place_of_the_data_module_is_named_with_where_it_belongs(tmp_path):
    loader = DataLoader(list(range(8)))
    with pytest.raises(TypeError, match="got DataLoader; pass loaders as train_dataloaders="):
        fit_with_recovery(maker(tmp_path), Net(), loader)


@pytest.mark.parametrize(("name", "value"), [("max_crashes", -1), ("progress_steps", 0)])
def test_limit_out_of_range_is_rejected(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        fit_with_recovery(maker(tmp_path), Net(), Data(), **{name: value})


def test_trainer_that_is_not_new_or_ignores_overrides_is_reported_in_the_note(tmp_path):
    one = maker(tmp_path)()
    shared = Callback()
    for make, message in (
        (lambda **overrides: one, "the Trainer of an earlier fit"),
        (maker(tmp_path, lambda: [shared]), "the Callback of an earlier fit"),
        (lambda **overrides: maker(tmp_path)(), "the overrides must take precedence"),
    ):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            fit_with_recovery(make, Net(limit=4), Data(), find=newest)
        assert message in caught.value.__notes__[0]


def stopped():
    anomaly = Anomaly(kind="divergence", step=1, value=1.0, message="", signal="loss")
    return TrainingStopped("stopped", Incident(1, anomaly))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (stopped(), "instability"),
        (
            RuntimeError("Function 'MulBackward0' returned nan values in its 0th output."),
            "instability",
        ),
        (RuntimeError("The total norm of order 2.0 is non-finite"), "instability"),
        (ValueError("loss is NaN"), "instability"),
        (PreflightError("the first loss is nan", Report()), "other"),
        (KeyError("nan"), "other"),
        (RuntimeError("a finance model"), "other"),
    ],
)
def test_kind_of_an_error(error, kind):
    assert kind_of(error) == kind
