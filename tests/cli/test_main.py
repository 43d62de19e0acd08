"""The command line: what it prints and with which code it exits."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import lit_stability
from lit_stability.cli.config import compose
from lit_stability.cli.main import main
from lit_stability.cli.run_folders import choose_run_dir
from lit_stability.training_state.good_checkpoints import find_last_good, step_of

ROOT = Path(lit_stability.__file__).parents[1]
MODULE = """
from lightning.pytorch.demos.boring_classes import BoringModel


class Local(BoringModel):
    def __init__(self, size: int = 1, fail: bool = False) -> None:
        super().__init__()
        if fail:
            raise RuntimeError("crashed")


class Logging(Local):
    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        self.log("loss", found["loss"])
        return found


class Broken(BoringModel):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"] * float("nan")
"""
CONFIG = """
seed: 0
model: {_target_: cli_targets.Local}
trainer:
  accelerator: cpu
  max_steps: 1
  limit_train_batches: 1
  enable_progress_bar: false
  enable_model_summary: false
logger: null
"""


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder: a package-less module and a `configs/` of two files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_targets", raising=False)
    (tmp_path / "cli_targets.py").write_text(MODULE)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/small.yaml").write_text(CONFIG)
    (tmp_path / "configs/longer.yaml").write_text("trainer: {max_steps: 2}")
    return tmp_path


def test_fit_runs_a_target_of_the_current_folder(cwd, capsys):
    assert main(["fit", "-c", "small", "-c", "longer", "model.size=3"]) == 0
    (run,) = (cwd / "runs/small").iterdir()
    assert f"small -> runs/small/{run.name}\n" in capsys.readouterr().out
    saved = OmegaConf.load(run / "config.yaml")
    assert (saved.trainer.max_steps, saved.model.size) == (2, 3)


def test_resume_goes_on_from_the_last_checkpoint(cwd, capsys):
    assert main(["fit", "-c", "small"]) == 0
    (run,) = Path("runs/small").iterdir()
    assert main(["fit", "-c", "small", "--resume", "last", "trainer.max_steps=2"]) == 0
    assert f"resumed from {run}/checkpoints/" in capsys.readouterr().out
    assert [*Path("runs/small").iterdir()] == [run], "it goes on in its folder"


def test_fit_twice_writes_two_runs_and_commands_read_the_newest(cwd, capsys):
    (cwd / "configs/good.yaml").write_text(GOOD)
    for steps in (40, 30):
        assert main(["fit", "-c", "good", f"trainer.max_steps={steps}"]) == 0
    runs = sorted(
        Path("runs/good").iterdir(), key=lambda run: (run / "config.yaml").stat().st_mtime
    )
    assert len(runs) == 2
    assert {f.name for f in runs[0].iterdir()} == {f.name for f in runs[1].iterdir()}
    capsys.readouterr()
    assert main(["doctor", "runs/good"]) == 0
    assert f"{runs[1]}/good/" in capsys.readouterr().out
    assert main(["resume", "runs/good", "trainer.max_steps=35"]) == 0
    assert f"resumed from {runs[1]}/good/" in capsys.readouterr().out


def test_named_run_is_refused_a_second_time_and_overwritten_when_asked(cwd, capsys):
    named = ["fit", "-c", "small", "--name", "a"]
    assert main(named) == 0
    run = cwd / "runs/small/a"
    (run / "mine.txt").write_text("of the first run")
    assert main(named) == 2
    error = capsys.readouterr().err
    assert "runs/small/a: has an earlier run" in error
    assert "--overwrite" in error
    assert main([*named, "--resume", "last", "trainer.max_steps=2"]) == 0
    assert (run / "mine.txt").exists()
    assert main([*named, "--overwrite", "model.size=x"]) == 2
    assert (run / "mine.txt").exists(), "nothing is deleted for a config that is wrong"
    assert main([*named, "--overwrite"]) == 0
    assert not (run / "mine.txt").exists()
    assert len([*(run / "checkpoints").iterdir()]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overwrite"], "--overwrite: which run? add --name or run_dir=FOLDER"),
        (["--overwrite", "run_dir=."], ".: has no config.yaml, so it is no run and is not overw"),
        (["--name", "../a"], "--name ../a: use letters, digits and any of"),
        (["--name", ".."], "--name ..: use letters, digits and any of"),
    ],
)
def test_folder_that_is_no_run_is_never_overwritten(arguments, message, cwd, capsys):
    assert main(["fit", "-c", "small", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert (cwd / "configs/small.yaml").exists()


def names(cwd, monkeypatch, **environment):
    """The folder that `fit` chooses in an environment."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = compose(["small"])
    choose_run_dir(config, name=None, resume=None, overwrite=False)
    return Path(config.run_dir.replace("${experiment}", "small")).name


def test_processes_of_one_run_and_restarts_of_a_job_have_one_folder(cwd, monkeypatch):
    monkeypatch.delenv("LIT_STABILITY_RUN", raising=False)
    first, second = names(cwd, monkeypatch), names(cwd, monkeypatch)
    assert first != second
    assert names(cwd, monkeypatch, LOCAL_RANK="1") == second, "Lightning starts it with the same"
    job = {"LOCAL_RANK": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    assert names(cwd, monkeypatch, **job) == "slurm-7-0"
    (cwd / "runs/small/slurm-7-0").mkdir(parents=True)
    (cwd / "runs/small/slurm-7-0/config.yaml").write_text("")
    assert names(cwd, monkeypatch, SLURM_RESTART_COUNT="1") == "slurm-7-0"


GOOD = """
compose: [small]
trainer: {max_steps: 30, limit_train_batches: 1.0, enable_checkpointing: false}
callbacks:
  monitor: {_target_: lit_stability.GradientMonitor}
  good: {_target_: lit_stability.LastKnownGood, every_n_steps: 10, confirm_after: 3}
"""


@pytest.fixture
def good_run(cwd):
    """A finished run with good checkpoints in `runs/good`."""
    (cwd / "configs/good.yaml").write_text(GOOD)
    assert main(["fit", "-c", "good", "run_dir=runs/good"]) == 0
    return cwd / "runs/good"


def test_resume_uses_a_preemption_checkpoint_of_a_later_step(good_run, capsys):
    later = good_run / "preempted" / "step=00000099.ckpt"
    later.parent.mkdir()
    find_last_good("runs/good").rename(later)
    assert main(["resume", "runs/good", "trainer.max_steps=40"]) == 0
    printed = capsys.readouterr().out
    assert "resuming from the preemption checkpoint of step 99\n" in printed
    assert "resumed from runs/good/preempted" in printed


def test_resume_uses_the_last_good_checkpoint_and_the_config_of_the_run(good_run, capsys):
    """S12."""
    good = find_last_good("runs/good")
    assert main(["resume", "runs/good", "trainer.max_steps=40"]) == 0
    printed = capsys.readouterr().out
    assert f"good checkpoint of step {step_of(good)}; the run finished at step 30" in printed
    assert f"resumed from {good}" in printed
    assert OmegaConf.load(good_run / "config.yaml").trainer.max_steps == 40
    assert OmegaConf.load(good_run / "config.1.yaml").trainer.max_steps == 30
    good = find_last_good("runs/good")
    assert main(["fit", "-c", "good", "--resume", "good", "trainer.max_steps=50"]) == 0
    assert f"resumed from {good}" in capsys.readouterr().out


def test_resume_follows_a_run_whose_folder_was_moved(good_run, capsys):
    good_run.rename(good_run.parent / "moved")
    assert main(["resume", "runs/moved", "trainer.max_steps=32"]) == 0
    assert not good_run.exists()
    assert "good -> runs/moved" in capsys.readouterr().out


def copied(run, change=lambda config: None):
    """A run as it came from somewhere else: its folder without the signature."""
    there = run.parent / "theirs"
    shutil.copytree(run, there)
    (there / ".config.yaml.signature").unlink()
    config = OmegaConf.load(there / "config.yaml")
    change(config)
    (there / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return there


def test_resume_of_a_run_of_somebody_else_asks_for_trust_before_its_config_is_read(
    good_run, capsys
):
    def trap(config):
        config.callbacks.trap = {"_target_": "trap.Callback"}

    copied(good_run, trap)
    Path("trap.py").write_text("open('imported', 'w').close()")
    assert main(["resume", "runs/theirs", "trainer.max_steps=40"]) == 2
    error = capsys.readouterr().err
    assert "theirs/config.yaml: was not written by a fit of this user" in error
    assert "add --trust" in error
    assert not Path("imported").exists()


def test_resume_with_trust_goes_on_and_needs_no_trust_afterwards(good_run, capsys):
    copied(good_run)
    assert main(["resume", "runs/theirs", "--trust", "trainer.max_steps=40"]) == 0
    assert main(["resume", "runs/theirs", "trainer.max_steps=45"]) == 0
    assert "theirs" in capsys.readouterr().out


def test_resume_of_a_config_that_was_edited_asks_for_trust(good_run, capsys):
    with (good_run / "config.yaml").open("a") as file:
        file.write("# mine\n")
    assert main(["resume", "runs/good"]) == 2
    assert "or was changed since" in capsys.readouterr().err


def test_trusted_config_still_builds_no_function(good_run, capsys):
    def spoil(config):
        config.callbacks.trap = {"_target_": "os.system", "command": "touch was_run"}

    copied(good_run, spoil)
    assert main(["resume", "runs/theirs", "--trust"]) == 2
    assert "callbacks.trap._target_=os.system: is of Python's" in capsys.readouterr().err
    assert not Path("was_run").exists()


@pytest.mark.parametrize("command", ["check", "fit", "ranges"])
def test_commands_refuse_a_function_unless_it_is_allowed(command, cwd, capsys):
    with Path("cli_targets.py").open("a") as file:
        file.write("\n\ndef local():\n    return Local()\n")
    wanted = [command, "-c", "small", "model._target_=cli_targets.local"]
    assert main(wanted) == 2
    assert "use --allow cli_targets.local" in capsys.readouterr().err
    main([*wanted, "--allow", "cli_targets.local"])
    assert "--allow" not in capsys.readouterr().err


def damage(file):
    """Flips a bit in the middle of the largest part of a checkpoint."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 16
    file.write_bytes(content)


def test_resume_with_a_damaged_checkpoint_takes_the_one_before_it(good_run, caplog, capsys):
    newest = find_last_good(good_run)
    damage(newest)
    before = find_last_good(good_run)
    assert step_of(before) < step_of(newest)
    assert main(["resume", "runs/good", "trainer.max_steps=40"]) == 0
    assert f"good checkpoint of step {step_of(before)}" in capsys.readouterr().out
    assert f"{newest.name} is ignored: it is damaged" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (damage, "it is damaged (BadZipFile"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "it is truncated"),
        (lambda file: file.write_text("hello"), "it is truncated, or not a checkpoint"),
        (lambda file: torch.save([1, 2], file), "no checkpoint of a Trainer"),
        (lambda file: torch.save({"state_dict": {}}, file), "no checkpoint of a Trainer"),
    ],
)
def test_resume_from_a_file_that_is_no_whole_checkpoint_is_refused_by_name(
    spoil, says, cwd, capsys
):
    assert main(["fit", "-c", "small", "run_dir=runs/small"]) == 0
    (file,) = (cwd / "runs/small/checkpoints").glob("*.ckpt")
    file = file.rename(cwd / "mine.ckpt")
    spoil(file)
    assert main(["fit", "-c", "small", "--resume", "mine.ckpt", "trainer.max_steps=2"]) == 2
    error = capsys.readouterr().err
    assert "resume=mine.ckpt: " in error
    assert says in error


def test_resume_without_a_good_checkpoint_says_what_can_be_done(cwd, capsys):
    assert main(["fit", "-c", "small", "run_dir=runs/small"]) == 0
    assert main(["resume", "runs/small"]) == 2
    error = capsys.readouterr().err
    assert "runs/small: has no good checkpoint" in error
    assert "lit-stability fit -c runs/small/config.yaml --resume last" in error
    assert main(["fit", "-c", "small", "--resume", "good"]) == 2
    assert "resume=good: no good checkpoint under runs/small" in capsys.readouterr().err
    assert main(["resume", "runs/smal"]) == 2
    assert "runs/smal: has no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "small", "a.b=1", "--print-config", "experiment=x"],
        ["a.b=1", "-c", "small", "experiment=x", "--print-config"],
        ["--print-config", "--config", "small", "a.b=1", "experiment=x"],
    ],
)
def test_print_config_prints_it_resolved_and_starts_nothing(arguments, cwd, capsys):
    assert main(["fit", *arguments]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.run_dir, printed.a.b) == ("runs/x", 1)
    assert not (cwd / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "smal"], "lit-stability: smal: no such config file; did you mean small?"),
        (["-c", "small", "longer"], "longer: expected KEY=VALUE; to add a config file use -c"),
        (["-c", "small", "trainer.max_step=3"], "trainer.max_step=3: unknown option of"),
        (["-c", "small", "model.size=x"], "model.size='x': expected int, got str"),
        (["-c", "small", "run_dir=${x}", "--print-config"], "run_dir: Interpolation key 'x'"),
        (["-c", "small", "--resume", "last"], "resume=last: no checkpoint under runs/small"),
    ],
)
def test_config_error_is_a_message_without_traceback_and_code_2(arguments, message, cwd, capsys):
    assert main(["fit", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["fti"],
        ["fit"],
        ["fit", "-c", "small", "--print"],
        ["fit", "-c", "small", "--res", "last"],
        ["fit", "-c", "small", "--other"],
    ],
)
def test_bad_command_line_exits_with_code_2(arguments, cwd, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: lit-stability" in capsys.readouterr().err


def test_failure_inside_a_run_is_raised(cwd):
    with pytest.raises(RuntimeError, match="crashed"):
        main(["fit", "-c", "small", "model.fail=true"])


def test_run_that_preflight_stops_exits_with_code_3(cwd, capsys):
    (cwd / "configs/broken.yaml").write_text(
        "compose: [small]\nmodel: {_target_: cli_targets.Broken}\ncallbacks:\n"
        "  preflight: {_target_: lit_stability.Preflight, on_error: stop}\n"
    )
    assert main(["fit", "-c", "broken"]) == 3
    assert "lit-stability: preflight: 1 error" in (err := capsys.readouterr().err)
    assert "the first loss is nan" in err


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["experiments", "--help"]])
def test_help_documents_the_exit_codes(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


def test_help_print_config_and_a_list_load_neither_torch_nor_lightning(cwd):
    code = (
        "import sys; from lit_stability.cli.main import main; "
        "main(['fit', '-c', 'small', '--print-config']); main(['experiments']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
