"""Compares two runs bit by bit: the result of a fit as a dict of plain values."""

import hashlib
import random
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader, Dataset

from tests.conftest import make_trainer


def digest(value):
    """Returns a hash of nested tensors, arrays and plain values."""
    h = hashlib.sha256()
    _feed(h, value)
    return h.hexdigest()[:16]


def _feed(h, value):
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        h.update(str((value.dtype, tuple(value.shape))).encode())
        h.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, dict):
        for key in value:
            h.update(repr(key).encode())
            _feed(h, value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(h, each)
    elif isinstance(value, np.ndarray):
        h.update(value.tobytes())
    else:
        h.update(repr(value).encode())


class Diary(Callback):
    """Records metrics of each step and validation; a repeated step replaces its first entry."""

    def __init__(self):
        self.steps, self.validations = {}, {}
        self._last = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self._last:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "val" not in k}
            rates = [g["lr"] for o in trainer.optimizers for g in o.param_groups]
            self.steps[trainer.global_step] = {**metrics, "batch": batch_idx, "rates": rates}
        self._last = trainer.global_step

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
            self.validations[trainer.global_step] = (trainer.current_epoch, metrics)


class Batches(Dataset):
    """Ready-made batches in the same fixed order in every epoch."""

    def __init__(self, count=24, size=8, left_out=(), nan=(), augment=False):
        g = torch.Generator().manual_seed(5)
        x = torch.randn(count, size, 8, generator=g)
        y = x @ torch.arange(8.0) / 8 + 0.1 * torch.randn(count, size, generator=g)
        for each in nan:
            x[each] = float("nan")
        keep = [i for i in range(count) if i not in left_out]
        self.x, self.y, self.kept, self.augment = x[keep], y[keep], keep, augment

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index].clone()
        if self.augment:
            x = x + 0.01 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()
        return x, self.y[index].clone()


def loader(dataset, **options):
    """Returns a DataLoader of ready-made batches."""
    return DataLoader(dataset, batch_size=None, **options)


def run(root, module, data, callbacks=(), *, val=None, seed=3, resume=None, **options):
    """Trains, and returns the result as plain values."""
    seed_everything(seed, verbose=False)
    diary = Diary()
    module = module()
    trainer = make_trainer(root, [*callbacks, diary], **{"max_steps": -1, **options})
    data, val = (each() if callable(each) else each for each in (data, val))
    trainer.fit(module, data, val, ckpt_path=resume)
    return {
        "weights": digest(dict(module.state_dict())),
        "optimizers": digest([_optimizer(o, module) for o in trainer.optimizers]),
        "schedulers": [
            {k: v for k, v in c.scheduler.state_dict().items() if not callable(v)}
            for c in trainer.lr_scheduler_configs
        ],
        "scaler": trainer.precision_plugin.state_dict(),
        "generators": digest(
            [random.getstate(), list(np.random.get_state()), torch.get_rng_state(), *_on_gpus()]
        ),
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "steps": diary.steps,
        "validations": diary.validations,
        "callbacks": [s for c in trainer.callbacks for s in _others(c)],
        "extra": digest(getattr(module, "extra", {})),
    }


def _on_gpus():
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _optimizer(optimizer, module):
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def _others(callback):
    if isinstance(callback, ModelCheckpoint):
        state = callback.state_dict()
        root = str(callback.dirpath)
        yield {k: str(v).replace(root, "") for k, v in state.items() if k not in ("dirpath",)} | {
            "files": sorted(f.name for f in _files(callback))
        }
    elif isinstance(callback, EarlyStopping):
        yield {**callback.state_dict(), "best_score": float(callback.best_score)}
    elif isinstance(callback, WeightAveraging):
        yield callback.state_dict()
        yield digest(dict(callback._average_model.state_dict()))


def _files(callback):
    return [f for f in Path(callback.dirpath).glob("*") if f.suffix == ".ckpt"]


def differences(a, b):
    """Returns the entries in which two runs differ, each with both values."""
    found = {}
    for key in a:
        if key in ("steps", "validations"):
            left = {k: (a[key].get(k), b[key].get(k)) for k in {*a[key], *b[key]}}
            wrong = {k: pair for k, pair in sorted(left.items()) if repr(pair[0]) != repr(pair[1])}
            if wrong:
                found[key] = dict(list(wrong.items())[:3])
        elif repr(a[key]) != repr(b[key]):
            found[key] = (a[key], b[key])
    return found
