"""What two ranks run where ``training_step`` raises on one of them; for test_raising_ranks.py."""

import functools
import os
import time
import warnings
import weakref

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_stability import CurvatureProbe, stability_callbacks
from lit_stability.trainer_internals import can_guard_ranks
from tests.rank_cases import (
    Lines,
    Manual,
    Net,
    Recorder,
    batches,
    fit_rank,
    incidents_of,
    whole,
)

MEMORY = "CUDA out of memory. Tried to allocate 7 GiB"
MAKES = {
    "memory": lambda: torch.OutOfMemoryError(MEMORY),
    "host memory": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "value": lambda: ValueError("Expected parameter loc to satisfy Real()"),
    "type": lambda: TypeError("unsupported operand"),
}


class Fails(Net):
    """Raises in the middle of the forward pass of some ranks, wherever it meets some batches."""

    def __init__(self, sharded, dropout, *, at, ranks=(1,), error="memory", times=99, late=False):
        super().__init__(sharded, dropout)
        self.at, self.ranks, self.make = at, ranks, MAKES[error]
        self.times, self.late = times, late
        self.raised_at, self.seconds, self.freed = [], [], []
        self.held = None
        """The activations of a forward pass that was cut short."""

    def setup(self, stage):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        x = batches(rank, ranks).dataset.tensors[0]
        at = self.at.get(rank, []) if isinstance(self.at, dict) else self.at
        self.marks = {float(x[8 * index, 1]) for index in at}

    def training_step(self, batch, batch_idx):
        hit = float(batch[0][0, 1]) in self.marks and self.trainer.global_rank in self.ranks
        if hit and len(self.raised_at) < self.times:
            self.raised_at.append(time.monotonic())
            if not self.late:
                hidden = self.net[0](batch[0])
                self.held = weakref.ref(hidden)
                raise self.make()
            loss = super().training_step(batch, batch_idx)
            loss.register_hook(self._fail)
            return loss
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss):
        if self.held is not None:
            self.freed.append(self.held() is None)
            self.held = None

    def on_train_batch_start(self, batch, batch_idx):
        if len(self.seconds) < len(self.raised_at):
            self.seconds.append(time.monotonic() - self.raised_at[-1])

    def _fail(self, grad):
        raise self.make()


class Unused(Fails):
    """Has parameters that no batch uses, and some that only every second batch uses."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.never, self.sometimes = nn.Linear(3, 3), nn.Linear(31, 1)

    def loss(self, batch):
        loss = super().loss(batch)
        if float(batch[0][0, 0]) > 0:
            hidden = self.net[:4](batch[0])
            loss = loss + self.sometimes(hidden).square().mean()
        return loss


class Speaks(Fails):
    """Averages a metric over the ranks within its training step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        dist.all_reduce(loss.detach().clone())
        return loss


CASES = {
    "step 1": {"at": [1]},
    "step 2": {"at": [2]},
    "step 20": {"at": [20]},
    "once": {"at": [9], "times": 1},
    "rank 0": {"at": [9], "ranks": (0,)},
    "both ranks": {"at": [9], "ranks": (0, 1)},
    "value": {"at": [9], "error": "value"},
    "host memory": {"at": [9], "error": "host memory"},
    "two in a row": {"at": [9, 10]},
    "first of a window": {"at": [9], "fit": {"accumulate_grad_batches": 3, "max_steps": 14}},
    "last of a window": {"at": [11], "fit": {"accumulate_grad_batches": 3, "max_steps": 14}},
    "unused parameters": {"at": [9], "module": Unused, "unused": True},
    "16 bits": {"at": [9], "fit": {"fp16": True}},
    "another batch of a window on each rank": {
        "at": {0: [10], 1: [9]},
        **{"ranks": (0, 1), "fit": {"accumulate_grad_batches": 3, "max_steps": 14}},
    },
    "measured by probes": {"at": [9], "suite": lambda: with_probes()},
    "NaN on the other rank": {"at": [9], "ranks": (0,), "fit": {"nan": (9,)}},
    "two epochs": {"at": [59], "fit": {"max_steps": 80, "val": True}},
    "three ranks": {"at": [9], "ranks": (1, 2), "fit": {"devices": 3}},
}
ENDS = {
    "step 0": {"at": [0]},
    "first window": {"at": [1], "fit": {"accumulate_grad_batches": 3}},
    "three in a row": {"at": [9, 10, 11]},
    "value three times": {"at": [9, 10, 11], "error": "value"},
    "type": {"at": [9], "error": "type"},
    "backward": {"at": [9], "late": True},
    "speaks": {"at": [9], "module": Speaks},
}


class Patches(Callback):
    """Looks at what is left on the module between two steps, once that of the first is due."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (6, 7, 8):
            self.seen |= set(vars(pl_module))


def with_probes():
    """The suite, with a probe that measures every step."""
    monitor, *others = stability_callbacks()
    return [monitor, CurvatureProbe(every=1), *others]


def one(folder, case, *, skipped=()):
    """Trains with a case's fault, or without one if its batches are skipped."""
    case = dict(case)
    unused, options = case.pop("unused", False), case.pop("fit", {})
    suite = case.pop("suite", stability_callbacks)
    cls, at = case.pop("module", Fails), case.pop("at")
    made = []

    def module(sharded, dropout):
        made.append(cls(sharded, dropout, at=[] if skipped else at, **case))
        return made[0]

    recorder, callbacks = Recorder(), suite()
    lines = Lines()
    options = {"max_steps": 25, "skipped": skipped, **options}
    if skipped:
        options.pop("nan", None)
    strategy = DDPStrategy(find_unused_parameters=unused)
    patches = Patches()
    every = [*callbacks, recorder, patches]
    net, trainer = fit_rank(folder, strategy, every, module=module, **options)
    return {
        "log": lines.stop(),
        "weights": whole(net.parameters()),
        "buffers": whole(net.buffers()),
        "optimizer": whole(
            v for s in trainer.optimizers[0].state.values() for v in s.values() if v.ndim
        ),
        "step": trainer.global_step,
        "steps": recorder.steps,
        "calls": recorder.calls,
        "raised": len(net.raised_at),
        "freed": net.freed,
        "patched": "training_step" in patches.seen,
        "seconds": net.seconds,
        "incidents": incidents_of(callbacks),
        "messages": [i.first.message for i in callbacks[0].incidents],
        "causes": [i.cause for i in callbacks[0].incidents],
    }


def pairs(folder, names):
    """Runs cases with their faults, and the twins that never meet the batches."""
    warnings.simplefilter("ignore")
    results = {}
    for name in names:
        case = CASES[name]
        at = case["at"]
        at = sorted({i for each in at.values() for i in each}) if isinstance(at, dict) else at
        skipped = () if case.get("times") else at
        root = folder / name.replace(" ", "-")
        results[name] = (one(root, case), one(root / "twin", {**case, "at": []}, skipped=skipped))
    return results


def ending(folder, name):
    """Runs a case that ends in an exception, which is written to a file."""
    warnings.simplefilter("ignore")
    rank, begun = os.environ["LOCAL_RANK"], time.monotonic()
    try:
        one(folder, ENDS[name])
    except Exception as error:
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    finally:
        (folder / f"seconds{rank}").write_text(str(time.monotonic() - begun))


class Sparse(Net):
    """Has an embedding with sparse gradients."""

    def __init__(self, *args):
        super().__init__(*args)
        self.table = nn.Embedding(4, 31, sparse=True)

    def loss(self, batch):
        rows = self.table((batch[1] > 0).long())
        return super().loss(batch) + rows.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class LineSearch(Net):
    """Trains with LBFGS."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 1e-3, max_iter=2)


class Asks(Callback):
    """Asks whether the ranks of a fit are guarded."""

    def on_train_start(self, trainer, pl_module):
        self.found = can_guard_ranks(trainer)


def guarded(folder):
    """Whether the ranks are guarded, by what they train and how."""
    warnings.simplefilter("ignore")
    static = DDPStrategy(static_graph=True)
    fits = {
        "plain": ("ddp", Net, {}),
        "unused parameters": (DDPStrategy(find_unused_parameters=True), Unused, {}),
        "two batches per step": ("ddp", Net, {"accumulate_grad_batches": 2}),
        "static graph": (static, Net, {}),
        "sparse gradients": ("ddp", Sparse, {}),
        "manual": ("ddp", Manual, {}),
        "LBFGS": ("ddp", LineSearch, {}),
        "FSDP2": ("fsdp2", Net, {}),
    }
    found = {}
    for label, (strategy, module, options) in fits.items():
        asks = Asks()
        cls = functools.partial(module, at=[]) if module is Unused else module
        fit_rank(folder, strategy, [asks], module=cls, max_steps=1, **options)
        found[label] = asks.found
    return found
