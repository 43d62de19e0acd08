"""What two ranks run for the tests of the probes."""

import os
import warnings

from lit_stability import AttentionProbe, CurvatureProbe, GradientMonitor
from tests.probe_models import Attending, by_hand
from tests.rank_cases import Recorder, fit_rank, whole


class AttendingRank(Attending):
    """For the batches of a rank; no BatchNorm, so that the loss is a mean over samples."""

    def __init__(self, sharded, dropout=0.1):
        super().__init__()
        del self.head[0]
        self.first.dropout = self.second.dropout = 0.0
        self.head[0].p = 0.0


def readings(root, probed):
    """Readings by step, weights, and the mean of the ratios that each rank has by itself."""
    warnings.simplefilter("ignore")
    recorded_step = Recorder()
    probes = [AttentionProbe(every=5), CurvatureProbe(every=5)] if probed else []
    net, _ = fit_rank(
        root, "ddp", [GradientMonitor(), *probes, recorded_step], module=AttendingRank, max_steps=12
    )
    found = [
        (s.step, [(r.quantity, r.where, r.value) for r in s.readings]) for s in recorded_step.stats
    ]
    return {
        "readings": [(step, each) for step, each in found if each],
        "steps": [step for step, _ in found],
        "weights": whole(net.parameters()),
        "losses": net.losses,
    }


def both(root):
    """With the probes and without."""
    return {probed: readings(root / str(probed), probed) for probed in (True, False)}


def unseen(q, k, v, mask=None, dropout=0.0):
    """Attention that the probe does not know for one."""
    weights = (q @ k.transpose(-2, -1) / 2).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


class Uneven(AttendingRank):
    """Attends in the way of its rank."""

    ways = ()

    def __init__(self, sharded, dropout=0.1):
        super().__init__(sharded)
        self.first.attend = self.second.attend = self.ways[int(os.environ["LOCAL_RANK"])]


def one_sided(root):
    """Steps with readings, where rank 1 alone has an attention that is seen, and where none has."""
    found = {}
    for name, ways in {"one": (unseen, by_hand), "none": (unseen, unseen)}.items():
        Uneven.ways = ways
        recorded_step = Recorder()
        probe = AttentionProbe(every=3, quiet=True)
        suite = [GradientMonitor(), probe, recorded_step]
        fit_rank(root / name, "ddp", suite, module=Uneven, max_steps=12)
        found[name] = [s.step for s in recorded_step.stats if s.readings]
    return found
