"""What the ranks run in tests/test_ranks.py: small fits, with a fault on one rank."""

import logging

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.INFO)


class Net(LightningModule):
    """Dropout, a normalization, and parameters too small to be cut in two."""

    def __init__(self, sharded=False, dropout=0.1):
        super().__init__()
        norm = nn.LayerNorm(31) if sharded else nn.BatchNorm1d(31)
        self.net = nn.Sequential(
            nn.Linear(9, 31), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(31, 1)
        )
        self.sharded, self.losses = sharded, []

    def configure_model(self):
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(-1), y)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=400)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def batches(rank, ranks, count=60, leave_out=()):
    """Each rank's own batches; an index means the same data whatever else is left out."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count * ranks * 8, 9, generator=g)
    y = x @ torch.arange(9.0) / 9 + 0.1 * torch.randn(len(x), generator=g)
    x, y = (t.view(count, ranks, 8, -1)[:, rank] for t in (x, y))
    keep = [i for i in range(count) if i not in leave_out]
    data = TensorDataset(x[keep].flatten(0, 1), y[keep].flatten())
    return DataLoader(data, 8)


def strategy(name):
    if name != "fsdp2":
        return name
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


class Tape(Callback):
    """What was measured, and the weights that every rank had after each batch."""

    def __init__(self):
        self.stats, self.steps = [], []

    def on_healthy_step(self, trainer, pl_module, stats):
        self.stats.append(stats)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(trainer.global_step)


def fit_rank(root, name, callbacks, *, module=None, leave_out=(), **options):
    """Train this rank's share from a seed."""
    seed_everything(0, verbose=False)
    module = Net(name == "fsdp2", **(module or {}))
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
    trainer = Trainer(callbacks=callbacks, strategy=strategy(name), **(defaults | options))
    data = batches(trainer.global_rank, 2, leave_out=leave_out)
    torch.manual_seed(trainer.global_rank)
    trainer.fit(module, data, options.get("val"))
    return module, trainer


def whole(tensors):
    """All in one tensor, put together from their shards."""
    full = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
    return torch.cat([t.detach().double().flatten() for t in full])


def outcome(root, name, faults=(), **options):
    """What a rank tells of a fit with these faults."""
    tape, suite = Tape(), stability_callbacks()
    injector = [FaultInjector(list(faults))] if faults else []
    module, trainer = fit_rank(root, name, [*injector, *suite, tape], **options)
    return {
        "incidents": [
            (i.first.kind, i.first.step, i.anomaly.kind, i.strikes, i.responses, i.outcome)
            for i in suite[0].incidents
        ],
        "said": [i.first.message for i in suite[0].incidents],
        "evidence": [i.evidence for i in suite[0].incidents],
        "books": suite[2].state_dict(),
        "weights": whole(module.parameters()),
        "buffers": whole([torch.zeros(1), *module.buffers()]),
        "step": trainer.global_step,
        "steps": tape.steps,
        "stats": tape.stats,
        "losses": module.losses,
    }


def outcomes(root, name, cases):
    """Several fits one after the other; each in a folder of its own."""
    told = {}
    for label, (faults, options) in cases.items():
        told[label] = outcome(root / label.replace(" ", "-"), name, faults, **options)
    return told
