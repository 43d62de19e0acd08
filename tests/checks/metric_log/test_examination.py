"""Series in, findings out."""

import math
import random
from pathlib import Path

import pytest

from lit_stability.checks.metric_log import MetricLog, NoLossError, examine_log
from lit_stability.checks.metric_log.causes import LOG_CAUSES
from lit_stability.checks.metric_log.roles import choose_roles
from lit_stability.diagnosis import CAUSES

NAN = math.nan


def log_of(*, every=1, seconds=None, **metrics):
    """A log in which each metric has a point at every step, or every few steps."""
    log = MetricLog("CSV", Path("metrics.csv"), ())
    for name, values in metrics.items():
        for i, value in enumerate(values):
            time = NAN if seconds is None else sum(seconds[: i + 1])
            log.add(name, i * every, value, time)
    return log


def falling(count=400, noise=0.1, seed=0, start=2.3, end=0.4):
    """A loss that falls exponentially, with multiplicative noise."""
    draw = random.Random(seed)
    shape = [end + (start - end) * math.exp(-6 * i / count) for i in range(count)]
    return [value * math.exp(noise * draw.gauss(0, 1)) for value in shape]


def whats(log, **options):
    return [f"{f.severity}: {f.what}" for f in examine_log(log, **options).findings]


def replaced(values, start, new):
    return [*values[:start], *new, *values[start + len(new) :]]


BASE = falling()
CASES = {
    "one spike": (replaced(BASE, 300, [9.0]), ["note: a loss spike at step 300"]),
    "spike of 40 steps": (replaced(BASE, 200, [6.0] * 40), ["warning: a loss spike at step 200"]),
    "NaN once": (replaced(BASE, 100, [NAN]), ["warning: non-finite loss at step 100"]),
    "NaN to the end": (BASE[:390] + [NAN] * 10, ["error: non-finite loss at step 390"]),
    "NaN from the start": ([NAN] * 50, ["error: non-finite loss at step 0"]),
    "rise to the start": (
        BASE[:300] + [0.5 + 0.05 * i for i in range(100)],
        ["error: divergence from step 307 on"],
    ),
    "rise by half": (BASE[:300] + [1.4] * 100, ["warning: divergence from step 300 on"]),
    "chance": ([math.log(10) + 0.01 * math.sin(i) for i in range(400)], ["warning: no learning"]),
    "high from the start": ([3.3] * 400, ["note: no learning"]),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gives_the_finding(case):
    values, expected = CASES[case]
    assert whats(log_of(train_loss=values)) == expected


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("count", [12, 40, 100, 1000])
def test_falling_loss_of_any_length_and_noise_is_silent(count, noise):
    for seed in range(20):
        found = whats(log_of(loss=falling(count, noise, seed)))
        assert [each for each in found if not each.startswith("note")] == []


def test_dead_gradient_is_an_error_unless_the_loss_is_solved():
    norms = [1.0] * 200 + [0.0] * 200
    found = whats(log_of(loss=BASE, grad_norm=norms))
    assert found == ["error: gradient norm of 0 from step 200 on"]
    solved = [max(0.0, 1 - i / 200) for i in range(400)]
    assert whats(log_of(loss=solved, grad_norm=norms)) == []


SIGNALS = {
    "vanished gradient": (
        {"loss": [3.3 + 0.1 * math.sin(i) for i in range(400)], "grad_norm": [1e-9] * 400},
        "warning: vanishing gradient by step 100",
    ),
    "converged gradient": ({"loss": BASE, "grad_norm": [1.0] * 200 + [1e-9] * 200}, None),
    "gradient of NaN": (
        {"loss": BASE, "grad_norm": [1.0] * 300 + [NAN] * 100},
        "error: non-finite gradient from step 300 on",
    ),
    "negative rate": (
        {"loss": BASE, "lr": [0.1] * 399 + [-0.1]},
        "error: impossible learning rate at step 399",
    ),
    "decay to 0": ({"loss": BASE, "lr": [1e-3 * (1 - i / 399) for i in range(400)]}, None),
    "rate of 0 at once": (
        {"loss": falling(400), "lr": [1e-3] * 60 + [0.0] * 340},
        "warning: dead learning rate from step 60 on",
    ),
    "search for a scale": (
        {"loss": BASE, "loss_scale": [2.0 ** max(4, 16 - i) for i in range(400)]},
        "note: loss-scale fall",
    ),
    "scale of a usual run": ({"loss": BASE, "loss_scale": [2.0**15, 2.0**16] * 200}, None),
    "collapse of the scale": (
        {"loss": BASE, "loss_scale": [2.0 ** min(16, 216 - i) for i in range(400)]},
        "error: loss-scale collapse at step 227",
    ),
    "validation of NaN": (
        {"loss": BASE, "val_loss": [1.0] * 10 + [NAN] * 10},
        "warning: non-finite validation loss from step 10 on",
    ),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_other_metrics_give_the_finding(case):
    metrics, expected = SIGNALS[case]
    found = [each for each in whats(log_of(**metrics)) if each != "note: no learning"]
    assert found == ([] if expected is None else [expected])


def test_run_that_ended_with_an_exit_code_or_not_at_all_is_reported():
    log = log_of(loss=BASE)
    log.complete, log.planned_steps = False, 1000
    ends = "note: the log ends at step 399 of 1000, without the end of the run"
    assert whats(log) == [ends]
    log.complete, log.exit_code = True, 1
    assert whats(log) == ["warning: the run ended with exit code 1"]


def test_step_that_goes_back_is_a_resume_and_what_it_replaced_does_not_count():
    log = log_of(loss=[*BASE[:250], *[NAN] * 5])
    for step in range(240, 400):
        log.add("loss", step, BASE[step])
    assert whats(log) == [
        "warning: non-finite loss at step 250, before a restart",
        "note: steps that go back",
    ]


def test_validation_loss_that_rises_while_training_falls_is_a_note():
    log = log_of(train_loss=BASE)
    for i in range(20):
        log.add("val_loss", i * 20, 1.0 + 0.01 * (i - 5) ** 2)
    (finding,) = examine_log(log).findings
    assert (finding.severity, finding.what) == ("note", "overfitting since step 100")


def test_steps_that_take_longer_and_a_gap_are_notes():
    seconds = [0.1 + 0.001 * i for i in range(400)]
    assert whats(log_of(loss=BASE, seconds=seconds)) == ["note: steps take longer and longer"]
    seconds = replaced([0.1] * 400, 200, [5000.0])
    assert whats(log_of(loss=BASE, seconds=seconds)) == ["note: a gap in the log after step 199"]


NAMES = {
    "train_loss_step": ["train_loss_epoch", "train_loss_step", "val_loss", "loss_scale"],
    "loss": ["eval_loss", "loss", "learning_rate"],
    "train/loss": ["train/box_loss", "train/cls_loss", "train/loss", "val/loss"],
    "Train/LossTotal": ["Train/LossTotal", "Valid/LossTotal", "grad_norm"],
    "nll": ["accuracy", "nll", "loss_weight"],
}


@pytest.mark.parametrize("chosen", NAMES)
def test_training_loss_is_chosen_by_name(chosen):
    few = {name: 10 if name.endswith("epoch") else 40 for name in NAMES[chosen]}
    log = log_of(**{name: [1.0] * few[name] for name in NAMES[chosen]})
    assert choose_roles(log).loss.name == chosen


def test_other_metrics_are_found_by_the_names_of_many_loggers():
    names = ["loss", "grad_2.0_norm/net.weight", "grad_2.0_norm_total", "lr-AdamW/pg1"]
    names += ["lr-AdamW/pg1-momentum", "val/loss", "amp_scale"]
    roles = choose_roles(log_of(**{name: [1.0, 1.0] for name in names}))
    assert roles.gradient_norm.name == "grad_2.0_norm_total"
    assert [series.name for series in roles.learning_rates] == ["lr-AdamW/pg1"]
    assert (roles.validation_loss.name, roles.loss_scale.name) == ("val/loss", "amp_scale")


def test_loss_can_be_named_and_a_wrong_name_lists_the_metrics():
    log = log_of(loss=BASE, aux=[*BASE[:-1], NAN])
    assert whats(log, loss="aux") == ["error: non-finite loss at step 399"]
    with pytest.raises(NoLossError, match=r"has no metric 'los'; it has aux, loss"):
        examine_log(log, loss="los")
    with pytest.raises(NoLossError, match=r"choose one with --loss NAME: accuracy"):
        examine_log(log_of(accuracy=[0.1]))


def test_causes_have_the_names_of_the_live_diagnosis():
    assert {cause.name for cause in LOG_CAUSES} <= set(CAUSES)


EXPLODED = [*BASE[:300], *[0.5 * 1.2 ** min(i, 30) for i in range(100)]]
RATES = {
    "constant rate": ([1e-3] * 400, None),
    "jump": ([1e-3] * 298 + [0.1] * 102, "learning rate jumped"),
    "ramp": ([1e-3 * 1.02**i for i in range(400)], None),
}


@pytest.mark.parametrize("case", RATES)
def test_jump_of_the_learning_rate_is_named_and_a_ramp_is_none(case):
    rates, cause = RATES[case]
    finding = examine_log(log_of(loss=EXPLODED, lr=rates)).findings[0]
    assert finding.what.startswith("divergence")
    found = [each.cause for each in finding.causes]
    assert "learning rate too high" in found
    assert ("learning rate jumped" in found) == (cause is not None)


def test_loss_that_jumps_and_falls_again_is_a_change_of_regime():
    values = BASE[:200] + [3.0 + 9 * math.exp(-i / 40) for i in range(200)]
    (finding,) = examine_log(log_of(loss=values)).findings
    assert finding.causes[0].cause == "change of regime"
