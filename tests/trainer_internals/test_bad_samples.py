"""The samples that made a NaN are named, and recognised in other batches."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_stability import read_incidents, stability_callbacks
from lit_stability.diagnosis.nonfinite import locate_nonfinite
from lit_stability.trainer_internals.bad_samples import of_batch
from tests.conftest import Regression, fit, lines_of, regression_data


class Rooted(Regression):
    """A root of a number that is negative in one sample."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        return super().training_step(batch, batch_idx) + (2.0 - x[:, 0]).sqrt().mean() * 1e-3


def with_one_bad_sample(at=100):
    data = regression_data(40).dataset
    x, _ = data.tensors
    x[:, 0].clamp_(max=1.5)
    x[at, 0] = 3.0
    return data


def test_sample_is_named_and_recognised_in_the_batches_of_a_shuffled_epoch(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(with_one_bad_sample(), 16, shuffle=True, generator=generator)
    fit(tmp_path, stability_callbacks(), Rooted, loader, max_epochs=3, max_steps=-1)
    records = read_incidents(tmp_path)
    assert [each["batch_size"] for each in records] == [16] * 3
    assert [len(each["samples"]) for each in records] == [1] * 3
    assert [each["same_sample_as"] for each in records] == [None, 1, 1]
    text = "\n".join(lines_of(caplog))
    for each in records[1:]:
        assert f"sample {each['samples'][0]} of 16 (the same sample as #1)" in text
    assert "summary: 3 incidents, one cause: sqrt at test_bad_samples.py:" in text
    assert "verdict: 3 times the same bad sample. To do: fix or remove sample " in text


def test_position_is_that_in_the_batch(tmp_path):
    loader = DataLoader(with_one_bad_sample(at=16 * 12 + 5), 16)
    fit(tmp_path, stability_callbacks(), Rooted, loader, max_steps=19)
    (record,) = read_incidents(tmp_path)
    assert (record["batch_idx"], record["samples"]) == (12, [5])
    source = record["origin"]["source"].split("\n")
    assert len(source) == 7, "three lines on either side of the origin, no more"
    assert ".sqrt().mean()" in source[record["origin"]["line"] - record["origin"]["source_line"]]


X = torch.ones(4, 3)
BATCHES = {
    "one sample": (X.index_fill(0, torch.tensor(2), -1.0), (2,)),
    "two samples": (X.index_fill(0, torch.tensor([0, 3]), -1.0), (0, 3)),
    "all samples": (-X, ()),
}


def origin_in(batch, reduce=lambda x: x):
    model = nn.Linear(3, 1)
    origin = locate_nonfinite(model, lambda: model(reduce(batch["x"]).log()).sum())
    return of_batch(origin, batch)


@pytest.mark.parametrize("name", BATCHES)
def test_rows_with_a_nan_are_samples_unless_all_are_bad(name):
    x, samples = BATCHES[name]
    found = origin_in({"x": x, "y": torch.zeros(4)})
    assert (found.samples, len(found.digests)) == (samples, len(samples))


def test_rows_that_are_not_those_of_the_batch_are_no_samples():
    """The result has a row for each of the three features."""
    x = X.clone()
    x[:, 1] = -1.0
    found = origin_in({"x": x}, reduce=lambda x: x.T.contiguous().expand(3, 4)[:, :3])
    assert (found.samples, found.batch_size) == ((), 0)


def test_digest_is_that_of_the_content_of_all_tensors():
    first = origin_in({"x": BATCHES["one sample"][0], "y": torch.arange(4)})
    moved = origin_in({"x": BATCHES["one sample"][0].roll(1, 0), "y": torch.arange(4).roll(1)})
    other = origin_in({"x": BATCHES["one sample"][0], "y": torch.arange(4) + 1})
    assert moved.samples == (3,)
    assert moved.digests == first.digests != other.digests


def test_step_without_a_nan_or_a_batch_without_tensors_names_nothing():
    assert of_batch(None, {"x": X}) is None
    found = origin_in({"x": BATCHES["one sample"][0]})
    assert of_batch(found, {"text": "a"}).samples == ()
