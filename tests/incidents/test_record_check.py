"""What is read from a record is an incident, or an error that says what is wrong with it."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_stability.incidents.log import read_incidents
from lit_stability.incidents.record_check import FIELDS, problem_of
from tests.incidents.test_incident import incident

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
FIXED = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
GOOD = b'{"schema": 1, "id": 9, "time": 1.0, "kind": "spike"}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "it is a list"),
        ("null", "it is a NoneType"),
        ("{}", "it has no id"),
        ('{"id": 1}', "it has no time"),
        ('{"id": [], "time": 1}', r"id=\[\], expected a whole number"),
        ('{"id": 1, "time": null}', "time=None, expected a number of seconds"),
        ('{"id": 1, "time": 1, "layers": null}', "layers=None"),
        ('{"id": 1, "time": 1, "layers": [["a", 1, 2]]}', "expected a list of"),
        ('{"id": 1, "time": 1, "responses": "none"}', "responses='none', expected a list"),
        ('{"id": 1, "time": 1, "origin": {"inputs": 3}}', "origin="),
        ('{"id": 1, "time": 1, "hypotheses": [3]}', r"hypotheses=\[3\]"),
        ('{"schema": "2", "id": 1, "time": 1}', "schema='2'"),
        ('{"id": 1, "time": 1, "x": ' + "[" * 3000 + "]" * 3000 + "}", "not valid JSON"),
        ('{"id": ' + "1" * 5000 + ', "time": 1}', "not valid JSON"),
    ],
)
def test_line_that_is_no_incident_is_named_with_its_field(line, says, tmp_path):
    file = tmp_path / "incidents.jsonl"
    file.write_bytes(GOOD + line.encode() + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"incidents.jsonl:2 is damaged.*{says}"):
        read_incidents(file)


@pytest.mark.parametrize("line", [b"\0" * 4096, b"   ", b"\r"])
def test_line_without_content_is_skipped(line, tmp_path):
    """A power failure leaves zeros in files that were being written."""
    (tmp_path / "incidents.jsonl").write_bytes(GOOD + line + b"\n" + GOOD)
    assert [row["id"] for row in read_incidents(tmp_path)] == [9]


@FIXED
@given(key=st.sampled_from(sorted(FIELDS)), value=JSON)
def test_any_value_in_any_field_is_read_or_refused_with_its_name(key, value, tmp_path):
    row = {**incident(1).as_dict(), key: value}
    file = tmp_path / "incidents.jsonl"
    file.write_text(json.dumps(row) + "\n" + GOOD.decode())
    try:
        found = read_incidents(file)
    except ValueError as error:
        assert "incidents.jsonl:1" in str(error)  # noqa: PT017
        assert key in str(error)  # noqa: PT017
    else:
        assert found[-1]["id"] == 9


@FIXED
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused_with_their_line(content, tmp_path):
    file = tmp_path / "incidents.jsonl"
    file.write_bytes(GOOD + content + b"\n" + GOOD)
    try:
        assert all("id" in row for row in read_incidents(file))
    except ValueError as error:
        assert "incidents.jsonl:" in str(error)  # noqa: PT017


def test_incident_as_it_is_written_has_no_problem():
    assert problem_of(incident(1).as_dict()) is None
