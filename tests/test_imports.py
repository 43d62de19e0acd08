"""The public names, and who may import what."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_stability
from lit_stability import detectors

ROOT = Path(lit_stability.__file__).parent
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py"))
ROOMS = {
    "versions": set(),
    "console": set(),
    "renamed": set(),
    "lightning_choice": {"console", "versions"},
    "compat": {"lightning_choice"},
    "lightning_package": {"lightning_choice", "versions"},
    "errors": set(),
    "printing": set(),
    "redaction": set(),
    "outside": {"lightning_choice"},
    "background": {"outside"},
    "figures": {"printing"},
    "distributed": set(),
    "measurement": {"compat", "distributed"},
    "training_state": {"distributed", "lightning_choice", "measurement", "redaction"},
    "detectors": {"measurement", "renamed"},
    "diagnosis": {"detectors", "distributed", "lightning_choice", "measurement", "training_state"},
    "policies": {"detectors", "diagnosis", "measurement"},
    "incidents": {"detectors", "diagnosis", "measurement", "outside", "policies", "redaction"},
    "trainer_internals": {
        *("diagnosis", "distributed", "lightning_choice", "lightning_package", "measurement"),
        *("outside", "redaction", "training_state"),
    },
    "faults": {"distributed", "lightning_package", "measurement", "trainer_internals"},
    "checks": {
        *("detectors", "diagnosis", "errors", "figures", "lightning_choice", "measurement"),
        *("printing", "training_state"),
    },
    "loggers": {
        *("background", "incidents", "lightning_choice", "measurement", "outside"),
        "training_state",
    },
    "tensorboard": {"incidents", "lightning_choice", "loggers", "measurement", "outside"},
    "callbacks": {
        *("background", "checks", "console", "detectors", "diagnosis", "distributed", "figures"),
        *("incidents", "lightning_choice", "lightning_package", "loggers", "measurement"),
        *("outside", "policies", "redaction", "renamed", "tensorboard", "trainer_internals"),
        "training_state",
    },
    "restart": {
        *("callbacks", "checks", "compat", "incidents", "lightning_choice", "lightning_package"),
        *("outside", "trainer_internals", "training_state"),
    },
    "cli": {
        *("callbacks", "checks", "errors", "figures", "incidents", "lightning_choice"),
        *(
            "lightning_package",
            "measurement",
            "printing",
            "redaction",
            "restart",
            "trainer_internals",
        ),
        "training_state",
    },
    "registration": {"callbacks"},
}
"""Every room, from the lowest up, and the rooms that its files import: only lower ones."""

WITH_LIGHTNING = {"callbacks", "trainer_internals", "restart", "cli", "faults"}
"""Rooms that may use Lightning, through `lightning_package`."""
WITHOUT_TORCH = {
    *(
        "versions",
        "console",
        "lightning_choice",
        "errors",
        "printing",
        "redaction",
        "outside",
        "background",
        "loggers",
        "figures",
        "detectors",
        "policies",
        "incidents",
        "registration",
    ),
}
LIGHT = {
    "__init__.py",
    "measurement/__init__.py",
    "measurement/float_formats.py",
    "measurement/step_stats.py",
    "training_state/__init__.py",
    "training_state/atomic_write.py",
    "training_state/good_checkpoints.py",
    "training_state/preemption_checkpoints.py",
    "training_state/run_names.py",
    "training_state/snapshot_rotation.py",
    "diagnosis/nonfinite/advice.py",
    "diagnosis/nonfinite/origin.py",
    "callbacks/gradient_flow/layer_rows.py",
    "callbacks/gradient_flow/picture.py",
    "checks/checkpoint/comparison.py",
    "checks/checkpoint/report.py",
    "checks/checkpoint/run_findings.py",
    "checks/checkpoint/table.py",
    "checks/checkpoint/tensor_findings.py",
    "checks/finding.py",
    "checks/text_table.py",
    *(
        f"checks/metric_log/{m}.py"
        for m in (
            *("__init__", "causes", "examination", "gradient_course", "level_findings"),
            *("loss_findings", "loss_levels", "progress_findings", "report", "roles"),
            *("series", "signal_findings", "text"),
            *("timeline", "readers/__init__", "readers/csv_file", "readers/hugging_face"),
            *("readers/tensorboard", "readers/wandb"),
        )
    ),
    "cli/log_doctor.py",
    "checks/preflight/report.py",
    "checks/precision_ranges/bins.py",
    "checks/precision_ranges/limits.py",
    "checks/precision_ranges/report.py",
    "checks/precision_ranges/table.py",
    "checks/precision_ranges/verdict.py",
    "tensorboard/plugin.py",
    "tensorboard/tab_writer.py",
    "tensorboard/tags.py",
    *(f"cli/experiments/{m}.py" for m in ("expectation", "judgement", "outcome", "running")),
    *(f"restart/{m}.py" for m in ("checkpoint_edits", "record", "resume_source")),
}
"""Files of other rooms that import no torch either: TensorBoard, or a table, needs them light."""


def room_of(path):
    return path.split("/")[0].removesuffix(".py")


def is_light(path):
    room = room_of(path)
    inside = room == "diagnosis" and not path.startswith("diagnosis/nonfinite/")
    return room in WITHOUT_TORCH or inside or path in LIGHT


def modules(tree, everywhere):
    """Top-level packages that a file imports: all, or only when it is itself imported."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            found |= modules(node, everywhere)
    return found


def imported(path, everywhere=True):
    return modules(ast.parse((ROOT / path).read_text(encoding="utf8")), everywhere)


def loaded_by(statement):
    """Which of the heavy packages a fresh interpreter has loaded after a statement."""
    heavy = ("torch", "lightning", "pytorch_lightning", "tensorboard", "numpy", "omegaconf")
    code = f"{statement}\nimport sys\nprint(*sorted(set({heavy}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import lit_stability",
        "import lit_stability; dir(lit_stability); lit_stability.__version__",
        "from lit_stability.detectors import default_detectors; default_detectors()",
        "import lit_stability.policies.escalation, lit_stability.incidents",
        "from lit_stability import read_incidents, Anomaly, Incident, TrainingStopped",
        "from lit_stability.checks.precision_ranges import RangeReport, format_report, judge",
        "from lit_stability.checks.checkpoint import Finding, HealthReport, format_report",
        "from lit_stability.policies.clip_rules import TieredClip; TieredClip()",
        "from lit_stability.policies.crash_risk import CrashRisk; CrashRisk()",
        "from lit_stability.cli.experiments import Expectation, judge",
    ],
)
def test_import_of_the_light_part_loads_nothing_heavy(statement):
    """K5: TensorBoard imports the package at its own start."""
    assert loaded_by(statement) == []


def test_import_of_the_arithmetic_loads_torch_without_lightning():
    statement = "import " + ", ".join(
        f"lit_stability.{m}"
        for m in (
            "measurement.step_meter",
            "training_state.snapshot",
            "training_state.lr_multiplier",
            "training_state.memory_estimate",
            "training_state.gradient_clipping",
        )
    )
    assert "lightning" not in loaded_by(statement)
    assert "torch" in loaded_by(statement)


def test_plugin_of_tensorboard_loads_no_torch():
    """K5: its loader, on which TensorBoard's start depends, loads nothing heavy of ours at all."""
    assert loaded_by("import lit_stability.tensorboard.loader") == ["tensorboard"]
    loaded = loaded_by("import lit_stability.tensorboard.loader, lit_stability.tensorboard.plugin")
    assert set(loaded) == {"tensorboard", "numpy"}


def test_public_names_are_frozen():
    """K3."""
    assert lit_stability.__all__ == [
        "AdaptiveGradientClipping",
        "Alerts",
        "Anomaly",
        "AnomalyCheckpoint",
        "AttentionProbe",
        "AutoRollback",
        "Budget",
        "CrashPrediction",
        "CurvatureProbe",
        "Diagnosis",
        "GradientFlow",
        "GradientMonitor",
        "Incident",
        "IntegrityAudit",
        "LastKnownGood",
        "NonFiniteLocator",
        "NonFiniteOrigin",
        "PrecisionFallback",
        "PreemptionCheckpoint",
        "Preflight",
        "QKClip",
        "RankWatchdog",
        "StabilityCallback",
        "StepStats",
        "TrainingStopped",
        "estimate_memory",
        "find_last_good",
        "find_resume_checkpoint",
        "fit_with_recovery",
        "locate_nonfinite",
        "measure_attention",
        "read_incidents",
        "register_strategy",
        "stability_callbacks",
    ]


@pytest.mark.parametrize("name", lit_stability.__all__)
def test_public_name_resolves_to_the_object_of_that_name(name):
    found = getattr(lit_stability, name)
    assert found.__name__ == name
    assert found.__module__.startswith("lit_stability.")
    assert found.__doc__


def test_public_names_are_what_dir_and_star_give():
    namespace = {}
    exec("from lit_stability import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == lit_stability.__all__
    assert set(lit_stability.__all__) | {"__version__"} == set(dir(lit_stability))


def test_unknown_name_is_an_attribute_error_that_repeats_it():
    with pytest.raises(AttributeError, match="no attribute 'GradientMonitr'"):
        lit_stability.GradientMonitr  # noqa: B018


def test_detectors_export_what_they_define():
    public = {n for n in vars(detectors) if not n.startswith("_") and n[0].isupper()}
    assert public | {
        *("default_detectors", "disagreement", "flagged", "rates_differ", "with_damage")
    } == set(detectors.__all__)


def own_imports(path):
    """Rooms of this package that a file imports, also inside of functions, its own left out."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    rooms = {name.split(".")[1] for name in names if name.startswith("lit_stability.")}
    return rooms - {room_of(path)}


def test_rooms_look_downwards():
    """The list of rooms is an order: no file imports from a room above its own."""
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert all(order.index(each) < order.index(room) for each in below), room


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_the_rooms_that_it_is_known_to(room):
    files = [f for f in FILES if room_of(f) == room]
    assert files
    found = {f: own_imports(f) - ROOMS[room] for f in files}
    assert {f: rooms for f, rooms in found.items() if rooms} == {}
    assert set().union(*map(own_imports, files)) == ROOMS[room], "an arrow that is gone"


def test_every_file_is_in_a_room():
    assert {room_of(f) for f in FILES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("path", [f for f in FILES if room_of(f) != "lightning_package"])
def test_lightning_is_imported_by_one_file(path):
    names = {"lightning", "lightning_fabric", "pytorch_lightning"}
    assert not imported(path) & names, "import it from lit_stability.lightning_package"


@pytest.mark.parametrize(
    "path", [f for f in FILES if room_of(f) not in WITH_LIGHTNING | {"lightning_package"}]
)
def test_file_outside_the_shell_imports_no_lightning(path):
    assert not imported(path) & {"torchmetrics"}
    assert "lightning_package" not in own_imports(path)


WRITES_BOTH_NAMES = {"lightning_choice.py", "cli/targets.py", "restart/crashes.py"}


@pytest.mark.parametrize("path", [f for f in FILES if f not in WRITES_BOTH_NAMES])
def test_text_names_no_module_of_one_package_of_lightning(path):
    """Such as a logger or a target: `lightning_choice` knows which package is in use."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    name = re.compile(r"(lightning[./](pytorch|fabric)|pytorch_lightning|lightning_fabric)[\w./]*")
    assert [text for text in texts if isinstance(text, str) and name.fullmatch(text)] == []


def test_both_packages_of_lightning_give_the_same_names():
    """They are written out twice, for type checkers and readers."""
    tree = ast.parse((ROOT / "lightning_package.py").read_text(encoding="utf8"))
    (choice,) = [n for n in tree.body if isinstance(n, ast.If)]
    first, second = (
        {(n.module, alias.name, alias.asname) for n in part for alias in n.names}
        for part in (choice.body, choice.orelse)
    )
    names = {"lightning": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
    names["lightning.pytorch"] = "pytorch_lightning"

    def renamed(module):
        known = max((n for n in names if f"{module}.".startswith(f"{n}.")), key=len)
        return names[known] + module.removeprefix(known)

    assert {(renamed(module), *rest) for module, *rest in first} == second


@pytest.mark.parametrize("path", [f for f in FILES if is_light(f)])
def test_file_of_decisions_imports_no_torch(path):
    assert not imported(path) & {"torch", "numpy"}


def test_light_files_exist():
    assert set(FILES) >= LIGHT


@pytest.mark.parametrize(
    "path",
    [
        *("cli/__init__.py", "cli/main.py", "cli/instantiate.py", "cli/config.py"),
        *("cli/ranges.py", "cli/doctor.py", "tensorboard/__init__.py", "tensorboard/loader.py"),
        *("checks/__init__.py", "checks/precision_ranges/__init__.py"),
        "checks/checkpoint/__init__.py",
        *(f"cli/experiments/{m}.py" for m in ("__init__", "catalogue", "command", "table")),
    ],
)
def test_file_that_starts_a_command_imports_no_torch_at_its_top(path):
    assert not imported(path, everywhere=False) & {"torch", "numpy"}
    text = (ROOT / path).read_text(encoding="utf8")
    assert "\nfrom lit_stability.lightning_package" not in text


def test_public_names_have_the_types_of_their_homes():
    """What a type checker is told, name by name, is where the name comes from at run time."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname: node.module.removeprefix("lit_stability.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == lit_stability._HOME
