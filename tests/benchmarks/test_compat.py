"""The list of environments and its table; a real environment takes ten minutes and is not built."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from benchmarks import compat
from benchmarks.compat import (
    DOCUMENT,
    END,
    ENVIRONMENTS,
    RECORD,
    SELECTION,
    START,
    Environment,
    Row,
    chosen,
    corrected,
    install,
    interpreter,
    pins,
    record,
    recorded,
    row_of,
    run_tests,
    selected,
    table,
    write_document,
)
from benchmarks.lightning_tests import Outcome
from lit_stability.versions import NEEDED
from tests.project import PYPROJECT, ROOT

ROW = Row("3.12", "2.8.0", "2.6.6", 7, 1, 2, 3.5, "2026-11-29", ["tests.test_x::test_y"])


def test_selection_names_tests_that_exist():
    paths = selected()
    assert str(ROOT / "tests" / "callbacks" / "test_battery.py") in paths
    assert len(paths) > len(SELECTION)


def test_selection_of_a_test_that_is_gone_is_an_error(monkeypatch):
    monkeypatch.setattr(compat, "SELECTION", ("tests/test_gone.py",))
    with pytest.raises(ValueError, match=r"tests/test_gone\.py"):
        selected()


@pytest.mark.parametrize("each", ENVIRONMENTS, ids=lambda each: each.name)
def test_environment_is_supported(each):
    assert SpecifierSet(NEEDED["torch"]).contains(each.torch)
    assert SpecifierSet(NEEDED["lightning"]).contains(each.lightning)
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(each.python)


def test_oldest_supported_versions_are_among_the_environments():
    assert NEEDED["torch"] == f">={'.'.join(ENVIRONMENTS[0].torch.split('.')[:2])}"
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert oldest in {each.python for each in ENVIRONMENTS}


def test_environment_is_chosen_by_the_start_of_its_name():
    assert chosen("py3.12-torch2.8") == [Environment("3.12", "2.8.0")]
    assert chosen(None) == list(ENVIRONMENTS)


def test_environment_that_is_unknown_is_an_error_with_the_names():
    with pytest.raises(ValueError, match=r"(?s)--only py2: .*py3.12-torch2.8.0"):
        chosen("py2")


def test_interpreter_is_the_one_asked_for():
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shown = subprocess.run([interpreter(version), "--version"], capture_output=True, text=True)
    assert shown.stdout.startswith(f"Python {version}.")


def test_interpreter_that_is_missing_skips_its_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compat, "measure", lambda *_: pytest.fail("not skipped"))
    assert compat.run(Environment("3.0", "2.8.0"), tmp_path, keep=False, failed=False) is None
    assert "skipped, there is no python3.0" in capsys.readouterr().out


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_pins_leave_torch_and_lightning_to_the_environment(python):
    names = [line.partition("==")[0] for line in pins(python)]
    assert not {"torch", "lightning", "pytorch-lightning"} & set(names)
    assert len(names) == len(set(names))
    assert "numpy" in names


def test_pins_of_an_old_interpreter_are_lower():
    assert "numpy==2.2.6" in pins("3.10")
    assert "numpy==2.2.6" not in pins("3.12")


def test_environment_that_is_complete_is_not_installed_again(tmp_path):
    (tmp_path / "complete").touch()
    install(ENVIRONMENTS[0], "no interpreter", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["complete"]


def test_outcomes_are_counted_with_the_names_of_failures(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\n\ndef test_a():\n    pass\n\ndef test_b():\n    assert 0\n\n"
        "@pytest.mark.skip\ndef test_c():\n    pass\n"
    )
    outcomes = run_tests(Path(sys.executable), [str(tests)], tmp_path / "report.xml")
    row = row_of(ENVIRONMENTS[0], outcomes, 30.0)
    assert (row.passed, row.failed, row.skipped, row.minutes) == (1, 1, 1, 0.5)
    assert [name.split("::")[1] for name in row.failures] == ["test_b"]


def test_error_of_a_fixture_counts_as_a_failure():
    assert row_of(ENVIRONMENTS[0], {"a": Outcome("error")}, 1.0).failed == 1


def test_row_is_corrected_by_the_tests_that_failed_and_were_run_again():
    row = replace(ROW, failed=3, failures=["a", "b", "c"])
    again = {"a": Outcome("passed"), "b": Outcome("failed"), "c": Outcome("skipped")}
    now = corrected(row, {**again, "another": Outcome("passed")})
    assert (now.passed, now.failed, now.skipped) == (ROW.passed + 1, 1, ROW.skipped + 1)
    assert now.failures == ["b"]
    assert now.minutes == ROW.minutes


def test_environment_without_failures_is_not_run_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compat, "RECORD", tmp_path / "compat.json")
    assert compat.run(ENVIRONMENTS[0], tmp_path, keep=False, failed=True) is None
    assert "no failed test is recorded" in capsys.readouterr().out


def test_tests_that_cannot_start_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="wrote no report"):
        run_tests(Path("/bin/false"), [], tmp_path / "report.xml")


def test_row_replaces_the_earlier_one_of_its_environment(tmp_path):
    path = tmp_path / "compat.json"
    record(path, "a", ROW)
    record(path, "b", ROW)
    again = Row("3.12", "2.8.0", "2.6.6", 8, 0, 2, 3.0, "2026-11-30")
    assert record(path, "a", again) == recorded(path) == {"a": again, "b": ROW}


def test_table_has_the_oldest_torch_first():
    newer = Row("3.13", "2.15.0", "2.6.6", 1, 0, 0, 1.0, "2026-11-29")
    lines = table([newer, ROW]).split("\n")
    assert lines[2] == "| 3.12 | 2.8.0 | 2.6.6 | 7 | 1 | 2 | 3.5 | 2026-11-29 |"
    assert lines[3].startswith("| 3.13 | 2.15.0 ")


def test_document_keeps_all_but_its_table(tmp_path):
    path = tmp_path / "compatibility.md"
    path.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_document(path, [ROW])
    assert path.read_text() == f"before\n{START}\n{table([ROW])}\n{END}\nafter\n"


def test_document_without_marks_is_an_error(tmp_path):
    path = tmp_path / "compatibility.md"
    path.write_text("before\n")
    with pytest.raises(ValueError, match="restore both lines"):
        write_document(path, [ROW])


def test_document_has_the_table_of_the_record():
    assert f"{START}\n{table(recorded(RECORD).values())}\n{END}" in DOCUMENT.read_text("utf8")
