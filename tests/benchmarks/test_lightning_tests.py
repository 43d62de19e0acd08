"""Lightning's tests with the suite, on a small folder of tests made for it."""

import json
import sys
from pathlib import Path

import pytest

import lit_stability
from benchmarks.lightning_tests import (
    ENTRY_POINT,
    GROUP,
    Outcome,
    folder_of_tests,
    is_expected,
    main,
    new_failures,
    normalized,
    outcomes_of,
    require_installed,
    require_passed,
    selected_tests,
)

TESTS = """
import pytest
from lightning.pytorch import Trainer

def trainer():
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(accelerator="cpu", barebones=False, **dict.fromkeys(options, False))

def test_passes():
    assert trainer().max_epochs is None

def test_fails():
    assert trainer().max_epochs == 7

def test_counts():
    assert len(trainer().callbacks) == 0

@pytest.mark.parametrize("room", [3, 4])
def test_breaks(room):
    if trainer().callbacks:
        raise RuntimeError(f"no callback fits into {room} places")
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one file of tests; Lightning finds the entry point in the child too."""
    site = tmp_path / "site"
    info = site / "lit_stability-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lit-stability\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nstability = {ENTRY_POINT}\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    root = Path(lit_stability.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{site}:{root}")
    folder = tmp_path / "checkout" / "tests" / "tests_pytorch"
    folder.mkdir(parents=True)
    (folder / "test_trainer.py").write_text(TESTS)
    return tmp_path / "checkout"


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lightning_tests", *map(str, args)])
    main()


@pytest.mark.slow
@pytest.mark.long
def test_run_separates_what_counts_callbacks_from_what_breaks(checkout, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="2 tests pass bare and fail with the suite"):
        run_main(monkeypatch, checkout, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/lightning_tests.json").read_text(encoding="utf8"))
    broken, counted = found["figures"]["new_failures"]
    assert broken["message"] == "RuntimeError: no callback fits into N places"
    assert [name.partition("::")[2] for name in broken["tests"]] == [
        "test_breaks[3]",
        "test_breaks[4]",
    ]
    assert not broken["expected"]
    assert counted["expected"]
    assert [name.partition("::")[2] for name in counted["tests"]] == ["test_counts"]
    table = (tmp_path / "out/lightning_tests.md").read_text(encoding="utf8")
    assert "| bare | 4 | 1 | 0 |  |  |\n| with the suite | 1 | 4 | 0 | 2 | 1 |" in table


@pytest.mark.long
def test_run_of_tests_that_all_pass_ends_without_an_error(checkout, tmp_path, monkeypatch, capsys):
    one = "tests/tests_pytorch/test_trainer.py::test_passes"
    run_main(monkeypatch, checkout, "--tests", one, "--out", tmp_path)
    assert "| with the suite | 1 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.slow
def test_run_without_a_test_repeats_the_path_and_what_pytest_reports(
    checkout, tmp_path, monkeypatch, capsys
):
    (checkout / "tests/tests_pytorch/test_trainer.py").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, checkout, "--out", tmp_path)
    reported = capsys.readouterr().err
    assert f"pytest cannot run {checkout}/tests/tests_pytorch (exit code 5): run `cd" in reported
    assert "no tests ran" in reported


def test_folder_without_tests_is_repeated_with_what_to_give(tmp_path, checkout):
    assert folder_of_tests(checkout / "tests") == folder_of_tests(checkout)
    with pytest.raises(ValueError, match=rf"{tmp_path}/none has neither .* give the path of a che"):
        folder_of_tests(tmp_path / "none")


def test_selected_tests_are_relative_to_the_checkout_or_to_the_tests(checkout):
    folder = folder_of_tests(checkout)
    file = str(folder / "test_trainer.py")
    assert selected_tests(folder, []) == [str(folder)]
    names = ["tests/tests_pytorch/test_trainer.py", "test_trainer.py::test_fails"]
    assert selected_tests(folder, names) == [file, f"{file}::test_fails"]
    with pytest.raises(ValueError, match=r"--tests test_none.py does not exist in .*checkout"):
        selected_tests(folder, ["test_none.py"])


def test_package_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match=r"adds nothing to a Trainer: run pip install -e \. first"):
        require_installed()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("AssertionError: Expected 'log' to have been called once. Called 2 times.", True),
        ("AssertionError: Expected 'save' to not have been called. Called 1 times.", True),
        ("assert 4 == 2\n+  where 4 = <Mock id='12'>.call_count", True),
        ("assert [call(1), call(2)] == [call(1)]\nLeft contains one more item: call(2)", True),
        ("AssertionError: assert 7 == 3\n+  where 7 = len([<AutoRollback>])", True),
        ("AssertionError: assert {'a', 'b'} == {'a'}\nExtra items in the left set:\n'b'", True),
        ("assert {'a': 1, 'b': 2} == {'a': 1}\nLeft contains 1 more item:\n{'b': 2}", True),
        ("assert ['a', 'b'] == ['b']\nAt index 0 diff: 'a' != 'b'", True),
        (
            "assert {'callbacks': [<lit_stability.Diagnosis object at 0x7>]} == {'callbacks': []}",
            True,
        ),
        ("assert [1, 2] == [1, 3]\nAt index 1 diff: 2 != 3", False),
        ("assert [0.5, 0.2] == [0.5]\nLeft contains one more item: 0.2", False),
        ("AssertionError: assert False\n+  where False = <method allclose>", False),
        ("assert {'a': 1} == {'a': 2}\nDiffering items:\n{'a': 1} != {'a': 2}", False),
        ("Failed: DID NOT RAISE ValueError", False),
        ("RuntimeError: call(1) is not possible", False),
    ],
)
def test_failure_is_expected_if_it_counts_or_lists_what_a_suite_adds(message, expected):
    assert is_expected(message) == expected


@pytest.mark.parametrize(
    ("message", "without"),
    [
        ("assert 12 == 3", "assert N == N"),
        ("<Trainer object at 0x7f57>", "<Trainer object at ID>"),
        ("in '/tmp/a/test_x0/last.ckpt'", "in 'PATH'"),
        ("lr 1e-3 of\n  conv2d, step -4", "lr N of conv2d, step N"),
        ("and/or", "and/or"),
    ],
)
def test_numbers_ids_and_paths_of_a_message_are_replaced(message, without):
    assert normalized(message) == without


def test_tests_that_all_fail_without_the_suite_are_refused_with_the_first(tmp_path):
    bare = {"a::x": Outcome("failed", "KeyError: 1"), "a::y": Outcome("skipped")}
    with pytest.raises(ValueError, match=r"none of 2 tests of .* The first, a::x: KeyError: 1"):
        require_passed(bare, tmp_path)
    assert require_passed(bare | {"a::z": Outcome("passed")}, tmp_path)["a::z"].status == "passed"


def test_test_without_a_result_or_skipped_with_the_suite_is_a_new_failure():
    bare = {name: Outcome("passed") for name in ("ends", "skips", "passes")}
    bare["fails"] = Outcome("failed", "assert 1 == 2")
    suite = {"skips": Outcome("skipped", "no room"), "passes": Outcome("passed")}
    found = {f.tests[0]: (f.message, f.expected) for f in new_failures(bare, suite)}
    assert found == {
        "ends": ("no result: the run ended before this test", False),
        "skips": ("no room", False),
    }


def test_outcomes_are_the_last_exception_of_each_test(tmp_path):
    report = tmp_path / "report.xml"
    chained = "E   KeyError: 'a'\n\na.py:3: in f\nE   ValueError: no a\nE   in b\n"
    report.write_text(
        "<testsuites><testsuite><testcase classname='a' name='good'/>"
        f"<testcase classname='a' name='bad'><failure message='m'>{chained}</failure></testcase>"
        "<testcase classname='a' name='bad'><error message='teardown'/></testcase>"
        "</testsuite></testsuites>"
    )
    assert outcomes_of(report) == {
        "a::good": Outcome("passed"),
        "a::bad": Outcome("failed", "ValueError: no a\nin b"),
    }
