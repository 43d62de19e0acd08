"""What two ranks run for the tests of `IntegrityAudit`."""

import warnings

from lit_stability import GradientMonitor, IntegrityAudit
from lit_stability.faults import CorruptGradient, CorruptOutput, CorruptWeight, FaultInjector
from tests.exact import digest
from tests.rank_cases import fit_rank, whole

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
