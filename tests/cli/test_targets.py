"""Which classes a config may build, and what is refused before it is imported or called."""

import importlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_stability.cli.fit import check_options
from lit_stability.cli.instantiate import Build, bind
from lit_stability.cli.targets import COMPONENTS, LISTED, Rules, refusals
from lit_stability.errors import ConfigError

HERE = __name__


class Tokenizer:
    """A plain class of the user's own package."""

    @classmethod
    def of(cls, size: int = 1) -> "Tokenizer":
        return cls()

    @staticmethod
    def make() -> "Tokenizer":
        return Tokenizer()


@dataclass(frozen=True)
class Size:
    width: int = 1


class Net(nn.Module):
    """A model whose options have annotations of all kinds."""

    def __init__(
        self,
        part: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        named: nn.Module | list[nn.Module] | Literal[False] | None = None,
        free: Any = None,
        untyped=None,
        **rest: Any,
    ) -> None:
        super().__init__()


def build() -> nn.Module:
    return nn.Linear(1, 1)


def problems(option, target, allow=(), **options):
    bad: list[str] = []
    plan = bind(Net, {option: {"_target_": target, **options}}, "model", bad, Rules(tuple(allow)))
    assert bad or isinstance(plan.options[option], Build)
    return bad


@pytest.mark.parametrize("option", ["free", "untyped", "anything"])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("torch.nn.ReLU", {}),
        ("torch.nn.Linear", {"in_features": 1, "out_features": 1}),
        ("torch.utils.data.TensorDataset", {}),
        ("torch.utils.data.SequentialSampler", {"data_source": []}),
        ("torchmetrics.MeanMetric", {}),
        ("torch.device", {"type": "cpu"}),
        ("lightning.pytorch.callbacks.ModelSummary", {}),
        ("lightning.pytorch.strategies.DDPStrategy", {}),
        ("lightning.pytorch.plugins.MixedPrecision", {"precision": "16-mixed", "device": "cpu"}),
        ("lightning.pytorch.loggers.CSVLogger", {"save_dir": "."}),
        ("lightning.pytorch.profilers.SimpleProfiler", {}),
        ("lit_stability.GradientMonitor", {}),
        ("lit_stability.faults.NanLoss", {"step": 3}),
        ("lit_stability.policies.clip_rules.TieredClip", {}),
        ("datetime.timedelta", {"hours": 1}),
        (f"{HERE}.Tokenizer", {}),
        (f"{HERE}.Tokenizer.of", {}),
        (f"{HERE}.Size", {}),
    ],
)
def test_part_of_a_training_run_is_built_in_any_option(option, target, options):
    assert problems(option, target, **options) == []


@pytest.mark.parametrize(
    ("option", "target"),
    [
        ("part", "torch.nn.ReLU"),
        ("named", "torch.nn.ReLU"),
        ("tokenizer", f"{HERE}.Tokenizer"),
        ("tokenizer", f"{HERE}.Tokenizer.of"),
    ],
)
def test_class_of_the_annotation_is_built(option, target):
    assert problems(option, target) == []


@pytest.mark.parametrize("option", ["part", "named", "free", "untyped", "anything"])
@pytest.mark.parametrize(
    "target",
    [
        "numpy.memmap",
        "torch.utils.tensorboard.SummaryWriter",
        "torch.multiprocessing.Process",
        "lightning.pytorch.cli.LightningCLI",
        "yaml.Loader",
        "torch.hub.load",
        "torch.load",
        "torch.nn.functional.relu",
        "torchvision.models.subprocess.run",
        f"{HERE}.build",
        f"{HERE}.Tokenizer.make",
    ],
)
def test_anything_else_is_refused(option, target):
    (problem,) = problems(option, target)
    assert problem.startswith(f"model.{option}._target_={target}: ")


def test_class_of_another_kind_than_the_annotation_is_refused_with_what_is_expected():
    assert "expected a mapping whose _target_ is a Module" in problems("named", f"{HERE}.Size")[0]
    assert (
        "expected a mapping whose _target_ is a Tokenizer"
        in problems("tokenizer", "torch.nn.ReLU")[0]
    )


@pytest.mark.parametrize("allow", [f"{HERE}.build", f"{HERE}.*", "tests.cli.*.build"])
def test_function_is_called_if_the_user_allows_it(allow):
    assert problems("free", f"{HERE}.build", [allow]) == []
    assert "use --allow" in problems("free", f"{HERE}.build", ["tests.*"])[0]


def test_listed_name_does_not_lead_to_a_function_of_another_package():
    """`torchvision.models` may have imported `subprocess`."""
    import lit_stability.tensorboard.tags as module

    assert Rules().accepts("transformers.AutoModel.from_pretrained")
    assert not Rules(("torchvision.*.*",)).accepts("torch.hub.load", module.json.dumps)
    assert not Rules().accepts("torchvision.models.loads", module.json.loads)


# Those of the package that this process does not use: tests/guest/test_packages.py.
OTHER = ("pytorch_lightning.", "lightning_fabric.")


@pytest.mark.parametrize("name", sorted(n for n in COMPONENTS if not n.startswith(OTHER)))
def test_component_is_a_class_of_that_name(name):
    module, _, attribute = name.rpartition(".")
    if module.startswith("transformers"):
        pytest.importorskip("transformers")
    found = getattr(importlib.import_module(module), attribute)
    assert f"{found.__module__}.{found.__qualname__}" in COMPONENTS


@settings(derandomize=True, max_examples=200)
@given(
    module=st.sampled_from(sorted(sys.stdlib_module_names)),
    name=st.sampled_from(["run", "Popen", "system", "timeit", "exec", "x"]),
    place=st.sampled_from(["model", "data", "callbacks", "logger"]),
)
def test_standard_library_is_refused_by_name_wherever_it_is_named(module, name, place):
    config = {place: [{"deep": {"_target_": f"{module}.{name}", "args": ["x"]}}]}
    (problem,) = refusals(config)
    assert problem == (
        f"{place}[0].deep._target_={module}.{name}: is of Python's standard library, of which a "
        "config builds nothing"
    )


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A project with a module that leaves a trace when it is imported, and one that does not."""
    monkeypatch.syspath_prepend(tmp_path)
    source = "open({!r}, 'w').close()\ndef act(): pass\nclass Net: pass\n"
    (tmp_path / "trap.py").write_text(source.format(str(tmp_path / "imported")))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/deep.py").write_text(source.format(str(tmp_path / "imported")))
    yield tmp_path
    for name in ("trap", "inner", "inner.deep"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"_target_": "trap.act"}},
        {"model": {"_target_": "inner.deep.act"}},
        {"model": {"_target_": "trap.Net", "x": {"_target_": "subprocess.run"}}},
        {"model": {"_target_": "trap.Net"}, "callbacks": {"a": {"_target_": "timeit.timeit"}}},
        {"model": {"_target_": "trap.Net"}, "logger": [{"_target_": "antigravity.x"}]},
    ],
)
def test_nothing_is_imported_if_a_target_is_refused_by_name_or_source(config, traps):
    with pytest.raises(ConfigError, match=r"is a function|standard library"):
        check_options({"experiment": "x", "run_dir": "runs", "trainer": {}, **config})
    assert not (traps / "imported").exists()


def test_decorated_function_is_looked_at_before_it_is_refused(traps):
    """A decorator may return a class."""
    (traps / "decorated.py").write_text(
        "def as_class(f): return type(f.__name__, (), {})\n@as_class\ndef A(): pass"
    )
    assert refusals({"model": {"_target_": "decorated.A"}}) == []


def test_listed_targets_are_patterns_of_whole_names():
    assert all(pattern.count(".") >= 1 for pattern in LISTED)
    assert Rules().accepts("torchvision.models.resnet18")
    assert not Rules().accepts("torchvision.models.detection.utils.run")
