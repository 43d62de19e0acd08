"""Every option of every public callback from the YAML of a `LightningCLI`."""

import inspect
import warnings

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule

import lit_stability
from tests.conftest import Regression, regression_data

cli = pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("jsonargparse")

# Lightning's own way with jsonargparse.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

D, C = "lit_stability.detectors", "lit_stability.policies.clip_rules"
OPTIONS = {
    "GradientMonitor": {
        "detectors": [
            {"class_path": f"{D}.NonFinite"},
            {"class_path": f"{D}.Spike", "init_args": {"signal": "loss"}},
        ],
        "layer_bounds": {"net.0.*": 1e6, "*": [1e-12, 1e6]},
        "close_after": 5,
        "scan_weights_every": 7,
        "details_every": 9,
        "history": 3,
        "allow_strategies": ["FSDPStrategy"],
        "upload_incidents": True,
        "directory": None,
    },
    "AdaptiveGradientClipping": {"rule": {"class_path": f"{C}.TieredClip"}},
    "AnomalyCheckpoint": {"history": 50, "max_incidents": 3, "max_bytes": 1_000_000},
    "Alerts": {"targets": [], "events": ["stop"], "min_interval": 5.0, "timeout": 1.0},
    "NonFiniteLocator": {},
    "Diagnosis": {"history": 50, "stop_on_certain_cause": False},
    "LastKnownGood": {
        "every_n_steps": 20,
        "confirm_after": 5,
        "keep": 1,
        "max_batch_bytes": 0,
        "on_mismatch": "warn",
        "lr_factor_after_crash": 1.0,
        "every_n_seconds": 60.0,
    },
    "PreemptionCheckpoint": {"grace": 60.0},
    "RankWatchdog": {
        "timeout": 900.0,
        "silent_after": 200.0,
        "slow_factor": 2.0,
        "straggler_factor": 2.0,
        "straggler_steps": 100,
        "interval": 2.0,
    },
    "PrecisionFallback": {
        "precisions": ["bf16-mixed", "32-true"],
        "fp32_modules": ["net.0"],
        "try_again_after": 100,
        "failures": 1,
        "max_fp32_modules": 0,
        "infinite_losses": 1,
    },
    "AutoRollback": {
        "after_rollback": "skip",
        "snapshot_every": 10,
        "confirm_after": 5,
        "relax_after": 9,
        "budget": {
            "class_path": "lit_stability.policies.escalation.Budget",
            "init_args": {"skips": 2},
        },
        "max_replay_bytes": 1000,
        "clone_batches": True,
        "snapshot_device": "host",
        "memory_budget": "4 GiB",
        "snapshot_cost": 0.01,
    },
    "CrashPrediction": {
        "levels": {
            "class_path": "lit_stability.policies.crash_risk.RiskLevels",
            "init_args": {"stop": 0.9},
        },
        "relax_after": 10,
        "keep": 1,
    },
    "Preflight": {
        "on_error": "warn",
        "classes": 10,
        "one_vs_rest": None,
        "pretrained": True,
        "frozen": ["net.9.*"],
        "memorise": {
            "class_path": "lit_stability.checks.preflight.Memorise",
            "init_args": {"samples": 2},
        },
    },
    "GradientFlow": {"every_n_steps": 100, "layers": 5},
    "QKClip": {"threshold": 50.0, "every": 2, "modules": ["*"]},
    "AttentionProbe": {"modules": ["*"], "every": 20, "quiet": False},
    "IntegrityAudit": {"every": 500},
    "CurvatureProbe": {"every": 30, "follow": 2},
    "StabilityCallback": {},
}


class Numbers(LightningDataModule):
    """The data of the regression task."""

    def train_dataloader(self):
        return regression_data(10)


def plans(names):
    return [{"class_path": f"lit_stability.{n}", "init_args": OPTIONS[n]} for n in names]


def run(tmp_path, callbacks, *command, **trainer):
    """A `LightningCLI` on a config with these callbacks; with no command nothing is run."""
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "max_steps": 10}
    options |= {"default_root_dir": str(tmp_path), "callbacks": callbacks}
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump({"trainer": options | trainer}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        return cli.LightningCLI(
            Regression,
            Numbers,
            args=[*command, "--config", str(path)],
            run=bool(command),
            seed_everything_default=0,
            save_config_callback=None,
        ).trainer


def test_table_has_every_option_of_every_public_callback():
    found = {name: getattr(lit_stability, name) for name in lit_stability.__all__}
    found = {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, Callback)}
    signatures = {name: {*inspect.signature(c).parameters} for name, c in found.items()}
    assert {name: {*options} for name, options in OPTIONS.items()} == signatures


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_yaml_reach_the_callback(name, tmp_path):
    (made,) = [c for c in run(tmp_path, plans([name])).callbacks if type(c).__name__ == name]
    for option, value in OPTIONS[name].items():
        kept = getattr(made, option, None)
        if isinstance(value, (int, float, str)) and kept is not None:
            assert kept == value, option


def test_suite_from_yaml_trains_with_objects_inside_of_options(tmp_path):
    """K5: detectors, a budget, a clipping rule and levels are written as classes."""
    trainer = run(tmp_path, plans([n for n in OPTIONS if n != "Preflight"]), "fit")
    assert trainer.global_step == 10
    monitor, clipping = trainer.callbacks[:2]
    assert [type(d).__name__ for d in monitor.detectors] == ["NonFinite", "Spike", "LayerBounds"]
    assert type(clipping.rule).__name__ == "TieredClip"
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("GradientMonitor", "close_afer", "close_afer"),
        ("GradientMonitor", "detectors", "detectors"),
        ("AutoRollback", "budget", "budget"),
    ],
)
def test_wrong_option_in_yaml_is_refused_by_name(name, option, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, [{"class_path": f"lit_stability.{name}", "init_args": {option: "many"}}])
    assert message in capsys.readouterr().err
