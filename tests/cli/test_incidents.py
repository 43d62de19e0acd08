"""The command that lists incidents, on records as a fit writes them."""

import json
import shutil
import subprocess
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_stability import __version__, stability_callbacks
from lit_stability.cli.main import main
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of two incidents below it."""
    root = tmp_path_factory.mktemp("runs")
    faults = [NanLoss(step=20), CorruptWeight(step=40, parameter="net.0.weight")]
    logger = CSVLogger(root, "name", "version_0")
    fit(root, [FaultInjector(faults), *stability_callbacks()], logger=logger, max_steps=60)
    return root


def output_of(capsys, *words):
    assert main(["incidents", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_incidents_of_a_run_are_listed_with_cause_response_and_outcome(run, capsys):
    folder = run / "name/version_0"
    head, first, second = output_of(capsys, folder).splitlines()
    assert head.split() == ["id", "step", "kind", "cause", "count", "response", "outcome"]
    assert first.split("  ")[0] == "1"
    assert "non-finite loss" in first
    assert "step retried" in first
    assert "weights damaged from outside" in second
    assert second.endswith("recovered")


def test_runs_below_a_folder_are_listed_each_under_its_folder(run, capsys):
    assert output_of(capsys, run).splitlines()[0] == str(run / "name/version_0")
    assert "non-finite loss" in output_of(capsys, run / "name/version_0/incidents.jsonl")


def test_incident_is_shown_with_its_report_even_after_the_run_was_moved(run, capsys, tmp_path):
    moved = shutil.copytree(run / "name/version_0", tmp_path / "moved")
    report = output_of(capsys, moved, 2)
    assert report.startswith("## Incident 2")
    assert "### Ruled out" in report
    shutil.rmtree(moved / "incidents")
    assert "cause: weights damaged from outside" in output_of(capsys, moved, 2)


def test_incidents_are_printed_as_json_with_all_fields(run, capsys):
    found = json.loads(output_of(capsys, run, "--json"))
    assert [each["id"] for each in found] == [1, 2]
    assert found[1]["responses"] == ["rolled back and replayed"]


def test_run_without_incidents_is_no_error(tmp_path, capsys):
    assert output_of(capsys, tmp_path) == f"no incident is recorded in {tmp_path}\n"
    assert json.loads(output_of(capsys, tmp_path, "--json")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "missing: does not exist; give the folder of a run"),
        (["RUN", "9"], "has no incident 9; it has 1, 2"),
        (["damaged.jsonl"], "damaged.jsonl:1 is damaged"),
    ],
)
def test_wrong_run_or_number_is_refused_with_what_there_is(words, message, run, tmp_path, capsys):
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{nonsense}\n{}\n")
    given = {"RUN": str(run), "damaged.jsonl": str(damaged), "missing": str(tmp_path / "missing")}
    assert main(["incidents", *(given.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_listing_incidents_imports_no_torch(run):
    code = (
        "import sys; from lit_stability.cli.main import main; "
        f"main(['incidents', {str(run)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_bare_call_prints_the_help(capsys):
    assert main([]) == 2
    assert "incidents  list the incidents of a run" in capsys.readouterr().out


def test_version_is_printed_with_those_that_matter_for_a_report(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"lit-stability {__version__}"
    assert [line.split()[0] for line in others][:2] == ["torch", "lightning"]


@pytest.mark.parametrize(
    ("word", "meant"), [("dotcor", "doctor"), ("incident", "incidents"), ("x", None)]
)
def test_mistyped_command_gets_the_one_that_was_meant(word, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([word])
    assert stopped.value.code == 2
    suggestion = f"did you mean {meant!r}? " if meant else ""
    assert f"{word!r} is no command; {suggestion}commands: fit, resume" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "check", "ranges"])
def test_config_without_its_option_is_answered_with_the_option(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "translation_rescue"])
    assert end.value.code == 2
    assert "which config? write -c NAME, such as -c translation_rescue" in capsys.readouterr().err
