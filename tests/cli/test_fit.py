"""From a config to a finished run, and on from its checkpoint."""

import json
import math
import os
import shutil
import weakref
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from omegaconf import OmegaConf
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lit_stability.cli.fit import compose, fit
from lit_stability.errors import ConfigError

HERE = __name__


class Model(LightningModule):
    """A linear layer whose steps log the learning rate they were taken with."""

    def __init__(
        self,
        lr: float = 0.1,
        schedule: Literal["none", "cosine", "lambda", "chained", "plateau"] = "none",
        horizon: int = 20,
        weight_decay: float = 0.0,
        metric: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(32, 2)
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("score", self.hparams.metric)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay
        )
        if self.hparams.schedule == "none":
            return optimizer
        scheduler = schedule(self.hparams.schedule, optimizer, self.hparams.horizon)
        interval = {"scheduler": scheduler, "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": interval}


class Data(LightningDataModule):
    """Two batches: a fit of 2n steps ends where an epoch does."""

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 2))

    def test_dataloader(self):
        return DataLoader(RandomDataset(32, 2))


def schedule(name: str, optimizer: torch.optim.Optimizer, horizon: int) -> LRScheduler:
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, horizon, eta_min=1e-3)
    if name == "lambda":
        return lr_scheduler.LambdaLR(optimizer, lambda step: step / horizon)
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer)
    parts = [
        lr_scheduler.LinearLR(optimizer, total_iters=horizon),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


class Note(Callback):
    """Writes its name when the fit starts."""

    def __init__(self, word: str) -> None:
        if not word:
            raise ValueError("word='' is empty; give one")
        self.word = word

    def on_fit_start(self, trainer, pl_module):
        with Path("notes.txt").open("a") as file:
            file.write(f"{self.word} ")


class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError("crashed")


class FailsOnce(Callback):
    """Raises at step 3 of the first fit of a process."""

    fits: list[weakref.ref] = []  # noqa: RUF012 (what is shared is the point)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer not in [each() for each in self.fits]:
            self.fits.append(weakref.ref(trainer))
        if len(self.fits) == 1 and trainer.global_step == 3:
            raise RuntimeError("crashed")
        if len(self.fits) == 2:
            assert self.fits[0]() is None, "what failed must not stay in memory"


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(
        f"""
seed: 0
model: {{_target_: {HERE}.Model}}
data: {{_target_: {HERE}.Data}}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 4
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
logger: null
"""
    )
    return tmp_path


def run(*overrides: str, resume: str | None = None):
    return fit(compose(["base"], overrides), resume=resume)


def problems(*overrides: str, resume: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*overrides, resume=resume)
    return str(caught.value)


def test_fit_trains_what_the_config_describes():
    result = run("model.lr='3e-2'", "trainer.max_steps=3")
    assert isinstance(result.model, Model)
    assert isinstance(result.datamodule, Data)
    assert result.model.rates == [0.03] * 3
    assert result.trainer.global_step == 3
    assert set(result.metrics) == {"loss"}


def test_fit_takes_a_plain_mapping():
    target = "lightning.pytorch.demos.boring_classes.BoringModel"
    result = fit(
        {
            "experiment": "plain",
            "run_dir": "plain",
            "model": {"_target_": target},
            "trainer": {"fast_dev_run": True, "enable_model_summary": False, "accelerator": "cpu"},
        }
    )
    assert isinstance(result.model, BoringModel)
    assert result.datamodule is None
    assert result.trainer.loggers == []


def test_seed_makes_two_runs_equal():
    first, second, other = (run(f"seed={seed}").model.layer.weight for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_launched_run_equals_the_one_written_by_hand():
    """What the launcher adds to a trainer changes no weight."""
    from lightning.pytorch import Trainer

    launched = run("model.schedule=cosine").model
    seed_everything(0, workers=True, verbose=False)
    model, data = Model(schedule="cosine"), Data()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    assert torch.equal(launched.layer.weight, model.layer.weight)


def test_callbacks_run_in_the_order_of_the_mapping_without_the_null_ones(cwd):
    note = f"_target_: {HERE}.Note"
    run(
        f"callbacks.b={{{note}, word: b}}",
        f"callbacks.a={{{note}, word: a}}",
        f"callbacks.c={{{note}, word: c}}",
        "callbacks.a=null",
    )
    assert (cwd / "notes.txt").read_text() == "b c "


def test_null_callbacks_are_none(cwd):
    run(f"callbacks.a={{_target_: {HERE}.Note, word: a}}", "callbacks=null")
    assert not (cwd / "notes.txt").exists()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["trainer.max_epoch=3"], "trainer.max_epoch=3: unknown option of lightning.pytorch"),
        (["trainer.max_epoch=3"], "did you mean max_epochs?"),
        (["trainer.max_steps=x"], "trainer.max_steps='x': expected int, got str"),
        (["trainer.precision=fp16"], "trainer.precision='fp16': expected null or one of 64, 32"),
        (["trainer.callbacks=[]"], "trainer.callbacks: belongs at the top level of a config, as"),
        (["trainer.logger=false"], "trainer.logger: belongs at the top level of a config, as"),
        (["trainer=fast"], "trainer='fast': expected a mapping whose _target_ is a Trainer"),
        (["trainer.accelerator=abacus"], "trainer: Trainer cannot be built: "),
        (["trianer.max_steps=3"], "trianer={'max_steps': 3}: unknown option of"),
        (["trianer.max_steps=3"], "did you mean trainer?"),
        (["model=null"], "model=None: expected a mapping whose _target_ is a LightningModule"),
        ([f"model._target_={HERE}.Note"], "Note: expected a mapping whose _target_ is a Lightning"),
        (["model.learning_rate=1"], f"model.learning_rate=1: unknown option of {HERE}.Model"),
        (["model.schedule=cosin"], "did you mean cosine?"),
        (["evaluate=tset"], "evaluate='tset': expected null or one of 'test', 'validate', 'none'"),
        (["evaluate=validate"], "evaluate=validate: Model defines no validation_step"),
        (["seed=abc"], "seed='abc': expected int or null, got str"),
        (["experiment=3"], "experiment=3: expected str, got int; quote it"),
        ([f"callbacks.a._target_={HERE}.Note"], "callbacks.a.word: missing; "),
        (
            [f"callbacks.a={{_target_: {HERE}.Note, word: ''}}"],
            "callbacks.a: Note cannot be built: word=''",
        ),
        (["ckpt_path=gone.ckpt"], "resume=gone.ckpt: no such checkpoint"),
        (["ckpt_path=last"], "resume=last: no checkpoint under runs/base; start without resume"),
    ],
)
def test_bad_option_is_an_error_before_anything_is_written(overrides, problem, cwd):
    assert problem in problems(*overrides)
    assert not (cwd / "runs").exists()


def test_missing_model_is_an_error():
    with pytest.raises(ConfigError, match=r"model: missing; .*requires it"):
        fit({"experiment": "x", "run_dir": "x"})


def test_every_problem_of_a_config_is_reported_at_once():
    text = problems("trainer.max_epoch=3", "model.lr=fast", "sed=1")
    assert [line.split("=")[0] for line in text.splitlines()] == [
        "model.lr",
        "trainer.max_epoch",
        "sed",
    ]


def test_failure_of_a_run_is_not_swallowed(cwd):
    with pytest.raises(RuntimeError, match="crashed"):
        run(f"callbacks.a._target_={HERE}.Fails")
    assert (cwd / "runs/base/config.yaml").exists()
    assert not (cwd / "runs/base/metrics.json").exists()


@pytest.mark.parametrize("recover", ["{}", "{max_crashes: 1, progress_steps: 50}"])
def test_run_that_recovers_ends_as_one_that_never_failed(recover, cwd, monkeypatch):
    monkeypatch.setattr(FailsOnce, "fits", [])
    result = run(f"callbacks.a._target_={HERE}.FailsOnce", f"recover={recover}")
    wanted = run("experiment=clean")
    assert torch.equal(result.model.layer.weight, wanted.model.layer.weight)
    assert result.trainer.global_step == 4
    (line,) = (cwd / "runs/base/recoveries.jsonl").read_text().splitlines()
    assert json.loads(line)["remedy"] == "plain restart"


def test_failure_that_cannot_be_recovered_from_is_not_swallowed(cwd):
    with pytest.raises(RuntimeError, match="crashed") as caught:
        run(f"callbacks.a._target_={HERE}.Fails", "recover={}")
    assert "it is deterministic" in caught.value.__notes__[0]
    assert not (cwd / "runs/base/metrics.json").exists()


def test_recovery_options_are_checked_before_anything_is_built(cwd):
    assert "recover.max_crashs=3: unknown option" in problems("recover.max_crashs=3")
    with pytest.raises(ConfigError, match="max_crashes must be at least 0, got -1"):
        run("recover.max_crashes=-1")
    assert not (cwd / "runs").exists()


def test_resolved_config_is_saved_and_can_be_run_again(cwd):
    first = run("experiment=first", "model.lr=0.05")
    saved = cwd / "runs/first/config.yaml"
    assert OmegaConf.load(saved).run_dir == "runs/first"
    second = fit(compose([saved]))
    assert torch.equal(first.model.layer.weight, second.model.layer.weight)


def test_file_already_written_is_kept_under_a_number(cwd):
    for rate in (0.1, 0.1, 0.2, 0.3):
        run(f"model.lr={rate}", "trainer.max_steps=1")
    folder = cwd / "runs/base"
    rates = {each.name: OmegaConf.load(each).model.lr for each in folder.glob("config*.yaml")}
    assert rates == {"config.1.yaml": 0.1, "config.2.yaml": 0.2, "config.yaml": 0.3}
    assert not list(folder.glob("*.partial"))


def test_metrics_of_the_evaluation_join_those_of_the_fit(cwd, capsys):
    result = run("evaluate=test", "model.metric=0.25")
    saved = json.loads((cwd / "runs/base/metrics.json").read_text())
    assert saved == pytest.approx(result.metrics)
    assert saved["score"] == 0.25
    assert "score 0.25" in capsys.readouterr().out


def test_metric_that_is_not_finite_is_null_in_the_file_alone(cwd):
    result = run("evaluate=test", "model.metric=.nan")
    assert math.isnan(result.metrics["score"])
    assert json.loads((cwd / "runs/base/metrics.json").read_text())["score"] is None


def test_run_announces_itself_and_how_to_view_it(capsys):
    run("run_dir='my runs'", "trainer.max_steps=1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["base -> my runs", "1 x cpu, precision 32-true", "Model, 66 parameters"]
    assert lines[-1] == "tensorboard --logdir 'my runs'"


def test_tensorboard_writes_into_the_run_dir_by_default(cwd):
    text = (cwd / "base.yaml").read_text().replace("logger: null\n", "")
    (cwd / "logged.yaml").write_text(text)
    fit(compose(["logged"]))
    assert list((cwd / "runs/logged").glob("events.out.tfevents.*"))
    assert list((cwd / "runs/logged/checkpoints").glob("*.ckpt"))


def test_list_of_loggers_is_built(cwd):
    csv = "{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '${run_dir}', name: NAME}"
    result = run(f"logger=[{csv.replace('NAME', 'a')}, {csv.replace('NAME', 'b')}]")
    assert [logger.name for logger in result.trainer.loggers] == ["a", "b"]


def test_resume_goes_on_where_the_checkpoint_stopped():
    run("trainer.max_steps=4")
    resumed = run("trainer.max_steps=6", resume="last")
    assert resumed.trainer.global_step == 6
    assert len(resumed.model.rates) == 2


def test_resume_takes_arguments_from_the_config_not_from_the_checkpoint():
    run("model.metric=1", "evaluate=test")
    resumed = run("model.metric=2", "evaluate=test", resume="last")
    assert resumed.metrics["score"] == 2.0


@pytest.mark.parametrize("schedule", ["none", "cosine", "lambda", "chained", "plateau"])
def test_resume_with_the_same_config_is_the_run_that_never_stopped(schedule):
    option = f"model.schedule={schedule}"
    whole = run(option, "trainer.max_steps=8", "run_dir=whole").model
    first = run(option, "trainer.max_steps=4").model
    resumed = run(option, "trainer.max_steps=8", resume="last").model
    assert first.rates + resumed.rates == whole.rates


@pytest.mark.parametrize(
    ("schedule", "change"),
    [
        ("none", "model.lr=0.5"),
        ("cosine", "model.lr=0.5"),
        ("cosine", "model.horizon=11"),
        ("lambda", "model.lr=0.5"),
        ("chained", "model.lr=0.5"),
        ("chained", "model.horizon=11"),
    ],
)
def test_rate_or_schedule_changed_in_the_config_is_in_effect_after_resume(schedule, change):
    option = f"model.schedule={schedule}"
    whole = run(option, change, "trainer.max_steps=8", "run_dir=whole").model
    run(option, "trainer.max_steps=4")
    resumed = run(option, change, "trainer.max_steps=8", resume="last").model
    assert resumed.rates == whole.rates[4:]


def test_function_changed_under_lambda_lr_is_in_effect_from_the_second_step():
    """A `LambdaLR` keeps no trace of its function in a checkpoint that could be compared."""
    options = ("model.schedule=lambda", "model.horizon=10", "trainer.max_steps=8")
    whole = run(*options, "run_dir=whole").model
    run("model.schedule=lambda", "trainer.max_steps=4")
    assert run(*options, resume="last").model.rates[1:] == whole.rates[5:]


def test_learning_rate_changed_under_a_metric_driven_scheduler_starts_from_the_config():
    run("model.schedule=plateau")
    resumed = run("model.schedule=plateau", "model.lr=0.5", "trainer.max_steps=6", resume="last")
    assert resumed.model.rates == [0.5, 0.5]


def test_other_option_changed_in_the_config_leaves_the_restored_rate_alone(cwd):
    run()
    path = next((cwd / "runs/base/checkpoints").glob("*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.07
    torch.save(checkpoint, "edited.ckpt")
    resumed = run("model.weight_decay=0.01", "trainer.max_steps=6", resume="edited.ckpt")
    assert resumed.model.rates == [0.07, 0.07]
    assert resumed.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.01


def test_checkpoint_of_another_launcher_can_be_resumed(cwd):
    run()
    path = next((cwd / "runs/base/checkpoints").glob("*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, "foreign.ckpt")
    resumed = run("model.lr=0.5", "trainer.max_steps=5", resume="foreign.ckpt")
    assert resumed.model.rates == [0.1]


def test_last_is_the_newest_whole_checkpoint_and_never_evidence(cwd):
    run("trainer.max_steps=2")
    folder = cwd / "runs/base"
    good = next((folder / "checkpoints").glob("*.ckpt"))
    stale = shutil.copy(good, folder / "checkpoints/last.ckpt")
    os.utime(stale, (1, 1))
    (folder / "checkpoints/cut.ckpt").write_bytes(good.read_bytes()[:500])
    (folder / "incidents").mkdir()
    shutil.copy(good, folder / "incidents/evidence.ckpt")
    assert run("trainer.max_steps=3", resume="last").trainer.ckpt_path == str(good.relative_to(cwd))


def test_checkpoints_all_cut_short_are_counted(cwd):
    folder = cwd / "runs/base/checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"half")
    assert "no checkpoint under runs/base (1 truncated or damaged)" in problems(resume="last")


def test_model_checkpoint_of_the_config_is_the_only_one():
    target = "lightning.pytorch.callbacks.ModelCheckpoint"
    result = run(f"callbacks.save={{_target_: {target}, save_last: true}}")
    assert [type(each) for each in result.trainer.checkpoint_callbacks] == [ModelCheckpoint]


class Secretive(Model):
    """Keeps a password, and fails with it on request."""

    def __init__(self, password: str = "", url: str = "", deep: dict | None = None, fail=False):
        super().__init__()
        self.save_hyperparameters()
        self.used = (password, url)

    def training_step(self, batch, batch_idx):
        if self.hparams.fail:
            raise RuntimeError(f"401 for {self.hparams.password}")
        return super().training_step(batch, batch_idx)


PASSWORD = "hunter2-is-secret"
"""The value of an environment variable, which no file may contain."""

SECRETIVE = f"""
experiment: base
model:
  _target_: {HERE}.Secretive
  password: ${{oc.env:SECRET}}
  url: postgres://me:${{oc.env:SECRET}}@host
  deep: {{again: "${{model.password}}"}}
data: {{_target_: {HERE}.Data}}
callbacks:
  monitor: {{_target_: lit_stability.GradientMonitor}}
  saved: {{_target_: lit_stability.AnomalyCheckpoint}}
  good: {{_target_: lit_stability.LastKnownGood, every_n_steps: 2, confirm_after: 1}}
  weights: {{_target_: lightning.pytorch.callbacks.ModelCheckpoint, save_weights_only: true}}
  fault:
    _target_: lit_stability.faults.FaultInjector
    faults: [{{_target_: lit_stability.faults.NanLoss, step: 5}}]
trainer: {{max_steps: 8, enable_progress_bar: false, enable_model_summary: false, accelerator: cpu}}
"""


@pytest.fixture
def secretive(cwd, monkeypatch):
    monkeypatch.setenv("SECRET", PASSWORD)
    monkeypatch.setattr("lit_stability.redaction._expressions", {})
    (cwd / "secretive.yaml").write_text(SECRETIVE)
    return cwd / "runs/base"


def contents(folder):
    """Every file of a run with its bytes; checkpoints store their parts uncompressed."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_value_of_the_environment_is_used_and_in_no_file(secretive):
    result = fit(compose(["secretive"]))
    assert result.model.used == (PASSWORD, f"postgres://me:{PASSWORD}@host")
    assert result.model.hparams.password == PASSWORD
    files = contents(secretive)
    assert [file for file, content in files.items() if PASSWORD.encode() in content] == []
    kinds = {file.name.split(".")[-1] for file in files}
    assert {"yaml", "ckpt", "json", "jsonl", "pt"} <= kinds
    saved = OmegaConf.to_container(OmegaConf.load(secretive / "config.yaml"))["model"]
    assert saved["password"] == "${oc.env:SECRET}"
    assert saved["url"] == "postgres://me:${oc.env:SECRET}@host"
    hparams = [
        torch.load(file, weights_only=True)["hyper_parameters"]
        for file in files
        if file.suffix == ".ckpt"
    ]
    assert len(hparams) >= 3
    assert {each["password"] for each in hparams} == {"${oc.env:SECRET}"}
    assert {each["deep"]["again"] for each in hparams} == {"${oc.env:SECRET}"}


def test_saved_config_gets_the_value_again(secretive, monkeypatch):
    fit(compose(["secretive"]))
    monkeypatch.setenv("SECRET", "another-secret")
    again = compose([secretive / "config.yaml"], ["trainer.max_steps=10"])
    assert fit(again, resume="good").model.used[0] == "another-secret"


def test_exception_that_quotes_a_value_is_recorded_without_it(secretive):
    with pytest.raises(RuntimeError, match=PASSWORD):
        fit(compose(["secretive"], ["model.fail=true"]))
    outcome = json.loads((secretive / "outcome.json").read_text())
    assert outcome["why"] == "RuntimeError: 401 for ${oc.env:SECRET}"
    files = contents(secretive)
    assert [file for file, content in files.items() if PASSWORD.encode() in content] == []


def test_files_that_may_hold_secrets_can_be_read_by_the_user_alone(secretive):
    fit(compose(["secretive"]))
    fit(compose(["secretive"], ["seed=1"]))
    private = [*secretive.glob("config*.yaml"), *secretive.glob("good*/*")]
    private += secretive.rglob("incidents/*/config.yaml")
    names = {file.name for file in private}
    assert {"config.yaml", "config.1.yaml", "run.json"} <= names
    assert {oct(file.stat().st_mode & 0o777) for file in private} == {"0o600"}
    folders = [file.parent for file in secretive.rglob("scene.pt")]
    assert {oct(folder.stat().st_mode & 0o777) for folder in folders} == {"0o700"}
