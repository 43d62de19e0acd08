"""From a diagnosis context to its ranked causes."""

import math
from types import SimpleNamespace

import pytest

from lit_stability.detectors import Anomaly
from lit_stability.diagnosis import (
    CAUSES,
    Cause,
    DiagnosisContext,
    assess,
    decision_tree,
    diagnose,
    register_cause,
    register_layer_cause,
)
from lit_stability.diagnosis.layer_types import LAYER_KINDS
from lit_stability.measurement.step_stats import ProbeReading, StepStats

NAN = math.nan


def stats(step, loss=2.0, grad_norm=1.0, **options):
    defaults = {"learning_rates": (1e-3,), "nominal_learning_rates": (1e-3,)}
    return StepStats(step=step, loss=loss, grad_norm=grad_norm, **(defaults | options))


def history(losses, start=5000, **options):
    return tuple(stats(start + i, loss, **options) for i, loss in enumerate(losses))


def context(kind, losses=(2.0, 2.05, 1.95) * 10, *, loss=2.0, grad_norm=1.0, **options):
    """A step of an anomaly after accepted ones."""
    before = options.pop("history", None) or history(losses)
    anomaly = {"value": 1.0, "message": f"it is a {kind}", "signal": "loss"}
    anomaly |= options.pop("anomaly", {})
    now = options.pop("now", {})
    step = before[-1].step + 1
    return DiagnosisContext(
        anomaly=Anomaly(kind=kind, step=step, **anomaly),
        history=before,
        stats=stats(step, loss, grad_norm, **now),
        **options,
    )


CALM = (2.0, 2.05, 1.95) * 10
GROWN = (*CALM, 2.3, 2.8, 4.5, 12.3)
SWUNG = (*CALM, 1.8, 2.5, 1.6, 3.2, 1.4)
OPERATION = SimpleNamespace(
    op="log",
    cause="operation",
    kind="domain error",
    overflow=False,
    tensor="",
    advice="clamp it",
    describe=lambda: "log made nan",
)
OVERFLOW = SimpleNamespace(**(vars(OPERATION) | {"overflow": True}))
SPOILED = SimpleNamespace(**(vars(OPERATION) | {"cause": "parameter", "tensor": "head.weight"}))

CASES = {
    "sequence A": (context("loss spike", loss=87234.5), "bad batch"),
    "sequence B": (context("divergence", GROWN, loss=89.7), "learning rate too high"),
    "sequence C": (context("divergence", SWUNG, loss=5.8), "learning rate too high"),
    "a batch with NaN in it": (
        context("non-finite loss", loss=NAN, batch=("3 of 8 values are NaN",)),
        "bad batch",
    ),
    "an operation": (
        context("non-finite loss", loss=NAN, origin=OPERATION),
        "operation outside its domain",
    ),
    "an overflow": (
        context("non-finite loss", loss=NAN, origin=OVERFLOW, precision="16-mixed"),
        "numeric precision",
    ),
    "a weight": (
        context("non-finite loss", loss=NAN, origin=SPOILED),
        "weights damaged from outside",
    ),
    "a checkpoint with NaN in it": (
        context("damaged state at the start", anomaly={"state_corrupted": True}),
        "damaged checkpoint",
    ),
    "not reproduced": (
        context("non-finite gradient", grad_norm=NAN, verdict="transient"),
        "glitch",
    ),
    "reproduced": (
        context("gradient spike", grad_norm=900.0, verdict="deterministic"),
        "bad batch",
    ),
    "back with five batches, under an ordinary loss": (
        context("gradient spike", grad_norm=900.0, verdict="deterministic", occurrences=9),
        "exploding gradient",
    ),
    "back with five batches, and the loss grows": (
        context("gradient spike", GROWN, loss=89.7, grad_norm=900.0, occurrences=9),
        "learning rate too high",
    ),
    "a schedule that runs through": (
        context(
            "divergence",
            history=tuple(
                stats(5000 + i, loss, nominal_learning_rates=(1e-3 * 1.2**i,))
                for i, loss in enumerate(SWUNG)
            ),
            loss=5.8,
        ),
        "schedule of the learning rate",
    ),
    "momentum": (
        context(
            "divergence", (*CALM, 2.3, 2.8, 4.5), loss=12.0, momentum=0.99, verdict="transient"
        ),
        "glitch",
    ),
    "a collapse of attention": (context("attention collapse"), "attention-logit growth"),
    "a gain of zero": (
        context(
            "dead gradients",
            anomaly={"signal": "weight_norm", "layers": (("norm.weight", 0.0), ("up.weight", 0.0))},
        ),
        "zeroed gain",
    ),
    "a gain of a dead part, which is not zero": (
        context(
            "dead gradients", anomaly={"signal": "grad_norm", "layers": (("norm.weight", 0.0),)}
        ),
        "dead part of the model",
    ),
    "no gradient at all": (
        context("vanishing gradient", history=history(CALM, grad_norm=0.0), grad_norm=0.0),
        "no gradient reaches the optimizer",
    ),
    "gradients that are 0": (
        context(
            "vanishing gradient",
            history=history(CALM, grad_norm=0.0, names=("w",), grad_norms=(0.0,)),
            grad_norm=0.0,
            now={"names": ("w",), "grad_norms": (0.0,)},
        ),
        "no gradient reaches the optimizer",
    ),
    "gradients that 16 bits may have rounded to 0": (
        context(
            "vanishing gradient",
            history=history(CALM, grad_norm=0.0, names=("w",), grad_norms=(0.0,)),
            grad_norm=0.0,
            now={"names": ("w",), "grad_norms": (0.0,)},
            precision="16-true",
        ),
        "vanishing gradient",
    ),
    "gradients that have become tiny": (
        context("vanishing gradient", grad_norm=1e-9),
        "vanishing gradient",
    ),
    "an exception": (context("exception", loss=NAN), "the model raises on this batch"),
    "an exception that did not come again": (
        context("exception", loss=NAN, verdict="transient"),
        "glitch",
    ),
    "post-norm": (
        context("stalled layers", history=history(CALM, start=100), rate_rose=False),
        "no warm-up",
    ),
    "post-norm, warmed up": (
        context(
            "stalled layers",
            history=history(CALM, start=100),
            layer_types=frozenset({"layernorm", "multiheadattention"}),
        ),
        "learning rate too high",
    ),
    "a jump of the learning rate": (
        context("learning-rate jump", (*CALM, 2.3, 2.8, 4.5), loss=12.0),
        "learning rate jumped",
    ),
    "a weight that became NaN": (
        context("non-finite weight", loss=NAN),
        "weights damaged from outside",
    ),
    "a weight that became NaN, and was not reproduced": (
        context("non-finite weight", loss=NAN, verdict="transient"),
        "weights damaged from outside",
    ),
    "an operation that did not do it again": (
        context("non-finite loss", loss=NAN, origin=OPERATION, verdict="transient"),
        "glitch",
    ),
    "a constant of the module": (
        context(
            "non-finite loss",
            loss=NAN,
            origin=SimpleNamespace(
                **(vars(OPERATION) | {"cause": "constant", "kind": "non-finite constant"})
            ),
        ),
        "non-finite constant",
    ),
    "a buffer that was infinite from the start": (
        context(
            "non-finite loss",
            loss=NAN,
            origin=SimpleNamespace(**(vars(SPOILED) | {"cause": "buffer", "tensor": "w"})),
            bad_from_start=frozenset({"w"}),
        ),
        "non-finite constant",
    ),
    "a buffer that was finite before": (
        context(
            "non-finite loss",
            loss=NAN,
            origin=SimpleNamespace(**(vars(SPOILED) | {"cause": "buffer", "tensor": "w"})),
        ),
        "weights damaged from outside",
    ),
    "a value that overflows at the end of a growth": (
        context(
            "non-finite loss",
            GROWN,
            loss=NAN,
            origin=SimpleNamespace(**(vars(OPERATION) | {"op": "mse_loss", "kind": "overflow"})),
            occurrences=9,
        ),
        "learning rate too high",
    ),
    "an exponential at the end of a growth": (
        context(
            "non-finite loss",
            GROWN,
            loss=NAN,
            origin=SimpleNamespace(**(vars(OPERATION) | {"op": "exp", "kind": "overflow"})),
        ),
        "operation outside its domain",
    ),
    "LBFGS on mini-batches": (
        context("gradient spike", optimizer_type="lbfgs", batches_per_epoch=40),
        "LBFGS on mini-batches",
    ),
    "a recurrent gain": (
        context(
            "divergence",
            history=history(GROWN, start=10),
            loss=89.7,
            layer_types=frozenset({"rnn", "linear"}),
            sensitivity_at_start=1e4,
        ),
        "recurrent gain too large",
    ),
    "a recurrent network of the usual gain": (
        context(
            "divergence",
            history=history(GROWN, start=10),
            loss=89.7,
            layer_types=frozenset({"rnn", "linear"}),
            sensitivity_at_start=100.0,
        ),
        "learning rate too high",
    ),
    "raw targets": (
        context(
            "divergence",
            history=history((2.0, 40.0, 900.0), start=0),
            loss=1e5,
            unscaled=("values of rms 2e5",),
        ),
        "data not normalised",
    ),
    "an optimizer's state": (context("optimizer state"), "optimizer state damaged"),
    "a rank": (context("rank disagreement"), "rank out of step"),
}


@pytest.mark.parametrize("name", CASES)
def test_cause_of_a_context_is_named_first(name):
    """S2, S5, S15, S17."""
    given, expected = CASES[name]
    found = diagnose(given)
    assert found[0].cause == expected, [each.text() for each in found]
    assert all(each.evidence and each.remedy and each.ignore_when for each in found)


def origin(**options):
    return SimpleNamespace(**(vars(OPERATION) | options))


NAN_LOSS = {"kind": "non-finite loss", "loss": NAN}
SPIKE = {"kind": "gradient spike", "grad_norm": 900.0, "verdict": "deterministic"}
SOUND = {"batch_examined": True}
START = {"history": history(CALM, start=10), "rate_rose": False}
MLP, NORMED = frozenset({"linear", "relu"}), frozenset({"linear", "layernorm"})
CLEARED = {
    "a finite batch": (NAN_LOSS | SOUND, "bad batch", "the batch is finite"),
    "a batch whose loss is ordinary": (SPIKE | SOUND, "bad batch", "the loss is ordinary"),
    "a constant": (
        NAN_LOSS | {"origin": origin(cause="constant", tensor="w")},
        "bad batch",
        "w, an attribute of the module, is non-finite",
    ),
    "an ordinary loss": (
        SPIKE | {"occurrences": 9},
        "learning rate too high",
        "the loss is ordinary, 2",
    ),
    "ordinary losses before a NaN": (
        NAN_LOSS | {"occurrences": 9},
        "learning rate too high",
        "the 30 losses before were ordinary",
    ),
    "an ordinary gradient": (
        {"kind": "loss spike", "loss": 900.0},
        "exploding gradient",
        "the gradient norm is normal",
    ),
    "a model without norms": (
        {"kind": "divergence", "layer_types": MLP} | START,
        "no warm-up",
        "neither norms nor attention",
    ),
    "an optimizer without moments": (
        {"kind": "update spike", "optimizer_type": "sgd", "momentum": 0.0},
        "optimizer state damaged",
        "plain SGD keeps no state",
    ),
    "LBFGS on mini-batches": (
        {
            "kind": "divergence",
            "losses": GROWN,
            "loss": 89.7,
            "optimizer_type": "lbfgs",
            "batches_per_epoch": 40,
        },
        "learning rate too high",
        "LBFGS builds its curvature from 40 different batches",
    ),
    "calm steps on raw data": (
        {"kind": "loss spike", "loss": 900.0, "unscaled": ("rms 300",)} | START,
        "data not normalised",
        "the 30 losses before were ordinary",
    ),
}


@pytest.mark.parametrize("name", CLEARED)
def test_cause_that_the_evidence_contradicts_is_ruled_out_and_not_named(name):
    options, cause, why = CLEARED[name]
    found = assess(context(**options))
    assert cause not in [each.cause for each in found.likely_causes]
    (excluded,) = [each for each in found.ruled_out if each.cause == cause]
    assert why in excluded.text()


KEPT = {
    "a batch of another scale": (SPIKE | SOUND | {"batch": ("rms 1e4",)}, "bad batch"),
    "a batch that was not examined": (SPIKE, "bad batch"),
    "norms": ({"kind": "divergence", "layer_types": NORMED} | START, "no warm-up"),
    "moments": (
        {"kind": "update spike", "optimizer_type": "sgd", "momentum": 0.9},
        "optimizer state damaged",
    ),
    "LBFGS on all data": (
        {
            "kind": "divergence",
            "losses": GROWN,
            "loss": 89.7,
            "optimizer_type": "lbfgs",
            "batches_per_epoch": 1,
        },
        "learning rate too high",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_cause_that_nothing_contradicts_is_kept(name):
    options, cause = KEPT[name]
    assert cause in [each.cause for each in diagnose(context(**options))]


def test_cause_that_an_experiment_has_confirmed_is_not_ruled_out():
    given = context(**(SPIKE | SOUND), shown={"bad batch": "it is finite without sample 3"})
    assert diagnose(given)[0].cause == "bad batch"
    assert "bad batch" not in [each.cause for each in assess(given).ruled_out]


def test_no_weaker_cause_is_returned_beside_a_certain_one():
    given = context("non-finite loss", loss=NAN, origin=OPERATION, **START)
    assert [each.cause for each in diagnose(given, most=10)] == ["operation outside its domain"]


def test_fault_before_the_first_step_is_blamed_on_no_learning_rate():
    anomaly = Anomaly(kind="non-finite gradient", step=0, value=NAN, message="m", signal="s")
    given = DiagnosisContext(anomaly=anomaly, occurrences=9, verdict="deterministic", **SOUND)
    found = assess(given)
    assert [each.cause for each in found.likely_causes][:1] == ["initialisation"]
    assert "learning rate too high" not in [each.cause for each in found.likely_causes]


def test_rerun_at_a_lower_rate_is_no_evidence_of_a_glitch():
    same = context("divergence", GROWN, loss=89.7, verdict="transient")
    lower = context("divergence", GROWN, loss=89.7, verdict="transient", rerun_lowered=True)
    assert diagnose(same)[0].cause == "glitch"
    assert diagnose(lower)[0].cause == "learning rate too high"


def test_causes_of_each_printed_pattern_are_among_those_named():
    """S2: A, an abnormal sample; B, the rate, accumulation or momentum; C, batches and schedule."""
    growth = context("divergence", GROWN, loss=89.7, accumulation=4, momentum=0.99)
    swings = context("divergence", SWUNG, loss=5.8)
    names = {each.cause for each in diagnose(growth, most=10)}
    assert names >= {
        "learning rate too high",
        "gradients added up and not averaged",
        "momentum too high",
    }
    names = {each.cause for each in diagnose(swings, most=10)}
    assert names >= {
        "optimizer state damaged",
        "batches too different from each other",
        "schedule of the learning rate",
    }


@pytest.mark.parametrize(
    ("given", "certainty", "decides"),
    [
        (context("attention collapse"), "certain", "stop"),
        (context("attention-logit growth"), "likely", "usual"),
        # Grown logits that a probe has read are no collapse yet.
        (
            context(
                "attention-logit growth",
                now={"readings": (ProbeReading("attention_logit", "blocks.0", 9000.0),)},
            ),
            "likely",
            "usual",
        ),
        (context("divergence", GROWN, loss=89.7), "likely", "lower"),
        (context("divergence", (2.0, 2.1) * 15, loss=2.1), "possible", "usual"),
    ],
)
def test_stop_needs_certainty_and_a_cut_likelihood(given, certainty, decides):
    best = diagnose(given)[0]
    assert (best.certainty, best.action) == (certainty, decides)


def test_healthy_looking_spike_stops_nothing_and_lowers_nothing():
    for kind in ("gradient spike", "loss spike", "non-finite loss", "non-finite gradient"):
        assert diagnose(context(kind, grad_norm=900.0))[0].action == "usual"


LAYERS = {
    "explode in a vision encoder": (
        "gradient spike",
        {"vision_tower.blocks.0.weight": 900.0, "lm.head.weight": 1.1},
        False,
        "inputs of the vision encoder not normalised",
    ),
    "explode in an embedding": (
        "gradient spike",
        {"model.wte.weight": 900.0, "model.h.0.mlp.weight": 1.1},
        False,
        "embeddings with too large gradients",
    ),
    "vanish in a projection": (
        "layer bound",
        {"mm_projector.weight": 1e-9},
        True,
        "projection badly initialised",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_kind_of_layer_that_shows_it_most_adds_a_cause(name):
    """S7."""
    kind, norms, warn_only, expected = LAYERS[name]
    names = tuple(norms)
    before = history(CALM, names=names, grad_norms=(1.0,) * len(names))
    given = context(
        kind,
        history=before,
        grad_norm=900.0,
        now={"names": names, "grad_norms": tuple(norms.values())},
        anomaly={"warn_only": warn_only, "layers": tuple(norms.items())},
    )
    assert expected in {each.cause for each in diagnose(given, most=10)}


def test_language_model_that_swings_is_asked_for_its_padding():
    """S7."""
    names = ("lm.layers.0.mlp.weight",)
    before = history(SWUNG, names=names, grad_norms=(1.0,))
    given = context(
        "divergence", history=before, loss=5.8, now={"names": names, "grad_norms": (3.0,)}
    )
    causes = {each.cause: each for each in diagnose(given, most=10)}
    assert "attention mask" in causes["sequence lengths or padding"].remedy


def test_layers_are_ranked_by_their_own_past_and_not_by_their_size():
    names = ("large", "small")
    before = history(CALM, names=names, grad_norms=(100.0, 0.1))
    given = context(
        "gradient spike", history=before, now={"names": names, "grad_norms": (110.0, 9)}
    )
    assert given.layers(1) == [("small", pytest.approx(90.0))]


def test_kinds_of_layers_and_their_causes_are_yours_to_extend(monkeypatch):
    """S7."""
    monkeypatch.setitem(LAYER_KINDS, "retina", ("retina",))
    register_layer_cause("retina", "explode", "too much light", "close the shutter")
    names = ("model.retina.weight",)
    before = history(CALM, names=names, grad_norms=(1.0,))
    given = context("gradient spike", history=before, now={"names": names, "grad_norms": (900.0,)})
    try:
        causes = {each.cause: each.remedy for each in diagnose(given, most=10)}
    finally:
        del CAUSES["too much light"]
    assert causes["too much light"] == "close the shutter"


def test_cause_of_your_own_takes_part_and_may_stop_the_run():
    mine = Cause(
        name="tuesday",
        rules=((9, lambda given: "it is tuesday" if given.anomaly.step > 5000 else None),),
        remedy="wait",
        ignore_when="on any other day",
        recommended_action="stop",
    )
    register_cause(mine)
    try:
        best = diagnose(context("gradient spike"))[0]
    finally:
        del CAUSES["tuesday"]
    assert (best.cause, best.action, best.text()) == (
        "tuesday",
        "stop",
        "certain: tuesday (it is tuesday)",
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": ""}, "name of a cause must not be empty"),
        ({"ignore_when": ""}, "ignore_when of a cause must not be empty"),
        ({"rules": ()}, "must have at least one rule"),
    ],
)
def test_cause_without_rules_or_names_is_refused(options, problem):
    whole = {"name": "x", "rules": ((1, lambda _: None),), "remedy": "y", "ignore_when": "z"}
    with pytest.raises(ValueError, match=problem):
        Cause(**(whole | options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"history": history(CALM, start=10), "precision": "16-mixed", "grad_norm": 500.0},
            ["yes: check initialisation", "yes: check the loss scale", "yes: lower the learning"],
        ),
        (
            {"restorable": True},
            ["no: continue", "no: check for values", "no: check the data", "yes: restore it"],
        ),
        ({"restorable": False}, ["no", "no", "no", "no: restart with a lower"]),
    ],
)
def test_questions_are_answered_in_the_order_of_the_tree(options, expected):
    """S5."""
    answers = [each.text() for each in decision_tree(context("non-finite loss", **options))]
    assert len(answers) == len(expected)
    for answer, part in zip(answers, expected, strict=True):
        assert part in answer


def test_reading_of_a_probe_speaks_where_it_is_high():
    reading = (ProbeReading("attention_logit", "blocks.1", 9000.0),)
    given = context("divergence", now={"readings": reading})
    found = {each.cause: each for each in diagnose(given, most=10)}
    assert "attention logits of 9e+03 in blocks.1" in found["attention-logit growth"].evidence[0]


def test_second_moment_that_lagged_is_among_the_causes_and_one_that_did_not_is_not():
    lagged, ordinary = (
        diagnose(context("divergence", history=history(CALM, moment_rms=rms), loss=9.0), most=10)
        for rms in (2.8, 1.2)
    )
    assert "stale second moment" in {each.cause for each in lagged}
    assert "stale second moment" not in {each.cause for each in ordinary}


def test_trouble_is_dated_to_where_the_loss_left_its_trend():
    """Since when, not only that."""
    given = context("divergence", GROWN, loss=89.7)
    assert given.since == given.anomaly.step - 5


def test_context_of_nothing_but_an_anomaly_is_enough():
    alone = DiagnosisContext(
        anomaly=Anomaly(kind="mine", step=3, value=1.0, message="m", signal="s")
    )
    assert diagnose(alone) == []
    assert alone.pattern is None
    assert alone.layers() == []


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("ValueError: Expected parameter scale of distribution Normal(loc: torch...", "softplus"),
        ("IndexError: Target 3 is out of bounds.", "0 to C - 1"),
        ("RuntimeError: all elements of target should be between 0 and 1", "the targets"),
        ("RuntimeError: all elements of input should be between 0 and 1", "sigmoid"),
        ("IndexError: index out of range in self", "embedding"),
        ("LinAlgError: the input is not positive-definite", "jitter"),
        ("ValueError: empty", "look at the batch"),
    ],
)
def test_advice_on_an_exception_goes_by_its_message(message, part):
    found, *_ = diagnose(context("exception", loss=NAN, anomaly={"message": message}))
    assert part in found.remedy
