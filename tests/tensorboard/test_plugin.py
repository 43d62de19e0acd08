"""The plugin over WSGI, on what TensorBoard's own reader makes of real event files."""

import base64
import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

import lit_stability
from lit_stability.incidents.log import to_json
from lit_stability.incidents.step_history import StepHistory, row_of
from lit_stability.measurement.step_stats import StepStats
from lit_stability.tensorboard.loader import StabilityLoader
from lit_stability.tensorboard.plugin import MIMETYPES, StabilityPlugin
from lit_stability.tensorboard.tab_writer import StabilityTab
from lit_stability.tensorboard.tags import SAMPLES
from tests.project import PYPROJECT


class Logger:
    def __init__(self, folder):
        self.experiment = SummaryWriter(str(folder))


def write(folder, steps, *, names=("a", "b"), first=1, norms=None, incidents=(), optimizer=0):
    """A run of these steps, one attempt each from `first` on, with incidents at some attempts."""
    logger = Logger(folder)
    tab, attempts = StabilityTab([logger]), StepHistory()
    attempts.count = first - 1
    for index, step in enumerate(steps):
        number = attempts.begin()
        own = [float(number)] * len(names) if norms is None else norms[index]
        fields = {"names": names, "grad_norms": tuple(own), "optimizer": optimizer}
        stats = StepStats(step=step, loss=float(number), grad_norm=1.0, **fields)
        row = row_of(number, stats, clip_threshold=None, precision="32-true", taken=True)
        attempts.add(row)
        tab.write_step_attempt(row, stats, None)
        if number in incidents:
            window = attempts.open(number, number)
            record = {"id": number, "time": float(number), "message": "loss is nan"}
            record |= window.as_dict()
            tab.write_incident(number, float(number), number, functools.partial(to_json, record))
    logger.experiment.close()


def plugin_on(root, samples=SAMPLES):
    multiplexer = EventMultiplexer(tensor_size_guidance={"stability": samples})
    multiplexer.AddRunsFromDirectory(str(root))
    multiplexer.Reload()
    return StabilityPlugin(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(root))))


def ask(plugin, route, method="GET"):
    """Status and JSON of an answer, which must be strict."""
    app = plugin.get_plugin_apps()["/" + route.partition("?")[0]]
    answer = Client(app).open("/data/plugin/stability/" + route, method=method)
    refuse = lambda constant: pytest.fail(f"{constant} is no JSON")  # noqa: E731
    assert answer.mimetype == "application/json"
    return answer.status_code, json.loads(answer.data, parse_constant=refuse)


def layers_of(answer):
    values = np.frombuffer(base64.b64decode(answer["values"]), "<f4")
    return values.reshape(len(answer["attempts"]), len(answer["names"]))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    norms = [(1.0, 2.0), (float("nan"), float("inf")), (0.0, 4.0), (5.0, 6.0)]
    write(root / "a", [0, 1, 2, 1], norms=norms, incidents=(3,))
    write(root / "b" / "deep", [0, 1])
    with SummaryWriter(str(root / "nothing of ours")) as writer:
        writer.add_scalar("x", 1.0, 0)
    return plugin_on(root)


def test_runs_are_those_with_data(plugin):
    """K5."""
    a = {"run": "a", "steps": 4, "layers": 2, "incidents": 1, "last": 1}
    a |= {"optimizers": [{"index": 0, "part": ""}], "problem": None, "status": None}
    b = a | {"run": "b/deep", "steps": 2, "incidents": 0}
    code, runs = ask(plugin, "runs")
    assert code == 200
    assert all(run.pop("updated") > 1e9 for run in runs)
    assert runs == [a, b]


def test_steps_are_the_rows_in_order_of_their_attempts(plugin):
    """V4."""
    code, found = ask(plugin, "steps?run=a")
    rows = [dict(zip(found["fields"], row, strict=True)) for row in found["rows"]]
    assert code == 200
    assert [(r["attempt"], r["step"], r["loss"]) for r in rows] == [
        (1, 0, 1),
        (2, 1, 2),
        (3, 2, 3),
        (4, 1, 4),
    ]
    assert rows[0]["loss_scale"] == "nan"
    assert found["precisions"][int(rows[0]["precision"])] == "32-true"


def test_layers_are_raw_values_with_nan_inf_and_zero_as_they_are(plugin):
    """V4, S6."""
    code, found = ask(plugin, "layers?run=a&quantity=grad_norm")
    assert code == 200
    assert (found["names"], found["attempts"], found["steps"]) == (
        *(["a", "b"], [1, 2, 3, 4]),
        [0, 1, 2, 1],
    )
    nan, inf = np.nan, np.inf
    np.testing.assert_array_equal(layers_of(found), [[1, 2], [nan, inf], [0, 4], [5, 6]])
    _, none = ask(plugin, "layers?run=a&quantity=update_ratio")
    assert none == {"names": [], "attempts": [], "steps": [], "values": ""}


def test_incidents_come_with_their_windows(plugin):
    code, (found,) = ask(plugin, "incidents?run=a")
    assert code == 200
    assert (found["id"], found["attempt"], found["message"]) == (3, 3, "loss is nan")
    assert [row[0] for row in found["window"]["rows"]] == [1, 2, 3]
    assert ask(plugin, "incidents?run=b/deep") == (200, [])
    code, verdict = ask(plugin, "verdict?run=a")
    assert (code, verdict["level"], [each["incidents"] for each in verdict["groups"]]) == (
        *(200, "watch"),
        [["3/3"]],
    )
    assert ask(plugin, "verdict?run=b/deep")[1]["text"] == "no incidents in 2 steps"


def test_data_of_a_newer_version_and_damaged_ones_are_passed_over(tmp_path, monkeypatch, caplog):
    """Reported once, and the rest is shown."""
    write(tmp_path / "old", [0, 1], incidents=(2,))
    logger = Logger(tmp_path / "old")
    StabilityTab([logger]).write_incident(5, 5.0, 5, lambda: "{cut")
    logger.experiment.close()
    monkeypatch.setattr("lit_stability.tensorboard.tags.SCHEMA", 2)
    write(tmp_path / "new", [0])
    plugin = plugin_on(tmp_path)
    for _ in range(2):
        assert [run["run"] for run in ask(plugin, "runs")[1]] == ["old"]
        assert [i["id"] for i in ask(plugin, "incidents?run=old")[1]] == [2]
    assert caplog.text.count("upgrade lit-stability") == 1
    assert caplog.text.count("is damaged and ignored") == 1


@pytest.mark.parametrize(
    ("route", "code", "says"),
    [
        ("steps", 400, "run is missing"),
        ("steps?run=nobody", 404, "no run 'nobody'"),
        ("steps?run=nothing of ours", 404, "'nothing of ours'"),
        ("steps?run=a&optimizer=1", 404, "no steps of optimizer 1"),
        ("steps?run=a&optimizer=-1", 400, "optimizer is '-1'"),
        ("steps?run=a&optimizer=²", 400, "optimizer is '²'"),
        ("layers?run=a", 400, "quantity is missing"),
        ("layers?run=a&quantity=mass", 400, "quantity is 'mass'"),
        ("incidents?run=<b>", 404, "'<b>'"),
    ],
)
def test_bad_request_is_answered_with_the_problem_and_what_to_do(plugin, route, code, says):
    found, answer = ask(plugin, route)
    assert found == code
    assert says in answer["error"]
    assert answer["do"]


def test_other_methods_than_get_are_refused(plugin):
    code, answer = ask(plugin, "runs", "POST")
    assert (code, answer["error"]) == (405, "POST is not served")


def test_reader_that_fails_is_answered_for_in_json(caplog):
    broken = StabilityPlugin(TBContext(data_provider=None))
    code, answer = ask(broken, "runs")
    assert code == 500
    assert "AttributeError" in answer["error"]
    assert "cannot answer" in caplog.text


def test_run_that_was_resumed_shows_the_later_of_two_attempts(tmp_path):
    """S12: a job that died at attempt 9 goes on from its checkpoint of attempt 5."""
    write(tmp_path / "r", range(9), incidents=(7,))
    write(tmp_path / "r", range(5, 8), first=6, norms=[(0.5, 0.5)] * 3)
    plugin = plugin_on(tmp_path)
    _, steps = ask(plugin, "steps?run=r")
    assert [row[0] for row in steps["rows"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    _, layers = ask(plugin, "layers?run=r&quantity=grad_norm")
    assert layers_of(layers)[:, 0].tolist() == [1, 2, 3, 4, 5, 0.5, 0.5, 0.5]
    _, incidents = ask(plugin, "incidents?run=r")
    assert [i["attempt"] for i in incidents] == [7], "what happened is kept all the same"


def test_layers_that_appeared_later_are_nan_before(tmp_path):
    """As when a backbone unfreezes; the order is that of the larger set."""
    write(tmp_path / "r", [0, 1], names=("head",))
    write(tmp_path / "r", [2], names=("backbone", "head"), first=3, norms=[(7.0, 8.0)])
    _, found = ask(plugin_on(tmp_path), "layers?run=r&quantity=grad_norm")
    assert found["names"] == ["backbone", "head"]
    np.testing.assert_array_equal(layers_of(found), [[np.nan, 1], [np.nan, 2], [7, 8]])


def test_second_optimizer_is_served_on_request(tmp_path):
    write(tmp_path / "r", [0, 2])
    write(tmp_path / "r", [1, 3], names=("critic.0.c", "critic.1.c"), first=3, optimizer=1)
    plugin = plugin_on(tmp_path)
    known = [{"index": 0, "part": ""}, {"index": 1, "part": "critic"}]
    assert ask(plugin, "runs")[1][0]["optimizers"] == known
    assert [r[1] for r in ask(plugin, "steps?run=r&optimizer=1")[1]["rows"]] == [1, 3]
    route = "layers?run=r&quantity=grad_norm&optimizer=1"
    assert ask(plugin, route)[1]["names"] == ["critic.0.c", "critic.1.c"]


@pytest.mark.long
def test_long_run_of_many_layers_loses_no_incident(tmp_path):
    """20,000 attempts of 300 layers: samples are dropped, incidents never."""
    names = tuple(f"layer.{i}" for i in range(300))
    faulty = {*range(100, 20_000, 500)}
    norms = [(float(i),) * 300 for i in range(7)]
    write(tmp_path / "r", range(20_000), names=names, norms=norms * 3000, incidents=faulty)
    plugin = plugin_on(tmp_path)
    (run,) = ask(plugin, "runs")[1]
    assert (run["steps"], run["layers"], run["incidents"]) == (SAMPLES, 300, len(faulty))
    assert run["last"] == 19_999
    incidents = ask(plugin, "incidents?run=r")[1]
    assert {i["attempt"] for i in incidents} == faulty
    assert all(len(i["window"]["rows"]) == 51 for i in incidents)
    layers = ask(plugin, "layers?run=r&quantity=grad_norm")[1]
    assert layers_of(layers).shape == (SAMPLES, 300)
    assert layers["steps"] == [attempt - 1 for attempt in layers["attempts"]]


STATIC = Path(lit_stability.__file__).parent / "tensorboard" / "static"


def get_file(plugin, path):
    app = plugin.get_plugin_apps()["/static/*"]
    return Client(app).get("/data/plugin/stability/static/" + path)


@pytest.mark.parametrize("file", sorted(p.name for p in STATIC.iterdir()))
def test_file_of_the_page_is_served_as_what_it_is(plugin, file):
    answer = get_file(plugin, file)
    assert answer.status_code == 200
    assert answer.data == (STATIC / file).read_bytes()
    assert answer.mimetype == MIMETYPES[Path(file).suffix]


@pytest.mark.parametrize(
    "path",
    [
        "../plugin.py",
        "..%2fplugin.py",
        "%2e%2e/plugin.py",
        "/etc/passwd",
        "no.js",
        "",
        "./index.js",
    ],
)
def test_nothing_else_of_the_disk_is_served(plugin, path):
    assert get_file(plugin, path).status_code == 404


def test_entry_of_the_page_is_a_module_that_tensorboard_finds(plugin):
    """K5."""
    shown = plugin.frontend_metadata()
    assert shown.tab_name == "Stability"
    answer = Client(plugin.get_plugin_apps()[shown.es_module_path]).get(shown.es_module_path)
    assert answer.mimetype == "text/javascript"
    assert b"./static/index.js" in answer.data
    assert b"render" in (STATIC / "index.js").read_bytes()


@pytest.mark.parametrize(("given", "kept"), [({}, SAMPLES), ({"stability": 7}, 7)])
def test_samples_are_asked_for_unless_the_user_has(given, kept):
    flags = SimpleNamespace(samples_per_plugin=given)
    StabilityLoader().fix_flags(flags)
    assert flags.samples_per_plugin["stability"] == kept
    StabilityLoader().fix_flags(SimpleNamespace())


def test_plugin_that_cannot_be_loaded_leaves_tensorboard_alone(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "lit_stability.tensorboard.plugin", None)
    with caplog.at_level(logging.WARNING, "tensorboard"):
        assert StabilityLoader().load(TBContext()) is None
    assert "the Stability tab cannot be loaded" in caplog.text


def test_package_says_where_the_plugin_is_and_takes_the_page_along():
    """K2."""
    found = PYPROJECT["project"]["entry-points"]["tensorboard_plugins"]["stability"]
    assert found == f"{StabilityLoader.__module__}:{StabilityLoader.__name__}"
    packages = PYPROJECT["tool"]["setuptools"]["package-data"]
    assert "tensorboard/static/*" in packages["lit_stability"]
