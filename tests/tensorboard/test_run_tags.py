"""A malformed run in the log directory is shown as such, and the other runs are not affected."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.types_pb2 import DT_STRING
from torch.utils.tensorboard import SummaryWriter

from lit_stability.incidents.step_history import FIELDS
from lit_stability.tensorboard import events
from lit_stability.tensorboard.run_tags import read_incident, read_tags
from tests.incidents.test_record_check import JSON
from tests.tensorboard.test_plugin import ask, plugin_on, write

FIXED = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
STEPS, LAYERS = "stability/steps", "stability/layers/grad_norm/ab"
INCIDENT = "stability/incident/1/1"
DEEP = b'{"schema": 1, "names": ' + b"[" * 5000 + b"]" * 5000 + b"}"
ROW = [1.0] * len(FIELDS)


def write_raw(folder, tag, metadata, content):
    """A run with one event: a text, or numbers, or numbers whose type says that they are text."""
    about = events.metadata_of(metadata)
    if isinstance(content, str):
        value = events.text(tag, content, about)
    else:
        value = events.doubles(tag, content or ROW, about)
    if content is None:
        value.tensor.dtype = DT_STRING
    with SummaryWriter(str(folder)) as writer:
        writer._get_file_writer().add_event(events.event_of([value]), 1)


def answers(root):
    """The entries of `runs` by name, after all routes of both runs were asked for."""
    plugin = plugin_on(root)
    code, runs = ask(plugin, "runs")
    assert code == 200
    for route in ("steps", "layers", "incidents"):
        quantity = "&quantity=grad_norm" if route == "layers" else ""
        code, answer = ask(plugin, f"{route}?run=bad{quantity}")
        assert code in (200, 404, 422), answer
        assert ask(plugin, f"{route}?run=good{quantity}")[0] == 200
    return {run["run"]: run for run in runs}


@pytest.mark.parametrize(
    ("tag", "metadata", "content", "says"),
    [
        (LAYERS, DEEP, [1.0, 2.0], "not JSON"),
        (LAYERS, b"\xff{", [1.0, 2.0], "not JSON"),
        (LAYERS, b'{"schema": 1}', [1.0, 2.0], "names is not a list of layer names"),
        (LAYERS, b'{"schema": 1, "names": [{}, []]}', [1.0, 2.0], "names is not"),
        (LAYERS, b'{"schema": 1, "names": ["a", "a"]}', [1.0, 2.0], "names is not"),
        (LAYERS, b'{"schema": "x", "names": ["a", "b"]}', [1.0, 2.0], "schema"),
        (STEPS, b'{"schema": null}', ROW, "schema"),
        (STEPS, b'{"schema": 1, "fields": 3}', ROW, "fields is not a list of names"),
        (STEPS, b'{"schema": 1, "fields": ["attempt", "step", "length"]}', [1.0] * 3, "fields"),
        (STEPS, b'{"schema": 1}', [1.0], "1 of 1 rows are damaged"),
        (STEPS, b'{"schema": 1}', [1.0, np.nan, *ROW[2:]], "1 of 1 rows are damaged"),
        (STEPS, b'{"schema": 1}', [1.0, 1e300, *ROW[2:]], "1 of 1 rows are damaged"),
        (STEPS, b'{"schema": 1}', "a text", "1 of 1 rows are damaged"),
        (STEPS, b'{"schema": 1}', None, "cannot be read"),
        ("stability/other", b'{"schema": 1}', [1.0], "no known tag"),
    ],
)
def test_malformed_run_is_listed_with_its_problem_next_to_the_others(
    tag, metadata, content, says, tmp_path
):
    write(tmp_path / "good", [0, 1], incidents=(2,))
    write_raw(tmp_path / "bad", tag, metadata, content)
    runs = answers(tmp_path)
    assert says in runs["bad"]["problem"]
    assert tag in runs["bad"]["problem"]
    assert (runs["good"]["steps"], runs["good"]["problem"]) == (2, None)


@pytest.mark.parametrize(
    "record",
    [
        "[1, 2]",
        "{}",
        '{"id": 1, "time": 1, "attempt": "x"}',
        '{"id": 1, "time": "nan", "attempt": 1}',
        '{"id": 1, "time": 1, "attempt": 1, "spans": [3]}',
        '{"id": 1, "time": 1, "attempt": 1, "window": {"fields": ["a"], "rows": [[]]}}',
        '{"a": ' + "[" * 7000 + "]" * 7000 + "}",
    ],
)
def test_malformed_incident_is_left_out_and_the_others_are_shown(record, tmp_path, caplog):
    write(tmp_path / "good", [0, 1])
    write(tmp_path / "bad", [0, 1], incidents=(2,))
    write_raw(tmp_path / "bad", INCIDENT, b"", record)
    runs = answers(tmp_path)
    assert runs["bad"]["incidents"] == 2
    assert [each["id"] for each in ask(plugin_on(tmp_path), "incidents?run=bad")[1]] == [2]
    assert f"run bad: {INCIDENT} is damaged and ignored" in caplog.text


def test_unknown_fields_of_an_incident_are_not_served_however_deep(tmp_path):
    record = '{"id": 1, "time": 1, "attempt": 1, "new": ' + "[" * 700 + "]" * 700 + "}"
    write_raw(tmp_path / "r", INCIDENT, b"", record)
    code, (found,) = ask(plugin_on(tmp_path), "incidents?run=r")
    assert (code, found) == (200, {"id": 1, "time": 1, "attempt": 1})


def test_damaged_steps_are_answered_with_the_problem_and_what_to_do(tmp_path):
    write_raw(tmp_path / "r", STEPS, b'{"schema": []}', ROW)
    code, answer = ask(plugin_on(tmp_path), "steps?run=r")
    assert code == 422
    assert "'r': stability/steps is damaged: its schema" in answer["error"]
    assert "choose another run" in answer["do"]


@FIXED
@given(
    tag=st.sampled_from([STEPS, LAYERS, INCIDENT, "stability/x"]),
    metadata=st.binary(max_size=20)
    | st.dictionaries(st.sampled_from(["schema", "names", "fields", "precisions"]), JSON).map(
        lambda value: json.dumps(value).encode()
    ),
)
def test_any_metadata_are_readable_or_have_a_problem(tag, metadata):
    tags = read_tags({tag: metadata})
    assert tags.newer or (tag in tags.about) == (tags.problem is None)


@settings(FIXED, max_examples=15)
@given(
    tag=st.sampled_from([STEPS, LAYERS, INCIDENT]),
    metadata=st.dictionaries(st.sampled_from(["schema", "names", "fields"]), JSON),
    content=st.text(max_size=20) | st.lists(st.floats(), min_size=1, max_size=13),
)
def test_any_run_leaves_the_others_readable(tag, metadata, content, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write(root / "good", [0, 1], incidents=(2,))
    write_raw(root / "bad", tag, json.dumps(metadata).encode(), content)
    good = answers(root)["good"]
    assert (good["steps"], good["layers"], good["incidents"], good["problem"]) == (2, 2, 1, None)


@FIXED
@given(
    st.dictionaries(
        st.sampled_from(["id", "time", "attempt", "window", "spans", "origin", "layers"]), JSON
    )
)
def test_any_incident_is_read_or_has_a_problem(record):
    found = read_incident(np.array(json.dumps(record).encode(), dtype=object))
    assert isinstance(found, str) or type(found["attempt"]) is int
