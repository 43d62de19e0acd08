"""What is measured, against numpy in float64 and against what can be worked out by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stability.measurement.gradient_distribution import gradient_details
from lit_stability.measurement.step_meter import StepMeter

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ADAMS = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "low beta2": (torch.optim.Adam, {"betas": (0.9, 0.5)}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def parameters(*shapes, dtype=F32, grads=True):
    """Named parameters with random gradients."""
    found = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in found:
        p.grad = torch.randn(p.shape).to(p.dtype) if grads else None
    return {f"p{i}": p for i, p in enumerate(found)}


def meter(named, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(list(named.values()), lr=options.pop("lr", 0.1))
    return StepMeter(named.items(), optimizer, **options)


def norm64(*tensors):
    return math.sqrt(sum(float((t.detach().double().numpy() ** 2).sum()) for t in tensors))


@pytest.mark.parametrize(
    ("dtypes", "scale"),
    [
        ([F32], 1.0),
        ([BF16], 1.0),
        ([F16], 1.0),
        ([F16], 4000.0),  # squares are beyond fp16's 65504
        ([F32], 1e17),  # of 2000 elements: squares add up to 2e37, fp32 ends at 3.4e38
        ([F64], 1e-30),
        ([F16, BF16, F32], 1.0),
        ([F64, BF16], 1.0),
        ([F64, F32, F16], 1.0),
    ],
)
def test_norms_of_any_precision_equal_float64_norms(dtypes, scale):
    """S6."""
    named = {str(i): nn.Parameter(torch.zeros(50, 40, dtype=d)) for i, d in enumerate(dtypes)}
    for p in named.values():
        p.grad = (torch.randn(50, 40, dtype=F64) * scale).to(p.dtype)
    stats = meter(named).measure(3, None)
    expected = [norm64(p.grad) for p in named.values()]
    assert stats.grad_norms == pytest.approx(expected, rel=2e-6, abs=0)
    total = norm64(*(p.grad for p in named.values()))
    assert stats.grad_norm == pytest.approx(total, rel=2e-6, abs=0)
    assert stats.step == 3
    assert stats.finite_gradients


def test_norm_of_many_elements_is_within_a_few_roundings():
    named = {"w": nn.Parameter(torch.zeros(1000, 1000))}
    named["w"].grad = torch.rand(1000, 1000) + 1
    stats = meter(named).measure(0, None)
    assert stats.grad_norm == pytest.approx(norm64(named["w"].grad), rel=1e-5)


def test_norm_of_complex_gradient_is_that_of_its_moduli():
    named = parameters((20, 30), dtype=torch.complex64)
    stats = meter(named).measure(0, None, details=True, scan_weights=True)
    grad = named["p0"].grad
    assert stats.grad_norm == pytest.approx(float(np.linalg.norm(grad.numpy())), rel=1e-5)


def test_norm_of_sparse_gradient_counts_repeated_rows_once():
    table = nn.Embedding(10, 4, sparse=True)
    (table(torch.tensor([1, 2, 2])) * 3.0).sum().backward()
    stats = meter({"table": table.weight}).measure(0, None, details=True)
    assert stats.grad_norm == pytest.approx(norm64(table.weight.grad.to_dense()), rel=1e-6)


def test_missing_gradients_are_left_out():
    named = parameters(3, 4, 5)
    named["p1"].grad = None
    stats = meter(named).measure(0, None)
    assert stats.names == ("p0", "p2")
    assert len(stats.grad_norms) == 2


def test_no_gradient_at_all_has_norm_zero():
    stats = meter(parameters(3, grads=False)).measure(0, torch.tensor(2.0), details=True)
    assert (stats.grad_norm, stats.names, stats.details, stats.loss) == (0.0, (), (), 2.0)


def test_zero_size_parameter_is_left_out():
    named = parameters((0, 3), 7)
    m = meter(named)
    stats = m.measure(0, None, scan_weights=True, details=True)
    assert stats.names == ("p1",)
    assert stats.grad_norm == pytest.approx(norm64(named["p1"].grad), rel=1e-6)
    m.optimizer.step()
    assert m.measure(1, None).update_ratio is not None


def test_tied_parameter_counts_once():
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    net["b"](net["a"](torch.randn(2, 4))).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stats = StepMeter(net.named_parameters(), optimizer).measure(0, None)
    assert stats.names == ("a.weight",)
    assert stats.grad_norm == pytest.approx(norm64(net["a"].weight.grad), rel=1e-6)


def test_frozen_parameter_is_measured_once_it_thaws():
    net = nn.Linear(3, 3)
    net.bias.requires_grad_(False)
    m = StepMeter(net.named_parameters(), torch.optim.SGD(net.parameters(), lr=0.1))
    net(torch.ones(1, 3)).sum().backward()
    assert m.measure(0, None).names == ("weight",)
    net.bias.requires_grad_(True)
    net(torch.ones(1, 3)).sum().backward()
    assert m.measure(1, None).names == ("weight", "bias")


def test_meter_is_stale_when_the_optimizer_was_given_more():
    net = nn.Linear(3, 3)
    optimizer = torch.optim.SGD([net.weight], lr=0.1)
    m = StepMeter(net.named_parameters(), optimizer)
    assert not m.stale
    optimizer.add_param_group({"params": [net.bias]})
    assert m.stale


def test_meter_is_stale_when_a_parameter_was_exchanged():
    """As where points are added to a cloud, and where a head gets another shape."""
    net = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    m = StepMeter(net.named_parameters(), optimizer)
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.zeros(4))
    assert m.stale


def test_optimizer_of_other_parameters_is_refused_by_name():
    other = torch.optim.RMSprop([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"optimizer 2 \(RMSprop\) holds no parameter"):
        StepMeter(parameters(3).items(), other, index=2)


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([math.nan, 1.0], "nan"),
        ([math.inf, 1.0], "inf"),
        ([-math.inf, 1.0], "inf"),
        ([math.inf, math.nan], "nan"),
    ],
)
def test_non_finite_gradient_shows_in_total_and_in_its_layer(values, total):
    """N1, S6."""
    named = parameters(5, 5, 5)
    for p, value in zip(named.values(), values, strict=False):
        p.grad[2] = value
    stats = meter(named).measure(0, None)
    assert repr(stats.grad_norm) == total
    assert not stats.finite_gradients
    bad = {n for n, v in stats.worst_layers(3) if not math.isfinite(v)}
    assert bad == {f"p{i}" for i, v in enumerate(values) if not math.isfinite(v)}
    assert stats.worst_layers(1)[0][0] in bad


def test_worst_layers_come_largest_first():
    named = parameters(4, 4, 4)
    for p, value in zip(named.values(), (2.0, 8.0, 4.0), strict=True):
        p.grad.fill_(value)
    assert meter(named).measure(0, None).worst_layers(2) == [("p1", 16.0), ("p2", 8.0)]


@pytest.mark.parametrize(
    ("grad", "mean", "std", "low", "high", "zeros"),
    [
        ([1.0, 2.0, 3.0, 6.0], 3.0, math.sqrt(3.5), 1.0, 6.0, 0.0),
        ([0.0, -0.0, 0.0, 8.0], 2.0, math.sqrt(12.0), 0.0, 8.0, 0.75),
        ([-1.0, 1.0], 0.0, 1.0, -1.0, 1.0, 0.0),
        ([5.0], 5.0, 0.0, 5.0, 5.0, 0.0),
    ],
)
def test_details_have_known_answers(grad, mean, std, low, high, zeros):
    """S6, S8."""
    named = {"w": nn.Parameter(torch.zeros(len(grad)))}
    named["w"].grad = torch.tensor(grad)
    (detail,) = meter(named).measure(0, None, details=True).details
    found = (detail.mean, detail.std, detail.minimum, detail.maximum, detail.zero_share)
    assert found == pytest.approx((mean, std, low, high, zeros), abs=1e-6)
    assert detail.name == "w"
    assert detail.norm == pytest.approx(norm64(named["w"].grad))
    (row,) = gradient_details(named.items())
    assert row["std"] == pytest.approx(std, abs=1e-6)
    assert row["zero_share"] == zeros


def test_gradient_details_of_a_large_tensor_miss_no_element():
    named = {"w": nn.Parameter(torch.zeros(300, 300))}
    named["w"].grad = torch.zeros(300, 300)
    named["w"].grad[137, 251] = -7.0
    (row,) = gradient_details(named.items())
    assert (row["minimum"], row["maximum"]) == (-7.0, 0.0)
    assert row["zero_share"] == pytest.approx(1 - 1 / 90000, abs=1e-7)


def test_details_come_only_when_asked_for():
    assert meter(parameters(3)).measure(0, None).details == ()


@pytest.mark.parametrize(
    ("loss", "scale", "expected"),
    [
        (torch.tensor(6.0), None, (6.0, None, True)),
        (torch.tensor([6.0], dtype=F16), torch.tensor(2.0), (3.0, 2.0, True)),
        (torch.tensor(6.0, dtype=F64), torch.tensor(0.0), (6.0, 0.0, True)),
        (None, torch.tensor(2.0), (math.nan, 2.0, False)),
    ],
)
def test_loss_is_divided_by_its_scale(loss, scale, expected):
    stats = meter(parameters(3)).measure(0, loss, loss_scale=scale)
    assert (stats.loss, stats.loss_scale, stats.has_loss) == pytest.approx(expected, nan_ok=True)


def moved_by_a_step(named, lr):
    """``(measured, true)`` update ratio of one SGD step."""
    m = meter(named, lr=lr)
    assert m.measure(0, None, learning_rates=[lr]).update_ratio is None
    before = [p.detach().clone() for p in named.values()]
    m.optimizer.step()
    stats = m.measure(1, None)
    assert stats.update_learning_rate == lr
    diff = [p.detach() - b for p, b in zip(named.values(), before, strict=True)]
    return stats.update_ratio, norm64(*diff) / norm64(*before)


def test_update_ratio_of_known_step_is_known():
    named = {"w": nn.Parameter(torch.full((10,), 2.0)), "b": nn.Parameter(torch.full((6,), 2.0))}
    for p in named.values():
        p.grad = torch.full_like(p, 4.0)
    measured, _ = moved_by_a_step(named, 0.25)
    assert measured == 0.5


@pytest.mark.parametrize("moved", ["large", "small"])
def test_update_ratio_gives_each_tensor_the_weight_of_its_size(moved):
    large, small = nn.Parameter(torch.ones(8000)), nn.Parameter(torch.ones(100))
    large.grad, small.grad = torch.zeros(8000), torch.zeros(100)
    {"large": large, "small": small}[moved].grad.fill_(1.0)
    measured, true = moved_by_a_step({"large": large, "small": small}, 0.5)
    assert true == pytest.approx(0.5 * math.sqrt({"large": 8000, "small": 100}[moved] / 8100))
    assert measured == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("shapes", [[3], [512], [(16, 32), 5, (2, 3, 4)]])
def test_update_ratio_of_small_tensors_is_exact(shapes):
    measured, true = moved_by_a_step(parameters(*shapes), 0.1)
    assert measured == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("shapes", [[(200, 300)], [(64, 32, 3, 3), 64, (100, 64), 513], [100003]])
def test_update_ratio_of_large_tensors_is_within_the_sampling_error(shapes):
    # 512 Gaussian elements a tensor: each norm is within 1/sqrt(2 * 512) = 3.1 %, one sigma.
    measured, true = moved_by_a_step(parameters(*shapes), 0.1)
    assert measured == pytest.approx(true, rel=0.12)


LAYOUTS = {
    "channels last": lambda: torch.randn(32, 16, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(70, 90).t(),
    "every other column": lambda: torch.randn(64, 200)[:, ::2],
    "every other of few": lambda: torch.randn(40)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_ratio_of_any_memory_layout_follows_every_step(layout):
    p = nn.Parameter(LAYOUTS[layout]())
    p.grad = p.detach() * 1.0
    m = meter({"w": p}, lr=0.5)
    m.measure(0, None)
    ratios = []
    for step in (1, 2, 3):
        p.grad.copy_(p.detach())
        m.optimizer.step()
        ratios.append(m.measure(step, None).update_ratio)
    assert ratios == pytest.approx([0.5] * 3)  # each step halves every weight


def test_update_ratio_after_a_tensor_was_replaced_sees_the_new_one_within_ten_steps():
    named = {"w": nn.Parameter(torch.ones(2000))}
    m = meter(named)
    m.measure(0, None)
    m.measure(1, None)
    named["w"].data = torch.full((2000,), 3.0)
    ratios = [m.measure(step, None).update_ratio for step in range(2, 14)]
    assert sorted(ratios) == [0.0] * 11 + [2.0]
    assert 2.0 in ratios[:10]


def test_update_ratio_after_forgetting_is_unknown_for_one_step():
    m = meter(parameters(5))
    m.measure(0, None)
    m.forget()
    assert m.measure(1, None).update_ratio is None
    assert m.measure(2, None).update_ratio == 0.0


def test_update_ratio_from_weights_of_zero_is_unknown():
    m = meter({"w": nn.Parameter(torch.zeros(5))})
    m.measure(0, None)
    assert m.measure(1, None).update_ratio is None


def train(named, optimizer, m, steps, seed=0):
    """Moment ratios of steps with random gradients, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, p in enumerate(named.values()):
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** ((step + i) % 5 - 3)
            if (step + i) % 4 == 0:
                p.grad.zero_()
        yield m.measure(step, None)
        optimizer.step()


@pytest.mark.parametrize("name", ADAMS)
def test_moment_ratio_of_healthy_optimizer_never_falls_below_one(name):
    make, options = ADAMS[name]
    named = parameters((40, 30), 7, (3, 3), 600)
    optimizer = make(named.values(), lr=0.01, **options)
    ratios = [s.moment_ratio for s in train(named, optimizer, meter(named, optimizer), 50)]
    assert ratios[:2] == [None, None]  # no moments, then nothing to compare them with
    # A sum of 512 numbers in fp32 is off by at most 512 roundings.
    assert min(r for r in ratios[2:] if r is not None) >= 1 - 512 * 2.0**-24
    assert sum(r is not None for r in ratios) >= 47


@pytest.mark.parametrize("victim", ["p0", "p1", "p3"])
def test_moment_ratio_of_zeroed_moment_is_zero_and_named(victim):
    named = parameters((40, 30), 7, (3, 3), 600)
    optimizer = torch.optim.AdamW(named.values(), lr=0.01)
    m = meter(named, optimizer)
    list(train(named, optimizer, m, 5))
    m.measure(5, None)
    optimizer.state[named[victim]]["exp_avg_sq"].zero_()
    stats = m.measure(6, None)
    assert (stats.moment_ratio, stats.moment_name) == (0.0, victim)


def test_moment_ratio_of_nan_moment_is_nan_and_named():
    named = parameters(9, 9)
    optimizer = torch.optim.AdamW(named.values(), lr=0.01)
    m = meter(named, optimizer)
    list(train(named, optimizer, m, 5))
    m.measure(5, None)
    optimizer.state[named["p1"]]["exp_avg_sq"][4] = math.nan
    stats = m.measure(6, None)
    assert math.isnan(stats.moment_ratio)
    assert stats.moment_name == "p1"


def test_moment_ratio_survives_a_parameter_that_joins_late():
    named = parameters(9, 9)
    optimizer = torch.optim.Adam(named.values(), lr=0.01)
    m = meter(named, optimizer)
    found = []
    for step in range(30):
        named["p0"].grad = torch.ones(9)
        named["p1"].grad = torch.ones(9) if step >= 4 else None
        found.append(m.measure(step, None))
        optimizer.step()
        if step == 20:
            optimizer.state[named["p1"]]["exp_avg_sq"].zero_()
    unknown = [i for i, s in enumerate(found) if s.moment_ratio is None]
    assert unknown[:2] == [0, 1]
    assert len(unknown) == 3, "once more when the newcomer is seen"
    assert unknown[2] <= 15
    assert all(s.moment_ratio >= 1 for i, s in enumerate(found[:20]) if i not in unknown)
    assert (found[21].moment_ratio, found[21].moment_name) == (0.0, "p1")


def test_moment_ratio_without_second_moments_is_unknown():
    named = parameters(5)
    m = meter(named)
    assert [s.moment_ratio for s in train(named, m.optimizer, m, 4)] == [None] * 4


def test_scan_names_bad_weights_and_measures_their_norm():
    """N3, S3."""
    named = parameters(4, 4, 4)
    for p in named.values():
        p.data.fill_(2.0)
    m = meter(named)
    assert m.measure(0, None).weight_norm is None
    healthy = m.measure(1, None, scan_weights=True)
    assert (healthy.weight_norm, healthy.bad_weights) == (pytest.approx(math.sqrt(48)), ())
    named["p1"].data[0] = math.nan
    named["p2"].data[0] = math.inf
    assert m.measure(2, None, scan_weights=True).bad_weights == ("p1", "p2")


def test_momentum_put_in_the_place_of_another_is_seen_within_ten_steps():
    named = parameters(4, (30, 30))
    optimizer = torch.optim.AdamW(named.values())
    m = meter(named, optimizer)
    list(train(named, optimizer, m, 3))
    state = optimizer.state[named["p1"]]
    state["exp_avg"] = torch.full_like(state["exp_avg"], math.nan)
    found = [m.measure(step, None).bad_momentum for step in range(3, 13)]
    assert ("p1",) in found


def test_audit_names_bad_weights_and_bad_moments():
    """N3, S3."""
    named = parameters(4, 4, (30, 30))
    optimizer = torch.optim.AdamW(named.values())
    m = meter(named, optimizer)
    optimizer.step()
    optimizer.state[named["p1"]]["exp_avg_sq"].fill_(1e30)  # its norm overflows, it does not
    assert m.audit() == ((), ())
    named["p0"].data[1] = math.inf
    optimizer.state[named["p2"]]["exp_avg"][17, 5] = math.nan
    optimizer.state[named["p2"]]["exp_avg_sq"][3, 3] = math.inf
    assert m.audit() == (("p0",), ("p2",))


class _Ops(TorchDispatchMode):
    """Names of the operations run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"scan_weights": True, "details": True}])
def test_measure_copies_to_the_host_once_for_any_number_of_parameters(monkeypatch, options):
    copies = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: copies.append(t.numel()) or tolist(t))
    for count in (3, 40):
        named = parameters(*[(60, 60)] * count)
        optimizer = torch.optim.AdamW(named.values())
        m = meter(named, optimizer)
        list(train(named, optimizer, m, 3))
        copies.clear()
        with _Ops() as ops:
            stats = m.measure(3, torch.tensor(1.0), loss_scale=torch.tensor(2.0), **options)
        assert stats.moment_ratio is not None
        assert len(copies) == 1
        assert "aten::_foreach_norm.Scalar" in ops.names
        # What `.item()`, `float()`, `bool()` and boolean indexing come down to.
        assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"} & set(ops.names)


@pytest.mark.parametrize(
    ("shape", "tensors"),
    [((60, 60), (3, 12)), ((30, 30), (3, 7)), ((30, 30), (40, 250)), ((5,), (40, 3000))],
)
def test_measure_asks_for_as_many_operations_for_many_parameters_as_for_few(shape, tensors):
    counts = []
    for count in tensors:
        named = parameters(*[shape] * count)
        m = meter(named)
        m.measure(0, None)
        with _Ops() as ops:
            m.measure(1, None)
        counts.append(sum(name not in ("aten::detach", "aten::_to_copy") for name in ops.names))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ADAMS)
def test_measuring_changes_no_bit_of_a_run(name):
    make, options = ADAMS[name]
    runs = []
    for watched in (False, True):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(8, 600), nn.Dropout(0.3), nn.Tanh(), nn.Linear(600, 2))
        optimizer = make(net.parameters(), lr=0.01, **options)
        m = StepMeter(net.named_parameters(), optimizer)
        for step in range(12):
            optimizer.zero_grad()
            loss = net(torch.randn(4, 8)).square().mean()
            loss.backward()
            grads = [p.grad.clone() for p in net.parameters()]
            if watched:
                m.measure(step, loss, scan_weights=step % 2 == 0, details=step % 3 == 0)
                m.audit()
                gradient_details(net.named_parameters())
            assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))
            optimizer.step()
        runs.append((copy.deepcopy(net.state_dict()), optimizer.state_dict(), torch.rand(3)))
    for bare, watched in zip(_flat(runs[0]), _flat(runs[1]), strict=True):
        assert torch.equal(bare, watched)


def _flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items if isinstance(v, (dict, list, tuple, torch.Tensor)) for t in _flat(v)]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.AdamW(p), "exp_avg"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "momentum_buffer"),
    ],
)
def test_non_finite_momentum_is_named_before_it_reaches_a_weight(make, key):
    """N3."""
    net = nn.Linear(3, 3)
    optimizer = make(net.parameters())
    m = StepMeter(net.named_parameters(), optimizer)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        if step == 2:
            optimizer.state[net.bias][key].fill_(math.inf)
        found.append(m.measure(step, None).bad_momentum)
        optimizer.step()
    assert found == [(), (), ("bias",)]


def test_scan_tells_how_far_each_weight_has_moved_since_the_scan_before():
    named = parameters((3,), (2,))
    m = meter(named)
    assert m.measure(0, None, scan_weights=True).weight_moves is None
    before = [p.detach().clone() for p in named.values()]
    m.measure(1, None)
    with torch.no_grad():
        named["p0"] += torch.tensor([3.0, -4.0, 12.0])
    stats = m.measure(2, None, scan_weights=True)
    moves = stats.weight_moves
    assert moves.since == 0
    assert moves.norms == pytest.approx([float(w.norm()) for w in before])
    peaks = zip(before, named.values(), strict=True)
    expected = [(float(a.abs().max()), float(b.detach().abs().max())) for a, b in peaks]
    assert [x for pair in moves.peaks for x in pair] == pytest.approx(
        [x for e in expected for x in e]
    )
    assert moves.distances == pytest.approx((5.0, 0.0), abs=1e-5)
    assert moves.farthest[0] == pytest.approx((12.0, 4.0), abs=1e-5)
    assert m.measure(3, None, scan_weights=True).weight_moves.distances == (0.0, 0.0)


def test_weights_before_a_rollback_are_not_compared_with_those_after():
    m = meter(parameters((3,)))
    m.measure(0, None, scan_weights=True)
    m.forget()
    assert m.measure(1, None, scan_weights=True).weight_moves is None
    assert m.measure(2, None, scan_weights=True).weight_moves.since == 1


def test_sparse_momentum_of_an_embedding_is_left_out():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 0.1, momentum=0.9)
    m = StepMeter(table.named_parameters(), optimizer)
    for step in range(3):
        optimizer.zero_grad()
        table(torch.tensor([1, 3])).sum().backward()
        assert m.measure(step, None).grad_norm == pytest.approx(math.sqrt(8))
        optimizer.step()
