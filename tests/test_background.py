import threading
import time

import pytest

from lit_stability import background
from lit_stability.background import Background


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(background, "_FIRST_WAIT", 0.01)


def test_calls_are_made_in_order_and_in_another_thread():
    made, calls = [], Background("test")
    for number in range(20):
        calls.call("a call", lambda n=number: made.append((n, threading.current_thread().name)))
    assert calls.close(5)
    assert made == [(n, "test") for n in range(20)]


def test_calls_after_a_close_are_made_too():
    made, calls = [], Background("test")
    for number in range(3):
        calls.call("a call", lambda n=number: made.append(n))
        assert calls.close(5)
    assert made == [0, 1, 2]


def test_call_that_fails_is_made_again_and_those_after_it_follow(caplog):
    made, calls = [], Background("test", tries=3)

    def fails_twice():
        made.append("first")
        if len(made) < 3:
            raise OSError("no network")

    calls.call("a call", fails_twice)
    calls.call("a call", lambda: made.append("second"))
    time.sleep(0.3)
    assert calls.close(5)
    assert made == ["first", "first", "first", "second"]
    assert not caplog.messages


def test_call_that_fails_for_good_is_logged_once(caplog):
    calls = Background("test", tries=2)
    for _ in range(3):
        calls.call("nothing was sent", lambda: 1 / 0)
    assert calls.close(5)
    assert caplog.text.count("nothing was sent (ZeroDivisionError") == 1


def test_close_waits_no_longer_than_it_may_and_a_full_queue_drops_its_oldest():
    free, made, calls = threading.Event(), [], Background("test", most=2)
    calls.call("a call", free.wait)
    time.sleep(0.05)
    for number in range(5):
        calls.call("a call", lambda n=number: made.append(n))
    begin = time.monotonic()
    assert not calls.close(0.1)
    assert time.monotonic() - begin < 1
    free.set()
    assert calls.close(5)
    assert made == [3, 4]
