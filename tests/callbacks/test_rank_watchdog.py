"""One rank dies, raises, stalls or leaves: the others name it, and all end within a stated time."""

import copy
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lit_stability import RankWatchdog, read_incidents
from tests.callbacks.test_battery import Regression, fit
from tests.conftest import make_trainer, regression_data
from tests.distributed import run_ranks
from tests.mortal_ranks import run_mortal_ranks
from tests.watchdog_rank_cases import HEALTHY, healthy, straggle, threads, trouble

ROOT = Path(__file__).parents[2]
CODE = RankWatchdog.exit_code
KILLED = -9


def hangs(tmp_path, acts, **options):
    """How the ranks ended, the text of the file with their stacks, and the row of the record."""
    ranks = options.get("ranks", 2)
    ended = run_mortal_ranks(call, tmp_path, acts, options, folder=tmp_path, ranks=ranks)
    files = list(tmp_path.glob("hang-*.txt"))
    assert len(files) <= 1, "one file for all ranks"
    rows = read_incidents(tmp_path) if (tmp_path / "incidents.jsonl").exists() else []
    return ended, files[0].read_text() if files else "", rows


def call(root, acts, options):
    trouble(root, acts, **options)


def stacks(text):
    """Rank -> its part of the file."""
    parts = re.split(r"^rank (\d) ", text, flags=re.MULTILINE)[1:]
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def line(ended, rank=0):
    return " ".join(re.findall(r"(?:the fit hangs|rank \d ends).*", ended[rank].output))


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.long)])
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_rank_that_is_killed_is_named_by_the_other(rank, where, tmp_path):
    ended, _, _ = hangs(tmp_path, {rank: (where, "die")})
    other = 1 - rank
    assert ended[rank].code == KILLED
    assert ended[other].code not in (0, None)
    assert f"the process of rank {rank} is gone" in line(ended, other)


def test_first_of_three_killed_in_its_loader_is_named_by_both_others(tmp_path):
    ended, _, _ = hangs(tmp_path, {0: ("data", "die")}, ranks=3)
    for other in (1, 2):
        assert ended[other].code not in (0, None)
        assert "the process of rank 0 is gone" in line(ended, other)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_rank_that_is_killed_while_nothing_breaks_ends_the_other(rank, tmp_path):
    """As with a backend whose collectives do not notice: the other is busy, and never told."""
    other = 1 - rank
    ended, text, rows = hangs(tmp_path, {rank: ("forward", "die"), other: ("forward", "sleep")})
    assert [ended[rank].code, ended[other].code] == [KILLED, CODE]
    assert f"the fit hangs: the process of rank {rank} is gone" in line(ended, other)
    assert "sleep_for_ever" in stacks(text)[other]
    assert [row["kind"] for row in rows] == ["hang: died"]


def test_loader_that_sleeps_for_ever_is_named_with_the_stacks_of_all_ranks(tmp_path):
    ended, text, (row,) = hangs(tmp_path, {1: ("data", "sleep")}, suite=True)
    assert [each.code for each in ended] == [CODE, CODE]
    assert "the fit hangs: rank 1 is behind" in line(ended)
    # Lightning fetches one batch ahead.
    assert "in data, after batch 4 (step 4)" in line(ended)
    assert str(next(tmp_path.glob("hang-*.txt"))) in line(ended)
    assert line(ended, 1) == "", "logged once"
    parts = stacks(text)
    assert set(parts) == {0, 1}
    assert "sleep_for_ever" in parts[1]
    assert "in backward, of batch 5" in parts[0]
    assert (row["kind"], row["outcome"], row["step"]) == ("hang: stalled", "stopped", 4)
    assert row["path"] in line(ended)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_validation_that_never_ends_is_named(rank, tmp_path):
    ended, text, _ = hangs(tmp_path, {rank: ("validation", "sleep")})
    assert [each.code for each in ended] == [CODE, CODE]
    assert f"rank {rank} is behind" in line(ended)
    assert "in validation" in stacks(text)[rank]


def test_ranks_in_the_same_place_are_not_named(tmp_path):
    ended, text, (row,) = hangs(tmp_path, {0: ("forward", "sleep"), 1: ("forward", "sleep")})
    assert [each.code for each in ended] == [CODE, CODE]
    assert "all ranks are in the same place, in forward, of batch 6" in line(ended)
    assert set(stacks(text)) == {0, 1}
    assert row["kind"] == "hang: deadlock"


def test_exception_of_one_rank_is_in_the_log_of_the_other(tmp_path):
    ended, text, _ = hangs(tmp_path, {1: ("forward", "raise")}, suite=True)
    assert [each.code for each in ended] == [1, 1]
    assert "rank 1 has raised LookupError: no such token: 17 in forward, of batch 6" in line(ended)
    assert text == "", "no hang"


def test_exception_that_its_program_survives_ends_the_other_ranks(tmp_path):
    ended, text, _ = hangs(tmp_path, {1: ("forward", "raise")}, goes_on=9.0)
    assert ended[0].code == CODE
    assert ended[0].seconds < ended[1].seconds
    assert "the fit hangs: rank 1 has raised LookupError: no such token: 17" in line(ended)
    assert "in backward, of batch 6" in stacks(text)[0]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_rank_with_fewer_batches_is_named_and_ends_with_the_other(rank, tmp_path):
    ended, text, (row,) = hangs(tmp_path, {}, counts={rank: 5}, goes_on=20.0)
    assert [each.code for each in ended] == [CODE, CODE]
    assert f"rank {rank} has left the training loop after batch 5" in line(ended, 1 - rank)
    assert set(stacks(text)) == {0, 1}
    assert row["kind"] == "hang: left"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
@pytest.mark.parametrize("act", ["hold", pytest.param("stop", marks=pytest.mark.long)])
def test_rank_that_sends_nothing_is_named_and_killed(rank, act, tmp_path):
    """A call of C that keeps the interpreter's lock, or a process that is stopped."""
    ended, text, (row,) = hangs(tmp_path, {rank: ("forward", act)})
    assert ended[rank].code == KILLED
    assert ended[1 - rank].code == CODE
    assert f"the fit hangs: rank {rank} has sent no heartbeat for" in line(ended, 1 - rank)
    assert set(stacks(text)) == {1 - rank}
    assert row["kind"] == "hang: silent"


QUICK = [name for name in HEALTHY if "slow" not in name or "first" in name]


def assert_unharmed(tmp_path, names):
    for results in run_ranks(healthy, tmp_path, names, folder=tmp_path, timeout=180):
        for name, (same, during, after) in results.items():
            assert same, name
            assert during == ([] if name == "max_time" else ["heartbeat exchange", "rank watchdog"])
            assert after == [], name
    assert not list(tmp_path.glob("hang*"))


def test_healthy_fits_are_unharmed_and_leave_no_thread(tmp_path):
    assert_unharmed(tmp_path, QUICK)


def patient(root):
    return healthy(root, ["late rank"], 3, timeout=600.0)["late rank"]


def test_ranks_that_end_before_another_do_not_wait_for_ever(tmp_path):
    results = run_ranks(patient, tmp_path, folder=tmp_path, ranks=3, timeout=40)
    assert [left for _, _, left in results] == [[]] * 3


@pytest.mark.long
def test_slow_healthy_fits_are_unharmed_and_leave_no_thread(tmp_path):
    assert_unharmed(tmp_path, [name for name in HEALTHY if name not in QUICK])


@pytest.mark.parametrize("phase", ["data", pytest.param("forward", marks=pytest.mark.long)])
def test_slow_rank_is_reported_once_with_its_phase(phase, tmp_path):
    ended = run_mortal_ranks(straggle, tmp_path, phase, folder=tmp_path)
    assert [each.code for each in ended] == [0, 0]
    (report,) = re.findall(r"rank \d is slow.*", ended[0].output + ended[1].output)
    assert report.startswith("rank 1 is slow: ")
    assert {"data": "(data)", "forward": "the forward pass"}[phase] in report


def test_even_ranks_are_not_reported(tmp_path):
    ended = run_mortal_ranks(straggle, tmp_path, "", folder=tmp_path)
    assert [each.code for each in ended] == [0, 0]
    assert "is slow" not in ended[0].output + ended[1].output


def test_one_device_has_no_thread_and_no_hook(tmp_path):
    class Look(Regression):
        def on_train_batch_end(self, *args):
            seen.append((threads(), watchdog.on_train_batch_start))

    seen, watchdog = [], RankWatchdog()
    trainer = make_trainer(tmp_path, [watchdog], max_steps=3)
    trainer.fit(Look(), regression_data())
    assert seen == [([], None)] * 3
    assert callable(watchdog.on_train_batch_start)


def test_copies_have_no_part_of_a_fit(tmp_path):
    class Copies(Regression):
        def on_train_batch_end(self, *args):
            for other in (copy.deepcopy(watchdog), pickle.loads(pickle.dumps(watchdog))):
                assert callable(other.on_train_batch_start)

    watchdog = RankWatchdog(timeout=99.0)
    fit(tmp_path, [watchdog], Copies, max_steps=2)
    assert copy.deepcopy(watchdog).timeout == 99.0


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("timeout", 0), ("interval", -1.0), ("slow_factor", 0.5), ("silent_after", 4.0)),
        *(("straggler_factor", 1.0), ("straggler_steps", 0), ("timeout", float("nan"))),
    ],
)
def test_argument_out_of_range_is_an_error_that_repeats_it(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*got {value!r}"):
        RankWatchdog(**{argument: value})


SCRIPT = """
    import os, sys
    from pathlib import Path
    from tests.watchdog_rank_cases import trouble

    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    trouble(Path(sys.argv[1]), {1: ("data", "sleep")} if attempt == 0 else {})
    print("DONE", attempt, flush=True)
"""


@pytest.mark.long
def test_torchrun_starts_the_ranks_again_after_a_hang(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "--max-restarts=1", str(script), str(tmp_path)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert run.returncode == 0, run.stderr
    assert "the fit hangs: rank 1 is behind" in run.stderr + run.stdout
    assert run.stdout.count("DONE 1") == 2


SPAWNED = """
    import sys
    from pathlib import Path
    from tests.watchdog_rank_cases import Batches, LIMITS, Net, loader, start
    from lit_stability import RankWatchdog

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.seen == 4 and sys.argv[3] == "fails" and self.trainer.global_rank == 1:
                raise ValueError("no such token: 17")
            return super().training_step(batch, batch_idx)

    if __name__ == "__main__":
        watchdog = RankWatchdog(**LIMITS)
        for _ in range(2):
            trainer = start(sys.argv[1], [watchdog], strategy=sys.argv[2])
            trainer.fit(Fails(), loader(Batches(0)))
            print("DONE")
"""


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
@pytest.mark.parametrize("how", ["healthy", "fails"])
def test_workers_that_a_launcher_starts_are_watched(strategy, how, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SPAWNED))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), strategy, how],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    if how == "healthy":
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("DONE") == 2
        assert not list(tmp_path.glob("hang*"))
    else:
        assert run.returncode == 1
        assert "no such token: 17" in run.stderr
