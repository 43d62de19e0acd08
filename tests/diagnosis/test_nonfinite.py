"""Where NaNs are born, case by case; and what a search leaves behind: nothing."""

import gc
import json
import os
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lit_stability import locate_nonfinite
from lit_stability.diagnosis.nonfinite.advice import ADVICE, LAYERS, OPS, advise
from lit_stability.distributed.dtensor import local
from lit_stability.training_state.rng import capture_rng, same_rng
from tests.diagnosis import nonfinite_cases
from tests.diagnosis.nonfinite_cases import BAD, HEALTHY, INF, data
from tests.distributed import run_ranks

EXPECTED = {"phase": "forward", "cause": "operation"}
LOG_OF_ZERO = next(build for build, _ in BAD if build.__name__ == "log_of_zero_in_a_loss")


@pytest.mark.parametrize(("build", "expected"), [pytest.param(*c, id=c[0].__name__) for c in BAD])
def test_locate_bad_step_names_the_origin(build, expected):
    """S15, S4: module, operation, line, phase and cause; and the same when asked again."""
    torch.manual_seed(0)
    model, step = build()
    found = locate_nonfinite(model, step)
    assert found is not None
    wanted = EXPECTED | expected
    assert {key: getattr(found, key) for key in wanted} == wanted, found.describe()
    assert found.file == nonfinite_cases.__file__
    assert type(model.get_submodule(found.module)).__name__ == found.module_type
    assert locate_nonfinite(model, step) == found


@pytest.mark.parametrize("build", HEALTHY, ids=lambda b: b.__name__)
def test_locate_healthy_step_finds_nothing(build):
    """S15."""
    torch.manual_seed(0)
    assert locate_nonfinite(*build()) is None


class Busy(nn.Module):
    """Changes all that a step can change."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))
        self.accumulated = 0
        self.fc.weight.register_post_accumulate_grad_hook(self.count)

    def count(self, parameter):
        self.accumulated += 1

    def forward(self, x):
        self.seen = self.seen + 1.0  # another tensor
        self.frozen.add_(1.0)
        self.fc.bias.requires_grad_(False)
        x.mul_(2.0)
        torch.rand(3)
        self.drop.eval()
        return self.norm(self.drop(self.fc(x)))


def everything(model, *tensors):
    """Values of all that must not change, and the numbers of hooks."""
    named = [*model.named_parameters(), *model.named_buffers()]
    values = {name: t.detach().clone() for name, t in named}
    values |= {f"grad of {n}": p.grad.clone() for n, p in named if p.grad is not None}
    values |= {str(i): t.detach().clone() for i, t in enumerate(tensors)}
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return values, [*flags, *hooks, torch._C._len_torch_function_stack()]


@pytest.mark.parametrize("spoil", ["nothing", "loss", "gradients", "raise"])
def test_locate_leaves_everything_as_it_was(spoil):
    """S15: gradients, buffers, generators, flags, hooks, the batch."""
    torch.manual_seed(0)
    model, x, leaf = Busy(), data(), data().requires_grad_()
    model.norm(model.fc(x)).sum().backward()
    kept = [(p, p.grad) for p in model.parameters()]
    seen, accumulated = model.seen, model.accumulated

    def step():
        y = model(x) + leaf
        if spoil == "raise":
            raise RuntimeError("out of luck")
        root = torch.sqrt(y.detach() * 0.0 + y * 0.0) if spoil == "gradients" else 0.0
        return (y + root).sum() + (torch.log(x * 0.0).sum() if spoil == "loss" else 0.0)

    before, rng = everything(model, x), capture_rng()
    if spoil == "raise":
        with pytest.raises(RuntimeError, match="out of luck"):
            locate_nonfinite(model, step)
    else:
        found = locate_nonfinite(model, step)
        assert (found is None) == (spoil == "nothing")
    after = everything(model, x)
    assert before[1] == after[1]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert same_rng(rng, capture_rng())
    assert all(p.grad is grad for p, grad in kept)
    assert model.seen is seen
    assert leaf.grad is None
    assert model.accumulated == accumulated
    assert model.fc.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_locate_called_without_gradients_runs_the_backward_pass(context):
    """Callbacks are often called where gradients are off."""
    model, step = next(build for build, _ in BAD if build.__name__ == "power_of_zero")()
    with context():
        assert locate_nonfinite(model, step).op == "pow"


def test_locate_step_with_dropout_draws_the_same_numbers_again():
    """S15: an element that dropout keeps only now and then is found from the step's own state."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    drawn = []

    def step():
        y = model(data())
        drawn.append(y.detach().clone())
        return (1.0 / y).sum()

    assert locate_nonfinite(model, step).op == "div"
    step()
    assert torch.equal(drawn[0], drawn[1])


def test_locate_distinguishes_overflow_that_is_finite_in_float32():
    """S9, S15: what keeping an operation in float32 cures."""
    model = nn.Linear(4, 4).half()

    def step(argument):
        return lambda: torch.exp(model(data().half()) * 0.0 + argument).float().sum()

    assert locate_nonfinite(model, step(20.0)).overflow
    hopeless = locate_nonfinite(model, step(1000.0))
    assert (hopeless.kind, hopeless.overflow) == ("overflow", False)


def test_locate_gradients_of_the_bad_step_are_not_taken_for_those_of_the_search():
    """S15: they are NaN as a rule when a search begins."""
    model = nn.Linear(4, 4)
    model(data()).sum().backward()
    model.weight.grad.fill_(torch.nan)
    assert locate_nonfinite(model, lambda: model(data()).sum()) is None
    assert model.weight.grad.isnan().all()


def test_locate_within_the_callers_autocast_names_the_weight_cast_before():
    """A cast that autocast keeps was made before anything was watched."""
    model = nn.Linear(4, 4)
    model.weight.data[0, 0] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        model(data())
        found = locate_nonfinite(model, lambda: model(data()).sum())
    assert (found.cause, found.tensor) == ("parameter", "weight")


def test_locate_overflow_under_autocast_names_the_weights_cast_among_its_inputs():
    """S9."""
    build = nonfinite_cases.linear_that_overflows_under_autocast
    names = [each.name for each in locate_nonfinite(*build()).inputs]
    assert {"block.fc.weight", "block.fc.bias"} < set(names)


def test_locate_runs_compiled_modules_without_their_compiled_code():
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph.forward(*args)

    block = nn.Linear(4, 4)
    model = nn.Sequential(torch.compile(block, backend=backend))
    model(data())
    assert runs == [1]
    found = locate_nonfinite(model, lambda: torch.log(model(data()) * 0.0).sum())
    assert found.note == "compiled parts were run eagerly"
    assert runs == [1]
    model(data())
    assert runs == [1, 1]


def test_locate_reports_inputs_with_their_ranges():
    """S15."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
        model.bias.zero_()
    found = locate_nonfinite(model, lambda: torch.log(model(data())).mean())
    (given,) = found.inputs
    assert (given.shape, given.dtype, given.nonfinite) == ((3, 4), "float32", 0)
    assert (given.minimum, given.maximum) == pytest.approx((-1.0, 1.0))


def test_locate_model_that_is_not_the_caller_of_its_loss_is_still_searched():
    """A step in which nothing but the loss tensor itself is bad."""
    bad = torch.tensor(torch.nan)
    found = locate_nonfinite(nn.Linear(4, 4), lambda: bad)
    assert (found.cause, found.kind, found.value) == ("input", "non-finite input", "nan")


@pytest.mark.parametrize(
    ("returned", "shown"),
    [(None, "None"), ({"los": 1}, "None"), (1.5, "1.5"), (torch.ones(2, 3), r"shape \(2, 3\)")],
)
def test_locate_step_without_a_loss_is_refused(returned, shown):
    with pytest.raises(ValueError, match=f"one element.*returned.*{shown}"):
        locate_nonfinite(nn.Linear(4, 4), lambda: returned)


def test_origin_describes_itself_in_two_lines_and_in_json():
    """S15, V5."""
    found = locate_nonfinite(*LOG_OF_ZERO())
    first, second = str(found).splitlines()
    assert first.startswith("log made -inf in Linear, nonfinite_cases.py:")
    assert "forward pass: domain error; self float32[3, 4] in [0, 0]" in first
    assert second.startswith("  try: the argument is too small, 0 or negative: clamp it above 0")
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["advice"] == found.advice
    assert plain["inputs"][0]["shape"] == [3, 4]


@pytest.mark.parametrize(
    ("kind", "op", "layer", "phase", "overflow", "part"),
    [
        ("overflow", "linear", "Linear", "forward", True, "run linear in float32"),
        ("overflow", "linear", "Linear", "backward", True, "lower the loss scale"),
        ("overflow", "exp", "Linear", "forward", False, "softplus"),
        ("softmax overflow", "exp", "Linear", "forward", False, "subtract the maximum"),
        ("overflow", "matmul", "SelfAttention", "forward", False, "normalise queries and keys"),
        ("overflow", "linear", "LMHeadLinear", "forward", False, "lower the learning rate"),
        (
            "division by zero",
            "layer_norm",
            "LayerNorm",
            "forward",
            False,
            "eps of the norm above 0",
        ),
        ("infinite slope", "sqrt", "RMSNorm", "backward", False, "inside the root"),
        ("division by zero", "div", "Loss", "forward", False, "add an epsilon"),
    ],
)
def test_advice_depends_on_accident_operation_and_layer(kind, op, layer, phase, overflow, part):
    """S7, S15."""
    assert part in advise(kind, op, layer, phase, overflow=overflow)


class Held(nn.Module):
    """A parameter, to be the argument of a function."""

    def __init__(self, values):
        super().__init__()
        self.p = nn.Parameter(torch.as_tensor(values, dtype=torch.float32))


ONES, SINGULAR, EQUAL = torch.ones(3), torch.ones(3, 3), torch.eye(3)
RAMP = torch.arange(9.0).view(3, 3)
MASK = torch.eye(3, 4, dtype=torch.bool)
WHY = {
    # A slope at an argument that is too small, or at the edge of the domain.
    "log of a denormal": ([1e-44], lambda p: p.log().sum(), "infinite slope", "clamp"),
    "rsqrt of a small number": ([1e-30], lambda p: p.rsqrt().sum(), "infinite slope", "epsilon"),
    "norm by hand at 0": ([0.0], lambda p: p.square().sum().sqrt(), "infinite slope", "inside"),
    "hypot at 0": ([0.0], lambda p: torch.hypot(p, p).sum(), "infinite slope", "epsilon"),
    "root as a power at 0": ([0.0], lambda p: (p**0.3).sum(), "infinite slope", "the base"),
    "angle of a small number": (
        *([[1e-25, 1e-25]], lambda p: torch.view_as_complex(p).angle().sum()),
        *("infinite slope", "an angle has no slope at 0"),
    ),
    "acos at 1": ([1.0], lambda p: p.acos().sum(), "infinite slope", "inside of (-1, 1)"),
    # A divisor that is too small, and a dividend that is too large.
    "division by a denormal": ([1e-40], lambda p: (1 / p).sum(), "division by zero", "epsilon"),
    "divergence from a target that underflows": (
        [0.0, -300.0],
        lambda p: F.kl_div(torch.zeros(2).log_softmax(0), p.softmax(0), reduction="sum"),
        *("division by zero", "log_target=True"),
    ),
    "slope of a division": ([1e-25], lambda p: (1 / p).sum(), "division by zero", "epsilon"),
    "large dividend": ([1e38], lambda p: (p / 0.01).sum(), "overflow", "too large"),
    # A value that is too large.
    "square of a large number": ([1e30], lambda p: (p**2).sum(), "overflow", "too large"),
    "log-variance": ([200.0], lambda p: (p.exp() - p).sum(), "overflow", "log-variance"),
    "rate of a Poisson loss": (
        *([200.0], lambda p: F.poisson_nll_loss(p, torch.ones(1)), "overflow", "softplus"),
    ),
    "softmax by hand": (
        *([200.0, 1.0], lambda p: (p.exp() / p.exp().sum()).sum()),
        *("softmax overflow", "subtract the maximum"),
    ),
    "logsumexp by hand": (
        *([200.0, 1.0], lambda p: p.exp().sum().log(), "softmax overflow", "logsumexp"),
    ),
    # Linear algebra.
    "eigenvectors": (
        *(EQUAL, lambda p: (torch.linalg.eigh(p)[1] * RAMP).sum(), "degenerate matrix", "eigvalsh"),
    ),
    "singular vectors": (
        *(EQUAL, lambda p: (torch.linalg.svd(p)[0] * RAMP).sum(), "degenerate matrix", "svdvals"),
    ),
    "determinant": (SINGULAR, torch.logdet, "degenerate matrix", "the determinant is 0"),
    "negative determinant": (-EQUAL, torch.logdet, "degenerate matrix", "the determinant"),
    "solution": (
        *(SINGULAR, lambda p: torch.linalg.solve_ex(p, ONES)[0].sum()),
        *("degenerate matrix", "lstsq"),
    ),
    "product of matrices": (
        *(200 * SINGULAR, lambda p: torch.linalg.matrix_exp(p).sum(), "overflow", "too large"),
    ),
    # Constants and masks.
    "factor of NaN": (ONES, lambda p: p.sum() * torch.nan, "non-finite constant", "the program"),
    "factor in a tensor": (
        *(ONES, lambda p: p.sum() * torch.tensor(torch.nan), "non-finite constant", "the program"),
    ),
    "summand of Inf": (ONES, lambda p: p.sum() + torch.inf, "non-finite constant", "the program"),
    "masked target": (
        *(
            RAMP[:, [0, 1, 2, 0]],
            lambda p: F.cross_entropy(p.masked_fill(MASK, -torch.inf), LABELS),
        ),
        *("masked value", "masked positions"),
    ),
}
LABELS = torch.arange(3)


@pytest.mark.parametrize("name", WHY)
def test_advice_goes_by_the_reason_and_not_by_the_kernel(name):
    values, function, kind, part = WHY[name]
    model = Held(values)
    found = locate_nonfinite(model, lambda: function(model.p))
    assert found is not None
    assert found.kind == kind, found.describe()
    assert part in found.advice


class Weighted(nn.Module):
    """A linear layer and weights of the classes, one of which is infinite."""

    def __init__(self, keep):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        keep(self, torch.tensor([1.0, 1.0, torch.inf]))


def loss_of(weights):
    def step(model, batch):
        x, y = batch
        chosen = F.one_hot(y, 3) * model.fc(x).log_softmax(-1)
        return -(weights(model) * chosen).sum()

    return step


class Criterion:
    """A loss that is no module."""


def in_an_object(model, weights):
    model.criterion = Criterion()
    model.criterion.weight = weights


@pytest.mark.parametrize(
    ("keep", "weights", "cause", "tensor"),
    [
        (lambda m, w: setattr(m, "w", w), lambda m: m.w, "constant", "w"),
        (lambda m, w: setattr(m, "ws", [w]), lambda m: m.ws[0], "constant", "ws[0]"),
        (in_an_object, lambda m: m.criterion.weight, "constant", "criterion.weight"),
        (lambda m, w: m.register_buffer("w", w), lambda m: m.w, "buffer", "w"),
    ],
    ids=["attribute", "list", "object", "buffer"],
)
def test_locate_weight_of_an_absent_class_names_where_the_module_holds_it(
    keep, weights, cause, tensor
):
    model, batch = Weighted(keep), (data(), torch.tensor([0, 1, 0]))
    found = locate_nonfinite(model, lambda: loss_of(weights)(model, batch))
    assert (found.cause, found.tensor) == (cause, tensor), found.describe()
    assert "a class without samples" in found.advice


def test_locate_single_weight_of_inf_is_no_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)
            self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([torch.inf]))

    model = Model()
    found = locate_nonfinite(model, lambda: model.loss(model.fc(data()), torch.zeros(3, 1)))
    assert (found.cause, found.tensor) == ("buffer", "loss.pos_weight"), found.describe()


def test_locate_fully_masked_row_under_a_mask_in_a_buffer_is_the_softmax():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((3, 4), -INF))

    model = Model()
    found = locate_nonfinite(model, lambda: (model.fc(data()) + model.mask).softmax(-1).sum())
    assert (found.cause, found.op, found.kind) == ("operation", "softmax", "fully masked row")


def test_locate_batch_that_the_module_keeps_is_an_input():
    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def training_step(self, batch):
            self.last = batch
            return self.fc(batch).sum()

    model, batch = Keeper(), torch.full((2, 4), torch.nan)
    model.last = batch
    found = locate_nonfinite(model, lambda: model.training_step(batch))
    assert (found.cause, found.tensor) == ("input", "batch")


def test_locate_state_that_the_step_replaces_is_no_constant():
    class Carrier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.hidden = nn.Linear(4, 4), torch.full((4,), torch.nan)

        def forward(self, x):
            out = self.fc(x + self.hidden)
            self.hidden = out.detach().mean(0)
            self.hidden = torch.zeros(4)
            return out.sum()

    model = Carrier()
    found = locate_nonfinite(model, lambda: model(data()))
    assert (found.cause, found.kind, found.tensor) == ("buffer", "non-finite buffer", "hidden")


def test_advice_of_a_users_own_layer_is_given(monkeypatch):
    """S7: extensible."""
    monkeypatch.setitem(LAYERS, ("domain error", "cauchyhead"), "bound the scale from below")
    given = advise("domain error", "acos", "MyCauchyHead", "forward", overflow=False)
    assert given == "bound the scale from below"


def test_advice_tables_name_known_kinds():
    assert {kind for kind, _ in [*OPS, *LAYERS]} <= set(ADVICE)


def test_locate_whole_transformer_with_one_bad_weight_names_it():
    """S15."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    assert locate_nonfinite(model, lambda: F.mse_loss(model(x), x)) is None
    with torch.no_grad():
        model.layers[1].linear1.weight[3, 5] = torch.nan
    found = locate_nonfinite(model, lambda: F.mse_loss(model(x), x))
    assert (found.cause, found.tensor) == ("parameter", "layers.1.linear1.weight")
    assert (found.op, found.module) == ("linear", "layers.1.linear1")


def ranks_search(sharded):
    """On each rank: what is found in steps that are healthy, or bad on both ranks or on rank 1."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    x = torch.randn(4, 8)
    wrapped(x).sum().backward()
    before = [local(p.grad).clone() for p in model.parameters()]
    steps = [
        lambda: wrapped(x).sum(),
        lambda: torch.log(wrapped(x) * 0.0).sum(),
        lambda: torch.sqrt(wrapped(x) * 0.0).sum(),
        lambda: torch.sqrt(wrapped(x) * 0.0 + 1.0 - rank).sum(),
    ]
    found = [locate_nonfinite(model, step) for step in steps]
    after = [local(p.grad) for p in model.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return same, [f and (f.op, f.phase, f.kind) for f in found]


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_locate_on_two_ranks_blames_the_operation_and_not_the_collective(sharded, tmp_path):
    """S15: and on a rank that only received the NaN it says so."""
    zero, one = run_ranks(ranks_search, sharded, folder=tmp_path)
    both = [None, ("log", "forward", "domain error"), ("sqrt", "backward", "infinite slope")]
    assert zero[0]
    assert one[0]
    assert zero[1][:3] == both
    assert one[1] == [*both, both[2]]
    assert zero[1][3][1:] == ("backward", "unseen")


def trained(searched):
    """Weights and buffers after ten steps, each searched between its backward pass and update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(10):
        x = torch.randn(16, 4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if searched:
            found = locate_nonfinite(model, lambda x=x: (model(x).square() / 0.0).mean())
            assert found.op == "div"
        optimizer.step()
    return model.state_dict()


def test_locate_in_every_step_leaves_the_training_bit_identical():
    """S15."""
    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)


def test_locate_keeps_nothing_of_the_step_alive():
    model = nn.Linear(4, 4)
    kept = []

    def step():
        y = model(data())
        kept.append(weakref.ref(y))
        return torch.log(y * 0.0).sum()

    assert locate_nonfinite(model, step) is not None
    gc.collect()
    assert [ref() for ref in kept] == [None]


@dataclass(slots=True)
class Graph:
    """A batch without ``__dict__``."""

    x: torch.Tensor


class Doubles(nn.Module):
    """Returns a batch, as the layers of graph networks do."""

    def forward(self, graph):
        return Graph(graph.x * 2)


class Logarithm(nn.Module):
    def forward(self, graph):
        return Graph(graph.x.log())


def test_module_that_returns_a_batch_with_slots_is_searched():
    module = nn.Sequential(Doubles(), Logarithm())
    graph = Graph(torch.tensor([-1.0], requires_grad=True))
    origin = locate_nonfinite(module, lambda: module(graph).x.sum())
    assert (origin.module, origin.op) == ("1", "log")
