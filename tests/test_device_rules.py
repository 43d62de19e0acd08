"""What the suite asks of an accelerator in a healthy run, by rules that are checked on a CPU."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lit_stability import (
    AdaptiveGradientClipping,
    CrashPrediction,
    GradientFlow,
    GradientMonitor,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from lit_stability.measurement import norms
from lit_stability.measurement.step_meter import StepMeter
from tests.conftest import Regression, flat, make_trainer, regression_data
from tests.device_rules import PACKAGE, DeviceRules

TO_HOST = ("measurement/norms.py", "to_host", "tolist")
"""The numbers of a step, which the detectors read before the update."""
RARE = {
    ("training_state/weight_writes.py", "_equal", "equal"): "after snapshots 1, 2, 4, 8, ...",
    ("callbacks/last_known_good/checkpoint_manager.py", "_hand_over", "cpu"): "a good checkpoint",
    ("training_state/host_copy.py", "capture", "_foreach_copy_"): "with a good checkpoint",
}
FIRST_STEPS = 3
"""Steps in which what is computed once goes to the device."""


class PerStep(Callback):
    """Notes what was waited for from the start of each step to that of the next, in `steps`."""

    def __init__(self, rules):
        self.rules, self.steps, self._before = rules, [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if self._before is not None:
            self.steps.append(self.rules.waits - self._before)
        self._before = Counter(self.rules.waits)


class Attention(LightningModule):
    """An attention and a norm."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x = batch[0].unflatten(0, (4, 4))
        x = self.norm(x + self.attention(x, x, x)[0])
        return nn.functional.mse_loss(self.head(x).flatten(), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)


RUNS = {
    "default": (Regression, [], {}),
    "accumulation": (Regression, [], {"accumulate_grad_batches": 2}),
    "clipping": (Regression, [], {"gradient_clip_val": 1.0}),
    "bf16": (Regression, [], {"precision": "bf16-mixed"}),
    "SGD": (lambda: Regression("sgd"), [], {}),
    "attention": (Attention, [], {}),
    "adaptive clipping": (Regression, [AdaptiveGradientClipping], {}),
    "crash prediction": (Regression, [CrashPrediction], {}),
    "gradient flow": (Regression, [lambda: GradientFlow(every_n_steps=1000)], {}),
}


def fit_by_the_rules(root, rules, make, callbacks=(), **options):
    """The module of a fit whose tensors count as those of a device, and its steps."""
    torch.manual_seed(0)
    module, steps = make(), PerStep(rules)
    trainer = make_trainer(root, [*stability_callbacks(), *callbacks, steps], **options)
    data = regression_data()
    with rules:
        trainer.fit(module, data)
    return module, steps.steps


@pytest.mark.parametrize("kind", RUNS)
def test_healthy_step_waits_for_one_copy_to_the_host(kind, tmp_path):
    make, callbacks, options = RUNS[kind]
    rules = DeviceRules()
    _, steps = fit_by_the_rules(tmp_path, rules, make, [c() for c in callbacks], **options)
    usual = steps[FIRST_STEPS:]
    assert len(usual) > 40
    for step in usual:
        assert step[TO_HOST] == 1
        step.subtract([TO_HOST])
    others = sum(usual, Counter())
    assert set(others) <= set(RARE), "waits for the device in addition"
    assert all(times <= 2 for times in others.values())
    assert not rules.mixed


@pytest.mark.parametrize("kind", ["default", "bf16", "attention"])
def test_healthy_step_by_the_kernels_of_an_accelerator_waits_for_one_copy(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(norms, "_on_cpu", lambda tensors: False)
    make, _, options = RUNS[kind]
    rules = DeviceRules(without_float64=True)
    module, steps = fit_by_the_rules(tmp_path / "suite", rules, make, **options)
    assert {step[TO_HOST] for step in steps[FIRST_STEPS:]} == {1}
    assert not rules.mixed
    torch.manual_seed(0)
    bare = make()
    make_trainer(tmp_path / "bare", **options).fit(bare, regression_data())
    assert torch.equal(flat(module), flat(bare))


def test_one_more_read_in_the_monitor_is_found(tmp_path, monkeypatch):
    """The rules look at what the package does; this function claims to be in it."""
    source = "def measured(meter, *args, **options):\n    meter.parameters[0].sum().item()\n"
    source += "    return original(meter, *args, **options)\n"
    scope = {"original": StepMeter.measure}
    exec(compile(source, f"{PACKAGE}/measurement/step_meter.py", "exec"), scope)
    monkeypatch.setattr(StepMeter, "measure", scope["measured"])
    _, steps = fit_by_the_rules(tmp_path, DeviceRules(), Regression, max_steps=10)
    assert {step["measurement/step_meter.py", "measured", "item"] for step in steps} == {1}


@pytest.mark.parametrize("make", [Regression, Attention])
def test_incident_on_a_device_without_float64_is_handled(make, tmp_path, monkeypatch):
    monkeypatch.setattr(norms, "_on_cpu", lambda tensors: False)
    faults = FaultInjector([NanLoss(step=30), CorruptWeight(step=45)])
    rules = DeviceRules(without_float64=True)
    module, _ = fit_by_the_rules(tmp_path, rules, make, [faults])
    assert torch.isfinite(flat(module)).all()
    monitor = next(c for c in module.trainer.callbacks if isinstance(c, GradientMonitor))
    assert len(monitor.incidents) == 2
    assert not rules.mixed


FOREACH = [name for name in vars(torch) if name.startswith("_foreach_")]


def test_foreach_kernels_in_use_have_an_implementation_for_any_device():
    text = "".join(path.read_text() for path in Path(PACKAGE).rglob("*.py"))
    used = [name for name in FOREACH if f"torch.{name}(" in text]
    assert used
    for name in used:
        packet = getattr(torch.ops.aten, name)
        registered = [
            torch._C._dispatch_has_kernel_for_dispatch_key(
                f"aten::{name}" + f".{overload}" * (overload != "default"),
                "CompositeExplicitAutograd",
            )
            for overload in packet.overloads()
            if "out" not in overload
        ]
        assert any(registered), name


def test_rules_tell_host_and_device_apart():
    device = torch.ones(3)
    with DeviceRules(without_float64=True):
        host = torch.ones(3)
        there = torch.zeros(3, device=device.device)
    rules = DeviceRules(without_float64=True)
    rules._mark(host)
    scope = {"torch": torch, "device": device, "host": host, "there": there}
    waiting = ["device.tolist()", "bool(device[0])", "device[device > 0]", "device.to('cpu')"]
    waiting += ["torch.tensor([1.0], device=there.device)", "host.to(device.device)"]
    free = ["host.tolist()", "device.to('cpu').sum()", "device.cpu()[0]", "device * host[0]"]
    free += ["host + device.cpu()", "there + device", "torch.where(device > 0, device, 0.0)"]
    with rules:
        for text in waiting + free:
            exec(compile(text, f"{PACKAGE}/example.py", "exec"), scope)
    assert sum(rules.waits.values()) == len(waiting) + sum(
        "device.to" in t or "cpu()" in t for t in free
    )
    assert not rules.mixed
    with rules:
        exec(compile("device + host", f"{PACKAGE}/example.py", "exec"), scope)
        with pytest.raises(TypeError, match="no float64"):
            exec(compile("device.double()", f"{PACKAGE}/example.py", "exec"), scope)
    assert sum(rules.mixed.values()) == 1
