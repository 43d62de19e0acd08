"""S9, S10: a run that dies of its precision goes on in another, and only such a run."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    PrecisionFallback,
    stability_callbacks,
)
from lit_stability.faults import CorruptGradient, CorruptWeight, FaultInjector
from lit_stability.incidents.report import responses_text
from tests.conftest import flat
from tests.precision import Net, data, evaluate, fp16, suite, train

DYING = {
    "half-precision squared error, targets x2000": (
        lambda: Net(own_loss=True, lr=3e-2),
        lambda: data(targets=2000.0),
        fp16,
        "precision 16-mixed -> bf16-mixed, step retried",
    ),
    "inputs x1e5": (Net, lambda: data(inputs=1e5), fp16, "net.0 kept in fp32, step retried"),
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


CAUSES = {
    "infinite loss": "loss computed in 16 bits",
    "lost updates": "updates lost to rounding",
}


LONG = (
    "half-precision weights, learning rate 3e-4",
    "half-precision squared error, targets x2000",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in DYING]
)
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
    assert [responses_text(i) for i in callbacks[0].incidents] == ([] if done is None else [done])
    for incident in callbacks[0].incidents:
        cause = CAUSES.get(incident.first.kind, "numeric precision")
        assert (incident.outcome, incident.cause) == ("recovered", cause)


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
    fallen, _ = train(tmp_path, suite(max_fp32_modules=0), data(inputs=1e5), **fp16())
    begun, _ = train(tmp_path, [], data(inputs=1e5), precision="bf16-mixed")
    assert torch.equal(flat(fallen), flat(begun))


@pytest.mark.parametrize(
    ("loader", "fault", "options", "evidence"),
    [
        (lambda: data(poison=(40, float("nan"))), [], fp16(), "in float32 too"),
        (lambda: data(poison=(40, 1e6)), [], fp16(), "times its median"),
        (data, [CorruptGradient(step=40)], {"precision": "bf16-mixed"}, "the step is finite"),
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
    assert responses_text(incident) == "precision bf16-true -> bf16-mixed, rolled back and replayed"
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
    assert responses_text(incident) == "precision 16-true -> bf16-mixed, step retried"
    assert incident.first.step > 1, "there are moments to convert"
    moments = trainer.optimizers[0].state_dict()["state"].values()
    assert {m["exp_avg"].dtype for m in moments} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert len(callbacks[0].incidents) == 1


def test_without_autorollback_the_failing_step_is_lost_and_training_goes_on(tmp_path):
    callbacks = [GradientMonitor(), PrecisionFallback(max_fp32_modules=0)]
    module, trainer = train(tmp_path, callbacks, data(inputs=1e5), **fp16())
    (incident,) = callbacks[0].incidents
    assert responses_text(incident) == "precision 16-mixed -> bf16-mixed"
    assert trainer.precision == "bf16-mixed"
    assert torch.isfinite(flat(module)).all()
    assert module.losses[-1] < 1.0


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
    callbacks = [GradientMonitor(), PrecisionFallback(), AutoRollback(after_rollback="skip")]
    loader = data(poison=(40, float("nan")))
    _, trainer = train(tmp_path, callbacks, loader, 90, module=Fragile, **fp16())
    (incident,) = callbacks[0].incidents
    assert (trainer.precision, incident.outcome) == ("16-mixed", "recovered")
    assert any("cannot be run again: RuntimeError('seen" in line for line in incident.evidence)


def test_precision_that_lightning_alone_converts_is_left_alone_with_the_reason(tmp_path, caplog):
    class Odd(MixedPrecision):
        pass

    plugin = Odd("bf16-mixed", "cpu")
    _, trainer = train(tmp_path, suite(), data(), 5, plugins=plugin)
    assert "PrecisionFallback changes nothing: Odd converts" in caplog.text
    assert trainer.precision_plugin is plugin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ["bf16"]}, "got 'bf16'"),
        ({"precisions": ["16-true"]}, "got '16-true'"),
        ({"try_again_after": 0}, "try_again_after must be at least 1, got 0"),
        ({"max_fp32_modules": -1}, "max_fp32_modules must be at least 0, got -1"),
        ({"failures": -1}, "failures must be at least 0, got -1"),
        ({"infinite_losses": 0}, "infinite_losses must be at least 1, got 0"),
    ],
)
def test_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrecisionFallback(**options)
