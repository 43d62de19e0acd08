"""Gradient norms in the order of the parameters in, a stall of the lower ones out."""

import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from lit_stability.detectors import Stall
from lit_stability.detectors.stalled_layers import stacks
from lit_stability.measurement.step_meter import StepMeter
from tests.detectors.streams import anomalies_of, anomalies_with_a_resume, steps_of

NAMES = tuple("abcdef")
EVEN, FADED = (1.0,) * 6, (1e-3, 2e-3, 0.01, 0.1, 0.5, 1.0)


def small():
    return Stall(persist=3, block=20)


def rows(norms, losses=3.1, rate=0.1):
    losses = [losses] * len(norms) if isinstance(losses, float) else losses
    return [
        {"names": NAMES, "grad_norms": each, "loss": loss, "learning_rates": (rate,)}
        for each, loss in zip(norms, losses, strict=True)
    ]


@pytest.mark.parametrize(
    ("norms", "losses", "expected"),
    [
        ([EVEN] * 200, 3.1, []),
        ([FADED] * 200, 3.1, [60]),
        # While the loss falls, lower layers may have what they need.
        ([FADED] * 200, [5.0 - 0.02 * i for i in range(200)], []),
        ([EVEN] * 100 + [FADED] * 100, 3.1, [120]),
        # Reported again after the gradient came through in between.
        ([FADED] * 100 + [EVEN] * 20 + [FADED] * 80, 3.1, [60, 140]),
        ([FADED] * 15 + ([EVEN] * 10 + [FADED] * 20) * 5, 3.1, []),
        # Zeros are for another detector; NaN neither counts nor clears.
        ([(0.0, 0.0, 0.01, 0.1, 0.5, 1.0)] * 200, 3.1, []),
        ([(math.nan,) * 6] * 200, 3.1, []),
        ([(1.0, 1.0)] * 200, 3.1, []),
    ],
)
def test_gradient_that_fades_towards_the_input_is_reported(norms, losses, expected):
    stream = rows(norms, losses)
    if len(norms[0]) == 2:
        stream = [row | {"names": ("a", "b")} for row in stream]
    if math.isnan(norms[0][0]):
        stream = [row | {"grad_norm": math.nan} for row in stream]
    assert steps_of(anomalies_of(small(), stream)) == expected


def both_stacks(encoder, decoder, layers=6):
    """Norms of an encoder and a decoder, one parameter a layer, and a table and a head beside."""
    parts = (("encoder", encoder), ("decoder", decoder))
    names = [f"{part}.layers.{i}.w" for part, _ in parts for i in range(layers)]
    norms = [fade**i for _, fade in parts for i in range(layers)[::-1]]
    row = {"names": ("table", *names, "head"), "grad_norms": (1.0, *norms, 1.0)}
    return [row | {"loss": 3.1, "learning_rates": (0.1,)}] * 200


@pytest.mark.parametrize(
    ("encoder", "decoder", "expected"),
    [
        (1.0, 1.0, []),
        # Halved from layer to layer, a sixteenth arrives.
        (0.5, 0.5, []),
        (0.1, 1.0, [(60, "encoder.layers")]),
        (1.0, 0.1, [(60, "decoder.layers")]),
        (0.2, 0.1, [(60, "decoder.layers")]),
        # Larger below than above is no stall.
        (2.0, 2.0, []),
    ],
)
def test_stack_of_an_encoder_decoder_in_which_the_gradient_fades_is_named(
    encoder, decoder, expected
):
    found = anomalies_of(small(), both_stacks(encoder, decoder))
    assert [(a.step, a.message.split(" of ")[2].split()[0]) for a in found] == expected
    for anomaly in found:
        assert [name.split(".")[0] for name, _ in anomaly.layers] == [expected[0][1][:7]] * 2


def test_stacks_that_are_low_in_turns_are_no_episode():
    low, high = both_stacks(0.1, 1.0)[0], both_stacks(1.0, 0.1)[0]
    stream = ([low] * 20 + [high] * 20) * 10
    assert anomalies_of(small(), stream) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a", "b.w"), {}),
        (("layers.0.w", "layers.1.w", "head.w"), {}),
        # The outermost of those that have layers enough.
        (("net.0.h.0.w", "net.0.h.1.w", "net.0.h.2.w", "out"), {"net.0.h": [0, 1, 2]}),
        (("net.0.h.0.w", "net.1.h.0.w", "net.2.h.0.w"), {"net": [0, 1, 2]}),
        ([f"net.{i}.h.{j}.w" for i in range(3) for j in range(3)], {"net": [*range(9)]}),
        (("0.w", "2.w", "4.w"), {"": [0, 1, 2]}),
    ],
)
def test_stacks_are_found_from_the_names(names, expected):
    assert stacks(names, least=3) == expected


def test_state_without_separate_stacks_is_loaded():
    first, second = small(), small()
    stream = rows([FADED] * 200)
    assert steps_of(anomalies_of(first, stream[:45])) == []
    state = first.state_dict()
    second.load_state_dict(state | {"low_for": state["low_for"][""]})
    assert second.state_dict() == state


def test_lowest_layers_are_named():
    (anomaly,) = anomalies_of(small(), rows([FADED] * 200))
    assert anomaly.layers == (("a", 1e-3), ("b", 2e-3))
    assert anomaly.value == pytest.approx(1.5e-3 / 0.75)
    assert anomaly.warn_only


def test_warm_up_is_silent():
    """V1."""
    stream = [row | {"learning_rates": (i / 1e6,)} for i, row in enumerate(rows([FADED] * 200))]
    assert anomalies_of(small(), stream) == []


def test_resume_neither_forgets_nor_tells_twice():
    for at in (35, 59, 61, 100):
        assert steps_of(anomalies_with_a_resume(small, rows([FADED] * 200), at)) == [60]


@pytest.mark.parametrize("warm_up", [1, 100])
def test_deep_post_norm_transformer_stalls_without_warm_up_only(warm_up):
    """Post-norm, 6 layers, 3e-3: lower layers get a hundredth of the gradient within ten steps."""
    torch.manual_seed(0)
    config = ByteGPTConfig(width=64, layers=6, length=32, post_norm=True)
    module = ByteGPTModule(config, lr=3e-3, warmup=warm_up, betas=(0.9, 0.999))
    (optimizer,), (schedule,) = module.configure_optimizers()
    meter, detector, found = StepMeter(module.named_parameters(), optimizer), small(), []
    for i, batch in zip(range(90), loader(batch=4, length=32), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(module.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        rates = [group["lr"] for group in optimizer.param_groups]
        stats = meter.measure(i, loss, learning_rates=rates)
        if (anomaly := detector.check(stats)) is not None:
            found.append(anomaly)
        detector.update(stats)
        optimizer.step()
        schedule["scheduler"].step()
    assert len(found) == (warm_up == 1)
    if not found:
        third = len(stats.grad_norms) // 3
        assert sum(stats.grad_norms[:third]) > 0.1 * sum(stats.grad_norms[-third:])


@pytest.mark.parametrize("options", [{"share": 0.0}, {"persist": 0}])
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        Stall(**options)
