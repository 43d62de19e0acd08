"""Invariant 7: a run that recovered from a fault equals one without the fault, bit by bit.

Every case trains twice on a small net with dropout and BatchNorm, for two or three epochs with
validation. Either a transient fault is injected once, and the other run is clean; or a batch of the
data is always bad, and the data of the other run do not contain it.
"""

import copy
import functools
import os

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.utilities import CombinedLoader
from torch.optim import lr_scheduler
from torch.utils.data import IterableDataset

from lit_stability import AutoRollback, GradientMonitor, read_incidents
from lit_stability.faults import (
    CorruptGradient,
    CorruptMoment,
    CorruptWeight,
    FaultInjector,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)
from tests.conftest import every_other
from tests.delayed import delay_copies
from tests.exact import Batches, differences, loader, run
from tests.exact_net import OPTIMIZERS, Net, cosine_by_epoch, onecycle, plateau
from tests.exact_practices import PRACTICES, WritesTensors
from tests.test_invariants import fp16_on_cpu


class TwoOptimizers(Net):
    """Manual optimization: two optimizers, one of them with a scheduler that the module steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        a = torch.optim.AdamW(self.first.parameters(), 1e-2)
        b = torch.optim.SGD(self.last.parameters(), 1e-2, momentum=0.9)
        return [a, b], [lr_scheduler.StepLR(a, 10, 0.5)]


class OwnState(Net):
    """Keeps a slow copy of a weight, and defines how to restore it."""

    def __init__(self):
        super().__init__()
        self.extra = {"slow": torch.zeros(16, 8), "seen": 0}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.extra["slow"] = 0.9 * self.extra["slow"] + 0.1 * self.first[0].weight.detach()

    def training_step(self, batch, batch_idx):
        self.extra["seen"] += 1
        return super().training_step(batch, batch_idx)

    def rewindable_state(self):
        return copy.deepcopy(self.extra)

    def load_rewindable_state(self, state):
        self.extra = copy.deepcopy(state)


class OwnScheduler(Net):
    """Steps a scheduler that Lightning does not know of."""

    def on_fit_start(self):
        optimizer = self.trainer.optimizers[0]
        self.schedule = lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=200)

    def on_before_zero_grad(self, optimizer):
        if self.trainer.global_step:
            self.schedule.step()

    def rewindable_state(self):
        return copy.deepcopy(self.schedule.state_dict())

    def load_rewindable_state(self, state):
        self.schedule.load_state_dict(copy.deepcopy(state))


class Stream(IterableDataset):
    """The same batches without a length."""

    def __init__(self, **options):
        self.batches = Batches(**options)

    def __iter__(self):
        return (self.batches[i] for i in range(len(self.batches)))


def in_dict(**options):
    return CombinedLoader({"a": loader(Batches(**options)), "b": loader(Batches(7))}, "max_size")


def sequence(dataset, **options):
    """Returns a loader with another order in every epoch, independent of the missing batches."""
    return loader(dataset, sampler=Shuffled(dataset), **options)


class Shuffled(torch.utils.data.Sampler):
    def __init__(self, data):
        self.data, self.epoch = data, 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        g = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        order = torch.randperm(24, generator=g).tolist()
        kept = {original: i for i, original in enumerate(self.data.kept)}
        return iter([kept[i] for i in order if i in kept])


WEIGHT = functools.partial(CorruptWeight, parameter="first.0.weight")
HEAD = functools.partial(CorruptWeight, parameter="last.1.weight")
FLIP = functools.partial(CorruptWeight, parameter="last.1.weight", bit=30)
ADAM_V = CorruptMoment
ADAM_NAN = functools.partial(CorruptMoment, key="exp_avg", value=float("nan"))
TRANSIENT = {
    "NaN loss": NanLoss,
    "loss x1e4": ScaleLoss,
    "NaN gradient": CorruptGradient,
    "gradients x1e3": ScaleGradients,
    "NaN weight": WEIGHT,
    "bit flip": FLIP,
    "zeroed moment": ADAM_V,
    "NaN moment": ADAM_NAN,
}

FEATURES = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "OneCycle": {"module": functools.partial(Net, scheduler=onecycle)},
    "cosine by epoch": {
        "module": functools.partial(Net, scheduler=cosine_by_epoch), "max_epochs": 3,
    },
    "plateau by step": {"module": functools.partial(Net, scheduler=plateau("train/loss", "step"))},
    "plateau by epoch": {
        "module": functools.partial(Net, scheduler=plateau("val/loss", "epoch")), "max_epochs": 3,
    },
    "validation in mid-epoch": {"val_check_interval": 5},
    "validation across epochs": {"val_check_interval": 7, "check_val_every_n_epoch": None},
    "max_steps": {"max_steps": 34, "max_epochs": None},
    "max_time": {"callbacks": lambda root: [Timer(duration={"hours": 1})]},
    "limit_train_batches": {"limit_train_batches": 13, "clean": {"limit_train_batches": 12}},
    "shuffled": {"loader": lambda **o: sequence(Batches(**o))},
    "workers": {"loader": lambda **o: loader(Batches(**o), num_workers=1)},
    "augmentation": {"loader": lambda **o: loader(Batches(augment=True, **o))},
    "iterable": {"loader": lambda **o: loader(Stream(**o))},
    "CombinedLoader": {"loader": in_dict},
    "reloaded every epoch": {"reload_dataloaders_every_n_epochs": 1},
    "EMA": {"callbacks": lambda root: [EMAWeightAveraging(decay=0.9)]},
    "EarlyStopping": {
        "callbacks": lambda root: [EarlyStopping("val/loss", patience=1)], "max_epochs": 3,
    },
    "ModelCheckpoint": {
        "enable_checkpointing": True,
        "val_check_interval": 6,
        "callbacks": lambda root: [
            ModelCheckpoint(
                root / "best", monitor="val/loss", save_top_k=2, filename="{step}", save_last=True
            )
        ],
    },
    "ModelCheckpoint by step": {
        "enable_checkpointing": True,
        "callbacks": lambda root: [
            ModelCheckpoint(root / "often", every_n_train_steps=4, save_top_k=3, monitor="step",
                            mode="max", filename="{step}")
        ],
    },
    "two optimizers": {"module": TwoOptimizers},
    "state of its own": {"module": OwnState},
    "scheduler of its own": {"module": OwnScheduler},
    "gradient checkpointing": {"module": functools.partial(Net, recompute=True)},
    "torch.compile": {"module": functools.partial(Net, compiled=True)},
    "batch copied from the start": {
        "module": WritesTensors, "rollback": {"clone_batches": True},
    },
}  # fmt: skip
PRECISIONS = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "fp16 with a scaler": {"plugins": fp16_on_cpu},
    "64-true": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
}

MAY_BE_QUESTIONED = ("restarted codes",)
"""Practices that write weights on purpose: the first large write is questioned once, where the
detectors know by then what is usual."""
NOT_JUDGED = ("SWA",)
"""Its last epoch takes no optimizer step, so a bad batch in it changes the BatchNorm statistics."""


def both(tmp_path, options, faults=(), nan=()):
    """Trains with the fault and the suite, and without either; returns the differences."""
    options = dict(options)
    module = options.pop("module", Net)
    make = options.pop("loader", lambda **o: loader(Batches(**o)))
    others = options.pop("callbacks", lambda root: [])
    rollback = options.pop("rollback", {})
    clean = options.pop("clean", {})
    count = options.pop("count", 16)
    limits = {"max_epochs": 2, "max_steps": -1, **options}
    results = []
    for name in ("faulty", "clean"):
        root = tmp_path / name
        callbacks = others(root)
        if name == "faulty":
            injector = [FaultInjector(list(faults))] if faults else []
            callbacks = [*injector, GradientMonitor(), AutoRollback(**rollback), *callbacks]
        data = make(count=count, **({"nan": nan} if name == "faulty" else {"left_out": nan}))
        own = {k: v() if callable(v) else v for k, v in limits.items()}
        own |= clean if nan and name == "clean" else {}
        val = loader(Batches(4))
        results.append(run(root, module, data, callbacks, val=val, **own))
    return differences(*results)


CELLS = [
    *[(f"{f}, bad batch", FEATURES[f], {"nan": (10,)}) for f in FEATURES],
    *[
        (f"{f}, NaN weight", FEATURES[f], {"faults": [functools.partial(WEIGHT, step=step)]})
        for f, step in {f: 9 if f == "accumulation" else 15 for f in FEATURES}.items()
    ],
    *[(f"{p}, bad batch", PRACTICES[p], {"nan": (10,)}) for p in PRACTICES if p not in NOT_JUDGED],
    *[(f"{p}, NaN weight", PRACTICES[p], {"faults": [lambda: HEAD(step=19)]}) for p in PRACTICES],
    *[
        (f"{o}, {name}", {"module": functools.partial(Net, o)}, cell)
        for o in OPTIMIZERS
        for name, cell in (
            ("bad batch", {"nan": (10,)}),
            ("NaN weight", {"faults": [lambda: WEIGHT(step=27)]}),
        )
    ],
    *[
        (f"{p}, {name}", PRECISIONS[p], cell)
        for p in PRECISIONS
        for name, cell in (
            ("bad batch", {"nan": (10,)}),
            ("NaN weight", {"faults": [lambda: WEIGHT(step=27)]}),
        )
    ],
    *[
        # The detectors of finite values need some 20 steps to know what is usual.
        (f"plain, {f}", {"count": 24}, {"faults": [functools.partial(TRANSIENT[f], step=35)]})
        for f in TRANSIENT
    ],
    *[(f"plain, bad batch {i}", {}, {"nan": i}) for i in [(0,), (15,), (0, 1), (14, 15)]],
    *[
        (f"accumulation, bad batch {i}", {"accumulate_grad_batches": 4}, {"nan": i})
        for i in [(0,), (3,), (13,), (15,), (9, 10)]
    ],
    *[
        (f"{p}, bad batch {i}", PRACTICES[p], {"nan": i})
        for p in ("counter in an attribute", "teacher", "callback with a state")
        for i in [(0,), (15,), (14, 15)]
    ],
    *[
        (f"accumulation, {p}, {name}", {**PRACTICES[p], "accumulate_grad_batches": 3}, cell)
        for p in ("averages in tensors", "codebook, through data", "slow weights of a callback",
                  "batch, tensor written", "buffer after the batch")
        for name, cell in (
            ("bad batch", {"nan": (10,)}),
            ("NaN weight", {"faults": [lambda: HEAD(step=9)]}),
        )
    ],
    ("codebook, fp16, bad batch",
     {**PRACTICES["codebook, frozen parameter"], "plugins": fp16_on_cpu}, {"nan": (10,)}),
    ("teacher, validation in mid-epoch, bad batch",
     {**PRACTICES["teacher"], "val_check_interval": 5}, {"nan": (10,)}),
]  # fmt: skip


def cells():
    """Every cell; of the faults with one practice CI runs every fifth, in turn."""
    seen = {}
    for name, options, cell in CELLS:
        practice = name.rsplit(", ", 1)[0]
        before = seen.setdefault(practice, [len(seen), 0])
        long = practice != "plain" and sum(before) % 5
        before[1] += 1
        marks = [pytest.mark.long] if long else []
        yield pytest.param(options, cell, marks=marks, id=name.replace(" ", "-"))


@pytest.mark.parametrize(("options", "cell"), [*cells()])
def test_recovered_run_equals_one_without_the_fault(options, cell, tmp_path):
    """S12, S17, K3."""
    cell = {k: [f() for f in v] if k == "faults" else v for k, v in cell.items()}
    assert both(tmp_path, options, **cell) == {}
    incidents = read_incidents(tmp_path / "faulty")
    assert incidents, "there was something to recover from"
    # No step may follow that would confirm what was done to the last batch.
    assert {i["outcome"] for i in incidents} <= {"recovered", "recurring", "handled", "unresolved"}


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    """``SNAPSHOTS=delayed`` runs all with snapshots that are copied beside the training."""
    if os.environ.get("SNAPSHOTS") == "delayed":
        delay_copies(monkeypatch, longest=0.01)


HEALTHY = {**FEATURES, **PRECISIONS, **PRACTICES} | {
    o: {"module": functools.partial(Net, o)} for o in OPTIMIZERS
}


@pytest.mark.parametrize("name", every_other(HEALTHY), ids=lambda name: name.replace(" ", "-"))
def test_healthy_run_is_unchanged(name, tmp_path):
    """Invariant 1: weights, optimizers, generators, metrics, validations, files."""
    count = 24 if name in MAY_BE_QUESTIONED else 16
    assert both(tmp_path, {**HEALTHY[name], "count": count}) == {}
    if name in MAY_BE_QUESTIONED:
        assert len(read_incidents(tmp_path / "faulty")) == 1
    else:
        assert not (tmp_path / "faulty" / "incidents.jsonl").exists()
