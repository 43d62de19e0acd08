"""The record of incidents: what goes in comes out, whatever happened to the file."""

import json
import math

import pytest

from lit_stability.incidents.log import SCHEMA, IncidentRecord, read_incidents, to_json
from lit_stability.policies.actions import SkipStep
from tests.incidents.test_incident import incident


@pytest.fixture
def record(tmp_path):
    return IncidentRecord(tmp_path / "run" / "incidents.jsonl")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", 1.5),
        ("value", math.nan),
        ("value", math.inf),
        ("value", -math.inf),
        ("baseline", None),
        ("baseline", 1e-300),
        ("threshold", math.inf),
        ("message", "损失从第三批起为 NaN：“除以零”"),
        ("message", "two\nlines, a \t tab, \u2028 and a \\ backslash"),
        ("message", "an ill-named folder \udc80"),
        ("layers", (("编码器.weight", 3.0), ("nan", math.nan), ("b", math.inf))),
    ],
)
def test_record_of_any_value_gives_it_back(record, field, value):
    """S17."""
    record.append("open", incident(**{field: value}))
    (row,) = read_incidents(record.path)
    expected = [list(pair) for pair in value] if field == "layers" else value
    assert repr(row[field]) == repr(expected)  # NaN is not equal to itself


def test_record_is_strict_json_one_line_an_event_readable_by_people(record):
    record.append("open", incident(message="损失为 NaN", value=math.nan))
    record.append("close", incident(message="b"))
    text = record.path.read_text(encoding="utf8")
    assert text.count("\n") == 2
    assert "损失为 NaN" in text
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_record_gives_the_last_line_of_each_incident_in_order(record):
    """S17: what happened, what was done, did it help."""
    first, second = incident(1), incident(2, kind="divergence")
    record.append("open", first)
    record.append("open", second)
    first.resolve(SkipStep())
    first.close("recovered", 12450)
    record.append("close", first)
    rows = read_incidents(record.path)
    assert [(r["id"], r["kind"], r["event"], r["outcome"]) for r in rows] == [
        (1, "gradient spike", "close", "recovered"),
        (2, "divergence", "open", "open"),
    ]
    assert rows[0]["responses"] == ["step skipped"]
    assert (rows[0]["step"], rows[0]["epoch"], rows[0]["batch_idx"]) == (12431, 3, 17)
    assert rows[0]["schema"] == SCHEMA


def test_record_keeps_incidents_of_one_number_from_two_attempts_apart(record):
    one, other = incident(1), incident(1)
    one.started, other.started = 1.0, 2.0
    record.append("open", one)
    record.append("open", other)
    assert [r["time"] for r in read_incidents(record.path)] == [1.0, 2.0]


def test_record_appears_with_its_first_incident_and_is_read_by_folder(record):
    assert not record.path.parent.exists()
    with pytest.raises(FileNotFoundError):
        read_incidents(record.path)
    record.append("open", incident())
    assert read_incidents(record.path.parent) == read_incidents(str(record.path))


def test_append_keeps_the_lines_there_were(record):
    record.append("open", incident(1))
    before = record.path.read_bytes()
    IncidentRecord(record.path).append("open", incident(2))
    assert record.path.read_bytes().startswith(before)


def every_cut(record, step=1):
    record.append("open", incident(1))
    whole = record.path.read_bytes()
    record.append("open", incident(2, message="损失为 NaN，第一层"))
    text = record.path.read_bytes()
    for end in range(len(whole), len(text), step):
        record.path.write_bytes(text[:end])
        yield end == len(text) - 1


def test_read_skips_a_last_line_cut_anywhere(record):
    """A crash while writing, also in the middle of a character."""
    for complete in every_cut(record):
        assert len(read_incidents(record.path)) == 1 + complete


def test_append_after_a_cut_line_loses_nothing_else(record):
    for complete in every_cut(record, step=7):
        before = record.path.read_bytes()
        record.append("open", incident(3))
        found = [r["id"] for r in read_incidents(record.path)]
        assert found == ([1, 2, 3] if complete else [1, 3])
        assert record.path.read_bytes().startswith(before)


def test_append_after_a_complete_line_without_its_newline_keeps_it(record):
    record.append("open", incident(1))
    record.path.write_bytes(record.path.read_bytes()[:-1])
    record.append("open", incident(2))
    assert [r["id"] for r in read_incidents(record.path)] == [1, 2]


@pytest.mark.parametrize("damage", [b"{]}", b'{"id": }', b'{"schema": 1, "m": "\xff"}'])
def test_read_of_damage_in_the_middle_names_file_and_line(record, damage):
    record.append("open", incident(1))
    with record.path.open("ab") as file:
        file.write(damage + b"\n")
    record.append("open", incident(2))
    with pytest.raises(ValueError, match=r"incidents.jsonl:2 is damaged"):
        read_incidents(record.path)


def test_read_of_a_newer_schema_says_to_upgrade(record):
    record.append("open", incident(1))
    with record.path.open("a") as file:
        file.write(f'{{"schema": {SCHEMA + 1}, "id": 2, "time": 0}}\n')
    with pytest.raises(ValueError, match=rf":2 has schema {SCHEMA + 1}.*upgrade lit-stability"):
        read_incidents(record.path)


def test_read_passes_over_empty_lines(record):
    record.append("open", incident(1))
    with record.path.open("a") as file:
        file.write("\n\n")
    assert len(read_incidents(record.path)) == 1


def test_append_where_no_folder_can_be_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        IncidentRecord(tmp_path / "file" / "incidents.jsonl").append("open", incident())


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([1, 2.5, "a", None, True], '[1, 2.5, "a", null, true]'),
        ((math.nan, math.inf, -math.inf), '["nan", "inf", "-inf"]'),
        ({"a": {"b": (math.nan,)}}, '{"a": {"b": ["nan"]}}'),
        ("语", '"语"'),
    ],
)
def test_to_json_is_strict_and_keeps_characters(value, line):
    assert to_json(value) == line
