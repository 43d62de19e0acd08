"""The callback: once, before the first step, and without a trace in the run that follows."""

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from lit_stability import Preflight, stability_callbacks
from lit_stability.checks.preflight import MaskProbe, Memorise, PreflightError, Report
from tests.conftest import Regression, fit, flat, make_trainer, regression_data
from tests.exact import digest


class Poisoned(Regression):
    """Its first loss is NaN."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


class Random(Regression):
    """Draws from the global generator in its step, in train mode and out of it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log(f"training is {self.training}", 1.0)  # what a check logs would stay in sight
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)


class Holding(Regression):
    """Keeps its trainer under a name of its own, which no copy may follow."""

    def on_fit_start(self):
        self.held = self.trainer

    def training_step(self, batch, batch_idx):
        assert self.held is self.trainer
        return super().training_step(batch, batch_idx)


class Compiled(Regression):
    """A net that runs as it is written while it is checked."""

    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def shuffled():
    """Batches in an order drawn from the global generator."""
    data = regression_data().dataset
    return DataLoader(data, 16, sampler=RandomSampler(data), num_workers=0)


def outcome(root, callbacks, module, data, **options):
    """Everything a fit leaves behind."""
    module, trainer = fit(root, callbacks, module, data(), max_steps=8, **options)
    return (
        digest(flat(module)),
        digest(trainer.optimizers[0].state_dict()),
        digest(torch.get_rng_state()),
        trainer.global_step,
        getattr(module, "losses", None),
        {k: float(v) for k, v in trainer.callback_metrics.items()},
        [m.training for m in module.modules()],
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()),
    )


@pytest.mark.parametrize(
    ("module", "data", "options"),
    [
        (Regression, regression_data, {}),
        (Random, shuffled, {}),
        (lambda: Regression("sgd", "onecycle"), shuffled, {"gradient_clip_val": 0.1}),
        (lambda: Regression("fused"), shuffled, {"precision": "bf16-mixed"}),
        (Regression, shuffled, {"accumulate_grad_batches": 2}),
        (Compiled, shuffled, {}),
        (Holding, shuffled, {}),
        (lambda: ByteGPTModule(ByteGPTConfig(width=32, layers=1, dropout=0.1)), loader, {}),
    ],
    ids=["plain", "random", "onecycle", "bf16", "accumulation", "compiled", "holding", "byte gpt"],
)
def test_fit_with_preflight_is_bit_identical_to_the_fit_without(module, data, options, tmp_path):
    """Invariant 1."""
    preflight = Preflight(memorise=Memorise(samples=4, steps=3))
    with_it = outcome(tmp_path / "a", [preflight], module, data, **options)
    assert with_it == outcome(tmp_path / "b", [], module, data, **options)
    assert "gradients" in preflight.report.ran


@pytest.mark.parametrize("order", ["first", "last"])
def test_preflight_beside_the_suite_changes_nothing(order, tmp_path):
    suite = stability_callbacks()
    callbacks = [Preflight(), *suite] if order == "first" else [*suite, Preflight()]
    with_it = outcome(tmp_path / "a", callbacks, Random, shuffled)
    assert with_it == outcome(tmp_path / "b", stability_callbacks(), Random, shuffled)


def test_preflight_runs_before_the_first_step_and_never_again(tmp_path):
    class Count(Preflight):
        looks = 0

        def look(self, trainer, pl_module, batch):
            self.looks += 1
            assert trainer.global_step == 0
            assert pl_module.losses == []
            return super().look(trainer, pl_module, batch)

    callback = Count()
    fit(tmp_path, [callback], max_steps=70)
    assert callback.looks == 1


def test_preflight_of_a_resumed_run_is_left_out(tmp_path):
    fit(tmp_path, max_steps=5)[1].save_checkpoint(tmp_path / "last.ckpt")
    callback = Preflight(on_error="stop")
    trainer = make_trainer(tmp_path, [callback], max_steps=7)
    trainer.fit(Poisoned(), regression_data(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 7
    assert callback.report is None


def test_preflight_that_warns_logs_each_finding_once_and_trains(tmp_path, caplog):
    class OnlyOne(Regression):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.net[0].parameters(), 1e-3)

    with caplog.at_level(logging.INFO, "lightning.pytorch.lit_stability"):
        _, trainer = fit(tmp_path, [Preflight()], OnlyOne, max_steps=5)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "no optimizer has 4 trainable parameters" in warned[0]
    assert "net.1.weight" in warned[0]
    assert trainer.global_step == 5


def test_preflight_that_stops_raises_before_anything_is_trained(tmp_path):
    """C5."""
    module = Poisoned()
    before = copy.deepcopy(module.state_dict())
    trainer = make_trainer(tmp_path, [Preflight(on_error="stop")])
    with pytest.raises(PreflightError, match="the first loss is nan") as caught:
        trainer.fit(module, regression_data())
    assert caught.value.report.errors
    assert digest(module.state_dict()) == digest(before)
    assert trainer.global_step == 0
    assert module.losses == []


def test_preflight_that_stops_lets_a_healthy_run_go_on(tmp_path):
    _, trainer = fit(tmp_path, [Preflight(on_error="stop")], max_steps=5)
    assert trainer.global_step == 5


class Backbone(LightningModule):
    """C1, C5: a backbone that was to be frozen."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        labels = torch.arange(len(x), device=x.device) % 3
        return F.cross_entropy(self.head(self.backbone(x).tanh()), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_preflight_names_a_backbone_that_is_not_frozen(tmp_path):
    """C5."""
    callback = Preflight(frozen=["backbone.*"])
    fit(tmp_path, [callback], Backbone, max_steps=1)
    (found,) = callback.report.errors
    assert (found.check, found.where) == ("frozen", ("backbone.weight", "backbone.bias"))


def test_preflight_of_a_frozen_backbone_reports_the_share_that_trains(tmp_path):
    class Frozen(Backbone):
        def __init__(self):
            super().__init__()
            self.backbone.requires_grad_(False)

    callback = Preflight(frozen=["backbone.*"])
    fit(tmp_path, [callback], Frozen, max_steps=1)
    assert not callback.report.of("error", "warning")
    assert "51 of 195 weights train" in callback.report.findings[0].what


def test_preflight_with_a_pattern_that_fits_nothing_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"frozen='trunk.\*' matches no parameter.*backbone.weight"
    ):
        fit(tmp_path, [Preflight(frozen=["trunk.*"])], Backbone, max_steps=1)


def test_preflight_asks_the_module_for_its_probes(tmp_path):
    """T3."""

    class Probed(Backbone):
        def preflight_probes(self, batch):
            x = batch[0]
            everything = torch.ones(len(x), dtype=torch.bool)
            run = lambda model: model.head(model.backbone(x).tanh())  # noqa: E731
            other = lambda model: model.head(model.backbone(x + 1).tanh())  # noqa: E731
            return [MaskProbe(name="the input", plain=run, changed=other, hidden=everything)]

    callback = Preflight()
    fit(tmp_path, [callback], Probed, max_steps=1)
    assert "the input: it is seen where it must not be" in callback.report.errors[0].what


def test_preflight_under_manual_optimization_runs_what_needs_no_step(tmp_path):
    class Manual(Backbone):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    callback = Preflight()
    _, trainer = fit(tmp_path, [callback], Manual, max_steps=3)
    assert "manual optimization" in callback.report.skipped["learning rate"]
    assert {"batch", "optimizer"} <= set(callback.report.ran)
    assert trainer.global_step == 3


def test_preflight_sees_the_warm_up_of_the_schedule(tmp_path):
    """C5: 0 at the first step is not dead if it rises."""

    class Warm(Backbone):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
            return [optimizer], [{"scheduler": rise, "interval": "step"}]

    callback = Preflight()
    fit(tmp_path, [callback], Warm, max_steps=1)
    assert not callback.report.errors


def test_preflight_after_a_hook_that_prepares_the_step_does_not_blame_the_step(tmp_path):
    class Prepared(Backbone):
        def on_train_batch_start(self, batch, batch_idx):
            self.weight = 1.0

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.weight

    callback = Preflight(on_error="stop")
    fit(tmp_path, [callback], Prepared, max_steps=1)
    assert "on_train_batch_start" in callback.report.skipped["gradients"]


def test_preflight_leaves_other_callbacks_their_wrapped_step(tmp_path):
    """A step wrapped on the instance belongs to the module that trains."""

    class Wrap(Callback):
        calls = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            original = pl_module.training_step

            def wrapped(*args):
                self.calls += 1
                return original(*args)

            vars(pl_module)["training_step"] = wrapped

        def on_train_batch_end(self, trainer, pl_module, *args):
            del vars(pl_module)["training_step"]

    wrap = Wrap()
    module, _ = fit(tmp_path, [wrap, Preflight()], max_steps=3)
    assert (wrap.calls, len(module.losses)) == (3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "raise"}, "on_error='raise' is unknown"),
        ({"frozen": "backbone.*"}, "must be a list"),
        ({"classes": 1}, "classes=1 must be at least 2"),
    ],
)
def test_preflight_with_a_bad_option_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Preflight(**options)


def test_preflight_runs_the_step_in_the_precision_of_the_trainer(tmp_path):
    class Autocast(Regression):
        def training_step(self, batch, batch_idx):
            assert torch.is_autocast_enabled("cpu")
            return super().training_step(batch, batch_idx)

    callback = Preflight(on_error="stop")
    fit(tmp_path, [callback], Autocast, precision="bf16-mixed", max_steps=1)
    assert "gradients" in callback.report.ran


def test_preflight_in_half_precision_finds_no_fault_in_a_healthy_run(tmp_path):
    """fp16 gradients are those of a scaled loss."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    callback = Preflight()
    fit(tmp_path, [callback], Backbone, _data(), max_steps=1, plugins=[plugin])
    assert not callback.report.findings


def _data():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, 0]), 16)


class Exhausted(IterableDataset):
    """Samples of an iterator that is made once: the second epoch has none."""

    def __init__(self, count):
        self.samples = iter([(torch.randn(8), torch.randn(())) for _ in range(count)])

    def __iter__(self):
        return self.samples


def few(drop_last):
    data = TensorDataset(torch.randn(10, 8), torch.randn(10))
    return DataLoader(data, 16, drop_last=drop_last)


NONE = "an epoch has no batch"
NO_LENGTH = "ignore:Total length of"


@pytest.mark.filterwarnings(NO_LENGTH)
@pytest.mark.parametrize(
    ("data", "part"),
    [
        (few(drop_last=True), f"{NONE}: 10 samples, batches of 16, and drop_last=True"),
        (DataLoader(Exhausted(32), 16), NONE),
        (DataLoader(Exhausted(0), 16), NONE),
    ],
    ids=["dropped", "exhausted", "empty"],
)
def test_preflight_of_an_epoch_without_batches_says_so_once(data, part, tmp_path, caplog):
    callback = Preflight()
    fit(tmp_path, [callback], data=data, max_epochs=3, max_steps=-1)
    (found,) = [f for f in callback.report.findings if f.check == "batches"]
    assert (found.severity, found.what) == ("error", part)
    assert len([r for r in caplog.records if "has no batch" in r.getMessage()]) == 1


@pytest.mark.filterwarnings(NO_LENGTH)
def test_preflight_that_stops_raises_for_a_fit_without_batches(tmp_path):
    with pytest.raises(PreflightError, match="an epoch has no batch"):
        fit(tmp_path, [Preflight(on_error="stop")], data=few(drop_last=True), max_epochs=1)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (few(drop_last=False), {}),
        (regression_data(4), {}),
        (regression_data(4), {"limit_train_batches": 0}),
        (regression_data(4), {"limit_train_batches": 1}),
        (regression_data(4), {"fast_dev_run": True}),
    ],
    ids=["one incomplete batch", "four", "none on purpose", "one on purpose", "fast_dev_run"],
)
def test_preflight_of_epochs_with_batches_does_not_miss_any(data, options, tmp_path):
    callback = Preflight()
    fit(tmp_path, [callback], data=data, max_epochs=2, max_steps=-1, **options)
    assert not [f for f in (callback.report or Report()).findings if f.check == "batches"]


def test_preflight_of_a_run_resumed_at_the_end_of_an_epoch_misses_no_batch(tmp_path):
    data = regression_data(4)
    fit(tmp_path, data=data, max_steps=4)[1].save_checkpoint(tmp_path / "last.ckpt")
    callback = Preflight()
    trainer = make_trainer(tmp_path, [callback], max_epochs=3, max_steps=-1)
    trainer.fit(Regression(), data, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 12
    assert callback.report is None
