"""Helpers of this folder that run a detector on a stream of rows."""

import io

import torch

from lit_stability.measurement.step_stats import StepStats


def step(i, **fields):
    return StepStats(**({"step": i, "loss": 1.0, "grad_norm": 1.0} | fields))


def anomalies_of(detector, rows, start=0):
    """Returns the anomalies of a stream; like the monitor, learns steps with only a warning."""
    found = []
    for i, row in enumerate(rows, start):
        stats = row if isinstance(row, StepStats) else step(i, **row)
        anomaly = detector.check(stats)
        if anomaly is not None:
            found.append(anomaly)
        if anomaly is None or anomaly.warn_only:
            detector.update(stats)
    return found


def steps_of(anomalies):
    return [anomaly.step for anomaly in anomalies]


def through_a_checkpoint(state):
    """Saves a state and loads it as Lightning does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def anomalies_with_a_resume(make, rows, at):
    """Like `anomalies_of`, with a resume into a new detector before row ``at``."""
    first, second = make(), make()
    before = anomalies_of(first, rows[:at])
    second.load_state_dict(through_a_checkpoint(first.state_dict()))
    return before + anomalies_of(second, rows[at:], at)
