"""Messages to a server that answers, hangs, refuses or fails, and to apprise."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lit_stability import Alerts, TrainingStopped, background, stability_callbacks
from lit_stability.callbacks.alerts import targets
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit, flat


class Server(ThreadingHTTPServer):
    """Keeps what is posted to it; answers with a status, or not before it is closed."""

    def __init__(self, status=200, hangs=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.hangs = status, hangs
        self.posted, self.asked, self.free = [], 0, threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/hook/s3cret-token"

    def events(self):
        return [each["event"] for each in self.posted]

    def stop(self):
        self.free.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.hangs:
            self.server.free.wait(30)
            return
        if self.server.status == 200:
            self.server.posted.append(json.loads(body, parse_constant=pytest.fail))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(request, monkeypatch):
    monkeypatch.setattr(background, "_FIRST_WAIT", 0.01)
    made = Server(**getattr(request, "param", {}))
    yield made
    made.stop()


def train(root, *alerts, steps=(20, 40), module=None):
    faults = FaultInjector([NanLoss(step=step) for step in steps])
    return fit(root, [faults, *stability_callbacks(), *alerts], module, max_steps=55)


def test_opening_and_end_are_posted_as_json_with_what_was_done(server, tmp_path):
    train(tmp_path, Alerts(server.url, min_interval=0))
    assert server.events() == ["open", "open", "end"]
    first, second, end = server.posted
    assert first["title"].startswith("incident 1: non-finite loss (run 2")
    for part in ("step 20", "cause: ", "done: step retried", "what to try: ", "details: "):
        assert part in first["text"]
    assert first["incident"]["value"] == "nan"
    assert "source" not in first["incident"]["origin"]
    assert (second["step"], second["incidents"], second["incident"]["id"]) == (40, 2, 2)
    assert "finished at step 55\nincidents: 2" in end["text"]
    assert end["run"] == first["run"]


def test_incidents_in_quick_succession_are_one_message_and_a_number(server, tmp_path, monkeypatch):
    class TwoMinutesLater:
        monotonic = staticmethod(lambda: float(next(minutes)))
        time = time.time

    minutes = iter([0, 5, 9, 70, 70, 70, 70])
    monkeypatch.setattr("lit_stability.callbacks.alerts.callback.time", TwoMinutesLater)
    train(tmp_path, Alerts(server.url, events=["open"]), steps=(5, 18, 31, 44))
    assert server.events() == ["open", "open"]
    assert [each["incident"]["id"] for each in server.posted] == [1, 4]
    assert server.posted[1]["text"].endswith("2 more since the last message")


def test_stop_is_one_message_with_the_reason(server, tmp_path):
    class Constant(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    suite = stability_callbacks(alerts=server.url)
    assert type(suite[-1]) is Alerts
    with pytest.raises(TrainingStopped):
        fit(tmp_path, suite, Constant)
    assert server.events() in (["stop"], ["open", "stop"])
    stop = server.posted[-1]
    assert stop["incident"]["outcome"] == "stopped"
    assert "What to try" in stop["text"]


@pytest.mark.parametrize(
    ("error", "event", "text"),
    [
        (ValueError("no such file"), "stop", "failed at step 3: ValueError: no such file"),
        (SystemExit(1), "end", "interrupted at step 3: SystemExit: 1"),
    ],
)
def test_exception_is_a_stop_and_an_interruption_an_end(error, event, text, server, tmp_path):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise error
            return super().training_step(batch, batch_idx)

    with pytest.raises(type(error)):
        fit(tmp_path, [stability_callbacks()[0], Alerts(server.url)], Fails)
    (message,) = server.posted
    assert message["event"] == event
    assert message["text"].startswith(text)


TROUBLE = {"hangs": {"hangs": True}, "fails": {"status": 500}, "refuses": {}}


@pytest.mark.parametrize(("kind", "server"), TROUBLE.items(), indirect=["server"], ids=TROUBLE)
def test_server_in_trouble_neither_ends_nor_slows_a_fit(kind, server, tmp_path, caplog):
    if kind == "refuses":
        server.stop()
    begin = time.monotonic()
    alerts = Alerts(server.url, min_interval=0, timeout=0.5)
    module, trainer = train(tmp_path / "a", alerts)
    assert trainer.global_step == 55
    assert time.monotonic() - begin < 15
    assert caplog.text.count("an alert was not delivered") <= 1
    assert "s3cret-token" not in caplog.text
    if kind == "fails":
        assert server.asked == 9, "three messages, three times each"
    assert torch.equal(flat(module), flat(train(tmp_path / "b")[0]))


def test_target_that_hangs_holds_up_no_other(server, tmp_path):
    hanging = Server(hangs=True)
    train(tmp_path, Alerts([hanging.url, server.url], min_interval=0, timeout=1.0))
    assert server.events() == ["open", "open", "end"]
    hanging.stop()


def test_targets_of_the_environment_stay_out_of_the_callback(server, tmp_path, monkeypatch):
    monkeypatch.setenv(targets.VARIABLE, server.url)
    alerts = Alerts(events=["end"])
    assert "s3cret" not in repr(vars(alerts))
    train(tmp_path, alerts)
    assert server.events() == ["end"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "hooks.slack.com/s3cret"}, "must be a URL such as https://host/hook"),
        ({"events": ["close"]}, r"events must be a list of open, stop, end, got \['close'\]"),
        ({"events": "open"}, "events must be a list, got 'open'"),
        ({"min_interval": -1}, "min_interval must be 0 or more seconds, got -1"),
        ({"timeout": 0}, "timeout must be more than 0 seconds, got 0"),
    ],
)
def test_wrong_option_is_refused_without_a_secret(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Alerts(**options)
    assert "s3cret" not in str(caught.value)


class Apprise:
    """What is used of apprise: `make test-loggers` asks the real one."""

    def __init__(self):
        self.sent = []

    def add(self, url):
        return url.startswith("slack://")

    def notify(self, title, body):
        SENT.append((title, body))
        return True


SENT = []


def test_other_schemes_go_through_apprise(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apprise", type("m", (), {"Apprise": Apprise}))
    train(tmp_path, Alerts("slack://s3cret-token", events=["end"]))
    ((title, body),) = SENT
    assert title.startswith("training ended (run ")
    assert "incidents: 2" in body
    with pytest.raises(ValueError, match="apprise does not accept the target slak:"):
        Alerts("slak://s3cret-token")


def test_apprise_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apprise", None)
    with pytest.raises(ValueError, match=r"needs apprise.*lit-stability\[alerts\]"):
        Alerts("slack://s3cret-token")


@pytest.mark.filterwarnings("default")
def test_apprise_itself_posts_to_a_server(server, tmp_path):
    pytest.importorskip("apprise")
    train(tmp_path, Alerts(server.url.replace("http", "json"), events=["end"]))
    assert server.asked == 1
