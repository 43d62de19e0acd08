"""The corpus is fixed, and the documented example enters a protection."""

import json
import logging
import re
from pathlib import Path

import pytest

from benchmarks.corpus import entries
from benchmarks.corpus.__main__ import main
from benchmarks.corpus.entries import read, with_twins
from benchmarks.corpus.selection import entry_of

ROOT = Path(__file__).parents[2]
ENTRIES = {entry.id: entry for entry in read()}
DIVERGING = "prediction-sgd-rate-too-high-16"


@pytest.fixture(autouse=True)
def _logs_as_before():
    """Runs in this process silence all logs."""
    yield
    logging.disable(logging.NOTSET)


def test_corpus_file_is_the_one_of_its_version():
    assert entries.checksum() == entries.CHECKSUM, "other runs are another version of the corpus"
    assert len(ENTRIES) == len(read())


def test_failing_runs_have_a_healthy_twin_also_in_the_quick_selection():
    failing = [entry for entry in ENTRIES.values() if not entry.healthy]
    assert len(failing) < len(ENTRIES) / 2
    for entry in failing:
        twin = ENTRIES[entry.twin]
        assert twin.healthy
        assert twin.quick >= entry.quick
        assert entry.lost is None or entry.lost >= (entry.fault or 0)


@pytest.mark.parametrize("source", ["rescue", "prediction", "healthy"])
def test_entries_are_what_their_benchmark_defines(source):
    for entry in [entry for entry in ENTRIES.values() if entry.source == source][::8]:
        now = entry_of(source, entry.name, entry.seed)
        assert (now.id, now.twin, now.steps, now.family, now.cause, now.fault) == (
            *(entry.id, entry.twin, entry.steps, entry.family, entry.cause, entry.fault),
        )


def test_documented_example_is_measured_beside_the_unprotected_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs/corpus.md").read_text(encoding="utf8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    (tmp_path / "my_protection.py").write_text(code, encoding="utf8")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--module", "my_protection:MyProtection", "--run", DIVERGING, "--workers", "0"]
    options += ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path)]
    main(options)
    figures = json.loads((tmp_path / "corpus.json").read_text(encoding="utf8"))["figures"]
    bare, mine = figures["scores"]["none"], figures["scores"]["skip spikes"]
    assert bare["saved"] == {"count": 0, "total": 1}
    assert bare["identical"] == mine["identical"] == {"count": 1, "total": 1}
    assert mine["alarms"] == bare["changed"] == mine["changed"] == 0
    assert mine["noticed"] == {"count": 1, "total": 1}
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert len(records) == 4
    main(options)
    assert {path: path.stat().st_mtime_ns for path in records} == records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--module", "my_protection"], "expected package.module:Class, got 'my_protection'"),
        (["--module", "no_such:Mine"], "cannot load the protection 'no_such:Mine'"),
        (["--module", "math:pi"], "'math:pi' is 3.14159"),
        (["--module", "benchmarks.alternatives:Protection"], "set a class attribute `name`"),
        (["--protection", "ZClop"], "there is no protection 'ZClop'"),
        (["--run", "nan"], "there is no run 'nan'"),
    ],
)
def test_wrong_option_is_an_error_that_repeats_it(options, message, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_run_is_selected_with_its_twin():
    assert [entry.id for entry in with_twins(read(), [DIVERGING])] == [
        DIVERGING,
        ENTRIES[DIVERGING].twin,
    ]
