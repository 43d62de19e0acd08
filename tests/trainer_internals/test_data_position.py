"""A resumed fit continues with the next batch: every step of every kind of loader."""

import random
import threading

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import MeanMetric

from lit_stability import GradientMonitor, LastKnownGood
from lit_stability.trainer_internals import data_position
from lit_stability.training_state.good_checkpoints import good_files, step_of
from tests.conftest import every_other, flat, make_trainer
from tests.test_invariants import optimizer_state

BATCH, SAMPLES = 4, 28


class Net(LightningModule):
    """Dropout, BatchNorm, a scheduler, epoch aggregates; takes any nesting of tensors."""

    def __init__(self, plateau=False):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3)
        )
        self.plateau = plateau
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        x = torch.cat([p[0] if isinstance(p, list) else p for p in parts])
        loss = self.net(x).square().mean()
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedulers = torch.optim.lr_scheduler
        if self.plateau:
            schedule = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            options = {"scheduler": schedule, "interval": "step", "monitor": "val", "frequency": 5}
        else:
            options = {"scheduler": schedulers.StepLR(optimizer, 5, 0.9), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": options}


def samples(n=SAMPLES):
    return TensorDataset(torch.arange(3.0 * n).reshape(n, 3) / n)


class Augmented(Dataset):
    """Draws from all three global generators while it is read."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return (
            torch.full((3,), index / SAMPLES) + torch.randn(3) + random.random() + np.random.rand()
        )


class Stateful:
    """A loader with a state of its own, which Lightning saves and restores."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        while self.given < 7:
            self.given += 1
            yield torch.full((BATCH, 3), self.given / 7) + torch.arange(BATCH)[:, None]
        self.given = 0

    def __len__(self):
        return 7

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Stream(IterableDataset):
    """No length, a shuffle buffer, and augmentation."""

    def __init__(self, draw, n=SAMPLES):
        self.draw, self.n = draw, n

    def __iter__(self):
        buffer = []
        for i in range(self.n):
            buffer.append(i)
            if len(buffer) == 6:
                yield self._sample(buffer.pop(self.draw(6)))
        while buffer:
            yield self._sample(buffer.pop(self.draw(len(buffer))))

    def _sample(self, index):
        return torch.full((3,), index / self.n) + 0.1 * torch.randn(3)


def by_python(n):
    return random.randrange(n)


def by_torch(n):
    return int(torch.randint(n, ()))


class Batches:
    """Neither a data set nor a `DataLoader`."""

    def __iter__(self):
        return iter(torch.rand(7, BATCH, 3))

    def __len__(self):
        return 7


class Buckets(Sampler):
    """A sampler of batches that draws during its iteration."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        rest = list(range(SAMPLES))
        while rest:
            start = BATCH * self.draw(len(rest) // BATCH)
            chosen, rest[start : start + BATCH] = rest[start : start + BATCH], []
            yield chosen

    def __len__(self):
        return SAMPLES // BATCH


def own_generator():
    return DataLoader(samples(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))


def distributed():
    sampler = DistributedSampler(samples(), num_replicas=1, rank=0)
    return DataLoader(samples(), BATCH, sampler=sampler)


def combined(mode):
    two = {"a": DataLoader(samples(), BATCH, shuffle=True)}
    two["b"] = DataLoader(samples(12), BATCH, shuffle=True)
    return CombinedLoader(two, mode)


LOADERS = {
    "shuffled": lambda: DataLoader(samples(), BATCH, shuffle=True),
    "augmented": lambda: DataLoader(Augmented(), BATCH, shuffle=True),
    "a generator of its own": own_generator,
    "a sampler with epochs": distributed,
    "a sampler that draws from python as it goes": lambda: DataLoader(
        samples(), batch_sampler=Buckets(by_python)
    ),
    "a sampler that draws from torch as it goes": lambda: DataLoader(
        samples(), batch_sampler=Buckets(by_torch)
    ),
    "drawn with replacement": lambda: DataLoader(
        samples(), BATCH, sampler=torch.utils.data.WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
    ),
    "workers": lambda: DataLoader(Augmented(), BATCH, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        samples(), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "stream shuffled by python": lambda: DataLoader(Stream(by_python), BATCH),
    "stream shuffled by torch": lambda: DataLoader(Stream(by_torch), BATCH),
    "stream with a worker": lambda: DataLoader(Stream(by_torch), BATCH, num_workers=1),
    "stream with workers": lambda: DataLoader(Stream(by_torch), BATCH, num_workers=2),
    "combined, the short one in a cycle": lambda: combined("max_size_cycle"),
    "combined, to the end of the short one": lambda: combined("min_size"),
    "an iterable of batches": lambda: Batches(),
    "a loader with a state": Stateful,
    "one batch in an epoch": lambda: DataLoader(samples(BATCH), BATCH, shuffle=True),
}
OPTIONS = {
    "accumulation": {"accumulate_grad_batches": 3},
    "reloaded": {"reload_dataloaders_every_n_epochs": 2},
    "limited": {"limit_train_batches": 5},
    "validation twice an epoch": {"val_check_interval": 3},
    "validation after every batch": {"val_check_interval": 1},
    "validation across epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "validation every other epoch": {"check_val_every_n_epoch": 2},
}


class Recorder(Callback):
    """Records every batch with its step, its index and all logged values."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for thread in threading.enumerate():
            if thread.name == "last known good":
                thread.join()
        batch = {"": batch} if not isinstance(batch, dict) else batch
        batch = [p[0] if isinstance(p, list) else p for p in batch.values()]
        logged = [float(v) for v in trainer.callback_metrics.values()]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        place = trainer.current_epoch, batch_idx, trainer.global_step
        self.seen.append(
            (place, rate, torch.cat(batch).sum().item(), outputs["loss"].item(), logged)
        )

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(
            ("validation", trainer.global_step, float(trainer.callback_metrics["val"]))
        )

    def on_train_epoch_end(self, trainer, pl_module):
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen.append(("epoch", trainer.current_epoch, logged))


def validation():
    return DataLoader(samples(8), BATCH)


def run(root, loader, *, ckpt=None, seed=0, callbacks=(), module=Net, good=True, **options):
    """Runs a fit that saves the state between any two batches; returns all that can differ."""
    seed_everything(seed, verbose=False)
    net, recorder = module(), Recorder()
    if "reload_dataloaders_every_n_epochs" in options:
        net.train_dataloader = loader
        data = None
    else:
        data = loader()
    manager = LastKnownGood(every_n_steps=1, confirm_after=1, keep=10**6)
    suite = [GradientMonitor(), manager, recorder] if good else [recorder]
    trainer = make_trainer(
        root, [*suite, *callbacks], **({"max_steps": -1, "max_epochs": 4} | options)
    )
    trainer.fit(net, data, validation(), ckpt_path=ckpt)
    assert not vars(trainer.fit_loop).keys() & {"setup_data", "_load_combined_loader_states"}
    return (
        flat(net),
        optimizer_state(trainer),
        torch.get_rng_state(),
        random.getstate(),
        recorder.seen,
    )


def assert_same_end(whole, resumed, logged=True):
    for a, b in zip(whole[:3], resumed[:3], strict=True):
        assert all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)
    assert whole[3] == resumed[3]
    seen, rest = whole[4], resumed[4]
    if not logged:
        seen, rest = ([entry[:-1] for entry in entries] for entries in (seen, rest))
    assert rest
    assert seen[-len(rest) :] == rest


def check_resumes(tmp_path, caplog, loader, **options):
    """Resumes from a file of each epoch's start, middle and end, and compares the rest."""
    whole = run(tmp_path, loader, **options)
    files = good_files(tmp_path / "good")
    assert len(files) >= 8
    for i in (0, 3, 6, 7, len(files) - 1):
        caplog.clear()
        root = tmp_path / f"from {step_of(files[i])}"
        resumed = run(root, loader, ckpt=files[i], seed=9, **options)
        assert_same_end(whole, resumed)
        assert "the data continue with the next batch" in caplog.text


@pytest.mark.parametrize("name", LOADERS)
def test_following_the_data_changes_nothing(name, tmp_path):
    """Invariant 1: nothing is drawn and nothing fetched for it, though every state is copied."""
    bare = run(tmp_path, LOADERS[name], good=False, max_epochs=2)
    assert_same_end(bare, run(tmp_path, LOADERS[name], max_epochs=2))
    assert good_files(tmp_path / "good")


@pytest.mark.parametrize("name", every_other(LOADERS))
def test_resumed_fit_ends_bit_identical(name, tmp_path, caplog):
    """S12: weights, optimizer, generators, order, losses, logged metrics."""
    check_resumes(tmp_path, caplog, LOADERS[name], max_epochs=12 if name.startswith("one") else 3)


@pytest.mark.each_value
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loader", ["shuffled", "stream shuffled by torch"])
def test_resumed_fit_ends_bit_identical_with_options(loader, name, tmp_path, caplog):
    """S12."""
    if loader.startswith("stream") and name.startswith("limited"):
        pytest.skip("a limit makes a stream a loader with a length")
    check_resumes(tmp_path, caplog, LOADERS[loader], **OPTIONS[name])


@pytest.mark.each_value
@pytest.mark.parametrize("loader", ["shuffled", "augmented", "workers"])
@pytest.mark.parametrize(
    "when",
    [{"every_n_train_steps": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}],
    ids=["batch", "epoch"],
)
def test_any_checkpoint_of_the_trainer_carries_the_position(when, loader, tmp_path):
    """S12: also those at the last batch and at the end of an epoch, where Lightning restarts."""

    def saver():
        return ModelCheckpoint(tmp_path / "any", "{step}", save_top_k=-1, **when)

    options = {"limit_val_batches": 0, "enable_checkpointing": True, "max_epochs": 3}
    whole = run(tmp_path, LOADERS[loader], callbacks=[saver()], **options)
    files = sorted((tmp_path / "any").glob("*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
    assert len(files) == (21 if "every_n_train_steps" in when else 3)
    # Of the batches every second, among them the last one of the epoch before the last.
    for file in files[:-1][-7::2] if "every_n_train_steps" in when else files[:-1]:
        resume = {"ckpt": file, "seed": 9, "callbacks": [saver()]}
        resumed = run(tmp_path / file.stem, LOADERS[loader], **resume, **options)
        # From a file of an epoch's last batch Lightning goes on without the end of that epoch.
        assert_same_end(whole, resumed, logged=False)


def test_states_saved_are_bounded_and_this_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(data_position, "MAX_STATES", 3)
    run(tmp_path, LOADERS["stream shuffled by torch"], max_epochs=3)
    states = [
        torch.load(f, weights_only=True)["callbacks"]["LastKnownGood"]["position"]["states"]
        for f in good_files(tmp_path / "good")
    ]
    assert max(map(len, states)) == 4, "and the one before the batch that is read ahead"
    assert caplog.text.count("may change their order") == 1


def test_steps_of_a_plateau_scheduler_are_not_taken_twice(tmp_path, caplog):
    """Lightning steps it after the validation that a resume skips."""
    module = lambda: Net(plateau=True)  # noqa: E731
    options = {"module": module, "val_check_interval": 5, "check_val_every_n_epoch": None}
    check_resumes(tmp_path, caplog, LOADERS["shuffled"], num_sanity_val_steps=0, **options)
