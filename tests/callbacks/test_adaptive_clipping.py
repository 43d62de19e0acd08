"""Clipping by a rule: what reaches the optimizer, what is learnt, and what is rolled back."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule
from benchmarks.byte_gpt import loader as byte_loader
from lit_stability import (
    AdaptiveGradientClipping,
    AutoRollback,
    GradientMonitor,
    read_incidents,
)
from lit_stability.cli.fit import make
from lit_stability.cli.instantiate import bind
from lit_stability.faults import (
    FaultInjector,
    NanLoss,
    ScaleGradients,
)
from lit_stability.policies.clip_rules import (
    FixedClip,
    PercentileClip,
    TieredClip,
    ZScoreClip,
)
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from tests.callbacks.test_battery import TwoOptimizers
from tests.clip_cases import BUSY, Norms, expected, suite
from tests.conftest import Regression, fit, flat, lines_of, make_trainer, regression_data
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net
from tests.test_invariants import fp16_on_cpu


class Nominal(Callback):
    """Learning rates between the steps, as the scheduler writes them."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_steps": 30}])
@pytest.mark.parametrize("rule", BUSY.values(), ids=BUSY)
def test_step_reaches_the_optimizer_at_the_norm_that_the_rule_says(rule, options, tmp_path):
    """S14, N2, S10: from the norm of the whole accumulation window, learnt before clipping."""
    norms = Norms()
    callbacks = suite(rule, norms)
    fit(tmp_path, callbacks, **{"max_steps": 40, **options})
    assert norms.clipped == pytest.approx(expected(rule, norms.measured), rel=1e-5)
    clipped = sum(a < 0.999 * b for a, b in zip(norms.clipped, norms.measured, strict=True))
    assert 1 <= clipped == callbacks[1].clipped
    assert callbacks[1].taken == len(norms.measured)
    assert callbacks[1].rule.state_dict() == rule.state_dict(), "a copy has learnt"


def test_peak_of_16_62_is_brought_to_what_is_usual_and_the_loss_stays_steady(tmp_path):
    """N6: a byte-level language model whose healthy norms are 0.6 to 1.0, five steps of 16.62."""
    shape = ByteGPTConfig(width=32, layers=2, length=32)
    rule = PercentileClip(
        percentile=60, window=25, bounds=(0.1, 100.0), until_known=20.0, known_after=25
    )

    class Peak(Callback):
        """Makes the gradients of five steps as large as the field note's."""

        def on_after_backward(self, trainer, pl_module):
            if 56 <= trainer.global_step < 61:
                grads = [p.grad for p in pl_module.parameters()]
                factor = 16.62 / float(torch.cat([g.flatten() for g in grads]).norm())
                torch._foreach_mul_(grads, factor)

    def train(*callbacks):
        norms = Norms()
        module, _ = fit(
            tmp_path,
            [*callbacks, norms],
            lambda: ByteGPTModule(shape, lr=2e-3),
            byte_loader(32, 32),
            max_steps=75,
        )
        return module, norms

    clean, _ = train(GradientMonitor())
    peak, bare = train(Peak(), GradientMonitor())
    kept, norms = train(Peak(), *suite(rule))
    assert norms.measured[56:61] == pytest.approx([16.62] * 5, rel=1e-4)
    assert bare.clipped[56:61] == pytest.approx([16.62] * 5, rel=1e-4)
    assert all(0.7 <= norm <= 0.8 for norm in norms.clipped[56:61])
    assert torch.isfinite(flat(kept)).all()
    after = [sum(m.losses[57:]) / len(m.losses[57:]) for m in (clean, peak, kept)]
    assert after[2] == pytest.approx(after[0], rel=0.001)
    assert after[1] > 1.005 * after[0], "without the clip the peak shows in the loss"


def test_learning_rate_is_cut_for_a_while_after_a_large_norm_and_comes_back(tmp_path, caplog):
    """N2: with the step of the large norm, under a scheduler that writes at every step."""
    rule, norms = TieredClip(tiers=((100.0, 5.0, 0.5),), otherwise=50.0, lr_steps=8), Norms()
    faults = FaultInjector([ScaleGradients(step=20, factor=100.0)])
    nominal = [Nominal(), Nominal()]
    module = functools.partial(Regression, scheduler="onecycle")
    fit(tmp_path, [faults, *suite(rule, norms), nominal[0]], module, max_steps=40)
    assert norms.factors == [1.0] * 20 + [0.5] * 8 + [1.0] * 12
    assert norms.clipped[20] == pytest.approx(5.0)
    fit(tmp_path, [nominal[1]], module, max_steps=40)
    assert nominal[0].rates == nominal[1].rates, "the schedule is unchanged"
    lines = [line for line in lines_of(caplog) if "learning rate" in line]
    assert [line.split(":")[0] for line in lines] == ["step 20", "step 28"]
    assert "clipped 1 of 40 steps" in caplog.text


def test_spike_that_opens_an_incident_but_is_not_skipped_is_clipped(tmp_path):
    """N6, K3: `GradientMonitor` alone lets the step be taken; it is taken clipped."""
    norms, rule = Norms(), TieredClip(tiers=((100.0, 5.0, 0.5),), otherwise=50.0, lr_steps=5)
    faults = FaultInjector([ScaleGradients(step=30, factor=1e4)])
    fit(tmp_path, [faults, *suite(rule, norms)], max_steps=40)
    (incident,) = read_incidents(tmp_path)
    assert incident["kind"] == "gradient spike"
    assert norms.measured[30] > 1e3
    assert norms.clipped[30] == pytest.approx(5.0)
    assert norms.factors[30:36] == [0.5] * 5 + [1.0]


NEVER = {
    "tiered": TieredClip(tiers=((1e6, 1e6, 0.5),), otherwise=1e6),
    "percentile": PercentileClip(bounds=(1e6, 1e6), until_known=1e6),
    "z-score": ZScoreClip(until_known=1e6, known_after=1000),
}


@pytest.mark.parametrize("rule", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("with_rollback", [False, True])
def test_rule_that_is_never_reached_leaves_the_run_as_it_is(rule, with_rollback, tmp_path):
    """Invariant 1."""
    callbacks = suite(rule, *([AutoRollback()] if with_rollback else []))
    data = loader(Batches())
    with_it = run(tmp_path / "a", Net, data, callbacks, max_epochs=2)
    assert differences(with_it, run(tmp_path / "b", Net, data, max_epochs=2)) == {}


def test_every_optimizer_has_a_rule_to_itself(tmp_path):
    """Manual optimization; the norms of the second must not raise the threshold of the first."""
    callbacks = suite(BUSY["percentile"])
    logger = CSVLogger(tmp_path)
    fit(tmp_path, callbacks, TwoOptimizers, max_steps=80, logger=logger, log_every_n_steps=20)
    state = callbacks[1].state_dict()
    assert sorted(state) == ["0", "1"]
    norms = [state[i]["state"]["norms"] for i in "01"]
    assert len(norms[0]) == len(norms[1]) == 20
    assert not set(norms[0]) & set(norms[1])
    assert {"stability/clip_threshold", "stability/clip_threshold_1"} <= logged(tmp_path).keys()


def logged(folder):
    """The rows of a CSV log by key, without the gaps."""
    lines = next(folder.rglob("metrics.csv")).read_text().splitlines()
    rows = [line.split(",") for line in lines]
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    return {key: [float(v) for v in column if v] for key, column in columns.items()}


def test_metrics_are_logged_as_documented(tmp_path):
    """K3: the coefficient is the smallest since the row before."""
    norms, rule = Norms(), FixedClip(norm=2.0)
    callbacks = suite(rule, norms)
    fit(tmp_path, callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=10, max_steps=40)
    found = logged(tmp_path)
    assert found["stability/clip_threshold"] == [2.0] * 4
    rows = [norms.measured[i : i + 10] for i in range(0, 40, 10)]
    coefficients = [min(1.0, 2.0 / max(row)) for row in rows]
    assert found["stability/clip_coefficient"] == pytest.approx(coefficients)


def test_trainer_clips_afterwards_what_is_left(tmp_path):
    """S10: with a clip of its own the smaller of both holds."""

    class AfterClipping(Regression):
        norms: list

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            grads = [p.grad.flatten() for p in self.parameters()]
            self.norms = [*getattr(self, "norms", []), float(torch.cat(grads).norm())]

    norms = Norms()
    callbacks = suite(FixedClip(norm=2.0), norms)
    module, _ = fit(tmp_path, callbacks, AfterClipping, max_steps=30, gradient_clip_val=1.0)
    assert max(norms.clipped) == pytest.approx(2.0, rel=1e-5)
    assert module.norms == pytest.approx([min(n, 1.0) for n in norms.measured], rel=1e-5)


@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_is_clipped_unscaled(name, tmp_path):
    """S9, S10: gradients of the optimizer, not 2**16 times theirs; an overflow teaches nothing."""
    norms = Norms()
    options = {"plugins": fp16_on_cpu()} if name == "16-mixed" else {"precision": name}
    callbacks = suite(BUSY["percentile"], norms)
    fit(tmp_path, callbacks, max_steps=40, **options)
    finite = [n for n in norms.measured if torch.isfinite(torch.tensor(n))]
    assert max(finite) < 100
    clipped = [c for c, n in zip(norms.clipped, norms.measured, strict=True) if n in finite]
    assert clipped == pytest.approx(expected(BUSY["percentile"], finite), rel=1e-3)


def test_norm_that_is_not_finite_is_neither_clipped_nor_learnt(tmp_path):
    """C4: clipping does not help against it."""
    callbacks = suite(BUSY["z-score"])
    module, _ = fit(tmp_path, [FaultInjector([NanLoss(step=20)]), *callbacks], max_steps=25)
    assert not torch.isfinite(flat(module)).all()
    assert callbacks[1].taken == 20
    assert callbacks[1].state_dict()["0"]["state"]["mean"] < 10


def test_state_of_another_rule_is_ignored_and_logged(tmp_path, caplog):
    _, trainer = fit(tmp_path, suite(BUSY["percentile"]), max_steps=20)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    callbacks = suite(BUSY["z-score"])
    resumed = make_trainer(tmp_path, callbacks, max_steps=30)
    resumed.fit(Regression(), regression_data(), ckpt_path=tmp_path / "saved.ckpt")
    assert (
        "ZScoreClip starts from scratch: the saved state is that of a PercentileClip" in caplog.text
    )
    assert callbacks[1].state_dict()["0"]["rule"] == "ZScoreClip"


def test_optimizer_is_left_at_its_nominal_rate_after_a_fit(tmp_path):
    rule = TieredClip(tiers=((1e-3, 1e-3, 0.5),), lr_steps=100)
    _, trainer = fit(tmp_path, suite(rule), max_steps=10)
    assert learning_rate_multiplier(trainer.optimizers[0]).factors == ()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("rule", [1.0, PercentileClip, "tiered"])
def test_rule_that_is_none_is_refused_with_its_value(rule):
    with pytest.raises(ValueError, match=r"rule must be an object with .*, got "):
        AdaptiveGradientClipping(rule=rule)


def test_clipping_without_a_monitor_before_it_names_the_line_to_add(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks=\[GradientMonitor\(\), ..., AdaptiveGrad"):
        fit(tmp_path, [AdaptiveGradientClipping()])


def test_lbfgs_is_refused_with_what_to_use_instead(tmp_path):
    class Module(Regression):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match=r"cannot clip an LBFGS .*gradient_clip_val"):
        fit(tmp_path, suite(FixedClip()), Module)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, PercentileClip()),
        (
            {
                "rule": {
                    "_target_": "lit_stability.policies.clip_rules.TieredClip",
                    "tiers": [[20, 5, "5e-1"], [5, 2, 1]],
                    "lr_steps": 40,
                }
            },
            TieredClip(tiers=((20.0, 5.0, 0.5), (5.0, 2.0, 1.0)), lr_steps=40),
        ),
        (
            {
                "rule": {
                    "_target_": "lit_stability.policies.clip_rules.PercentileClip",
                    "bounds": [1, 9],
                }
            },
            PercentileClip(bounds=(1.0, 9.0)),
        ),
    ],
)
def test_rule_in_a_config_is_built_from_its_own_target(options, rule):
    """K5: checked against the rule's signature before anything is built."""
    bad = []
    assert make(bind(AdaptiveGradientClipping, options, "callbacks.clip", bad)).rule == rule
    assert bad == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr_step": 3}, "did you mean lr_steps"),
        ({"otherwise": "much"}, "callbacks.clip.rule.otherwise='much': expected float"),
    ],
)
def test_bad_option_of_a_rule_in_a_config_is_named_by_its_path(option, message):
    rule = {"_target_": "lit_stability.policies.clip_rules.TieredClip", **option}
    bad = []
    bind(AdaptiveGradientClipping, {"rule": rule}, "callbacks.clip", bad)
    assert len(bad) == 1
    assert message in bad[0]
