"""Composition of config files, and the check of options against signatures."""

import contextlib
import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, Protocol, Union

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lit_stability.cli.config import as_written, compose, resolve
from lit_stability.cli.fit import check_options
from lit_stability.cli.instantiate import Build, bind
from lit_stability.errors import ConfigError

Rate = NewType("Rate", float)


class Colour(enum.Enum):
    RED = 1


class Shape(Protocol):
    sides: int


@dataclass(frozen=True)
class Network:
    width: int = 1
    activation: Literal["relu", "gelu"] = "relu"


class Part:
    def __init__(self, size: int = 1) -> None:
        self.size = size

    @classmethod
    def large(cls, by: int = 2) -> "Part":
        return cls(100 * by)


class SmallPart(Part):
    pass


class Widget:
    def __init__(
        self,
        count: int = 0,
        rate: float = 0.0,
        flag: bool = False,
        name: str = "",
        mode: Literal["min", "max"] = "min",
        maybe: Optional[int] = None,  # noqa: UP045
        either: Union[int, float, str] = 0,  # noqa: UP007
        precision: Literal[16, 32] | Literal["bf16"] | None = None,
        sizes: Sequence[int] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        many: tuple[int, ...] = (),
        table: dict[str, float] | None = None,
        folder: Path = Path(),
        colour: Colour = Colour.RED,
        network: Network | None = None,
        part: Part | None = None,
        parts: list[Part] | None = None,
        shape: Shape | None = None,
        hook: Callable[[], None] | None = None,
        tagged: Annotated[int, "unit"] = 0,
        step: Rate = Rate(0.1),
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013
        unknown: "Missing" = None,  # type: ignore[name-defined]  # noqa: F821
        free: Any = None,
        untyped=None,
    ) -> None:
        pass


def takes_any(size: int, **rest: Any) -> None:
    pass


@functools.wraps(Part)
def wrapped(*args: Any, **kwargs: Any) -> Part:
    return Part(*args, **kwargs)


number = 3
HERE = __name__


def check(target: Callable[..., Any], options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    bad: list[str] = []
    return bind(target, options, "model", bad).options, bad


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("count", 3, 3),
        ("rate", 3, 3.0),
        ("rate", "3e-4", 3e-4),
        ("flag", True, True),
        ("mode", "max", "max"),
        ("maybe", None, None),
        ("maybe", 2, 2),
        ("either", 1, 1),
        ("either", 0.5, 0.5),
        ("either", "3e-4", "3e-4"),
        ("precision", 16, 16),
        ("precision", "bf16", "bf16"),
        ("precision", None, None),
        ("sizes", [1, 2], [1, 2]),
        ("betas", [0.9, "1e-1"], (0.9, 0.1)),
        ("many", [1, 2, 3], (1, 2, 3)),
        ("table", {"a": 1}, {"a": 1.0}),
        ("folder", "a/b", Path("a/b")),
        ("colour", "RED", Colour.RED),
        ("shape", "whatever", "whatever"),
        ("tagged", 4, 4),
        ("step", "1e-3", 1e-3),
        ("implicit", None, None),
        ("unknown", "whatever", "whatever"),
        ("free", {"a": [1]}, {"a": [1]}),
        ("untyped", 5, 5),
    ],
)
def test_option_of_the_right_type_is_taken_as_annotated(option, value, expected):
    options, bad = check(Widget, {option: value})
    assert bad == []
    assert options[option] == expected
    assert type(options[option]) is type(expected)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("count", "three", "model.count='three': expected int, got str"),
        ("count", True, "model.count=True: expected int, got bool"),
        ("count", 1.0, "model.count=1.0: expected int, got float"),
        ("count", None, "model.count=None: expected int, got NoneType"),
        ("rate", True, "model.rate=True: expected float, got bool"),
        ("rate", "fast", "model.rate='fast': expected float, got str"),
        ("flag", 1, "model.flag=1: expected bool, got int"),
        ("name", 7, "model.name=7: expected str, got int; quote it"),
        (
            "mode",
            "maxx",
            "model.mode='maxx': expected one of 'min', 'max', got str; did you mean max?",
        ),
        ("maybe", "x", "model.maybe='x': expected int or null, got str"),
        (
            "precision",
            "fp8",
            "model.precision='fp8': expected null or one of 16, 32, 'bf16', got str",
        ),
        ("sizes", 3, "model.sizes=3: expected list of int, got int"),
        ("sizes", [1, "x"], "model.sizes[1]='x': expected int, got str"),
        ("sizes", "12", "model.sizes='12': expected list of int, got str"),
        ("betas", [0.9], "model.betas=[0.9]: expected list of float, float, got list"),
        ("table", {"a": "x"}, "model.table.a='x': expected float, got str"),
        ("table", [1], "model.table=[1]: expected mapping or null, got list"),
        (
            "colour",
            "GREEN",
            "model.colour='GREEN': expected one of 'RED', got str",
        ),
        (
            "part",
            3,
            "model.part=3: expected a mapping whose _target_ is a Part or null, got int",
        ),
        (
            "part",
            {"size": 3},
            "model.part={'size': 3}: expected a mapping whose _target_ is a Part or null, got dict",
        ),
        (
            "hook",
            "print",
            "model.hook='print': expected a mapping whose _target_ is a Callable or null, got str",
        ),
        ("network", {"width": "x"}, "model.network.width='x': expected int, got str"),
        ("count", "???", "model.count: has no value; set it in a config file or with "),
        ("free", ["???"], "model.free[0]: has no value; set it in a config file or with "),
        ("count", "x" * 99, f"model.count='{'x' * 56}...: expected int, got str"),
    ],
)
def test_option_of_another_type_is_named_with_value_and_expectation(option, value, problem):
    _, bad = check(Widget, {option: value})
    assert len(bad) == 1
    assert bad[0].startswith(problem)


@pytest.mark.parametrize(
    ("target", "options", "problem"),
    [
        (Part, {"sise": 3}, f"model.sise=3: unknown option of {HERE}.Part; did you mean size?"),
        (Part, {"s": 3}, f"model.s=3: unknown option of {HERE}.Part; choose from size"),
        (takes_any, {}, f"model.size: missing; {HERE}.takes_any requires it"),
        (Network, {"widht": 2}, f"model.widht=2: unknown option of {HERE}.Network; did you mean"),
        (
            wrapped,
            {"sizes": 1},
            f"model.sizes=1: unknown option of {HERE}.Part; did you mean size?",
        ),
    ],
)
def test_unknown_abbreviated_or_missing_option_is_named_with_a_remedy(target, options, problem):
    _, bad = check(target, options)
    assert len(bad) == 1
    assert bad[0].startswith(problem)


def test_target_with_kwargs_takes_any_option():
    options, bad = check(takes_any, {"size": 1, "other": [2]})
    assert (options, bad) == ({"size": 1, "other": [2]}, [])


def test_class_without_signature_takes_any_option():
    assert check(dict, {"size": 1}) == ({"size": 1}, [])


def test_every_problem_is_collected():
    _, bad = check(Widget, {"count": "x", "flag": 1, "other": 2, "network": {"widht": 1}})
    assert [line.split("=")[0] for line in bad] == [
        "model.count",
        "model.flag",
        "model.other",
        "model.network.widht",
    ]


@pytest.mark.parametrize("target", ["Part", "SmallPart", "Part.large"])
def test_nested_target_becomes_a_plan_of_its_own(target):
    options, bad = check(Widget, {"part": {"_target_": f"{HERE}.{target}"}})
    assert bad == []
    assert isinstance(options["part"], Build)
    assert options["part"].path == "model.part"


def test_nested_targets_in_lists_and_free_options_are_checked():
    part = {"_target_": f"{HERE}.Part", "sise": 3}
    _, bad = check(Widget, {"parts": [part], "free": {"deep": [part]}})
    assert [line.split("=")[0] for line in bad] == [
        "model.parts[0].sise",
        "model.free.deep[0].sise",
    ]


def test_dataclass_is_built_without_naming_it():
    options, bad = check(Widget, {"network": {"width": 2}})
    assert bad == []
    assert options["network"] == Build(Network, {"width": 2}, "model.network")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("Part", "expected a dotted path, such as package.module.Class"),
        (3, "expected a dotted path, such as package.module.Class"),
        ("nowhere.to.Be", "cannot be imported; tried the modules nowhere.to, nowhere"),
        (f"{HERE}.Parts", f"{HERE} has no Parts; did you mean Part?"),
        (f"{HERE}.Part.larg", "Part has no larg; did you mean large?"),
        (f"{HERE}.number", "is a int, not a class or function"),
        ("json.decoder", "is a module, not a class or function"),
        (f"{HERE}.Network", "expected a mapping whose _target_ is a Part or null"),
    ],
)
def test_target_that_cannot_serve_is_named_with_the_reason(target, problem):
    _, bad = check(Widget, {"part": {"_target_": target}})
    assert bad == [f"model.part._target_={target}: {problem}"]


@pytest.mark.parametrize("source", ["import not_installed", "raise RuntimeError('broken')"])
def test_target_whose_module_fails_differs_from_one_that_is_absent(source, cwd, monkeypatch):
    name = f"failing_{abs(hash(source))}"
    (cwd / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(cwd)
    _, bad = check(Widget, {"part": {"_target_": f"{name}.Part"}})
    assert bad[0].startswith(f"model.part._target_={name}.Part: importing {name} failed: ")


@pytest.mark.parametrize(
    ("name", "experiment"),
    [
        ("configs/rescue.yaml", "rescue"),
        ("configs/rescue", "rescue"),
        ("rescue", "rescue"),
        ("rescue.yaml", "rescue"),
    ],
)
def test_config_is_found_from_here_or_in_configs(name, experiment, cwd):
    write(cwd, configs__rescue="seed: 3")
    config = resolve(compose([name]))
    assert (config["experiment"], config["seed"]) == (experiment, 3)
    assert config["run_dir"] == "runs/rescue"
    assert config["logger"]["save_dir"] == "runs/rescue"


def test_composed_files_lie_below_the_file_that_names_them(cwd):
    write(
        cwd,
        configs__model__small="model: {width: 1, depth: 1}\nseed: 1",
        configs__trainer__cpu="trainer: {max_steps: 5}",
        configs__deep__base="compose: [model/small, sibling]\nmodel: {width: 2}",
        configs__deep__sibling="trainer: {max_steps: 6}",
        configs__top="compose: [trainer/cpu, deep/base]\nseed: 2",
    )
    config = compose(["top"])
    assert config.model == {"width": 2, "depth": 1}
    assert config.trainer == {"max_steps": 6}
    assert config.seed == 2
    assert "compose" not in config


MERGES = [
    ("a: {x: 1, y: 2}", "a: {y: 3}", {"x": 1, "y": 3}),
    ("a: [1, 2]", "a: [3]", [3]),
    ("a: {x: 1}", "a: null", None),
    ("a: null", "a: {x: 1}", {"x": 1}),
    ("a: {x: 1, y: 2}", "a: {_replace_: true, y: 3}", {"y": 3}),
    ("a: {b: {x: 1}}", "a: {b: {_replace_: true, y: 3}}", {"b": {"y": 3}}),
    ("a: {_target_: m.A, x: 1}", "a: {y: 3}", {"_target_": "m.A", "x": 1, "y": 3}),
    ("a: {_target_: m.A, x: 1}", "a: {_target_: m.A, y: 3}", {"_target_": "m.A", "x": 1, "y": 3}),
    ("a: {_target_: m.A, x: 1}", "a: {_target_: m.B, y: 3}", {"_target_": "m.B", "y": 3}),
    ("a: {x: 1}", "a: {_target_: m.A}", {"x": 1, "_target_": "m.A"}),
]


@pytest.mark.parametrize(("first", "second", "expected"), MERGES)
def test_later_file_merges_or_replaces(first, second, expected, cwd):
    write(cwd, first=first, second=second)
    assert OmegaConf.to_container(compose(["first", "second"]))["a"] == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a.x=3e-4"], {"x": 3e-4, "y": 2}),
        (["a.x=null", "a.z=[1, b]"], {"x": None, "y": 2, "z": [1, "b"]}),
        (["a={z: 1}"], {"x": 1, "y": 2, "z": 1}),
        (["a.x='3'", "a.x=u=v"], {"x": "u=v", "y": 2}),
        (["a.x=${b}", "b=5"], {"x": 5, "y": 2}),
        (["a.x=''"], {"x": "", "y": 2}),
    ],
)
def test_override_lies_over_the_files(overrides, expected, cwd):
    write(cwd, base="a: {x: 1, y: 2}")
    assert resolve(compose(["base"], overrides))["a"] == expected


def test_mapping_keeps_the_order_in_which_keys_first_appeared(cwd):
    write(cwd, first="a: {x: 1, y: 1}", second="a: {z: 1, x: 2}")
    assert list(compose(["first", "second"]).a) == ["x", "y", "z"]


def test_environment_is_interpolated(cwd, monkeypatch):
    monkeypatch.setenv("ROOT", "/data")
    write(cwd, base="a: ${oc.env:ROOT}/x")
    assert resolve(compose(["base"]))["a"] == "/data/x"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["other"], "other: expected KEY=VALUE; to add a config file use -c other"),
        (["=3"], "=3: '' is not a dotted key"),
        (["a..b=3"], "a..b=3: 'a..b' is not a dotted key"),
        (["a[0]=3"], r"a\[0\]=3: 'a\[0\]' is not a dotted key"),
        (["a="], "a=: no value; write a=null or"),
        (["a=[1"], r"a=\[1: not YAML"),
        (["a=${x"], r"a=\$\{x"),
        (["a=${x}"], "a: Interpolation key 'x' not found"),
        (["a=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    ],
)
def test_malformed_override_is_an_error_that_repeats_it(overrides, problem, cwd):
    write(cwd, base="seed: 1")
    with pytest.raises(ConfigError, match=problem):
        resolve(compose(["base"], overrides))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "base: no such config file\n  tried "),
        ({"configs__bass": ""}, "base: no such config file; did you mean bass?"),
        ({"base": "a: 1\na: 2"}, "not a YAML mapping: .*duplicate key a"),
        ({"base": "a: [1"}, "not a YAML mapping"),
        ({"base": "- 1"}, "expected a mapping of options, got a list"),
        ({"base": "compose: model"}, "compose='model': expected a list of file names"),
        ({"base": "compose: [other]"}, "other: no such config file"),
        ({"base": "compose: [other]", "other": "compose: [base]"}, "composes itself, through"),
    ],
)
def test_unusable_file_is_an_error_that_names_it(files, problem, cwd):
    write(cwd, **files)
    with pytest.raises(ConfigError, match=f"(?s){problem}"):
        compose(["base"])


def test_empty_file_is_an_empty_config(cwd):
    write(cwd, base="")
    assert compose(["base"]).experiment == "base"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb:\n  " + "[" * 3000 + "]" * 3000, "deep.yaml:3: nested too deeply"),
        ("a: 1\n" + "{a: " * 3000 + "1" + "}" * 3000, "deep.yaml:"),
        ("\n".join(" " * i + "a:" for i in range(2000)), "deep.yaml:2000: nested too deeply"),
        ("a: " + "9" * 5000, "deep.yaml: not a YAML mapping"),
        ("compose: [" + "x" * 5000 + "]", "no such config file"),
    ],
)
def test_file_that_python_cannot_hold_is_named(text, says, tmp_path):
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        compose([tmp_path / "deep.yaml"])
    assert says in str(error.value)


def test_override_that_is_nested_too_deeply_is_an_error_of_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="nested too deeply"):
        compose([tmp_path / "x.yaml"], [".".join(["a"] * 3000) + "=1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: ${oc.env:LIT_A}", {"a": "${oc.env:LIT_A}"}),
        ("a: 3\nb: ${a}", {"a": 3, "b": 3}),
        ("a: ${oc.env:LIT_A}\nb: ${a}", {"a": "${oc.env:LIT_A}", "b": "${a}"}),
        ("a: [1, 'x-${oc.env:LIT_A}']", {"a": [1, "x-${oc.env:LIT_A}"]}),
        ("a: ${oc.decode:${oc.env:LIT_N}}", {"a": "${oc.decode:${oc.env:LIT_N}}"}),
        ("a: ${oc.env:LIT_UNSET, 5}", {"a": "${oc.env:LIT_UNSET, 5}"}),
        ("a: {x: {b: 1}}\nc: ${a.${oc.env:LIT_X}}", {"a": {"x": {"b": 1}}}),
        ("d: {k: '${oc.env:LIT_A}'}\ne: ${d}", {"d": {"k": "${oc.env:LIT_A}"}}),
    ],
)
def test_config_is_written_with_the_expressions_of_the_environment(text, expected, monkeypatch):
    for name, value in {"LIT_A": "the-secret", "LIT_N": "[1, 2]", "LIT_X": "x"}.items():
        monkeypatch.setenv(name, value)
    plain, _ = as_written(OmegaConf.create(text))
    assert {key: plain[key] for key in expected} == expected
    assert "the-secret" not in str(plain)
    assert resolve(plain) == resolve(OmegaConf.create(text)), "it gets its values again"
    assert OmegaConf.create({"a": "${oc.env:LIT_A}"}).a == "the-secret", "for others as ever"


def test_values_of_the_environment_come_with_their_expressions(monkeypatch):
    monkeypatch.setenv("LIT_A", "the-secret")
    text = "{a: '${oc.env:LIT_A}', b: 'at ${oc.env:LIT_A}!', c: '${oc.env:LIT_NONE, plain}'}"
    assert as_written(OmegaConf.create(text))[1] == {
        "the-secret": "${oc.env:LIT_A}",
        "at the-secret!": "at ${oc.env:LIT_A}!",
    }


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.text(alphabet="ab:[]{}&*!|>-?#%@\"'$\n ,.", max_size=40).map(str.encode)
    | st.binary(max_size=30)
    | st.dictionaries(st.sampled_from(["model", "trainer", "run_dir", "compose", "a"]), YAML).map(
        lambda value: yaml.safe_dump(value).encode()
    )
)
def test_any_file_is_a_config_or_a_config_error(content, tmp_path):
    (tmp_path / "any.yaml").write_bytes(content)
    with contextlib.suppress(ConfigError):
        config = resolve(compose([tmp_path / "any.yaml"]))
        with pytest.raises(ConfigError):
            check_options(config)
