"""Each head's largest logit, and the rows of the weights that make it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.byte_gpt import ByteGPT, ByteGPTConfig
from lit_stability.measurement.attention_heads import AttentionHeads
from lit_stability.measurement.attention_logits import head_logits, product_scores
from lit_stability.measurement.attention_monitor import fitting
from lit_stability.policies.qk_clip import qk_clip_factors
from tests.probe_models import SelfAttention, by_hand

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))


class Einsum(nn.Module):
    """Products written with ``einsum``, and heads that are not moved before the sequence."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        q, k = (y.view(2, 6, 4, 4) for y in (self.q(x), self.k(x)))
        return (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2).softmax(-1)


class Flat(nn.Module):
    """Sequences and heads in one dimension, and ``x @ weight``."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        q, k = ((x @ w).view(2, 6, 4, 4).transpose(1, 2).flatten(0, 1) for w in (self.q, self.k))
        return torch.baddbmm(torch.zeros(8, 6, 6), q, k.transpose(1, 2), alpha=0.5).softmax(-1)


class Interleaved(nn.Module):
    """Grouped queries in one projection: of each group two queries, a key and a value, rotated."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 32)

    def forward(self, x):
        y = self.qkv(x).view(2, 6, 2, 4, 4).permute(3, 0, 2, 1, 4)
        q, k = torch.stack([y[0], y[1]], 2).flatten(1, 2), y[2]
        angle = torch.arange(6.0)[:, None] / torch.tensor([1.0, 10.0])
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        q, k = (z * cos + torch.cat([-z[..., 2:], z[..., :2]], -1) * sin for z in (q, k))
        return F.scaled_dot_product_attention(q, k, y[3], is_causal=True, enable_gqa=True)


class Multi(nn.Module):
    """`torch.nn.MultiheadAttention`, with a mask of each kind."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.keys = options.get("kdim", 16)

    def forward(self, x):
        other, padding = x[:, :, : self.keys], torch.zeros(2, 6, dtype=torch.bool)
        padding[:, 0] = True
        closed = torch.ones(6, 6).triu(2).bool()
        return self.attention(x, other, other, key_padding_mask=padding, attn_mask=closed)


class WithNorm(nn.Module):
    """Queries and keys are normalised, so their projections do not bound the logits."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.RMSNorm(4)

    def forward(self, x):
        q, k = (self.norm(f(x).view(2, 6, 4, 4)).transpose(1, 2) for f in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, k)


class Tied(nn.Module):
    """Keys are values too."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        q, k = (f(x).view(2, 6, 4, 4).transpose(1, 2) for f in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, k)


class Computed(Tied):
    """The weight of the queries is that of a parametrisation."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.q)


def hugging_face(kind, **options):
    """A model with random weights."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 16}
    config = getattr(transformers, f"{kind}Config")(
        **shape, bos_token_id=1, eos_token_id=1, pad_token_id=0, **options
    )
    return transformers.AutoModel.from_config(config)


FOUND = {
    "fused qkv": (lambda: ByteGPT(ByteGPTConfig(width=16, layers=1)), IDS),
    "softmax by hand": (lambda: SelfAttention(attend=by_hand), X),
    "einsum": (Einsum, X),
    "flat, weight on the right": (Flat, X),
    "interleaved, grouped, rotated": (Interleaved, X),
    "MultiheadAttention": (Multi, X),
    "MultiheadAttention, separate": (lambda: Multi(kdim=8, vdim=8), X),
    "Llama": (lambda: hugging_face("Llama", num_key_value_heads=2), IDS),
    "Llama, eager": (
        lambda: hugging_face("Llama", num_key_value_heads=2, attn_implementation="eager"),
        IDS,
    ),
    "Qwen2": (lambda: hugging_face("Qwen2", num_key_value_heads=2), IDS),
    "GPT-2, transposed": (lambda: hugging_face("GPT2", attn_pdrop=0, embd_pdrop=0), IDS),
    "GPT-NeoX, interleaved": (lambda: hugging_face("GPTNeoX"), IDS),
}


def watched(model, batch, known, *, trace=False):
    with AttentionHeads(model, fitting(model, "*"), known, trace=trace) as heads:
        model(batch)
    return heads


@pytest.mark.parametrize(("make", "batch"), FOUND.values(), ids=FOUND)
def test_rescaled_rows_bring_each_head_to_the_threshold_and_change_no_other(make, batch):
    torch.manual_seed(0)
    model, known = make().train(), {}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    before = watched(model, batch, known, trace=True)
    assert before.failed == {}
    ((place, logits),) = before.logits.items()
    heads, threshold = known[place], float(logits.median())
    factors = qk_clip_factors(logits.tolist(), heads.query_groups, heads.key_groups, threshold)
    each = len(heads.query_groups) // len(heads.key.rows)
    groups = heads.query_groups, heads.key_groups[::each]
    for projection, own, factor in zip((heads.query, heads.key), groups, factors, strict=True):
        rows = torch.ones(projection.rows.shape[1])
        for group, mine in zip(own, projection.rows, strict=True):
            rows[mine] = factor[group]
        for view in projection.weights:
            view.scale(rows)
    after = watched(model, batch, known).logits[place]
    assert (logits > threshold).any()
    # Where sequences and heads share a dimension, the head with the largest decides.
    exact = make is not Flat
    wanted = logits.clamp(max=threshold)
    assert torch.allclose(after, wanted, rtol=1e-5) if exact else (after <= wanted * 1.00001).all()


NOT_FOUND = {
    "normalised": (WithNorm, "normalised after their projection"),
    "keys are values": (Tied, "values come from the same rows"),
    "computed weight": (Computed, "computed and not a parameter"),
    "no gradient": (lambda: Einsum().requires_grad_(False), "have no gradient"),
}


@pytest.mark.parametrize(("make", "reason"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_what_cannot_be_rescaled_is_refused_with_the_reason(make, reason):
    heads = watched(make(), X, known := {}, trace=True)
    assert known == {}
    assert [reason in str(each) for each in heads.failed.values()] == [True]


def test_queries_of_zero_are_tried_again():
    model = Einsum()
    for p in model.q.parameters():
        nn.init.zeros_(p)
    (reason,) = watched(model, X, {}, trace=True).failed.values()
    assert reason.for_now


@pytest.mark.parametrize("causal", [False, True])
def test_head_logits_are_the_largest_of_visible_products(causal):
    g = torch.Generator().manual_seed(2)
    q, k = 3 * torch.randn(2, 4, 6, 8, generator=g), torch.randn(2, 2, 5, 8, generator=g)
    mask = None if causal else torch.rand(2, 1, 6, 5, generator=g) > 0.5
    found = head_logits(q, k, mask, is_causal=causal)
    rows = [slice(i, i + 1) for i in range(2)]
    each = [
        product_scores(q[i], k[i], None if mask is None else mask[i], is_causal=causal)
        for i in rows
    ]
    scores = torch.stack(each)
    wanted = scores.masked_fill(scores == -math.inf, 0.0).abs().amax((0, 2, 3))
    assert torch.allclose(found, wanted)
