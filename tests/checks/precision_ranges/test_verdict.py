"""From what was measured to a verdict and what to do."""

import pytest
import torch

from lit_stability.checks.precision_ranges.limits import LossScale, loss_scale
from lit_stability.checks.precision_ranges.verdict import GRAD_SCALER_START, judge
from lit_stability.measurement.float_formats import BFLOAT16, FLOAT16, TF32
from tests.checks.precision_ranges.examples import report_of, row_of

TINY = 2.0**-30
CASES = [
    # gradients, status in fp16, loss scales
    ([1.0] * 10, "fits", (-24, 15)),
    ([0.0, 1.0, -1.0], "fits", (-24, 15)),
    ([65519.0], "fits", (-40, 0)),
    ([65520.0], "fits with a loss scale", (-40, -1)),
    ([TINY] * 10, "fits with a loss scale", (6, 45)),
    ([2.0**-25, 1.0], "fits with a loss scale", (1, 15)),
    ([1.0] * 1999 + [TINY], "fits", (-24, 15)),  # 0.05 % may go
    ([1.0] * 999 + [TINY], "fits", (-24, 15)),  # 0.1 % is the limit
    ([1.0] * 499 + [TINY], "fits with a loss scale", (6, 15)),
    ([2.0**10] + [2.0**-40] * 9, "no loss scale", None),
    ([0.0], "fits", None),
]


@pytest.mark.parametrize(("gradients", "status", "scale"), CASES)
def test_verdict_by_the_gradients(gradients, status, scale):
    """S9: the loss scale, from the smallest that loses little to the largest that overflows."""
    verdict = judge(report_of(row_of(gradients)), FLOAT16)
    assert verdict.status == status
    assert verdict.scale == (None if scale is None else LossScale(*scale))


@pytest.mark.parametrize("seed", range(5))
def test_loss_scale_ends_where_a_cast_says(seed):
    """S9: at both ends the cast keeps 99.9 % and overflows nowhere; one step beyond it does not."""
    torch.manual_seed(seed)
    values = (torch.randn(5000) * 3 - 12).exp()
    scale = loss_scale(row_of(values), FLOAT16)

    def does(exponent):
        after = (values.double() * 2.0**exponent).half()
        return (after == 0).float().mean() <= 1e-3, not after.isinf().any()

    assert does(scale.lowest) == does(scale.highest) == (True, True)
    assert does(scale.lowest - 1) == (False, True)
    assert does(scale.highest + 1) == (True, False)


def test_layers_that_overflow_are_named_with_share_and_size():
    """S9: chosen layers kept in fp32."""
    report = report_of(
        row_of([1e5, 1.0], "activations", "(input)"),
        row_of([1.0, 2.0], "weights", "cold"),
        row_of([7e4, 1.0, 1.0, 1.0], "activations", "stack.hot"),
        row_of([1e6, 1e6, 1e6, 1.0], "activations", "stack"),
        row_of([2e9], "activations", "(loss)"),
    )
    verdict = judge(report, FLOAT16)
    assert verdict.status == "overflows"
    shares = [(one.layer, one.share) for one in verdict.overflows]
    assert shares == [("(loss)", 1.0), ("stack", 0.75), ("(input)", 0.5), ("stack.hot", 0.25)]
    assert verdict.overflows[1].largest == 1e6
    assert verdict.fp32_modules == ("stack",), "a module holds those inside it"
    advice = "\n".join(verdict.advice)
    assert "normalize the inputs: magnitudes above 65504" in advice
    assert "fp32_modules=['stack']" in advice
    assert "compute the loss in float32" in advice
    assert judge(report, BFLOAT16).status == "fits"


def test_layer_that_overflows_as_the_root_asks_for_the_whole_model():
    verdict = judge(report_of(row_of([1e5], "weights", "(model)")), FLOAT16)
    assert verdict.fp32_modules == ()
    assert "keep the model in float32" in verdict.advice[0]


@pytest.mark.parametrize(
    ("gradient", "advice"),
    [
        (1e-3, "the initial scale of GradScaler, 2^16, is among them"),
        (1e2, "skips 7 steps until it reaches them; GradScaler(init_scale=2.0**9) skips none"),
        (1e-20, "start there: GradScaler(init_scale=2.0**42)"),
    ],
)
def test_advice_says_where_grad_scaler_stands(gradient, advice):
    """S9: the dynamic loss scale explained."""
    assert advice in "\n".join(judge(report_of(row_of([gradient])), FLOAT16).advice)


def test_grad_scaler_begins_where_the_advice_says():
    assert torch.amp.GradScaler("cpu").get_scale() == 2.0**GRAD_SCALER_START


def test_layer_that_starves_at_every_loss_scale_is_named():
    rows = [row_of([1.0] * 5000, layer="wide"), row_of([1e-14], layer="thin")]
    verdict = judge(report_of(*rows), FLOAT16)
    assert verdict.status == "fits"
    assert verdict.starved == ("thin",)
    assert "becomes zero in thin" in "\n".join(verdict.advice)


def test_gradients_that_no_scale_holds_name_the_layers_that_are_too_small():
    rows = [row_of([2.0**12], layer="wide"), row_of([2.0**-10] * 9, layer="fine")]
    thin = [row_of([2.0**-40] * 9, layer=f"thin{i}") for i in range(6)]
    verdict = judge(report_of(*rows, *thin), FLOAT16)
    assert verdict.status == "no loss scale"
    assert "thin0, thin1, thin2, thin3, thin4 and 1 more" in verdict.advice[0]
    assert "use bfloat16" in verdict.advice[0]


@pytest.mark.parametrize(("epsilon", "named"), [(1e-8, True), (1e-4, False)])
def test_advice_on_half_storage_names_adam_epsilon_that_becomes_zero(epsilon, named):
    """S9: known answer, 1e-8 is less than half the smallest fp16 of 6e-8."""
    assert torch.tensor(1e-8).half() == 0
    advice = judge(report_of(row_of([1.0]), adam_epsilon=epsilon), FLOAT16).advice
    assert ("Adam's eps=1e-08 becomes 0" in "\n".join(advice)) == named


def test_advice_on_half_storage_tells_the_squares_that_become_zero():
    advice = judge(report_of(row_of([1e-4] * 3 + [1.0])), FLOAT16).advice
    assert (torch.tensor(1e-4).half() ** 2) == 0
    assert "75.0% of the squared gradients become 0" in "\n".join(advice)


@pytest.mark.parametrize(
    ("kind", "layer", "status"),
    [
        ("weights", "head", "not finite"),
        ("weight gradients", "head", "not finite"),
        ("activations", "(loss)", "not finite"),
        ("activations", "mask", "fits"),  # -inf is how scores are masked
    ],
)
def test_what_is_not_finite_in_float32_is_judged_by_no_format(kind, layer, status):
    report = report_of(row_of([float("-inf"), 1.0], kind, layer), row_of([1.0]))
    for each in (FLOAT16, BFLOAT16):
        verdict = judge(report, each)
        assert verdict.status == status
        line = f"{kind} of {layer} are Inf or NaN in float32 already, which no"
        assert (line in "\n".join(verdict.advice)) == (status == "not finite")


def test_format_that_was_not_counted_for_is_refused():
    with pytest.raises(ValueError, match="tf32 cannot be judged; choose from float16, bfloat16"):
        judge(report_of(row_of([1.0])), TF32)


def test_model_without_gradients_is_judged_by_the_rest():
    verdict = judge(report_of(row_of([1.0], "weights")), FLOAT16)
    assert (verdict.status, verdict.scale) == ("fits", None)
    assert "the required loss scale is unknown" in verdict.advice[0]
