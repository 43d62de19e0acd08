"""The public names, and who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_stability
from lit_stability import detectors

ROOT = Path(lit_stability.__file__).parent
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py"))
MAY_IMPORT_LIGHTNING = (
    "callbacks/__init__.py",
    "callbacks/acceptance.py",
    "callbacks/adaptive_clipping.py",
    "callbacks/anomaly_checkpoint.py",
    "callbacks/attempt_log.py",
    "callbacks/attention_probe.py",
    "callbacks/auto_rollback.py",
    "callbacks/automatic.py",
    "cli/checkpoint_weights.py",
    "callbacks/council.py",
    "callbacks/crash_prediction.py",
    "callbacks/curvature_probe.py",
    "callbacks/desk.py",
    "callbacks/diagnosis.py",
    "callbacks/good_keeper.py",
    "callbacks/good_resume.py",
    "callbacks/gradient_flow.py",
    "callbacks/gradient_monitor.py",
    "callbacks/hooks.py",
    "callbacks/last_known_good.py",
    "callbacks/measuring.py",
    "callbacks/nonfinite_locator.py",
    "callbacks/precaution.py",
    "callbacks/precision_fallback.py",
    "callbacks/precision_proof.py",
    "callbacks/preflight.py",
    "cli/range_meter.py",
    "callbacks/reporting.py",
    "callbacks/requirements.py",
    "callbacks/rewinder.py",
    "callbacks/treatment.py",
    "cli/check.py",
    "cli/experiments/closing.py",
    "faults.py",
    "cli/fit.py",
    "restart/__init__.py",
    "restart/callback.py",
    "restart/initial_state.py",
    "restart/fit.py",
    "trainer_internals/skip_batches.py",
    "restart/loop.py",
    "restart/memory.py",
    "restart/remedies.py",
    "restart/trainers.py",
    "cli/resume.py",
    "trainer_internals/__init__.py",
    "trainer_internals/isolation.py",
    "trainer_internals/checkpoint_ledger.py",
    "trainer_internals/callback_state.py",
    "trainer_internals/data_position.py",
    "trainer_internals/dataloaders.py",
    "trainer_internals/metrics.py",
    "trainer_internals/next_step.py",
    "trainer_internals/precision.py",
    "trainer_internals/loop_counters.py",
    "trainer_internals/batch_replay.py",
    "trainer_internals/step_rerun.py",
    "trainer_internals/incident_checkpoint.py",
    "trainer_internals/training_snapshot.py",
    "trainer_internals/strategies.py",
    "trainer_internals/skip_step.py",
    "trainer_internals/trainer_view.py",
    "trainer_internals/reference_step.py",
)
MAY_IMPORT_TORCH = (
    *MAY_IMPORT_LIGHTNING,
    "measurement/attention_logits.py",
    "measurement/attention_monitor.py",
    "measurement/batched_norms.py",
    "measurement/tensor_tree.py",
    "training_state/host_copy.py",
    "training_state/async_writer.py",
    "cli/main.py",
    "training_state/gradient_clipping.py",
    "measurement/compiled.py",
    "cli/config.py",
    "measurement/curvature.py",
    "measurement/gradient_distribution.py",
    "checks/checkpoint/difference.py",
    "checks/checkpoint/examination.py",
    "checks/checkpoint/load.py",
    "checks/checkpoint/measure.py",
    "checks/checkpoint/optimizer_state.py",
    "training_state/frozen_weights.py",
    "measurement/half_precision.py",
    "training_state/fp32_modules.py",
    "diagnosis/nonfinite/call_sites.py",
    "diagnosis/nonfinite/kernel_call.py",
    "diagnosis/nonfinite/rerun.py",
    "diagnosis/nonfinite/step_state.py",
    "diagnosis/nonfinite/values.py",
    "diagnosis/nonfinite/variables.py",
    "diagnosis/nonfinite/watch.py",
    "training_state/lr_multiplier.py",
    "measurement/step_meter.py",
    "measurement/optimizer_moments.py",
    "measurement/norms.py",
    "checks/preflight/__init__.py",
    "checks/preflight/branches.py",
    "checks/preflight/checklist.py",
    "checks/preflight/inputs.py",
    "checks/preflight/loss.py",
    "checks/preflight/masks.py",
    "checks/preflight/memorise.py",
    "checks/preflight/modes.py",
    "checks/preflight/observation.py",
    "checks/preflight/operations.py",
    "checks/preflight/positions.py",
    "checks/preflight/rates.py",
    "checks/preflight/scales.py",
    "checks/preflight/sharing.py",
    "checks/preflight/subject.py",
    "checks/preflight/trainable.py",
    "checks/precision_ranges/measure.py",
    "checks/precision_ranges/tally.py",
    "measurement/distributed_step_meter.py",
    "distributed/collectives.py",
    "restart/crashes.py",
    "training_state/rng.py",
    "measurement/lost_updates.py",
    "measurement/weight_sampling.py",
    "distributed/dtensor.py",
    "training_state/snapshot.py",
    "cli/instantiate.py",
    "tensorboard/events.py",
    "tensorboard/images.py",
    "tensorboard/data.py",
)


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
        "import lit_stability.gradient_flow",
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
        "Anomaly",
        "AnomalyCheckpoint",
        "AttentionProbe",
        "AutoRollback",
        "CrashPrediction",
        "CurvatureProbe",
        "Diagnosis",
        "GradientFlow",
        "GradientMonitor",
        "Incident",
        "LastKnownGood",
        "NonFiniteLocator",
        "NonFiniteOrigin",
        "PrecisionFallback",
        "Preflight",
        "StabilityCallback",
        "StepStats",
        "TrainingStopped",
        "find_last_good",
        "fit_with_recovery",
        "locate_nonfinite",
        "measure_attention",
        "read_incidents",
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


@pytest.mark.parametrize("path", [f for f in FILES if not f.startswith(MAY_IMPORT_LIGHTNING)])
def test_file_outside_the_shell_imports_no_lightning(path):
    assert not imported(path) & {"lightning", "pytorch_lightning", "torchmetrics"}


@pytest.mark.parametrize("path", [f for f in FILES if not f.startswith(MAY_IMPORT_TORCH)])
def test_file_of_decisions_imports_no_torch(path):
    assert not imported(path) & {"torch", "numpy"}


def test_files_of_decisions_are_the_ones_meant():
    """The lists above must not let a file of decisions slip out."""
    without_torch = {f for f in FILES if not f.startswith(MAY_IMPORT_TORCH)}
    light = {
        "__init__.py",
        "incidents/step_history.py",
        "policies/clip_rules/deviation.py",
        "policies/clip_rules/percentile.py",
        "policies/clip_rules/rule.py",
        "policies/clip_rules/tiers.py",
        "detectors/attention_logits.py",
        "detectors/spike.py",
        "detectors/stale_moments.py",
        "checks/checkpoint/comparison.py",
        "checks/checkpoint/report.py",
        "checks/checkpoint/run_findings.py",
        "checks/checkpoint/table.py",
        "checks/checkpoint/tensor_findings.py",
        "cli/experiments/expectation.py",
        "cli/experiments/judgement.py",
        "cli/experiments/outcome.py",
        "cli/experiments/running.py",
        "figures.py",
        "measurement/float_formats.py",
        "gradient_flow.py",
        "incidents/incident.py",
        "policies/escalation.py",
        "training_state/good_checkpoints.py",
        "checks/precision_ranges/bins.py",
        "checks/precision_ranges/report.py",
        "checks/precision_ranges/verdict.py",
        "policies/crash_risk/model.py",
        "policies/crash_risk/prevention.py",
        "policies/crash_risk/trends.py",
        "measurement/second_moment_ratio.py",
        "tensorboard/plugin.py",
        "tensorboard/tab_writer.py",
        "tensorboard/tags.py",
    }
    assert light <= without_torch


@pytest.mark.parametrize(
    "path",
    [
        "cli/main.py",
        "cli/instantiate.py",
        "cli/config.py",
        "tensorboard/__init__.py",
        "tensorboard/loader.py",
        "checks/precision_ranges/__init__.py",
        "cli/ranges.py",
        "checks/checkpoint/__init__.py",
        "cli/doctor.py",
        "cli/experiments/__init__.py",
        "cli/experiments/catalogue.py",
        "cli/experiments/command.py",
        "cli/experiments/table.py",
    ],
)
def test_file_that_starts_a_command_imports_no_torch_at_its_top(path):
    assert not imported(path, everywhere=False) & {"torch", "lightning", "numpy"}
