"""Quantised weights and other tensors that torch's usual operations do not know, in a fit."""

import pytest
import torch

from lit_stability import AutoRollback, GradientMonitor, read_incidents, stability_callbacks
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import Regression, fit
from tests.delayed import delay_copies
from tests.foreign_tensors import FOREIGN, Packed, PackedMoments

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]


def module_of(name, optimizer=None):
    """The regression task with a net that holds such a tensor."""

    class Holds(Regression):
        def __init__(self):
            super().__init__()
            self.net = FOREIGN[name]()

        def on_train_end(self):
            self.net.forget()

        def configure_optimizers(self):
            trained = [p for p in self.parameters() if p.requires_grad]
            return super().configure_optimizers() if optimizer is None else optimizer(trained)

    return Holds


def content(module):
    """The trained weights, and what wrappers among the buffers hold."""
    wrapped = [b.dequantize() for b in module.buffers() if isinstance(b, Packed)]
    trained = [p for p in module.parameters() if p.requires_grad and not p.is_meta]
    return torch.cat([t.detach().flatten() for t in [*trained, *wrapped]])


@pytest.mark.parametrize("name", FOREIGN)
def test_healthy_run_with_the_suite_is_bit_identical(name, tmp_path):
    bare, _ = fit(tmp_path / "bare", module=module_of(name))
    suite = stability_callbacks()
    with_suite, _ = fit(tmp_path / "suite", suite, module=module_of(name))
    assert suite[0].incidents == []
    assert torch.equal(content(bare), content(with_suite))


@pytest.mark.each_value
@pytest.mark.parametrize("where", ["device", "host", "auto"])
@pytest.mark.parametrize("name", FOREIGN)
def test_rollback_and_retry_are_exact(name, where, tmp_path):
    bare, _ = fit(tmp_path / "bare", module=module_of(name))
    faults = [CorruptWeight(step=35, parameter="net.before.weight"), NanLoss(step=50)]
    callbacks = [FaultInjector(faults), GradientMonitor(), AutoRollback(snapshot_device=where)]
    saved, _ = fit(tmp_path / "saved", callbacks, module=module_of(name))
    first, second = read_incidents(tmp_path / "saved")
    assert (first["responses"], second["responses"]) == (
        ["rolled back and replayed"],
        ["step retried"],
    )
    assert torch.equal(content(bare), content(saved))


@pytest.mark.parametrize("delayed", [False, True])
def test_moments_in_a_wrapper_are_rolled_back(delayed, tmp_path, monkeypatch):
    if delayed:
        delay_copies(monkeypatch)
    kind = module_of("rare types", PackedMoments)
    bare, _ = fit(tmp_path / "bare", module=kind)
    fault = FaultInjector([CorruptWeight(step=35, parameter="net.before.weight")])
    saved, _ = fit(tmp_path / "saved", [fault, GradientMonitor(), AutoRollback()], module=kind)
    (incident,) = read_incidents(tmp_path / "saved")
    assert incident["responses"] == ["rolled back and replayed"]
    assert torch.equal(content(bare), content(saved))


@pytest.mark.parametrize("name", ["packed weight", "int8 weight", "float8 weight"])
def test_frozen_weights_of_a_library_are_not_copied_for_each_snapshot(name, tmp_path):
    def snapshot_bytes(net):
        root = tmp_path / net.replace(" ", "-")
        callbacks = [FaultInjector([NanLoss(step=50)]), GradientMonitor(), AutoRollback()]
        fit(root, callbacks, module=module_of(net))
        return read_incidents(root)[0]["memory"]["snapshot_bytes"]

    assert snapshot_bytes(name) == snapshot_bytes("meta weight")
