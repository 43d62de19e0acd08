"""Steps that go wrong, each with the line where it does, and steps that only look as if they did.

A case is a function that gives a model and a step. The line to be named carries the comment
``# origin``; other expected values are in the decorator. A case without is a healthy step.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BAD, HEALTHY = [], []
INF = float("inf")


def bad(**expected):
    """A step whose origin must be found."""

    def note(build):
        lines, start = inspect.getsourcelines(build)
        marked = [start + i for i, line in enumerate(lines) if line.rstrip().endswith("# origin")]
        BAD.append((build, expected | {"line": marked[0]}))
        return build

    return note


def healthy(build):
    """A step without an origin."""
    HEALTHY.append(build)
    return build


class Net(nn.Module):
    """A linear layer and a function of what it gives."""

    def __init__(self, function, width=4):
        super().__init__()
        self.fc, self.function = nn.Linear(width, width), function

    def forward(self, x):
        return self.function(self.fc(x))


class Wrapped(nn.Module):
    """A model whose block is run by `how`."""

    def __init__(self, block, how=lambda block, x: block(x)):
        super().__init__()
        self.block, self.how = block, how

    def forward(self, x):
        return self.how(self.block, x)


def zero(module):
    """Make a module's parameters 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def data(rows=3, width=4):
    return torch.linspace(-1.0, 1.0, rows * width).reshape(rows, width)


# The forward pass.


@bad(module="", op="log", kind="domain error", value="-inf")
def log_of_zero_in_a_loss():
    model = nn.Linear(4, 4)

    def step():
        probability = torch.relu(model(data()) - 100.0)
        nll = -torch.log(probability)  # origin
        return nll.mean()

    return model, step


@bad(module="block", op="softmax", kind="fully masked row", value="nan")
def softmax_of_a_fully_masked_row():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(4, 4)

        def forward(self, x):
            scores = self.query(x) @ x.T
            hidden = torch.zeros(3, 3, dtype=torch.bool)
            hidden[1] = True
            scores = scores.masked_fill(hidden, -INF)
            weights = F.softmax(scores, dim=-1)  # origin
            return weights @ x

    model = Wrapped(Attention())
    return model, lambda: model(data()).sum()


@bad(module="block", op="softmax", kind="fully masked row")
def softmax_under_an_inverted_padding_mask():
    attend = torch.tensor([[True, True, True], [True, True, False]])

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(4, 3)

        def forward(self, x):
            scores = torch.where(attend, -INF, self.score(x))
            return scores.softmax(-1)  # origin

    model = Wrapped(Attention())
    return model, lambda: model(data(2)).square().sum()


@bad(module="block", op="softmax", kind="fully masked row")
def softmax_of_an_additive_mask_given_as_an_input():
    mask = torch.zeros(3, 3)
    mask[2] = -INF
    model = Wrapped(Net(lambda y: (y @ y.T + mask).softmax(-1)))  # origin
    return model, lambda: model(data()).square().sum()


@bad(module="attention", module_type="MultiheadAttention", op="softmax", kind="fully masked row")
def multihead_attention_with_all_keys_padding():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            padding = torch.ones(1, 3, dtype=torch.bool)
            return self.attention(x, x, x, key_padding_mask=padding)[0]  # origin

    model = Model()
    return model, lambda: model(data()[None]).sum()


@bad(module="block", op="div", kind="division by zero", value="nan")
def norm_of_nothing():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = zero(nn.Linear(4, 4))

        def forward(self, x):
            y = self.fc(x)
            return y / y.norm(dim=-1, keepdim=True)  # origin

    model = Wrapped(Unit())
    return model, lambda: model(data()).sum()


@bad(module="", op="div", kind="division by zero", value="inf")
def one_over_zero():
    model = zero(nn.Linear(4, 1))
    return model, lambda: (1.0 / model(data())).sum()  # origin


@bad(module="block", op="exp", kind="softmax overflow", value="inf", overflow=False)
def exp_that_overflows_and_becomes_nan_later():
    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            e = torch.exp(self.fc(x).abs() + 1000.0)  # origin
            return e / e.sum(-1, keepdim=True)

    model = Wrapped(Softmax())
    return model, lambda: model(data()).sum()


@bad(module="", op="pow", kind="domain error", value="nan")
def root_of_a_negative_number():
    model = nn.Linear(4, 4)
    return model, lambda: ((model(data()).abs() - 100.0) ** 0.5).mean()  # origin


@bad(module="block.fc", op="linear", kind="overflow", overflow=True, dtype="float16")
def linear_that_overflows_under_autocast():
    model = Wrapped(Net(torch.tanh))
    nn.init.constant_(model.block.fc.weight, 300.0)

    def step():
        with torch.autocast("cpu", torch.float16):
            return (model.block.fc(data() * 1000.0 + 2000.0) * 0.0).sum()  # origin

    return model, step


@bad(module="fc", op="linear", kind="overflow", overflow=True, dtype="float16")
def linear_that_overflows_in_a_half_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)  # origin

    model = Model().half()
    nn.init.constant_(model.fc.weight, 300.0)
    return model, lambda: model(data().half() * 100.0 + 200.0).float().sum()


@bad(module="", op="matmul", kind="overflow", overflow=True, dtype="float16")
def attention_scores_that_overflow_before_the_softmax():
    model = nn.Linear(4, 4).half()
    mask = torch.full((3, 3), -INF, dtype=torch.half).triu(1)

    def step():
        y = model(data().half()) * 0.0 + 200.0
        scores = y @ y.T  # origin
        return (scores + mask).softmax(-1).float().square().sum()

    return model, step


@bad(module="", op="linear", overflow=True, kind="overflow", dtype="float16")
def input_too_large_for_the_cast_of_autocast():
    model = nn.Linear(4, 4)

    def step():
        with torch.autocast("cpu", torch.float16):
            return model(data() * 1e6).sum()  # origin

    return model, step


@bad(module="fc", op="linear", cause="parameter", kind="non-finite parameter", tensor="fc.weight")
def infinite_weight():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)  # origin

    model = Model()
    model.fc.weight.data[2, 1] = INF
    return model, lambda: model(data()).sum()


@bad(module="", op="linear", cause="parameter", tensor="weight", kind="non-finite parameter")
def nan_weight_that_autocast_casts():
    model = nn.Linear(4, 4)
    model.weight.data[0, 0] = torch.nan

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return model(data()).sum()  # origin

    return model, step


@bad(module="words", op="embedding", cause="parameter", tensor="words.weight")
def embedding_with_a_bad_row():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 4)

        def forward(self, tokens):
            return self.words(tokens)  # origin

    model = Model()
    model.words.weight.data[3] = torch.nan
    return model, lambda: model(torch.tensor([0, 3, 1])).sum()


@bad(module="norm", op="batch_norm", cause="buffer", tensor="norm.running_var")
def batch_norm_with_bad_statistics():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x)  # origin

    model = Model().eval()
    model.norm.running_var[1] = torch.nan
    return model, lambda: model(data()).sum()


@bad(module="fc", op="linear", cause="input", kind="non-finite input", tensor="batch['x']")
def nan_in_the_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)  # origin

    model, batch = Model(), {"x": data(), "y": data()}
    batch["x"][1, 2] = torch.nan
    return model, lambda: F.mse_loss(model(batch["x"]), batch["y"])


@bad(module="", op="mse_loss", cause="input", tensor="batch[1]", value="inf")
def infinity_in_the_targets():
    model, batch = nn.Linear(4, 4), (data(), data() + 1.0)
    batch[1][0, 0] = INF

    def step():
        x, y = batch
        return F.mse_loss(model(x), y)  # origin

    return model, step


@bad(module="", op="log", kind="domain error")
def custom_function_in_its_forward():
    class Entropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return p * torch.log(p)  # origin

        @staticmethod
        def backward(ctx, grad):
            return grad

    model = zero(nn.Linear(4, 4))
    return model, lambda: Entropy.apply(model(data())).sum()


@bad(module="norm", op="layer_norm", kind="division by zero")
def layer_norm_without_variance_or_epsilon():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4, eps=0.0)

        def forward(self, x):
            return self.norm(self.fc(x) * 0.0 + 1.0)  # origin

    model = Model()
    return model, lambda: model(data()).sum()


@bad(module="", op="cross_entropy", kind="mean of nothing")
def cross_entropy_of_a_batch_without_targets():
    model, targets = nn.Linear(4, 5), torch.full((3,), -100)
    return model, lambda: F.cross_entropy(model(data()), targets)  # origin


@bad(module="", op="mean", kind="mean of nothing")
def mean_of_an_empty_selection():
    model = nn.Linear(4, 1)

    def step():
        y = model(data())
        return y[y > 1e9].mean() + y.sum()  # origin

    return model, step


@bad(module="", op="mul", kind="indeterminate form", value="nan")
def mask_made_by_multiplying_with_infinity():
    model, attend = nn.Linear(4, 4), torch.tensor([1.0, 1.0, 0.0, 1.0])

    def step():
        mask = (1.0 - attend) * -INF  # origin
        return (model(data()) + mask).softmax(-1).square().sum()

    return model, step


@bad(module="", op="masked_fill", kind="masked value", value="-inf")
def target_that_is_masked_out():
    model, forbidden = nn.Linear(4, 4), torch.tensor([True, False, False, False])

    def step():
        logits = model(data()).masked_fill(forbidden, -INF)  # origin
        return F.cross_entropy(logits, torch.tensor([1, 0, 2]))

    return model, step


@bad(module="", op="div", kind="division by zero")
def division_in_place_in_a_view():
    model = nn.Linear(4, 4)

    def step():
        y = model(data()) + 1.0
        y[:, 1].div_(0.0)  # origin
        return y.mean()

    return model, step


@bad(module="second", op="log", kind="domain error")
def outputs_in_dicts_and_dataclasses():
    @dataclass
    class Out:
        hidden: torch.Tensor
        extra: tuple

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return Out(self.fc(x), ({"zero": x * 0.0},))

    class Second(nn.Module):
        def forward(self, out):
            return {"y": out.hidden + out.extra[0]["zero"].log()}  # origin

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = First(), Second()

        def forward(self, x):
            return {"loss": self.second(self.first(x))["y"].mean()}

    model = Model()
    return model, lambda: model(data())


@bad(module="", op="div", kind="division by zero", dtype="complex64")
def complex_division():
    model = nn.Linear(4, 4, dtype=torch.complex64)

    def step():
        y = model(data().to(torch.complex64))
        return (y / (y * 0.0)).abs().sum()  # origin

    return model, step


@bad(module="", op="log", kind="domain error")
def weights_computed_without_gradient():
    model = nn.Linear(4, 4)

    def step():
        with torch.no_grad():
            weight = torch.log(data() * 0.0)  # origin
        with torch.set_grad_enabled(True):
            return (model(data()) * weight).sum()

    return model, step


@bad(module="block.fc", op="linear", cause="parameter", tensor="block.fc.bias")
def bad_bias_in_a_reentrant_checkpoint():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)  # origin

    model = Wrapped(Block(), lambda block, x: checkpoint(block, x, use_reentrant=True))
    model.block.fc.bias.data[0] = torch.nan
    return model, lambda: model(data().requires_grad_()).sum()


@bad(module="block._orig_mod", op="exp", kind="overflow", note="compiled parts were run eagerly")
def overflow_in_a_compiled_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.exp(self.fc(x) + 1000.0)  # origin

    model = Wrapped(torch.compile(Block(), backend="eager"))
    return model, lambda: model(data()).sum()


@bad(module="", op="log", kind="domain error")
def earliest_of_two_that_meet():
    model = zero(nn.Linear(4, 4))

    def step():
        y = model(data())
        first = torch.log(y)  # origin
        second = torch.exp(y + 1000.0)
        return (second + first).sum()

    return model, step


@bad(module="fc", op="linear", cause="parameter", tensor="fc.weight")
def nan_beside_an_additive_mask_made_by_a_log():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, attend):
            mask = attend.log()
            y = self.fc(x)  # origin
            return (y + mask).softmax(-1)

    model = Model()
    model.fc.weight.data[0, 0] = torch.nan
    return model, lambda: model(data(), torch.tensor([1.0, 0.0, 1.0, 1.0])).square().sum()


@bad(module="", op="log", kind="domain error")
def result_kept_in_memory_that_was_nan_before():
    model = zero(nn.Linear(4, 4))

    def step():
        cache = torch.full((3, 4), torch.nan)
        cache.copy_(torch.log(model(data())))  # origin
        return cache.sum()

    return model, step


# The backward pass: the loss is finite.


@bad(module="block", op="sqrt", phase="backward", kind="infinite slope", value="nan")
def epsilon_outside_of_the_root():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = zero(nn.Linear(4, 4))

        def forward(self, x):
            y = self.fc(x)
            return y / (y.square().sum(-1, keepdim=True).sqrt() + 1e-6)  # origin

    model = Wrapped(Norm())
    return model, lambda: model(data()).sum()


@bad(module="", op="log", phase="backward", kind="infinite slope", value="nan")
def log_that_where_drops():
    model = zero(nn.Linear(4, 4))

    def step():
        y = model(data())
        safe = torch.where(
            y > 0,
            torch.log(y),  # origin
            0.0,
        )
        return safe.sum() + y.sum()

    return model, step


@bad(module="", op="sqrt", phase="backward", kind="domain error", value="nan")
def root_of_a_negative_number_that_where_drops():
    model = nn.Linear(4, 4)

    def step():
        y = model(data())
        root = torch.sqrt(y - 100.0)  # origin
        return torch.where(y > 100.0, root, y).sum()

    return model, step


@bad(module="", op="exp", phase="backward", kind="overflow")
def exp_that_where_drops():
    model = nn.Linear(4, 4)

    def step():
        y = model(data()) + 200.0
        e = y.exp()  # origin
        return torch.where(y < 80.0, e, y).sum()

    return model, step


@bad(module="", op="pow", phase="backward", kind="infinite slope")
def power_of_zero():
    model = zero(nn.Linear(4, 4))
    return model, lambda: (model(data()).abs() ** 0.5).sum()  # origin


@bad(module="block", op="div", phase="backward", kind="division by zero")
def custom_function_in_its_backward():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sqrt()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad / (2.0 * x.sqrt())  # origin

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = zero(nn.Linear(4, 4))

        def forward(self, x):
            return Root.apply(self.fc(x))

    model = Wrapped(Block())
    return model, lambda: model(data()).sum()


@bad(module="block", op="div", phase="backward", kind="division by zero")
def custom_function_in_its_backward_before_another_operation():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sqrt()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad / (2.0 * x.sqrt())  # origin

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = zero(nn.Linear(4, 4))

        def forward(self, x):
            return Root.apply(self.fc(x)) * 2.0

    def again(block, x):
        return checkpoint(block, x, use_reentrant=True)

    model = Wrapped(Block(), again)
    return model, lambda: 2.0 * model(data().requires_grad_()).sum()


@bad(module="", op="index_put", phase="backward", kind="overflow", overflow=True)
def half_written_into_float_under_a_large_slope():
    model = nn.Linear(4, 4).half()

    def step():
        y = torch.zeros(3, 4)
        y[:, :] = model(data().half())  # origin
        return (y * 1e6).sum()

    return model, step


@bad(module="", op="sqrt", phase="backward", kind="infinite slope")
def earliest_of_two_in_the_order_of_the_backward_pass():
    model = nn.ModuleList([zero(nn.Linear(4, 4)), zero(nn.Linear(4, 4))])

    def step():
        one = model[0](data()).sqrt().sum()
        two = model[1](data()).sqrt().sum()  # origin
        return one + two

    return model, step


def _root_in_a_block(how):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = zero(nn.Linear(4, 4))

        def forward(self, x):
            y = self.fc(x)
            return y.sqrt()  # origin

    model = Wrapped(Block(), how)
    return model, lambda: model(data().requires_grad_()).sum()


LINE = inspect.getsourcelines(_root_in_a_block)[1] + 8
ROOT = {"module": "block", "op": "sqrt", "phase": "backward", "kind": "infinite slope"}


def _noted(name, how, **changes):
    def build():
        return _root_in_a_block(how)

    build.__name__ = name
    BAD.append((build, ROOT | {"line": LINE} | changes))


def _eager_compiled(block, x):
    return torch.compile(block, backend="eager")(x)


_noted("root_in_a_plain_block", lambda block, x: block(x))
_noted("root_in_a_checkpoint", lambda block, x: checkpoint(block, x, use_reentrant=False))
_noted("root_in_a_reentrant_checkpoint", lambda block, x: checkpoint(block, x, use_reentrant=True))
_noted(
    "root_in_a_checkpointed_method",
    lambda block, x: checkpoint(block.forward, x, use_reentrant=True),
)
_noted("root_in_a_compiled_block", _eager_compiled)


@bad(module="fc", op="linear", phase="backward", overflow=True, dtype="float16", kind="overflow")
def gradient_that_overflows_under_a_loss_scale():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)  # origin

    model = Model()

    def step():
        with torch.autocast("cpu", torch.float16):
            y = model(data() * 100.0 + 200.0)
        return y.float().sum() * 2.0**12

    return model, step


@bad(module="", op="sqrt", phase="backward", kind="infinite slope")
def sparse_gradient_of_an_embedding():
    model = zero(nn.Embedding(5, 4, sparse=True))
    tokens = torch.tensor([1, 1, 2])
    return model, lambda: model(tokens).square().sum(-1).sqrt().sum()  # origin


@bad(module="", op="sqrt", phase="backward", kind="infinite slope", value="inf")
def root_in_place_in_a_view():
    model = zero(nn.Linear(4, 4))

    def step():
        y = model(data()) * 1.0
        y[:, 1].sqrt_()  # origin
        return y.sum()

    return model, step


@bad(module="", op="sqrt", phase="backward", kind="infinite slope")
def gradient_penalty_at_zero():
    model = nn.Sequential(zero(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))

    def step():
        x = data().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum().sqrt()  # origin

    return model, step


# Nothing to say.


@healthy
def plain_regression():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1))
    return model, lambda: model(data()).square().mean()


@healthy
def root_behind_a_relu():
    model = nn.Linear(4, 4)
    return model, lambda: torch.sqrt(torch.relu(model(data()) - 100.0)).sum()


@healthy
def clamp_before_the_log_that_where_drops():
    model = zero(nn.Linear(4, 4))

    def step():
        y = model(data())
        return torch.where(y > 0, torch.log(y.clamp(min=1e-6)), 0.0).sum()

    return model, step


@healthy
def two_wheres_around_a_log():
    model = zero(nn.Linear(4, 4))

    def step():
        y = model(data())
        safe = torch.where(y > 0, y, 1.0)
        return torch.where(y > 0, torch.log(safe), 0.0).sum()

    return model, step


@healthy
def deviation_of_a_constant():
    model = zero(nn.Linear(4, 4))
    return model, lambda: model(data()).std()


@healthy
def bad_values_that_only_a_log_shows():
    model = nn.Linear(4, 4)

    def step():
        y = model(data())
        torch.log(y.detach() * 0.0).mean()
        return y.square().mean()

    return model, step


@healthy
def causal_mask_of_infinities():
    model = nn.Linear(4, 4)

    def step():
        y = model(data(4))
        mask = torch.full((4, 4), -INF).triu(1)
        return ((y @ y.T) + mask).softmax(-1).square().sum()

    return model, step


@healthy
def additive_mask_in_scaled_dot_product_attention():
    model = nn.Linear(4, 4)

    def step():
        y = model(data(4))[None, None]
        mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -INF)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask).square().sum()

    return model, step


@healthy
def fully_masked_row_in_scaled_dot_product_attention():
    """Its kernels give 0 for such a row."""
    model = nn.Linear(4, 4)

    def step():
        y = model(data(4))[None, None]
        attend = torch.zeros(4, 4, dtype=torch.bool)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=attend).square().sum()

    return model, step


@healthy
def sigmoid_through_an_overflow_in_no_graph():
    model = nn.Linear(4, 4)

    def step():
        with torch.no_grad():
            gate = 1.0 / (1.0 + torch.exp(data() * 1000.0))
        return (model(data()) * gate).sum()

    return model, step


@healthy
def memory_left_blank_in_part():
    model = nn.Linear(4, 4)

    def step():
        buffer = torch.empty(4, 4).fill_(torch.nan)
        buffer[:3] = model(data())
        return buffer[:3].square().sum()

    return model, step


@healthy
def integers_and_flags():
    model = nn.Embedding(5, 4)
    return model, lambda: model(torch.tensor([1, 2]) // 1).square().sum()


@healthy
def loss_without_gradient():
    model = nn.Linear(4, 4)
    return model, lambda: model(data()).detach().sum()
