"""What two ranks run for the tests of `QKClip`."""

import warnings

import torch

from lit_stability import GradientMonitor, QKClip
from lit_stability.measurement.attention_heads import AttentionHeads
from lit_stability.measurement.attention_monitor import fitting
from tests.probe_rank_cases import AttendingRank
from tests.rank_cases import fit_rank, whole


class SharpRank(AttendingRank):
    """Large logits, weights that do not move but for a rescaling, and the same batch each time."""

    def __init__(self, sharded, dropout=0.1):
        super().__init__(sharded)
        with torch.no_grad():
            self.first.qkv.weight.mul_(4.0)

    def training_step(self, batch, batch_idx):
        self.batch = batch
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def rescaled(root):
    """After one rescaling: weights, counts, and the first attention's logits on the own batch."""
    warnings.simplefilter("ignore")
    callbacks = [GradientMonitor(), QKClip(0.5, modules="first")]
    net, _ = fit_rank(root, "ddp", callbacks, module=SharpRank, max_steps=1)
    net.log = lambda *args, **more: None
    return {
        "weights": whole(net.parameters()),
        "rescaled": callbacks[1].rescaled,
        "logits": logits_of(net, net.batch)[0].tolist(),
        "incidents": len(callbacks[0].incidents),
    }


def logits_of(net, batch):
    """For each attention the largest logit of each head, over all sequences."""
    with AttentionHeads(net, fitting(net, "*"), {}, trace=True) as heads:
        net.training_step(batch, 0)
    return list(heads.logits.values())
