"""A signal at any moment ends the run at the end of a step, with a checkpoint that it resumes from.

Each fit is in a process of its own, which the signal ends.
"""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_stability import GradientMonitor, PreemptionCheckpoint
from lit_stability.training_state.good_checkpoints import RunEnd
from tests import signal_cases
from tests.conftest import every_other, fit
from tests.distributed import exit_codes
from tests.rank_cases import Manual
from tests.test_kill import assert_same

ROOT = Path(__file__).resolve().parents[2]
TERM, USR1 = 128 + signal.SIGTERM, 128 + signal.SIGUSR1


def run(folder, function=signal_cases.train, *args, timeout=60, signals=(), **options):
    """The exit code of one process that trains, and what it printed."""
    folder.mkdir(exist_ok=True)
    (folder / "begun0").unlink(missing_ok=True)
    call = signal_cases.Call(function, options)
    (code,) = exit_codes(call, folder, *args, folder=folder, timeout=timeout, signals=signals)
    return code, (folder / "output0").read_text()


def end(folder):
    return torch.load(folder / "end.pt", weights_only=False)


def finish(folder, **options):
    """Goes on in a new process until the run is over; what it ended with."""
    code, output = run(folder, **options)
    assert code == 0, output
    return end(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed run ends with, for options of `train`; each is trained once."""
    known = {}

    def trained(**options):
        key = repr(options)
        if key not in known:
            known[key] = finish(tmp_path_factory.mktemp("undisturbed") / "run", **options)
        return known[key]

    return trained


def saved(folder):
    return sorted(path.name for path in (folder / "preempted").glob("*"))


PLACES = {
    "sanity check": (0, 0),
    "forward": (20, 21),
    "backward": (20, 21),
    "optimizer": (20, 21),
    "validation": (18, 18),
    "save": (14, 14),
    "epoch end": (19, 19),
    "loader": (20, 20),
}
"""Place of the signal, the step from which on it comes, and the step that is saved."""


@pytest.mark.parametrize("place", PLACES)
def test_run_ended_at_any_place_resumes_bit_identical(place, undisturbed, tmp_path):
    step, expected = PLACES[place]
    code, output = run(tmp_path, signal_cases.train, place, step)
    assert code == TERM, output
    assert saved(tmp_path) == [f"step={expected:08d}.ckpt"], output
    assert f"SIGTERM: saved step {expected} to {tmp_path}" in output
    if step:
        assert RunEnd.read(tmp_path / "good").state == "interrupted"
    assert_same(finish(tmp_path), undisturbed())


LOOPS = {
    "accumulation": ({"accumulate_grad_batches": 4, "max_steps": 15}, "forward", 7),
    "manual optimization": ({"module": signal_cases.ByHand}, "forward", 16),
    "LBFGS": ({"module": signal_cases.ByLBFGS}, "backward", 16),
    "steps without a loss": (
        {"module": signal_cases.WithoutSomeSteps, "max_epochs": 3},
        "forward",
        15,
    ),
    "validation after an epoch": ({"val_check_interval": 1.0}, "validation", 19),
    "no validation": ({"limit_val_batches": 0}, "epoch end", 38),
    "reloaded loaders": ({"reload_dataloaders_every_n_epochs": 1}, "forward", 22),
    "workers": ({"workers": 2}, "forward", 16),
}
"""Options of `train`, and place and step of the signal."""


@pytest.mark.parametrize("kind", every_other(LOOPS))
def test_run_of_any_loop_resumes_bit_identical(kind, undisturbed, tmp_path):
    options, place, step = LOOPS[kind]
    code, output = run(tmp_path, signal_cases.train, place, step, **options)
    assert code == TERM, output
    assert len(saved(tmp_path)) == 1, output
    assert_same(finish(tmp_path, **options), undisturbed(**options))


def test_signal_early_in_an_accumulation_window_is_acted_upon_at_its_end(tmp_path):
    options = {"accumulate_grad_batches": 4, "max_steps": 15}
    code, output = run(tmp_path, signal_cases.train, "forward", 7, **options)
    assert code == TERM, output
    assert saved(tmp_path) == ["step=00000008.ckpt"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_run_ended_at_random_moments_resumes_bit_identical(kills, undisturbed, tmp_path):
    """Two signals each time: the second does not interrupt what is done about the first."""
    draw, options = random.Random(kills), {"max_steps": 40 + 8 * kills}
    for _ in range(kills):
        second = (draw.uniform(0, 0.02), 0, signal.SIGTERM)
        signals = [(draw.uniform(0.2, 0.5), 0, signal.SIGTERM), second]
        code, output = run(tmp_path, signal_cases.train_slowly, signals=signals, **options)
        assert code in (TERM, -signal.SIGTERM), output
        assert not list(tmp_path.rglob(".part-*"))
    assert saved(tmp_path)
    assert_same(finish(tmp_path, **options), undisturbed(**options))


def test_second_signal_while_saving_does_not_interrupt_the_save(undisturbed, tmp_path):
    code, output = run(tmp_path, signal_cases.train_with_a_signal_in_the_save)
    assert code == TERM, output
    assert saved(tmp_path) == ["step=00000020.ckpt"]
    assert_same(finish(tmp_path), undisturbed())


def test_signal_in_the_last_step_ends_the_process_after_the_fit(tmp_path):
    last = signal_cases.STEPS
    code, output = run(tmp_path, signal_cases.train, "optimizer", last - 1)
    assert code == TERM
    assert "SIGTERM came in the last step: the fit is complete" in output
    assert RunEnd.read(tmp_path / "good").state == "finished"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_workers_of_the_loader_too_loses_nothing(signum, undisturbed, tmp_path):
    code, output = run(tmp_path, signal_cases.train_as_a_group, signum)
    assert code == 128 + signum, output
    assert saved(tmp_path) == ["step=00000021.ckpt"], output
    assert_same(finish(tmp_path, workers=2), undisturbed(workers=2))


@pytest.mark.parametrize("interruptible", [True, False])
def test_grace_that_expires_ends_the_process_and_says_so(interruptible, tmp_path, monkeypatch):
    case = signal_cases.train_with_endless_validation
    code, output = run(tmp_path, case, interruptible, timeout=30)
    assert code == TERM
    assert "SIGTERM: no step ended within 0.5 s, nothing is saved; resume from the last" in output
    assert saved(tmp_path) == []
    if interruptible:
        assert "on_exception SIGTERMException" in output
        assert RunEnd.read(tmp_path / "good").state == "interrupted"


def test_handler_of_the_program_is_called_and_restored(tmp_path):
    code, output = run(tmp_path, signal_cases.train_with_handler)
    assert code == TERM - 100, output
    assert saved(tmp_path) == ["step=00000011.ckpt"]


@pytest.mark.parametrize("case", [signal_cases.train_with_own_usr1, signal_cases.train_with_stacks])
def test_sigusr1_that_the_program_handles_does_not_end_the_fit(case, tmp_path):
    code, output = run(tmp_path, case)
    assert code == 0, output
    assert saved(tmp_path) == []


def test_stacks_are_printed_at_sigusr1(tmp_path):
    run(tmp_path, signal_cases.train_with_stacks)
    assert "most recent call first" in (tmp_path / "stacks").read_text()


def test_fit_outside_of_the_main_thread_reports_it_once_and_trains(tmp_path):
    code, output = run(tmp_path, signal_cases.train_in_a_thread)
    assert code == 0
    assert output.count("leaves SIGTERM to Lightning: the fit is not in the main thread") == 1
    assert end(tmp_path)["step"] == signal_cases.STEPS


def test_fits_and_validation_leave_the_handlers_of_the_program(tmp_path):
    code, output = run(tmp_path, signal_cases.fit_twice_and_validate)
    assert code == 0, output


def test_forked_process_ends_at_sigterm_and_ignores_sigusr1(tmp_path):
    code, output = run(tmp_path, signal_cases.fork_in_a_fit)
    assert code == 0, output


def test_disk_that_is_full_ends_the_run_all_the_same(tmp_path):
    code, output = run(tmp_path, signal_cases.train_with_a_full_disk)
    assert code == TERM
    assert "the checkpoint of step 20 cannot be saved (OSError(28" in output
    assert saved(tmp_path) == []


def test_run_without_the_rest_of_the_suite_ends_with_a_checkpoint(tmp_path):
    code, output = run(tmp_path, signal_cases.train, "forward", 20, suite=(GradientMonitor,))
    assert code == TERM, output
    assert saved(tmp_path) == ["step=00000021.ckpt"]
    assert finish(tmp_path, suite=(GradientMonitor,))["step"] == signal_cases.STEPS


def test_checkpoint_of_an_earlier_run_in_the_folder_is_moved_away(tmp_path):
    run(tmp_path, signal_cases.train, "forward", 20)
    fit(tmp_path, [GradientMonitor(), PreemptionCheckpoint()], max_steps=3)
    assert not (tmp_path / "preempted").exists()
    assert (tmp_path / "preempted.1" / "step=00000021.ckpt").exists()


def slurm(folder, monkeypatch, script, **environment):
    """A job of SLURM with a ``scontrol`` that is this shell script."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(parents=True)
    if script is not None:
        command = bin_folder / "scontrol"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    return job | {"PATH": f"{bin_folder}:/usr/bin:/bin"} | environment


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, "4711"),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
    ],
)
def test_slurm_job_is_requeued_and_resumes_by_itself(
    environment, job, undisturbed, tmp_path, monkeypatch
):
    script = f'echo "$@" > {tmp_path}/asked'
    variables = slurm(tmp_path, monkeypatch, script, **environment)
    folder = tmp_path / "run"
    options = {"environment": variables, "find": False}
    code, output = run(folder, signal_cases.train, "backward", 20, signal.SIGUSR1, **options)
    assert code == USR1, output
    assert (tmp_path / "asked").read_text().strip() == f"requeue {job}"
    assert f"requeued the SLURM job {job}" in output
    assert [path.name for path in folder.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    assert output.index("saved step 21") < output.index("requeued the SLURM job")
    assert_same(finish(folder, **options), undisturbed())


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (None, "the job is not requeued: scontrol is not on PATH"),
        ("echo no such job >&2; exit 3", "scontrol requeue 4711 failed with 3: no such job"),
    ],
)
def test_scontrol_that_fails_is_logged_and_nothing_else(script, line, tmp_path, monkeypatch):
    variables = slurm(tmp_path, monkeypatch, script)
    folder = tmp_path / "run"
    code, output = run(
        folder, signal_cases.train, "forward", 20, signal.SIGUSR1, environment=variables
    )
    assert code == USR1
    assert line in output
    assert (folder / "hpc_ckpt_1.ckpt").exists()


def test_sigterm_under_slurm_saves_and_does_not_requeue(tmp_path, monkeypatch):
    variables = slurm(tmp_path, monkeypatch, f"touch {tmp_path}/asked")
    folder = tmp_path / "run"
    code, output = run(folder, signal_cases.train, "forward", 20, environment=variables)
    assert code == TERM, output
    assert saved(folder) == ["step=00000021.ckpt"]
    assert not (tmp_path / "asked").exists()
    assert not list(folder.glob("hpc_ckpt*"))


def test_script_that_is_ended_leaves_the_code_to_the_shell(tmp_path):
    """No test process around it: the interpreter ends as that of a user."""
    script = "from pathlib import Path; from tests.signal_cases import train; "
    script += f"train(Path({str(tmp_path)!r}), 'backward', 20)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == TERM, done.stderr
    assert saved(tmp_path) == ["step=00000021.ckpt"]


# Several ranks


def ranks(folder, name, *args, timeout=60, **options):
    """Exit codes of two ranks, and what both printed."""
    folder.mkdir(exist_ok=True)
    call = signal_cases.Call(signal_cases.train_rank, options)
    codes = exit_codes(call, folder, name, *args, ranks=2, folder=folder, timeout=timeout)
    return codes, [(folder / f"output{r}").read_text() for r in range(2)]


@pytest.mark.parametrize(
    "hits",
    [pytest.param((0,), marks=pytest.mark.long), (1,), (0, 1)],
    ids=["rank 0", "rank 1", "both"],
)
def test_ranks_save_together_and_end_with_the_same_code(hits, tmp_path):
    codes, output = ranks(tmp_path, "ddp", hits)
    assert codes == [TERM, TERM], output
    (name,) = saved(tmp_path)
    step = int(re.search(r"\d+", name)[0])
    assert step in (13, 14), "sent in step 13, before or after that rank sent its numbers"
    assert all(f"ended at {step}" in text for text in output)
    assert sum("SIGTERM: saved step" in text for text in output) == 1
    codes, output = ranks(tmp_path, "ddp", ())
    assert codes == [0, 0]
    assert all("finished at 30" in text for text in output)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fsdp2", {}),
        pytest.param("ddp", {"accumulate_grad_batches": 3}, marks=pytest.mark.long),
        ("ddp", {"module": Manual}),
    ],
    ids=["FSDP2", "accumulation", "manual optimization"],
)
def test_ranks_of_any_kind_save_together(name, options, tmp_path):
    codes, output = ranks(tmp_path, name, (1,), **options)
    assert codes == [TERM, TERM], output
    assert len(saved(tmp_path)) == 1
    codes, output = ranks(tmp_path, name, (), **options)
    assert codes == [0, 0], output


def test_ranks_whose_grace_expires_end_with_the_code(tmp_path):
    codes, output = ranks(tmp_path, "ddp", (0, 1), grace=1.0, endless=(1,), timeout=40)
    assert codes == [TERM, TERM], output
    assert saved(tmp_path) == []
    assert all("no step ended within 1 s" in text for text in output)


def test_ranks_of_a_slurm_job_requeue_it_once_if_any_was_asked_to(tmp_path, monkeypatch):
    """The job is preempted while the batch script is cancelled on another node."""
    variables = slurm(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/asked')
    folder = tmp_path / "run"
    signums = (signal.SIGTERM, signal.SIGUSR1)
    codes, output = ranks(folder, "ddp", (0, 1), signum=signums, environment=variables)
    assert codes == [USR1, USR1], output
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    (name,) = saved(folder)
    link = folder / "hpc_ckpt_1.ckpt"
    assert link.resolve() == (folder / "preempted" / name / "checkpoint.ckpt").resolve()
