"""Saving and loading of benchmark results."""

import json
import math
from argparse import ArgumentParser

import pytest

from benchmarks.results import FOLDER, Spread, Table, add_options, folder_of, load, save


def test_saved_figures_are_read_back_with_what_they_were_measured_on(tmp_path, capsys):
    table = Table("Cost", ["suite", "ms"], [["bare", "1.0"]])
    save("example", tmp_path / "new", {"bare": Spread.of([1.0, 2.0, 4.0])}, [table])
    found = load("example", tmp_path / "new")
    assert found["figures"] == {"bare": {"median": 2.0, "low": 1.5, "high": 3.0, "count": 3}}
    assert {"date", "command", "machine", "versions", "commit"} <= set(found)
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"].startswith("2.")
    assert "| bare | 1.0 |" in (tmp_path / "new" / "example.md").read_text(encoding="utf8")
    assert "**Cost**" in capsys.readouterr().out


def test_saved_nan_is_text_as_json_has_no_such_number(tmp_path, capsys):
    path = save("example", tmp_path, {"loss": math.nan, "leads": (math.inf, 1)})
    assert json.loads(path.read_text(encoding="utf8"))["figures"] == {
        "loss": "nan",
        "leads": ["inf", 1],
    }


def test_loading_what_was_not_measured_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python -m benchmarks\.overhead first"):
        load("overhead", tmp_path)


@pytest.mark.parametrize(
    ("options", "folder"),
    [([], FOLDER), (["--quick"], FOLDER / "quick"), (["--quick", "--out", "x"], "x")],
)
def test_quick_figures_do_not_take_the_place_of_others(options, folder):
    parser = ArgumentParser()
    add_options(parser)
    assert str(folder_of(parser.parse_args(options))) == str(folder)


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"2 cells for 1 columns: \['a', 'b'\]"):
        Table("Cost", ["suite"], [["a", "b"]])


def test_spread_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="run more steps or rounds"):
        Spread.of([])
