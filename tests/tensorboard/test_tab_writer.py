"""What is written for the Stability tab, as TensorBoard's own readers find it."""

import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch.utils.tensorboard import SummaryWriter

from lit_stability.incidents.step_history import FIELDS, PRECISIONS, row_of
from lit_stability.loggers.size_limits import WITH_STEPS, WITHOUT_STEPS
from lit_stability.measurement.step_stats import StepStats, WeightMoves
from lit_stability.tensorboard.tab_writer import StabilityTab, update_ratios
from lit_stability.tensorboard.tags import layers_tag, steps_tag


class Logger:
    """The least that a logger is."""

    def __init__(self, experiment):
        self.experiment = experiment


def written(folder, write, **options):
    """Let `write` write to a tab, and return what a reader finds in the folder."""
    experiment = SummaryWriter(str(folder), **options)
    write(StabilityTab([Logger(experiment)]))
    experiment.close()
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def values(accumulator, tag):
    return [tensor_util.make_ndarray(e.tensor_proto) for e in accumulator.Tensors(tag)]


def about(accumulator, tag):
    return json.loads(accumulator.SummaryMetadata(tag).plugin_data.content)


def attempt(tab, number, names=("a", "b"), norms=(1.0, 2.0), scan=None, extra=False, **options):
    options = {"step": number - 1, "loss": 0.5, "grad_norm": 2.5} | options
    stats = StepStats(names=names, grad_norms=norms, **options)
    row = row_of(number, stats, clip_threshold=1.0, precision="bf16-mixed", taken=True)
    tab.write_step_attempt(row, stats, scan, extra=extra)
    return row


def test_attempt_comes_back_as_it_was_with_what_it_means(tmp_path):
    """V4: steps to the bit, layers in the precision of gradients."""
    norms = (math.nan, math.inf, 0.0, 0.1, 1e-40, 1e300)
    names = tuple("abcdef")
    rows = []
    found = written(
        tmp_path,
        lambda tab: rows.append(
            attempt(tab, 2**24 + 1, names, norms, loss=math.nan, grad_norm=math.inf)
        ),
    )
    (row,) = values(found, steps_tag(0))
    np.testing.assert_array_equal(row, rows[0])
    assert about(found, steps_tag(0))["fields"] == list(FIELDS)
    assert about(found, steps_tag(0))["precisions"] == list(PRECISIONS)
    tag = layers_tag(0, "grad_norm", names)
    expected = np.array([math.nan, math.inf, 0, 0.1, 1e-40, math.inf], "f4")
    np.testing.assert_array_equal(values(found, tag), [expected])
    assert about(found, tag)["names"] == list(names)
    assert found.Tensors(tag)[0].step == 2**24 + 1


def test_layers_that_appear_later_begin_a_series_and_those_that_pause_do_not(tmp_path):
    def write(tab):
        attempt(tab, 1, ("head",), (1.0,))
        attempt(tab, 2, ("backbone", "head"), (2.0, 3.0))
        attempt(tab, 3, ("head",), (4.0,))

    found = written(tmp_path, write)
    first, second = (layers_tag(0, "grad_norm", n) for n in (["head"], ["head", "backbone"]))
    assert [v.tolist() for v in values(found, first)] == [[1.0]]
    np.testing.assert_array_equal(values(found, second), [[3.0, 2.0], [4.0, math.nan]])


def test_update_ratios_are_those_of_the_scan_that_was_given(tmp_path):
    moves = WeightMoves(since=5, norms=(4.0, 0.0), peaks=(), distances=(2.0, 1.0), farthest=())
    scan = StepStats(
        step=10,
        loss=1.0,
        grad_norm=1.0,
        weight_norms=(("a", 4.0), ("b", 0.0)),
        weight_moves=moves,
    )
    found = written(tmp_path, lambda tab: attempt(tab, 12, scan=scan))
    tag = layers_tag(0, "update_ratio", ("a", "b"))
    np.testing.assert_array_equal(values(found, tag), np.array([[0.1, math.nan]], "f4"))
    assert update_ratios(moves, 5)[0] == 0.5, "a second scan of the same step"


def test_second_optimizer_has_series_of_its_own(tmp_path):
    def write(tab):
        attempt(tab, 1)
        attempt(tab, 2, ("c",), (1.0,), optimizer=1)

    tags = written(tmp_path, write).Tags()["tensors"]
    assert {"stability/steps", "stability/steps_1"} <= set(tags)
    assert layers_tag(1, "grad_norm", ("c",)) in tags


KILLED = """
import json, os, sys
from tests.tensorboard.test_tab_writer import Logger, StabilityTab, SummaryWriter, attempt
tab = StabilityTab([Logger(SummaryWriter(sys.argv[1], flush_secs=10_000, max_queue=10_000))])
for number in range(1, 501):
    attempt(tab, number)
text = json.dumps({"message": "\\udc80 is no text"})
tab.write_incident(3, 1_700_000_000.5, 501, lambda: text)
os._exit(9)
"""


def test_incident_of_a_job_that_is_killed_is_on_the_disk(tmp_path):
    """S1: whatever is in a queue then is lost."""
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert result.returncode == 9
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Tensors("stability/incident/3/1700000000")
    assert event.step == 501
    assert json.loads(event.tensor_proto.string_val[0]) == {"message": "\udc80 is no text"}


def size_of(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def incident_records(accumulator):
    """The last record of each incident, by its number."""
    tags = [t for t in accumulator.Tags()["tensors"] if t.startswith("stability/incident/")]
    last = {
        tag: json.loads(accumulator.Tensors(tag)[-1].tensor_proto.string_val[0]) for tag in tags
    }
    return {record["id"]: record for record in last.values()}


def write_incidents(tab, count, *, ends="recovered"):
    """Incidents of 25 kB with their steps and 2 kB without, each written three times."""
    for number in range(count):
        for outcome, last in (("open", False), (ends, False), (ends, True)):
            record = {"id": number, "outcome": outcome, "message": "m" * 2000}
            full, short = json.dumps({**record, "window": "w" * 23_000}), json.dumps(record)
            stops = {"always": ends == "stopped"}
            texts = (lambda text=full: text, lambda text=short: text)
            tab.write_incident(number, float(number), number, *texts, last=last, **stops)


def test_thousands_of_incidents_stay_below_the_stated_limit(tmp_path, caplog):
    """3,000 of them were 79 MB."""
    found = incident_records(written(tmp_path, lambda tab: write_incidents(tab, 3000)))
    assert size_of(tmp_path) < WITH_STEPS + WITHOUT_STEPS + 2**17
    whole = [number for number, record in found.items() if "window" in record]
    assert whole == list(range(len(whole)))
    assert 100 < len(whole) < 0.5 * len(found) < 1500
    assert {record["outcome"] for record in found.values()} == {"recovered"}
    assert caplog.text.count("without the steps around them") == 1
    assert caplog.text.count("further ones are only in incidents.jsonl") == 1


def test_incident_that_stops_the_fit_is_written_however_many_there_were(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.WITH_STEPS", 100_000)
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.WITHOUT_STEPS", 50_000)

    def write(tab):
        write_incidents(tab, 100)
        short = lambda: json.dumps({"id": 500, "outcome": "stopped"})  # noqa: E731
        tab.write_incident(500, 500.0, 500, lambda: "w" * 25_000, short, always=True)

    found = incident_records(written(tmp_path, write))
    assert max(number for number in found if number < 500) < 50
    assert found[500]["outcome"] == "stopped"


def test_incident_in_any_language_counts_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.WITH_STEPS", 10_000)
    text = json.dumps({"id": 1, "message": "层" * 5000}, ensure_ascii=False)
    found = written(tmp_path, lambda tab: tab.write_incident(1, 1.0, 1, lambda: text))
    assert not incident_records(found)


def test_steps_of_incidents_end_at_their_limit_and_logged_steps_go_on(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.EXTRA_STEPS", 20_000)
    names = tuple(f"layer.{i}" for i in range(200))

    def write(tab):
        for number in range(1, 101):
            extra = number % 10 != 0
            if not extra or tab.has_room:
                attempt(tab, number, names, (1.0,) * 200, extra=extra)

    found = written(tmp_path, write)
    steps = [int(value[0]) for value in values(found, steps_tag(0))]
    assert len(steps) < 40
    assert [step for step in steps if step % 10 == 0] == list(range(10, 101, 10))
    assert found.SummaryMetadata(layers_tag(0, "grad_norm", names)).plugin_data.content
    assert caplog.text.count("every log_every_n_steps-th step") == 1


class Broken(SummaryWriter):
    """The disk is full for a while, from the first step on."""

    events = 0

    def _get_file_writer(self):
        self.events += 1
        if 3 < self.events < 7:
            raise OSError("No space left on device")
        return super()._get_file_writer()


def test_logger_that_fails_is_reported_once_and_has_only_a_gap(tmp_path, caplog):
    broken, sound = Broken(str(tmp_path / "a")), SummaryWriter(str(tmp_path / "b"))
    tab = StabilityTab([Logger(broken), Logger(sound), Logger(None), object()])
    with caplog.at_level(logging.WARNING):
        for number in range(1, 6):
            attempt(tab, number)
    broken.close()
    sound.close()
    (line,) = (r.message for r in caplog.records if "Stability tab" in r.message)
    assert "Broken does not take data of the Stability tab (OSError: No space left" in line
    for name, steps in (("a", 2), ("b", 5)):
        accumulator = EventAccumulator(str(tmp_path / name))
        accumulator.Reload()
        assert len(accumulator.Tensors(steps_tag(0))) == steps
        assert about(accumulator, steps_tag(0))["fields"] == list(FIELDS)


def test_attempt_that_cannot_be_put_in_an_event_stops_no_training(tmp_path, caplog):
    """Nothing here may end a fit."""
    experiment = SummaryWriter(str(tmp_path))
    tab = StabilityTab([Logger(experiment)])
    with caplog.at_level(logging.WARNING):
        attempt(tab, 1)
        attempt(tab, 2, names=("a",), norms=())
        attempt(tab, 3)
    experiment.close()
    assert caplog.text.count("does not take data of the Stability tab") == 1


def test_loggers_without_event_files_are_left_alone():
    class Elsewhere:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    tab = StabilityTab([Logger(Elsewhere()), Logger(None)])
    assert not tab
    attempt(tab, 1)


@pytest.mark.parametrize("own", [False, True], ids=["none yet", "one of the user's"])
def test_layout_is_written_once_and_hides_nobody_elses(tmp_path, own):
    """V4: without the plugin, the Custom Scalars tab shows loss, gradient norm, learning rate."""
    experiment = SummaryWriter(str(tmp_path))
    if own:
        experiment.add_custom_scalars({"mine": {"chart": ["Multiline", ["x"]]}})
    for _ in range(2):
        StabilityTab([Logger(experiment)])
    experiment.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Tensors("custom_scalars__config__")
    assert (b"mine" in event.tensor_proto.string_val[0]) == own
    assert (b"stability/grad_norm" in event.tensor_proto.string_val[0]) != own
