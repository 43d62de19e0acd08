"""S4: facts about operations, found where they are called."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_stability.checks.preflight import StepError
from lit_stability.checks.preflight.operations import Watch, WithoutDropout, quiet_dropout

X = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 3.0, 4.0]])
SHUT = torch.full((2, 3), -torch.inf)
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def attend(mask):
    x = torch.randn(1, 1, 4, 8)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


NOTHING = "attention of a query that may attend to nothing"
FAULTS = [
    (lambda: X.log(), {("log of 0 or less", 2)}),
    (lambda: torch.log10(X), {("log of 0 or less", 2)}),
    (lambda: (X + 2).log(), set()),
    (lambda: X.log1p(), set()),
    (lambda: SHUT.softmax(-1), {("softmax of a row that is all -inf", 2)}),
    (lambda: F.softmax(torch.where(X > 0, X, -torch.inf), dim=-1), set()),
    (lambda: attend(CAUSAL), set()),
    (lambda: attend(~CAUSAL), {(NOTHING, 1), ("attention mask that opens the future only", 3)}),
    (lambda: attend(CAUSAL & (torch.arange(4) != 0)), {(NOTHING, 1)}),
    (lambda: attend(torch.zeros(4, 4).masked_fill(~CAUSAL, -torch.inf)), set()),
    (lambda: F.layer_norm(torch.ones(2, 3), (3,)), {("layer norm of rows without variance", 2)}),
    (lambda: F.layer_norm(X, (3,)), set()),
]


@pytest.mark.parametrize(("run", "expected"), FAULTS)
def test_watch_of_an_operation_keeps_what_has_no_good_answer(run, expected):
    """S4: log(0), all-zero attention rows, a norm's zero variance; the twins are silent."""
    watch = Watch(lambda: "here")
    with watch:
        run()
    assert {(f.operation, f.elements) for f in watch.faults} == expected
    assert all(f.module == "here" for f in watch.faults)


@pytest.mark.parametrize("bad", [-1, 5])
@pytest.mark.parametrize(
    "run",
    [
        lambda i: nn.Embedding(5, 2)(i),
        lambda i: F.embedding(i, torch.zeros(5, 2)),
        lambda i: F.cross_entropy(torch.zeros(2, 5), i),
        lambda i: nn.CrossEntropyLoss()(torch.zeros(2, 5), i),
    ],
)
def test_watch_of_an_index_out_of_range_raises_before_the_kernel_reads_it(run, bad):
    """N5: a GPU would end the process."""
    with Watch(lambda: "here"), pytest.raises(StepError, match=f"given the index {bad}"):
        run(torch.tensor([0, bad]))


def test_watch_of_the_ignored_index_is_no_fault():
    with Watch(str):
        default = F.cross_entropy(torch.zeros(2, 5), torch.tensor([0, -100]))
        other = F.cross_entropy(torch.zeros(2, 5), torch.tensor([0, 9]), ignore_index=9)
    assert float(default) == float(other) == pytest.approx(math.log(5)), "of the one label left"


class Dropping(nn.Module):
    """Every kind of dropout in one forward."""

    def __init__(self):
        super().__init__()
        self.drop, self.lstm = nn.Dropout(0.5), nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = self.lstm(F.dropout(self.drop(x), 0.5, self.training))[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)
        return F.scaled_dot_product_attention(y, y, y, None, 0.5 if self.training else 0.0)


def test_without_dropout_a_module_in_train_mode_gives_what_it_gives_in_eval_mode():
    """T4."""
    model, x = Dropping(), torch.randn(2, 5, 8)
    expected = model.eval()(x)
    model.train()
    assert not torch.allclose(model(x), expected)
    quiet_dropout(model)
    with WithoutDropout():
        assert torch.allclose(model(x), expected, atol=1e-6)
