"""The code that the ranks run for tests/test_ranks.py: small fits, with a fault on one rank."""

import logging
import threading
import warnings
from functools import partial

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import TrainingStopped, stability_callbacks
from lit_stability.faults import FaultInjector
from lit_stability.trainer_internals import adapter_of, keep_records_in
from tests.strategies import DeepSpeedOnCPU, FSDP1OnCPU

logging.getLogger("lightning").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(LightningModule):
    """A net with an uneven width, and a bias too small to be sharded: rank 1 has no part of it."""

    def __init__(self, strategy, dropout=0.1):
        super().__init__()
        norm = nn.BatchNorm1d(31) if strategy == "ddp" else nn.LayerNorm(31)
        # Each rank of tensor parallelism has half of the activations.
        norm = nn.Identity() if strategy.startswith("tensor") else norm
        width = 32 if strategy.startswith("tensor") else 31
        self.net = nn.Sequential(
            nn.Linear(9, width), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )
        self.strategy, self.losses = strategy, []

    def configure_model(self):
        if self.strategy.startswith("tensor"):
            plan = {"0": ColwiseParallel(), "4": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.strategy in ("fsdp2", "tensor and data"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x).squeeze(-1), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.loss(batch)

    def configure_optimizers(self):
        # FSDP1 has parameters of its own, in the module that Lightning has wrapped.
        owner = self.trainer.model if self.strategy.startswith("fsdp1") else self
        optimizer = torch.optim.AdamW(owner.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=400)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Manual(Net):
    """Two optimizers that take turns in every batch."""

    def __init__(self, strategy, dropout=0.1):
        super().__init__(strategy, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(float(loss.detach()))

    def configure_optimizers(self):
        trunk, head = self.net[:4].parameters(), self.net[4].parameters()
        return [torch.optim.AdamW(trunk, 1e-2), torch.optim.SGD(head, 1e-2, momentum=0.9)]


def batches(rank, ranks, count=60, skipped=(), nan=()):
    """Returns the batches of a rank; an index means the same data whatever else is skipped.

    Those of `nan` hold a NaN on rank 1.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count * ranks * 8, 9, generator=g)
    y = x @ torch.arange(9.0) / 9 + 0.1 * torch.randn(len(x), generator=g)
    x, y = (t.view(count, ranks, 8, -1)[:, rank] for t in (x, y))
    x[list(nan) if rank == 1 else [], 0, 0] = float("nan")
    keep = [i for i in range(count) if i not in skipped]
    return DataLoader(TensorDataset(x[keep].flatten(0, 1), y[keep].flatten()), 8)


class Truth(Callback):
    """Records the norm of the whole gradient, from its shards; must come before the suite."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        adapter = adapter_of(trainer)
        adapter.read_gradients()
        grads = [p.grad for _, p in adapter.named_parameters(pl_module)]
        if not isinstance(trainer.strategy, FSDP1OnCPU | DeepSpeedOnCPU):
            self.norms.append([float(whole([grad]).norm()) for grad in grads])
            return
        own = torch.stack([torch.zeros(()) if g is None else g.norm() for g in grads])
        ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, own)
        self.norms.append(torch.stack(ranks).norm(dim=0).tolist())


class Recorder(Callback):
    """Records accepted steps, ``global_step`` after every batch, and the collectives called."""

    def __init__(self):
        self.stats, self.steps, self.calls = [], [], []

    def on_train_start(self, trainer, pl_module):
        self._count, self._originals = [], {}
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name))

    def _counting(self, name):
        original = self._originals[name]

        def counted(*args, **kwargs):
            # Other threads communicate too, without keeping the training waiting.
            if threading.current_thread() is threading.main_thread():
                self._count.append(name if kwargs.get("async_op") is None else f"{name} async")
            return original(*args, **kwargs)

        return counted

    def on_healthy_step(self, trainer, pl_module, stats):
        self.stats.append(stats)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(trainer.global_step)
        self.calls.append(tuple(self._count))
        self._count.clear()

    def teardown(self, trainer, pl_module, stage):
        for name, original in self._originals.items():
            setattr(dist, name, original)


def whole(tensors):
    """Returns all tensors in one, assembled from their shards."""
    full = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
    return torch.cat([t.detach().double().flatten() for t in full])


def weights_of(net, trainer):
    """Returns all weights in one tensor; with FSDP1 first those of rank 0."""
    own = whole(p for _, p in adapter_of(trainer).named_parameters(net))
    if not isinstance(trainer.strategy, FSDP1OnCPU | DeepSpeedOnCPU):
        return own
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return torch.cat(ranks)


def fit_rank(
    root,
    name,
    callbacks,
    *,
    module=Net,
    dropout=0.1,
    skipped=(),
    nan=(),
    val=False,
    resume=None,
    **options,
):
    """Trains this rank's share from a seed."""
    seed_everything(0, verbose=False)
    ranks = options.get("devices", 2)
    given, name = name, name if isinstance(name, str) else "ddp"
    make = given if callable(given) else STRATEGIES.get(given, lambda: given)
    net = module(name, dropout)
    strategy = make(**options.pop("strategy", {}))
    if options.pop("fp16", False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=20)
        options["plugins"] = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    defaults = {
        "max_steps": 50,
        "accelerator": "cpu",
        "devices": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": root,
    }
    trainer = Trainer(callbacks=callbacks, strategy=strategy, **(defaults | options))
    keep_records_in(trainer, root)
    # The ranks of tensor parallelism train on the same batches.
    shared = 2 if name.startswith("tensor") else 1
    place = trainer.global_rank // shared, ranks // shared
    data = batches(*place, skipped=skipped, nan=nan)
    torch.manual_seed(place[0])
    checked = batches(*place, count=2) if val else None
    trainer.fit(net, data, checked, ckpt_path=resume)
    return net, trainer


STRATEGIES = {
    "fsdp2": partial(ModelParallelStrategy, 2, 1),
    "deepspeed": DeepSpeedOnCPU,
    "deepspeed 1": partial(DeepSpeedOnCPU, stage=1),
    "deepspeed 2": partial(DeepSpeedOnCPU, stage=2),
    "deepspeed 3": partial(DeepSpeedOnCPU, stage=3),
    "tensor": partial(ModelParallelStrategy, 1, 2),
    "tensor and data": partial(ModelParallelStrategy, 2, 2),
    "fsdp1": FSDP1OnCPU,
    "fsdp1 flat": partial(FSDP1OnCPU, use_orig_params=False),
}

SUITES = {"whole": stability_callbacks, "monitor": lambda: stability_callbacks()[:1], "none": list}


def outcome(root, name, faults=(), *, suite="whole", checkpoint=False, recorded=True, **options):
    """Returns the results of one rank for a fit with these faults.

    With ``recorded=False`` no callback but those of the suite sees the steps.
    """
    recorder, truth, suite, lines = Recorder(), Truth(), SUITES[suite](), Lines()
    callbacks = [FaultInjector(list(faults))] if faults else [truth]
    callbacks = [*callbacks, *suite, recorder] if recorded else suite
    if checkpoint:
        callbacks.append(ModelCheckpoint(root / "saved", every_n_train_steps=1, save_top_k=-1))
    try:
        net, trainer = fit_rank(root, name, callbacks, enable_checkpointing=checkpoint, **options)
    except TrainingStopped as stopped:
        return {"stopped": stopped.args[0].split(". Record")[0], "incidents": incidents_of(suite)}
    return {
        "incidents": incidents_of(suite),
        "messages": [i.first.message for i in suite[0].incidents] if suite else [],
        "evidence": [i.evidence for i in suite[0].incidents] if suite else [],
        "log": lines.stop(),
        "state": suite[-1].state_dict() if len(suite) > 1 else {},
        "weights": weights_of(net, trainer),
        "buffers": whole([torch.zeros(1), *net.buffers()]),
        "step": trainer.global_step,
        "steps": recorder.steps,
        "stats": recorder.stats,
        "calls": recorder.calls,
        "losses": net.losses,
        "norms": truth.norms,
    }


class Lines(logging.Handler):
    """Collects the lines of the package's log, which is quiet otherwise."""

    def __init__(self):
        super().__init__()
        self.lines, self.logger = [], logging.getLogger("lightning.pytorch.lit_stability")
        self.logger.addHandler(self)
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())

    def stop(self):
        self.logger.removeHandler(self)
        self.logger.propagate = True
        self.logger.setLevel(logging.NOTSET)
        return self.lines


def incidents_of(suite):
    """Returns the incidents, which must be the same on both ranks."""
    return [
        (i.id, i.first.kind, i.first.step, i.occurrences, i.responses, i.outcome)
        for i in (suite[0].incidents if suite else [])
    ]


def outcomes(root, name, cases):
    """Runs several fits, each in its own folder."""
    warnings.simplefilter("ignore")
    return {
        label: outcome(root / label.replace(" ", "-"), name, faults, **options)
        for label, (faults, options) in cases.items()
    }
