"""The invariants of the design, each shown on real small fits."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lit_stability import GradientMonitor, StepStats, stability_callbacks
from lit_stability.faults import (
    BadBatch,
    CorruptGradient,
    CorruptMoment,
    CorruptWeight,
    FaultInjector,
    JumpLearningRate,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from tests.conftest import Regression, fit, flat, lines_of, regression_data, skipping_suite


def fp16_on_cpu():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=20)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def optimizer_state(trainer):
    return [
        v.double().flatten() if isinstance(v, torch.Tensor) else torch.tensor([float(v)])
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for v in state.values()
    ]


class Order(Callback):
    """Records the samples, and every metric a logger would see."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen.append((float(batch[0].sum()), trainer.global_step, logged))

    def on_validation_end(self, trainer, pl_module):
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen.append(("validation", trainer.global_step, logged))


HEALTHY = {
    "dropout and BatchNorm": {},
    "OneCycle": {"module": lambda: Regression(scheduler="onecycle")},
    "fused AdamW": {"module": lambda: Regression("fused")},
    "SGD with momentum": {"module": lambda: Regression("sgd")},
    "accumulation": {"accumulate_grad_batches": 3, "max_steps": 40},
    "gradient clipping": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "fp16 with a scaler": {"plugins": fp16_on_cpu},
    "fp16, fused": {"plugins": fp16_on_cpu, "module": lambda: Regression("fused")},
    "validation in the epoch": {"val": regression_data(5, seed=1), "val_check_interval": 10},
    "two epochs": {"max_steps": 100},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_with_the_suite_is_bit_identical(name, tmp_path):
    """Invariant 1: weights, optimizer, RNG, batch order, global_step, logged metrics. Also S10."""
    runs = []
    for callbacks in ([], stability_callbacks()):
        options = {k: v() if k == "plugins" else v for k, v in HEALTHY[name].items()}
        order = Order()
        module, trainer = fit(tmp_path, [*callbacks, order], **options)
        runs.append((module, trainer, order, torch.get_rng_state()))
    (bare, t0, seen0, rng0), (with_suite, t1, seen1, rng1) = runs
    assert torch.equal(flat(bare), flat(with_suite))
    assert all(map(torch.equal, optimizer_state(t0), optimizer_state(t1)))
    assert torch.equal(rng0, rng1)
    assert seen0.seen == seen1.seen
    assert bare.rates == with_suite.rates
    assert t0.precision_plugin.state_dict() == t1.precision_plugin.state_dict()
    assert not list(tmp_path.rglob("incidents*"))


class Watch(Callback):
    """Fails the run as soon as a weight, buffer or moment is non-finite after a step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert torch.isfinite(flat(pl_module)).all()
        assert all(torch.isfinite(s).all() for s in optimizer_state(trainer))


FAULTS = {
    "NaN loss": lambda: NanLoss(step=30),
    "loss spike": lambda: ScaleLoss(step=30),
    "NaN gradient": lambda: CorruptGradient(step=30, parameter="net.4.*"),
    "Inf gradient": lambda: CorruptGradient(step=30, parameter="net.0.weight", value=float("inf")),
    "scaled gradients": lambda: ScaleGradients(step=30, steps=5),
    "NaN weight": lambda: CorruptWeight(step=30, parameter="net.0.weight"),
    "flipped bit": lambda: CorruptWeight(step=30, parameter="net.0.weight", bit=30),
    "Inf moment": lambda: CorruptMoment(step=30, value=float("inf")),
    "zeroed second moment": lambda: CorruptMoment(step=30),
    "NaN momentum": lambda: CorruptMoment(step=30, key="exp_avg", value=float("nan")),
    "learning-rate jump": lambda: JumpLearningRate(step=30),
    "NaN batch": lambda: BadBatch(step=30),
}
PRECISIONS = {
    "fp32": {},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"plugins": fp16_on_cpu},
    "accumulate": {"accumulate_grad_batches": 2},
}


@pytest.mark.each_value
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_leaves_nothing_non_finite_behind(fault, precision, tmp_path):
    """Invariant 2, N1, N3: after each batch weights, buffers and moments are finite."""
    options = {k: v() if k == "plugins" else v for k, v in PRECISIONS[precision].items()}
    callbacks = [FaultInjector([FAULTS[fault]()]), *stability_callbacks(), Watch()]
    module, trainer = fit(tmp_path, callbacks, max_steps=70, **options)
    assert trainer.global_step == 70
    assert sum(module.losses[-10:]) < sum(module.losses[:10])


@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd"])
@pytest.mark.parametrize("fault", ["NaN loss", "Inf gradient"])
def test_skipped_step_leaves_no_trace(optimizer, fault, tmp_path):
    """Invariant 2, N1: weights, moments, buffers, schedule and count are as before the batch."""

    class Compare(Callback):
        before = None
        compared = 0

        def _state(self, trainer, pl_module):
            group = {
                k: v for k, v in trainer.optimizers[0].param_groups[0].items() if k != "params"
            }
            return flat(pl_module), optimizer_state(trainer), trainer.global_step, group

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = self._state(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            flat_, moments, step, group = self._state(trainer, pl_module)
            if not injector.faults[0].injected or step > 30:
                return
            self.compared += 1
            assert torch.equal(flat_, self.before[0])
            assert all(map(torch.equal, moments, self.before[1]))
            assert (step, group) == self.before[2:]

    injector, compare = FaultInjector([FAULTS[fault]()]), Compare()
    callbacks = [injector, *stability_callbacks(), compare]
    fit(tmp_path, callbacks, lambda: Regression(optimizer, "onecycle", dropout=0.0))
    assert compare.compared == injector.faults[0].steps


def test_epoch_metric_is_finite_after_a_skipped_step(tmp_path):
    """Invariant 2: values logged for the bad batch do not enter the epoch's mean."""
    callbacks = [FaultInjector([BadBatch(step=30)]), *stability_callbacks()]
    module, trainer = fit(tmp_path, callbacks, max_steps=-1, max_epochs=1)
    healthy = [x for x in module.losses if x == x]
    assert len(healthy) == len(module.losses) - 1
    mean = float(trainer.callback_metrics["train/loss_epoch"])
    assert mean == pytest.approx(sum(healthy) / len(healthy), rel=1e-5)


def test_checkpoint_written_during_a_fault_is_finite(tmp_path):
    """Invariant 2: ModelCheckpoint saves after every batch and never sees a bad weight."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1)
    faults = [CorruptWeight(step=30, parameter="net.0.weight"), NanLoss(step=40)]
    callbacks = [FaultInjector(faults), *stability_callbacks(), checkpoint]
    fit(tmp_path, callbacks, enable_checkpointing=True)
    files = list((tmp_path / "ckpt").glob("*.ckpt"))
    assert len(files) >= 60
    for file in files:
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.isfinite(v).all() for v in state.values()), file


class Recorder(Callback):
    """Records the statistics of healthy steps."""

    def __init__(self):
        self.stats = []

    def on_healthy_step(self, trainer, pl_module, stats):
        self.stats.append(stats)


def test_rejected_steps_do_not_change_the_detectors(tmp_path):
    """Invariant 3: a burst of Infs and NaNs does not change the state of the detectors."""
    states = []
    infinite = CorruptGradient(step=30, steps=4, parameter="net.0.weight", value=float("inf"))
    for faults in ([], [infinite], [NanLoss(step=30, steps=4)]):
        monitor = GradientMonitor()
        suite = [monitor, *skipping_suite()[1:]]
        injector = [FaultInjector(faults)] if faults else []

        def data(skip=bool(faults)):
            # The same good batches: the faulty run gets four more, in the faulty places.
            batches = list(regression_data(60))
            batches = batches[:30] + batches[:4] + batches[30:] if skip else batches
            return DataLoader(batches, batch_size=None)

        fit(tmp_path, [*injector, *suite], lambda: Regression(dropout=0.0), data(), max_steps=50)
        windows = monitor.rewindable_state()["0"]
        states.append({label.split()[0]: window for label, window in windows})
    clean, inf, nan = states
    for name in ("Spike", "Divergence", "LossScale", "LostUpdates"):
        assert clean[name] == inf[name] == nan[name]
    for faulty in (inf, nan):
        # The record of the first bad step carried the measurement of the good update before it.
        before, after = clean["UpdateSpike"]["window"], faulty["UpdateSpike"]["window"]
        assert [x for x in before if x not in after] == [before[29]]


@pytest.mark.parametrize("fault", [NanLoss, ScaleLoss])
def test_endless_fault_ends_in_a_stop_with_remedy_and_record(fault, tmp_path):
    """Invariant 4: responses are bounded; the message has a remedy and the path of the record."""
    from lit_stability import TrainingStopped, read_incidents

    kwargs = {"factor": float("inf")} if fault is ScaleLoss else {}
    callbacks = [FaultInjector([fault(step=20, steps=10**9, **kwargs)]), *stability_callbacks()]
    with pytest.raises(TrainingStopped, match=r"What to try: .*Record: .*incidents\.jsonl") as stop:
        fit(tmp_path, callbacks, max_steps=-1, max_epochs=100)
    incident = stop.value.incident
    assert incident.outcome == "stopped"
    assert torch.isfinite(flat(incident_module(callbacks))).all()
    assert [i["outcome"] for i in read_incidents(tmp_path)] == ["stopped"]
    assert len(incident.responses) <= 210


def incident_module(callbacks):
    """The module the injector worked on."""
    return callbacks[0].module


def test_normal_step_copies_to_the_host_once_and_hooks_no_module(tmp_path, monkeypatch):
    """Invariant 6: one crossing per step, whatever the number of parameters; no module hook."""
    crossings = {"tolist": [], "item": []}

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(self):
            crossings[name].append(self.numel())
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Probe(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for module in pl_module.modules():
                assert not module._forward_hooks
                assert not module._backward_hooks
                assert not module._forward_pre_hooks

    for name in crossings:
        count(name)
    monitor_off, suite = [], stability_callbacks()
    suite[0].details_every = 10
    seen = []
    for callbacks in (monitor_off, suite):
        for numbers in crossings.values():
            numbers.clear()
        fit(tmp_path, [*callbacks, Probe()], max_steps=25)
        seen.append({name: len(numbers) for name, numbers in crossings.items()})
    # The monitor looks at the buffers when they begin to be watched and before a checkpoint is
    # loaded, at all state before the first step, and at the weights that the fit ends with; at its
    # start others look at weights and at buffers.
    copies = 2 + 1 + 1 + 2
    assert seen[1]["tolist"] - seen[0]["tolist"] == 25 + copies
    assert seen[1]["item"] == seen[0]["item"]


def test_incident_is_logged_once_when_it_opens_and_once_when_it_closes(tmp_path, caplog):
    """Invariant 8: a burst of five bad steps is one incident and two records."""
    callbacks = [FaultInjector([NanLoss(step=30, steps=5)]), *skipping_suite()]
    fit(tmp_path, callbacks)
    lines = [line for line in lines_of(caplog) if line.startswith("incident ")]
    assert len(lines) == 2
    assert "non-finite loss" in lines[0]
    assert "step skipped" in lines[0]
    assert lines[1].startswith("incident 1 recovered at step 40: skip x5; ")


def test_monitor_alone_changes_nothing_but_reports(tmp_path):
    """K3: `GradientMonitor()` only warns; the NaN spreads as without it."""
    weights = []
    for callbacks in ([], [GradientMonitor()]):
        injector = FaultInjector([ScaleLoss(step=30)])
        module, _ = fit(tmp_path, [injector, *callbacks])
        weights.append(flat(module))
    assert torch.equal(*weights)
    assert len(list(tmp_path.rglob("incidents.jsonl"))) == 1


def test_learning_rate_factor_holds_through_a_scheduler_and_comes_back(tmp_path):
    """K3: a cut survives what OneCycle writes at every step, and is relaxed in tens of steps."""

    class Factor(Callback):
        factors: list

        def __init__(self):
            self.factors = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            optimizer: Optimizer = trainer.optimizers[0]
            self.factors.extend(learning_rate_multiplier(optimizer).factors)

    factor = Factor()
    callbacks = [FaultInjector([NanLoss(step=30, steps=11)]), *skipping_suite(), factor]
    module, _ = fit(tmp_path, callbacks, lambda: Regression(scheduler="onecycle"), max_steps=100)
    assert min(factor.factors) == 0.5
    assert 10 <= factor.factors.count(0.5) <= 40
    assert factor.factors[-1] == 1.0
    healthy, _ = fit(tmp_path, [], lambda: Regression(scheduler="onecycle"), max_steps=100)
    assert module.rates[-20:] == healthy.rates[-20:]


def test_statistics_are_offered_to_any_callback(tmp_path):
    """S6: every accepted step comes with the norm of each parameter's gradient, by name."""
    recorder = Recorder()
    fit(tmp_path, [GradientMonitor(details_every=10), recorder], max_steps=30)
    assert len(recorder.stats) == 30
    assert all(isinstance(s, StepStats) for s in recorder.stats)
    assert set(recorder.stats[0].names) >= {"net.0.weight", "net.4.bias"}
    with_details = [s for s in recorder.stats if s.details]
    assert len(with_details) == 3
    assert with_details[0].details[0].std > 0


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
@pytest.mark.parametrize("value", [1e3, 1e12])
def test_raised_second_moment_is_found_at_once_and_undone(optimizer, value, tmp_path):
    """A second moment above its bound freezes the run without a word; the bound holds upwards."""
    weights = []
    for faults in ([], [CorruptMoment(step=30, parameter="net.4.*", value=value)]):
        suite = stability_callbacks()
        injector = [FaultInjector(faults)] if faults else []
        module, _ = fit(tmp_path, [*injector, *suite], lambda: Regression(optimizer))
        weights.append(flat(module))
    (incident,) = suite[0].incidents
    assert incident.first.kind == "optimizer state"
    assert incident.first.layers[0][0].startswith("net.4")
    assert incident.first.step in (30, 31)
    assert torch.equal(*weights)


class Hot(Regression):
    """Has batches that damage a statistic of the inputs, and nothing else."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.register_buffer("range", torch.zeros(8))

    def training_step(self, batch, batch_idx):
        self.range += batch[0].square().mean(0)
        if any(torch.equal(batch[0], hot) for hot in self.hot):
            self.range[3] = float("nan")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("hot", [(30,), (31, 44), (7, 25, 45)])
def test_buffer_that_a_batch_damages_is_undone_with_the_batch(hot, tmp_path):
    """Loss and gradients stay finite; the batches are left out as if they had never existed."""
    weights = []
    for batches in (hot, ()):
        suite = stability_callbacks()
        data = list(regression_data(60))
        Hot.hot = [data[i][0] for i in batches]
        data = data if batches else [b for i, b in enumerate(data) if i not in hot]
        steps = 60 - len(hot)
        callbacks = suite if batches else []
        loader = DataLoader(data, batch_size=None)
        module, _ = fit(tmp_path, callbacks, Hot, loader, max_steps=steps)
        weights.append(flat(module))
        if batches:
            kinds = {i.first.kind for i in suite[0].incidents}
            assert kinds == {"non-finite buffer"}
            assert suite[0].incidents[0].first.layers[0][0] == "range"
    assert torch.equal(*weights)


def test_buffer_that_is_infinite_on_purpose_is_left_alone(tmp_path):
    class Masked(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    suite = stability_callbacks()
    fit(tmp_path, suite, Masked)
    assert not suite[0].incidents
