"""Known faults in the checkpoint of a real fit, and its healthy twin, which is silent."""

import copy
import math

import pytest
import torch
from torch import nn

from lit_stability.checks.checkpoint import examine
from lit_stability.measurement.step_stats import GradientDetail
from tests.checks.checkpoint.examples import Mixed, checkpoint_of, found, read
from tests.conftest import Regression


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return read(checkpoint_of(tmp_path_factory.mktemp("healthy")))


def state_of(checkpoint, name):
    """The optimizer's entry of a parameter."""
    (moment,) = (each for each in examine(checkpoint).moments if each.name == name)
    return checkpoint["optimizer_states"][moment.optimizer]["state"][moment.index]


def put(name, index, value):
    def corrupt(checkpoint):
        checkpoint["state_dict"][name][index] = value

    return corrupt


def put_moment(name, key, value):
    def corrupt(checkpoint):
        state_of(checkpoint, name)[key].view(-1)[:1] = value

    return corrupt


def fill_moment(name, **values):
    def corrupt(checkpoint):
        for key, value in values.items():
            state_of(checkpoint, name)[key].fill_(value)

    return corrupt


def scale_moment(name, key, factor):
    def corrupt(checkpoint):
        state_of(checkpoint, name)[key].mul_(factor)

    return corrupt


def multiply(name, factor):
    def corrupt(checkpoint):
        checkpoint["state_dict"][name].mul_(factor)

    return corrupt


def set_rate(value):
    def corrupt(checkpoint):
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["lr"] = value

    return corrupt


def flip_a_bit(name):
    """The highest bit of an exponent, as memory does it."""

    def corrupt(checkpoint):
        flat = checkpoint["state_dict"][name].view(-1)
        flat.view(torch.int32)[5] ^= 1 << 30

    return corrupt


def add_scaler(scale):
    def corrupt(checkpoint):
        checkpoint["MixedPrecision"] = {"scale": scale, "growth_factor": 2.0, "_growth_tracker": 0}

    return corrupt


def spend(checkpoint):
    checkpoint["callbacks"]["AutoRollback"]["ladder"]["left"]["rollbacks"] = 0


def recur(checkpoint):
    history = checkpoint["callbacks"]["AnomalyCheckpoint"]["history"]
    history[-1] = [history[-1][0], 3.0, 5e4]


def halve_epsilon(checkpoint):
    state = checkpoint["optimizer_states"][0]["state"]
    for entry in state.values():
        entry["exp_avg_sq"] = entry["exp_avg_sq"].half()


FAULTS = {
    "NaN weight": (
        put("body.3.weight", (0, 0), math.nan),
        ("error", "non-finite weight", "body.3.weight"),
    ),
    "Inf bias": (put("body.0.bias", 3, math.inf), ("error", "non-finite weight", "body.0.bias")),
    "NaN variance": (
        put("body.1.running_var", 3, math.nan),
        ("error", "non-finite buffer", "body.1.running_var"),
    ),
    "negative variance": (
        put("body.1.running_var", 3, -1e-3),
        ("error", "negative running variance", "body.1.running_var"),
    ),
    "zero variance": (
        put("body.1.running_var", 3, 0.0),
        ("warning", "zero running variance", "body.1.running_var"),
    ),
    "NaN in a mask": (put("mask", (0, 1), math.nan), ("error", "non-finite weight", "mask")),
    "flipped bit": (flip_a_bit("body.0.weight"), ("error", "torn element", "body.0.weight")),
    "torn element": (
        put("body.0.weight", (0, 0), 2e3),
        ("warning", "torn element", "body.0.weight"),
    ),
    "large matrix": (multiply("body.0.weight", 1e3), ("warning", "large weights", "body.0.weight")),
    "zombie": (multiply("norm.weight", 0.0), ("error", "zeroed gain", "norm.weight")),
    "zeroed BatchNorm": (multiply("body.1.weight", 0.0), ("error", "zeroed gain", "body.1.weight")),
    "zero matrix": (multiply("body.3.weight", 0.0), ("warning", "zero matrix", "body.3.weight")),
    "dead neuron": (put("body.0.weight", 4, 0.0), ("warning", "dead rows", "body.0.weight")),
    "NaN moment": (
        put_moment("body.3.weight", "exp_avg", math.nan),
        ("error", "non-finite moment", "body.3.weight"),
    ),
    "negative moment": (
        put_moment("head.bias", "exp_avg_sq", -1e-3),
        ("error", "negative second moment", "head.bias"),
    ),
    "zeroed second moment": (
        fill_moment("body.3.weight", exp_avg_sq=0.0),
        ("error", "damaged second moment", "body.3.weight"),
    ),
    "shrunk second moment": (
        scale_moment("body.3.weight", "exp_avg_sq", 1e-6),
        ("error", "damaged second moment", "body.3.weight"),
    ),
    "no gradient ever": (
        fill_moment("body.3.bias", exp_avg=0.0, exp_avg_sq=0.0),
        ("warning", "no gradient", "body.3.bias"),
    ),
    "fewer updates": (
        fill_moment("head.bias", step=7.0),
        ("note", "fewer updates", "head.bias"),
    ),
    "NaN rate": (
        set_rate(math.nan),
        ("error", "impossible learning rate", "optimizer 0, group 0"),
    ),
    "zero rate": (set_rate(0.0), ("note", "learning rate of zero", "optimizer 0, group 0")),
    "untrained": (lambda c: c.update(global_step=0), ("warning", "untrained", "run")),
    "collapsed scale": (add_scaler(2.0**-12), ("error", "loss-scale collapse", "loss scaler")),
    "spent budget": (spend, ("warning", "budget spent", "rollbacks")),
    "large gradient": (recur, ("warning", "large gradient", "step 39")),
    "vanished epsilon": (halve_epsilon, ("warning", "vanished epsilon", "embedding.weight")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_and_nothing_else(fault, healthy):
    """S3, V4: by name, with the reason and the remedy."""
    corrupt, expected = FAULTS[fault]
    checkpoint = copy.deepcopy(healthy)
    corrupt(checkpoint)
    assert found(checkpoint) == [expected]
    (finding,) = examine(checkpoint).findings
    assert finding.why
    assert finding.remedy


def test_scaler_at_work_is_no_finding(healthy):
    checkpoint = copy.deepcopy(healthy)
    add_scaler(65536.0)(checkpoint)
    report = examine(checkpoint)
    assert report.findings == ()
    assert report.run.scaler["scale"] == 65536.0


MODELS = {
    "one group, BatchNorm": (Regression, {}),
    "a scheduler that moves beta": (lambda: Regression(scheduler="onecycle"), {}),
    "momentum": (lambda: Mixed("sgd"), {}),
    "named": (lambda: Mixed("named"), {}),
    "bf16 weights": (Regression, {"precision": "bf16-true"}),
    "first step": (Mixed, {"steps": 1}),
}


@pytest.mark.parametrize("model", MODELS)
def test_healthy_run_has_no_finding(model, tmp_path):
    """S3: no false alarm, also on a padding row, a tied head, a frozen layer and a mask of -inf."""
    module, options = MODELS[model]
    assert found(read(checkpoint_of(tmp_path, module, **options))) == []


class Zeroed(nn.Module):
    """Zeros on purpose: a residual branch that begins as nothing, a low-rank pair."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(16)
        nn.init.zeros_(self.bn.weight)
        self.lora_b = nn.Parameter(torch.zeros(16, 4))


FRESH = {
    "transformer": (
        lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
        [("note", "equal tensors")],
    ),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.LSTM(8, 8)), []),
    "embedding": (lambda: nn.Embedding(500, 16, padding_idx=0), []),
    "scalar": (lambda: nn.ParameterDict({"scale": nn.Parameter(torch.tensor(1e4))}), []),
    "zeros on purpose": (Zeroed, [("note", "zeroed gain")]),
    "heavy tails": (
        lambda: nn.ParameterDict(
            {"w": torch.distributions.StudentT(3.0).sample((500, 500)).requires_grad_()}
        ),
        [],
    ),
}


@pytest.mark.parametrize("model", FRESH)
def test_fresh_module_has_no_finding_but_notes(model):
    """As a bare state dict."""
    torch.manual_seed(0)
    make, expected = FRESH[model]
    assert [each[:2] for each in found(make().state_dict())] == expected


def test_moments_made_before_the_first_step_are_no_finding(healthy):
    checkpoint = copy.deepcopy(healthy)
    for entry in checkpoint["optimizer_states"][0]["state"].values():
        for value in entry.values():
            value.zero_()
    assert found(checkpoint) == []


OPTIMIZERS = {
    "betas of a language model": lambda p: torch.optim.AdamW(p, 1e-3, (0.9, 0.95)),
    "slow betas": lambda p: torch.optim.AdamW(p, 1e-3, (0.99, 0.9999)),
    "no momentum": lambda p: torch.optim.AdamW(p, 1e-3, (0.0, 0.9)),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "plain sgd": lambda p: torch.optim.SGD(p, 1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_healthy_optimizer_has_no_finding(optimizer, dtype):
    """S3: no false alarm, of the bound on the ratio of the moments above all."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)
    model = nn.Sequential(*layers).to(dtype)
    made = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(60):
        x = torch.randn(32, 16, dtype=dtype)
        made.zero_grad()
        (model(x) - x[:, :4].sin()).square().mean().backward()
        made.step()
    state = {"state_dict": model.state_dict(), "optimizer_states": [made.state_dict()]}
    assert found({**state, "global_step": 60}) == []


def test_numbers_of_a_tensor_are_those_of_its_finite_elements():
    weight = torch.tensor([[3.0, -4.0, 0.0], [math.nan, math.inf, 0.0], [0.0, 0.0, 0.0]])
    (health,) = examine({"layer.weight": weight}).tensors
    assert (health.nan, health.positive_inf, health.finite, health.zeros) == (1, 1, 7, 5)
    assert (health.norm, health.minimum, health.maximum, health.largest) == (5.0, -4.0, 3.0, 4.0)
    assert health.rms == pytest.approx(5 / math.sqrt(7))
    assert health.mean == pytest.approx(-1 / 7)
    assert health.std == pytest.approx(math.sqrt(25 / 7 - 1 / 49))
    assert (health.zero_rows, health.shape, health.dtype) == (1, (3, 3), "float32")


def test_norm_beyond_float32_is_finite():
    (health,) = examine({"w": torch.full((16,), 2e38)}).tensors
    assert health.norm == pytest.approx(8e38)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_tensor_of_any_type_is_measured(dtype):
    tensor = torch.tensor([[1.0, 2.0], [-2.0, 0.0]]).to(dtype)
    (health,) = examine({"w": tensor}).tensors
    assert health.dtype == str(dtype).removeprefix("torch.")
    assert health.norm == (0.0 if dtype == torch.int8 else 3.0)


def test_checkpoint_is_left_as_it_was(healthy):
    before = copy.deepcopy(healthy)
    examine(healthy)
    assert repr(before) == repr(healthy)


def test_gradients_of_an_incident_are_judged_by_name():
    """S3: NaN by name, norms over 1000."""

    def detail(name, norm):
        spread = {"mean": 0.0, "std": 1.0, "minimum": -1.0, "maximum": 1.0, "zero_share": 0.0}
        return GradientDetail(name=name, norm=norm, **spread)

    gradients = [detail("a", 1.0), detail("b", math.nan), detail("c", 1500.0), detail("d", 2e4)]
    report = examine({"w": torch.ones(2)}, gradients=gradients)
    assert [(f.what, f.where) for f in report.findings] == [
        ("non-finite gradient", ("b",)),
        ("large gradient", ("d", "c")),
    ]


def test_state_of_the_suite_is_reported(healthy):
    run = examine(healthy).run
    assert run.callbacks["budget left"] == {"skips": 100, "rollbacks": 8, "holds": 8}
    assert (run.callbacks["incidents"], run.callbacks["precision"]) == (0, "32-true")
    assert (run.global_step, run.epoch, len(run.history)) == (40, 1, 40)
    assert run.groups[0]["lr"] == 1e-2


def test_mapping_without_a_tensor_is_refused():
    with pytest.raises(ValueError, match=r"no tensor among the keys \['epoch'\]; give a Lightning"):
        examine({"epoch": 3})
