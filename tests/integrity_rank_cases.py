"""What two ranks run for the tests of `IntegrityAudit`."""

import warnings
from functools import partial

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_stability import GradientMonitor, IntegrityAudit
from lit_stability.distributed.dtensor import local
from lit_stability.faults import CorruptGradient, CorruptOutput, CorruptWeight, FaultInjector
from tests.exact import digest
from tests.rank_cases import Net, fit_rank, whole

FAULTS = {
    "none": [],
    "forward pass": [CorruptOutput(step=10, rank=1, module="net.0", bit=20, element=3)],
    "averaged gradient": [CorruptGradient(step=10, rank=1, parameter="net.0.weight", bit=9)],
    "weight": [CorruptWeight(step=10, rank=1, parameter="net.0.weight", bit=9)],
}


def audited(root, strategy, fault):
    """Incidents, ledger and final weights of a run that is audited every fifth step."""
    warnings.simplefilter("ignore")
    monitor, audit = GradientMonitor(), IntegrityAudit(every=5)
    injector = [FaultInjector(FAULTS[fault])] if FAULTS[fault] else []
    net, _ = fit_rank(root, strategy, [monitor, audit, *injector], max_steps=13)
    return {
        "incidents": [(i.first.step, i.first.kind, i.first.message) for i in monitor.incidents],
        "suspects": audit.suspects(),
        "audits": audit.audits,
        "weights": digest(whole(net.parameters())),
    }


def both(root, strategy):
    """An audited run without a fault, and the weights of one without the audit."""
    warnings.simplefilter("ignore")
    bare, _ = fit_rank(root, strategy, [GradientMonitor()], max_steps=13)
    return {**audited(root, strategy, "none"), "bare": digest(whole(bare.parameters()))}


class Hybrid(Net):
    """FSDP2 on a mesh of two dimensions: ranks 0 and 2 hold the same shards, as do 1 and 3."""

    def configure_model(self):
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        fully_shard(self.net, mesh=mesh)


class Drift(Callback):
    """Changes a replica of rank 2 between two steps, by more than a bit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 8 and trainer.global_rank == 2:
            local(pl_module.net[0].weight.data).view(-1)[5] += 1e-3


def hybrid(root):
    """Incidents of four ranks, of which one has another weight."""
    warnings.simplefilter("ignore")
    monitor, audit = GradientMonitor(), IntegrityAudit(every=5)
    callbacks = [monitor, audit, Drift()]
    strategy = partial(ModelParallelStrategy, 4, 1)
    fit_rank(root, strategy, callbacks, module=Hybrid, max_steps=13, devices=4)
    return [(i.first.step, i.first.message) for i in monitor.incidents]
