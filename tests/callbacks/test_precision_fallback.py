"""S9, S10: a run that dies of its precision goes on in another, and only such a run."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    PrecisionFallback,
    TrainingStopped,
    stability_callbacks,
)
from lit_stability.faults import CorruptGradient, CorruptWeight, FaultInjector
from lit_stability.islands import islands_of
from tests.conftest import fit, flat, make_trainer


class Net(LightningModule):
    """A regression with dropout; its loss may be computed in the format of its outputs."""

    def __init__(self, lr=1e-2, eps=1e-8, own_loss=False, norm=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32),
            nn.LayerNorm(32) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(32, 1),
        )
        self.lr, self.eps, self.own_loss, self.losses = lr, eps, own_loss, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x).squeeze(-1)
        if self.own_loss:
            loss = (out - y.to(out.dtype)).pow(2).mean()
        else:
            loss = nn.functional.mse_loss(out.float(), y.float())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, eps=self.eps)


def data(inputs=1.0, targets=1.0, poison=None, batches=100):
    """Batches of a linear task; `poison` is the index of a batch and a factor of its inputs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batches * 16, 8, generator=g)
    y = x @ torch.arange(8.0) / 8 + 0.1 * torch.randn(batches * 16, generator=g)
    x = x * inputs
    if poison is not None:
        index, factor = poison
        x[index * 16 : index * 16 + 16] *= factor
    return DataLoader(TensorDataset(x, y * targets), 16)


def fp16(init_scale=2.0**16):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=50)
    return {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=scaler)}


def suite(**options):
    return [GradientMonitor(), PrecisionFallback(**options), AutoRollback()]


def train(root, callbacks, loader, steps=100, **options):
    module = options.pop("module", Net)
    return fit(root, callbacks, module, loader, max_steps=steps, **options)


def evaluate(module, loader):
    """Loss in float32, without dropout."""
    module = module.float().eval()
    with torch.no_grad():
        errors = [(module.net(x).squeeze(-1) - y).pow(2).mean() for x, y in loader]
    return float(sum(errors) / len(errors))


DYING = {
    "half-precision squared error, targets x2000": (
        lambda: Net(own_loss=True, lr=3e-2),
        lambda: data(targets=2000.0),
        fp16,
        "precision 16-mixed -> bf16-mixed, step taken again",
    ),
    "inputs x1e5": (Net, lambda: data(inputs=1e5), fp16, "fp32 island net.0, step taken again"),
    "half-precision weights, Adam's eps 0 in float16": (
        Net,
        data,
        lambda: {"precision": "16-true"},
        None,
    ),
    "half-precision weights, learning rate 3e-4": (
        lambda: Net(lr=3e-4),
        data,
        lambda: {"precision": "bf16-true"},
        "precision bf16-true -> bf16-mixed",
    ),
}


@pytest.mark.parametrize("name", DYING)
def test_run_that_dies_of_its_precision_reaches_the_loss_of_its_fp32_twin(name, tmp_path):
    """S9: within 5 %; unprotected it is NaN, far behind, or has no loss to see."""
    module, loader, options, done = DYING[name]
    steps = 1500 if done == "precision bf16-true -> bf16-mixed" else 400
    losses, runs = {}, {}
    for who, callbacks, how in (
        ("clean", [], {}),
        ("bare", [], options()),
        ("suite", suite(), options()),
    ):
        trained, _ = train(tmp_path, callbacks, loader(), steps, module=module, **how)
        losses[who] = evaluate(trained, loader())
        runs[who] = trained
    blind = all(x == float("inf") for x in runs["bare"].losses)
    assert blind or not losses["bare"] < 1.2 * losses["clean"]
    assert losses["suite"] == pytest.approx(losses["clean"], rel=0.05) or (
        losses["suite"] < losses["clean"]
    )
    assert [i.done for i in callbacks[0].incidents] == ([] if done is None else [done])
    for incident in callbacks[0].incidents:
        assert (incident.outcome, incident.cause) == ("recovered", "numeric precision")


HEALTHY = {
    "a search from 2**24": (Net, data, lambda: fp16(2.0**24)),
    "fp16": (lambda: Net(own_loss=True), data, fp16),
    "bf16": (Net, data, lambda: {"precision": "bf16-mixed"}),
    "half-precision weights, eps 1e-4": (
        lambda: Net(eps=1e-4),
        data,
        lambda: {"precision": "16-true"},
    ),
    "half-precision weights, learning rate 1e-2": (
        Net,
        data,
        lambda: {"precision": "bf16-true"},
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_is_bit_identical_and_keeps_its_precision(name, tmp_path):
    """Invariant 1, and no false alarm: a scaler's search is 14 steps left out, and healthy."""
    module, loader, options = HEALTHY[name]
    bare, bare_trainer = train(tmp_path, [], loader(), 250, module=module, **options())
    callbacks = stability_callbacks()
    with_suite, trainer = train(tmp_path, callbacks, loader(), 250, module=module, **options())
    assert torch.equal(flat(bare), flat(with_suite))
    assert bare.losses == with_suite.losses
    assert trainer.precision == bare_trainer.precision
    assert callbacks[0].incidents == []


def test_step_that_failed_is_taken_again_as_if_the_run_had_begun_in_the_new_precision(tmp_path):
    """Invariant 7: nothing of the fp16 attempt, nor of its proof, is left; dropout is on."""
    fallen, _ = train(tmp_path, suite(max_islands=0), data(inputs=1e5), **fp16())
    begun, _ = train(tmp_path, [], data(inputs=1e5), precision="bf16-mixed")
    assert torch.equal(flat(fallen), flat(begun))


@pytest.mark.parametrize(
    ("loader", "fault", "options", "evidence"),
    [
        (lambda: data(poison=(40, float("nan"))), [], fp16(), "in float32 too"),
        (lambda: data(poison=(40, 1e6)), [], fp16(), "times its median"),
        (data, [CorruptGradient(step=40)], {"precision": "bf16-mixed"}, "it is finite"),
    ],
    ids=["a NaN in the batch", "a batch out of range", "a fault from outside"],
)
def test_bad_batch_is_left_to_others_with_what_float32_says_of_it(
    loader, fault, options, evidence, tmp_path
):
    """S13: precision is not lowered for bad data; the evidence says why."""
    callbacks = [*([FaultInjector(fault)] if fault else []), *suite()]
    module = lambda: Net(norm=False)  # noqa: E731
    _, trainer = train(tmp_path, callbacks, loader(), module=module, **options)
    (incident,) = callbacks[-3].incidents
    assert trainer.precision == options.get("precision", "16-mixed")
    assert incident.outcome == "recovered"
    assert any(evidence in line for line in incident.evidence), incident.evidence


def test_faster_precision_is_tried_again_and_stays_if_it_holds(tmp_path):
    loader = data()
    loader.dataset.tensors[0][: 30 * 16] *= 1e5
    callbacks = suite(max_islands=0, try_again_after=40)
    module, trainer = train(tmp_path, callbacks, loader, **fp16())
    (incident,) = callbacks[0].incidents
    assert incident.done == "precision 16-mixed -> bf16-mixed, step taken again"
    assert trainer.precision == "16-mixed"
    assert torch.isfinite(flat(module)).all()


class Precisions(Callback):
    """The precision of each step taken."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.precision)


def test_faster_precision_that_fails_again_is_tried_ever_later_and_then_no_more(tmp_path):
    """Invariant 4: tries are bounded; each costs one step, taken again."""
    seen = Precisions()
    callbacks = [*suite(max_islands=0, try_again_after=20, failures=2), seen]
    module, trainer = train(tmp_path, callbacks, data(inputs=1e5), 200, **fp16())
    tries = [i for i, name in enumerate(seen.seen) if name == "16-mixed"]
    assert tries == [0, 21, 62]
    assert trainer.precision == "bf16-mixed"
    begun, _ = train(tmp_path, [], data(inputs=1e5), 200, precision="bf16-mixed")
    assert torch.equal(flat(module), flat(begun))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("module", "loader", "options", "precision"),
    [
        (Net, lambda: data(inputs=1e5), fp16, "16-mixed"),
        (lambda: Net(own_loss=True), lambda: data(targets=2000.0), fp16, "bf16-mixed"),
        (lambda: Net(lr=1e-4), data, lambda: {"precision": "bf16-true"}, "bf16-mixed"),
        (Net, data, lambda: {"precision": "16-true"}, "bf16-mixed"),
    ],
    ids=["an island in fp16", "fp16", "bf16 weights", "fp16 weights"],
)
def test_choice_survives_a_resume_bit_for_bit(module, loader, options, precision, tmp_path):
    """With dropout and in mid-epoch, by way of `LastKnownGood`'s data position."""
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=150, save_top_k=-1)
    whole, _ = train(
        tmp_path,
        [*stability_callbacks(), keep],
        loader(),
        180,
        module=module,
        enable_checkpointing=True,
        **options(),
    )
    callbacks = stability_callbacks()
    resumed = module()
    trainer = make_trainer(tmp_path, callbacks, max_steps=180, **options())
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "step=150.ckpt")
    assert trainer.precision == precision
    assert callbacks[0].incidents == []
    assert torch.equal(flat(whole), flat(resumed))


class AfterRollback(Callback):
    """What the weights are right after a rollback."""

    def on_rollback(self, trainer, pl_module):
        self.weights = [p.detach().clone() for p in pl_module.parameters()]


def test_snapshot_of_half_precision_weights_is_put_back_exactly_after_they_were_converted(tmp_path):
    """What was bfloat16 when it was kept comes back into float32 weights, and they go on so."""
    after = AfterRollback()
    injector = FaultInjector([CorruptWeight(step=112, parameter="net.0.weight")])
    callbacks = [injector, *suite(), after]
    module, trainer = train(
        tmp_path, callbacks, data(), 160, module=lambda: Net(lr=1e-4), precision="bf16-true"
    )
    (incident,) = callbacks[1].incidents
    assert incident.done == "precision bf16-true -> bf16-mixed, rolled back and replayed"
    assert all(p.dtype == torch.float32 for p in after.weights)
    assert all(torch.equal(p, p.bfloat16().float()) for p in after.weights)
    assert trainer.precision == "bf16-mixed"
    assert torch.isfinite(flat(module)).all()


def test_half_precision_weights_that_overflow_in_mid_run_become_float32_with_their_moments(
    tmp_path,
):
    """Targets of about 100, whose squared errors leave float16 now and then."""
    module = lambda: Net(own_loss=True, eps=1e-4, lr=0.1)  # noqa: E731
    callbacks = suite()
    module, trainer = train(
        tmp_path, callbacks, data(targets=75.0), module=module, precision="16-true"
    )
    incident = callbacks[0].incidents[0]
    assert incident.done == "precision 16-true -> bf16-mixed, step taken again"
    assert incident.first.step > 1, "there are moments to convert"
    moments = trainer.optimizers[0].state_dict()["state"].values()
    assert {m["exp_avg"].dtype for m in moments} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert len(callbacks[0].incidents) == 1


def test_next_fit_of_the_same_callbacks_begins_where_the_last_one_ended(tmp_path):
    callbacks = suite(max_islands=0)
    for incidents in (1, 0):
        module, trainer = train(tmp_path, callbacks, data(inputs=1e5), 30, **fp16())
        assert trainer.precision == "bf16-mixed"
        assert len(callbacks[0].incidents) == incidents
        assert all(x == x for x in module.losses[-29:])


def test_without_autorollback_the_failing_step_is_lost_and_training_goes_on(tmp_path):
    callbacks = [GradientMonitor(), PrecisionFallback(max_islands=0)]
    module, trainer = train(tmp_path, callbacks, data(inputs=1e5), **fp16())
    (incident,) = callbacks[0].incidents
    assert incident.done == "precision 16-mixed -> bf16-mixed"
    assert trainer.precision == "bf16-mixed"
    assert torch.isfinite(flat(module)).all()
    assert module.losses[-1] < 1.0


def test_infinite_loss_with_finite_gradients_is_named_and_after_three_of_them_acted_upon(tmp_path):
    """S9: the steps are good, and taken: training in fp16 alone does as well, but blindly."""
    module = lambda: Net(own_loss=True)  # noqa: E731
    callbacks = suite()
    _, trainer = train(tmp_path, callbacks, data(targets=2000.0), module=module, **fp16(1.0))
    (incident,) = callbacks[0].incidents
    assert incident.first.kind == "infinite loss"
    assert incident.strikes == 3
    assert trainer.precision == "bf16-mixed"
    assert "compute the loss in float32" in incident.remedy


class HugeGradient(torch.autograd.Function):
    """The identity, whose gradient is too large for float16 and not for float32."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e9


class Collapsing(Net):
    """Gradients of 1e9 where activations are float16: no scale above 1e-5 lets them through."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = HugeGradient.apply(self.net[:4](x))
        return nn.functional.mse_loss(self.net[4](hidden).squeeze(-1).float(), y)


def test_scale_that_no_search_will_find_ends_in_a_stop_with_the_remedy(tmp_path):
    """S9: inputs out of range take a scaler to 0.0 in silence; here it ends at 2**-10."""
    callbacks = [GradientMonitor(), AutoRollback()]
    with pytest.raises(TrainingStopped, match=r"loss scale of 0.0009.*bf16 or 32-bit") as stop:
        train(tmp_path, callbacks, data(), module=Collapsing, **fp16())
    assert stop.value.incident.first.kind == "loss-scale collapse"
    assert stop.value.incident.first.step <= 30


def test_scale_that_no_search_will_find_is_answered_by_another_precision(tmp_path):
    callbacks = suite()
    module, trainer = train(tmp_path, callbacks, data(), module=Collapsing, **fp16())
    assert trainer.precision == "bf16-mixed"
    assert callbacks[0].incidents[0].first.kind in ("loss-scale fall", "loss-scale collapse")
    assert torch.isfinite(flat(module)).all()


def test_module_that_overflows_becomes_an_island_and_the_rest_stays_fast(tmp_path):
    """S9: found by running the step again, with the line that overflowed as evidence."""
    callbacks = suite()
    module, trainer = train(tmp_path, callbacks, data(inputs=1e5), **fp16())
    (incident,) = callbacks[0].incidents
    assert incident.done == "fp32 island net.0, step taken again"
    assert "linear made" in incident.evidence[1]
    assert "overflow of float16, finite in float32" in incident.evidence[1]
    assert trainer.precision == "16-mixed"
    assert islands_of(module) == ["net.0"]
    assert torch.isfinite(flat(module)).all()


def test_islands_are_not_made_where_they_are_not_enough(tmp_path):
    """The loss overflows in the module's own code."""
    module, trainer = train(
        tmp_path, suite(), data(targets=2000.0), module=lambda: Net(own_loss=True), **fp16()
    )
    assert trainer.precision == "bf16-mixed"
    assert islands_of(module) == []


def test_named_modules_compute_in_float32_while_the_rest_does_not(tmp_path):
    """S9: chosen layers are kept in fp32; the state dict is what it was."""
    formats = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with trainer.precision_plugin.train_step_context(), torch.no_grad():
                hidden = pl_module.net[0](batch[0])
                formats["linear"] = hidden.dtype
                formats["norm"] = pl_module.net[1](hidden).dtype

    callbacks = [GradientMonitor(), PrecisionFallback(fp32_modules=["LayerNorm"]), Look()]
    module, _ = train(tmp_path, callbacks, data(), 5, **fp16())
    assert formats == {"linear": torch.float16, "norm": torch.float32}
    assert set(module.state_dict()) == set(Net().state_dict())


class Manual(Collapsing):
    """The same in manual optimization, where a step cannot be taken again beside training."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Fragile(Net):
    """Cannot run one batch twice."""

    def __init__(self):
        super().__init__(own_loss=True)
        self.seen = {}

    def training_step(self, batch, batch_idx):
        known = self.seen.setdefault("batches", set())
        if batch_idx in known:
            raise RuntimeError("seen already")
        known.add(batch_idx)
        return super().training_step(batch, batch_idx)


def test_step_that_cannot_be_run_twice_is_no_proof_and_does_not_end_the_run(tmp_path):
    callbacks = [GradientMonitor(), PrecisionFallback(), AutoRollback(data="skip")]
    loader = data(poison=(40, float("nan")))
    _, trainer = train(tmp_path, callbacks, loader, 90, module=Fragile, **fp16())
    (incident,) = callbacks[0].incidents
    assert (trainer.precision, incident.outcome) == ("16-mixed", "recovered")
    assert any("cannot be taken again: RuntimeError('seen" in line for line in incident.evidence)


def test_run_resumed_on_the_last_rung_can_fall_back_again_after_it_has_come_up(tmp_path):
    """bf16 rounds 0.999 to 1, and the logarithm of its rest is infinite."""
    options = {"precision": "bf16-mixed", "module": Rounded}
    callbacks = [GradientMonitor(), PrecisionFallback(try_again_after=20), AutoRollback()]
    _, trainer = train(tmp_path, callbacks, data(), 10, **options)
    assert trainer.precision == "32-true"
    _, trainer = train(tmp_path, callbacks, data(), 60, **options)
    fallen = "precision bf16-mixed -> 32-true, step taken again"
    assert [(i.first.step, i.done) for i in callbacks[0].incidents] == [(10, fallen), (50, fallen)]
    assert trainer.precision == "32-true"


class Rounded(Net):
    """A probability of 0.999, and the logarithm of its rest."""

    def training_step(self, batch, batch_idx):
        rest = 1 - torch.sigmoid(self.net(batch[0]).squeeze(-1).clamp(-0.5, 0.5) + 7.0)
        return -torch.log(rest).float().mean()


def test_collapse_is_proof_enough_where_a_step_cannot_be_taken_again(tmp_path):
    callbacks = suite()
    module, trainer = train(tmp_path, callbacks, data(), module=Manual, **fp16())
    assert callbacks[0].incidents[0].first.kind == "loss-scale collapse"
    assert trainer.precision == "bf16-mixed"
    assert torch.isfinite(flat(module)).all()


def test_precision_that_lightning_alone_converts_is_left_alone_with_the_reason(tmp_path, caplog):
    class Odd(MixedPrecision):
        pass

    plugin = Odd("bf16-mixed", "cpu")
    _, trainer = train(tmp_path, suite(), data(), 5, plugins=plugin)
    assert "PrecisionFallback changes nothing: Odd converts" in caplog.text
    assert trainer.precision_plugin is plugin


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_precision_with_nothing_below_is_left_alone(precision, tmp_path):
    callbacks = suite(fp32_modules=["LayerNorm"])
    module, trainer = train(tmp_path, callbacks, _as(precision), 20, precision=precision)
    assert trainer.precision == precision
    assert "forward" not in vars(module.net[1])


def _as(precision):
    loader = data()
    if precision == "64-true":
        x, y = (t.double() for t in loader.dataset.tensors)
        loader = DataLoader(TensorDataset(x, y), 16)
    return loader


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rungs": ["bf16"]}, "got 'bf16'"),
        ({"rungs": ["16-true"]}, "got '16-true'"),
        ({"try_again_after": 0}, "try_again_after must be at least 1, got 0"),
        ({"max_islands": -1}, "max_islands must be at least 0, got -1"),
        ({"failures": -1}, "failures must be at least 0, got -1"),
        ({"infinite_losses": 0}, "infinite_losses must be at least 1, got 0"),
    ],
)
def test_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrecisionFallback(**options)


def test_pattern_that_matches_nothing_is_refused_before_training(tmp_path):
    callbacks = suite(fp32_modules=["encoder.*norm"])
    with pytest.raises(ValueError, match=r"'encoder.\*norm' matches no module of Net"):
        train(tmp_path, callbacks, data(), 5, **fp16())


def test_search_of_the_scaler_is_told_of_once_and_counted(tmp_path, caplog):
    """S9: the loss scale is watched and explained."""
    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 10, **fp16(2.0**24)}
    train(tmp_path, [GradientMonitor()], data(), 60, **options)
    lines = [r.getMessage() for r in caplog.records if "loss scaler" in r.getMessage()]
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf8") as file:
        last = list(csv.DictReader(file))[-1]
    left_out = int(last["stability/overflows"])
    assert left_out > 5
    assert lines == [
        f"step {left_out}: the loss scaler left {left_out} steps out, as is usual at the start, "
        f"and found its scale: {2.0 ** (24 - left_out):g}"
    ]
    assert float(last["stability/loss_scale"]) <= 2.0 ** (25 - left_out)
