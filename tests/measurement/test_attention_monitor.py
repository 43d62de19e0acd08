"""Every form of attention is seen, under its module's name, and nothing is left behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lit_stability.measurement.attention_monitor import AttentionMonitor, measure_attention
from tests.probe_models import SelfAttention, by_hand, fused

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()


def pairs(readings):
    return {(r.quantity, r.where): r.value for r in readings}


def values(readings):
    """The numbers alone: largest logit, entropy."""
    return [r.value for r in readings]


def qkv(heads=4, keys=9, width=8):
    g = torch.Generator().manual_seed(0)
    make = lambda h, n: torch.randn(3, h, n, width, generator=g, requires_grad=True)  # noqa: E731
    return make(4, 9), make(heads, keys), make(heads, keys)


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


FORMS = {
    "flash": (lambda *t: fused(*t), lambda *t: by_hand(*t)),
    "causal": (
        lambda *t: F.scaled_dot_product_attention(*t, is_causal=True),
        lambda *t: by_hand(*t, CAUSAL),
    ),
    "boolean mask": (lambda *t: fused(*t, CAUSAL), lambda *t: by_hand(*t, CAUSAL)),
    "additive mask": (
        lambda *t: fused(*t, torch.zeros(9, 9).masked_fill(~CAUSAL, -float("inf"))),
        lambda *t: by_hand(*t, CAUSAL),
    ),
    "dropout, by the math kernel": (lambda *t: fused(*t, None, 0.5), lambda *t: by_hand(*t)),
}


@pytest.mark.parametrize("form", FORMS)
def test_fused_attention_reads_like_the_one_written_out(form):
    """T3."""
    one, other = FORMS[form]
    tensors = qkv()
    seen, wanted = (measure_attention(nn.Identity(), lambda f=f: f(*tensors)) for f in (one, other))
    assert len(seen) == 2
    assert values(seen) == pytest.approx(values(wanted), rel=1e-5)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_grouped_queries_read_like_repeated_keys(backend):
    q, k, v = qkv(heads=2)
    wide = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    with sdpa_kernel(backend):
        try:
            grouped(q, k, v)
        except RuntimeError as error:  # flash kernel of torch 2.8
            pytest.skip(f"{backend} has no grouped queries here: {error}")
        seen = measure_attention(nn.Identity(), lambda: grouped(q, k, v))
    assert values(seen) == pytest.approx(
        values(measure_attention(nn.Identity(), lambda: fused(q, *wide)))
    )


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_multihead_attention_of_torch_is_seen(options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    net = nn.ModuleDict({"body": attention})
    x = torch.randn(1, 9, 16)
    mask = ~CAUSAL
    seen = measure_attention(net, lambda: attention(x, x, x, attn_mask=mask, **options))
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.view(1, 9, 4, 4).transpose(1, 2) for t in (q, k, v))
    wanted = measure_attention(nn.Identity(), lambda: by_hand(q, k, v, CAUSAL))
    assert {r.where for r in seen} == {"body"}
    assert values(seen) == pytest.approx(values(wanted), rel=1e-5)


@pytest.mark.parametrize("attend", [fused, by_hand])
def test_attention_under_autocast_reads_nearly_like_in_float32(attend):
    torch.manual_seed(0)
    net, x = SelfAttention(attend=attend), torch.randn(2, 9, 16)
    plain = measure_attention(net, lambda: net(x, CAUSAL))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            net(x, CAUSAL)

    assert values(measure_attention(net, step)) == pytest.approx(values(plain), rel=2e-2)


def test_scores_of_a_fused_kernel_are_made_in_float32_under_autocast_too():
    tensors = [t.detach().bfloat16() for t in qkv()]

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            fused(*tensors)

    plain = measure_attention(nn.Identity(), lambda: fused(*tensors))
    assert values(measure_attention(nn.Identity(), step)) == values(plain)


def test_readings_carry_the_innermost_module_and_a_shared_one_is_one():
    layer = nn.ModuleDict({"attn": SelfAttention(), "twice": SelfAttention()})
    x = torch.randn(2, 9, 16)

    def step():
        layer["attn"](x)
        layer["twice"](100 * layer["twice"](x))
        fused(*qkv())

    seen = pairs(measure_attention(layer, step))
    assert {where for _, where in seen} == {"attn", "twice", ""}
    first = pairs(measure_attention(layer, lambda: layer["twice"](x)))
    assert seen["attention_logit", "twice"] > 5 * first["attention_logit", "twice"]


@pytest.mark.parametrize(
    ("modules", "wanted"),
    [
        ("*", {"a.attn", "b.attn"}),
        ("a", {"a.attn"}),
        (["a", "b.*"], {"a.attn", "b.attn"}),
        ("*.attn", {"a.attn", "b.attn"}),
        ("?.attn.qkv", set()),
    ],
)
def test_modules_that_fit_stand_for_all_inside(modules, wanted):
    net = nn.ModuleDict({k: nn.ModuleDict({"attn": SelfAttention()}) for k in "ab"})
    x = torch.randn(1, 5, 16)
    seen = measure_attention(net, lambda: [net[k]["attn"](x) for k in "ab"], modules)
    assert {r.where for r in seen} == wanted


def test_glob_that_fits_nothing_is_refused_with_the_names_there_are():
    net = nn.ModuleDict({"decoder": SelfAttention()})
    with pytest.raises(
        ValueError, match=r"modules='encoder\*' matches no module.*'decoder', 'decod"
    ):
        measure_attention(net, lambda: None, ["decoder", "encoder*"])


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: (x @ torch.randn(16, 5)).softmax(-1),  # a router, a class
        lambda x: (x @ x.transpose(-2, -1)).softmax(-2).sum().item(),  # over queries
        lambda x: x.log_softmax(-1),
    ],
)
def test_softmax_that_is_no_attention_is_left_out(softmax):
    x = torch.randn(3, 9, 16)
    assert measure_attention(nn.Identity(), lambda: softmax(x)) == []


def test_watch_changes_no_bit_and_leaves_no_hook():
    torch.manual_seed(0)
    net, x = SelfAttention(dropout=0.3), torch.randn(2, 9, 16, requires_grad=True)

    def run():
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(net(x).sum(), x)
        return grad, torch.get_rng_state()

    plain = run()
    with AttentionMonitor(net) as watch:
        watched = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert watch.readings()
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert _get_current_dispatch_mode() is None


def test_watch_that_was_stopped_sees_no_more_and_can_be_left():
    net, x = SelfAttention(), torch.randn(2, 9, 16)
    with AttentionMonitor(net) as watch:
        net(x)
        watch.stop()
        assert _get_current_dispatch_mode() is None
        net(1000 * x)
    assert values(watch.readings()) == values(measure_attention(net, lambda: net(x)))


def test_what_cannot_be_measured_ends_no_step():
    with AttentionMonitor(nn.Identity()) as watch:
        watch._paths = None  # stands for whatever a new version of torch may bring
        watch._fitting = None
        fused(*qkv())
    assert isinstance(watch.error, TypeError)
    assert watch.readings() == []


def test_function_that_was_compiled_is_still_compiled_afterwards():
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph.forward(*args)

    net = nn.Linear(3, 3)
    compiled = torch.compile(lambda x: net(x).sin(), backend=backend)
    x = torch.randn(2, 3)
    with AttentionMonitor(net) as watch:  # compiles, and runs
        compiled(x)
    compiled(x)
    assert len(ran) == 2
    assert watch.readings() == []
    torch.compiler.reset()
