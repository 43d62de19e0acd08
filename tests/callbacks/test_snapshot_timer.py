"""What a snapshot costs: the time for which it holds training up, not what runs beside a step."""

import pytest
import torch

from lit_stability.callbacks.auto_rollback import snapshot_timer
from lit_stability.callbacks.auto_rollback.snapshot_timer import SnapshotTimer
from lit_stability.policies.snapshot_cadence import SnapshotCadence


class Loop:
    """A loop with steps of 200 ms; a capture takes 10 ms, and copies go on for some more."""

    def __init__(self, monkeypatch, beside, cost=0.002):
        self.now, self.beside = 0.0, beside
        monkeypatch.setattr(snapshot_timer, "clock", lambda: self.now)
        self.cadence = SnapshotCadence(every=20, cost=cost)
        device = torch.device("cpu")
        self.timer = SnapshotTimer(self.cadence, device, self.finish, lambda value: [value])

    def capture(self):
        self.now += 0.01

    def finish(self):
        self.now += self.beside

    def run(self, captures):
        for _ in range(captures):
            self.timer.step_ended()
            self.timer.take(self.capture, lambda: 1000.0)
            self.timer.step_begins()
            self.now += 0.2


@pytest.mark.parametrize(
    ("beside", "seconds", "distance"),
    [
        (0.0, 0.01, 40),  # 0.5 ms a step at 20 steps; 0.2 % of 200 ms are 0.4 ms
        (0.19, 0.01, 40),  # a copy that a step hides
        (0.3, 0.11, 320),  # 100 ms of it are not hidden
    ],
)
def test_copy_costs_what_no_step_hides(beside, seconds, distance, monkeypatch):
    loop = Loop(monkeypatch, beside)
    loop.run(captures=6)
    assert loop.cadence.capture_seconds == pytest.approx(seconds)
    assert loop.cadence.distance == distance


def test_capture_that_is_not_measured_is_not_waited_for(monkeypatch):
    loop = Loop(monkeypatch, beside=100.0)
    loop.run(captures=3)
    assert loop.now == pytest.approx(3 * 0.21)
    loop.run(captures=3)
    assert loop.now > 300
    loop = Loop(monkeypatch, beside=100.0, cost=None)
    loop.run(captures=20)
    assert loop.now == pytest.approx(20 * 0.21)
