"""What is unusual in a batch, and that ordinary batches are not."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import AutoRollback, Diagnosis, GradientMonitor
from lit_stability.measurement.batch_statistics import unusual
from tests.conftest import Regression, fit


def zipf(batch, length, words=300):
    weights = 1 / torch.arange(1, words + 1).float()
    return torch.multinomial(weights.expand(batch, words), length, replacement=True) + 1


def padded(batch=16, length=64):
    tokens = zipf(batch, length)
    for row, end in zip(tokens, torch.randint(length // 8, length, (batch,)), strict=True):
        row[end:] = 0
    return tokens


def few_tokens():
    return zipf(16, 8).repeat(1, 8)


USUAL = {
    "tokens": lambda: zipf(16, 64),
    "padded tokens": padded,
    "numbers": lambda: torch.randn(16, 20),
    "heavy tails": lambda: torch.distributions.StudentT(2.0).sample((16, 20)),
    "rows of very different scale": lambda: torch.randn(16, 20) * torch.randn(16, 1).exp(),
    "labels": lambda: torch.randint(0, 10, (16,)),
    "two labels of a rare class": lambda: (torch.rand(16) < 0.1).long(),
    "copies": lambda: torch.randint(0, 30, (16, 1)).expand(16, 8).float(),
    "images": lambda: torch.randint(0, 255, (8, 3, 8, 8), dtype=torch.uint8),
    "by name": lambda: {"x": torch.randn(16, 4), "y": torch.randint(0, 3, (16,))},
    "many labels": lambda: torch.randint(0, 50_000, (200_000,)),
    "many samples": lambda: torch.randint(0, 300, (2_000, 8)),
    "few samples": lambda: torch.randint(0, 2, (2, 3)),
}


@pytest.mark.parametrize("kind", USUAL)
def test_batches_in_random_order_are_ordinary(kind):
    torch.manual_seed(0)
    recent = [USUAL[kind]() for _ in range(20)]
    assert [found for _ in range(60) if (found := unusual(USUAL[kind](), recent))] == []


@pytest.mark.parametrize(
    ("usual", "batch", "phrase"),
    [
        ("tokens", few_tokens, "87% of the 4-grams of a sample repeat, usually 0%"),
        (
            "tokens",
            lambda: torch.ones(16, 64, dtype=torch.long),
            "100% of the samples are constant",
        ),
        ("padded tokens", lambda: zipf(16, 256), "256 elements before the padding, usually 3"),
        ("numbers", lambda: 40 * torch.randn(16, 20), ", usually 0.9"),
        ("numbers", lambda: torch.randn(16, 20) / 9, "rms 0.1"),
        ("numbers", lambda: torch.randn(1, 20).expand(16, 20), "are copies of another one"),
        ("labels", lambda: torch.full((16,), 3), "100% of the labels are 3, usually"),
        ("by name", lambda: {"x": torch.zeros(16, 4), "y": torch.arange(16) % 3}, "batch['x']: "),
    ],
)
def test_what_differs_is_named(usual, batch, phrase):
    torch.manual_seed(0)
    recent = [USUAL[usual]() for _ in range(20)]
    assert any(phrase in text for text in unusual(batch(), recent))


def test_bucketed_lengths_and_a_second_epoch_are_ordinary():
    torch.manual_seed(0)
    buckets = [zipf(16, 20 + 2 * i) for i in range(20)]
    assert unusual(zipf(16, 62), buckets) == []
    epoch = [torch.randn(16, 20) for _ in range(12)]
    assert unusual(epoch[0], epoch, len(epoch)) == []
    assert unusual(epoch[1], [*epoch, epoch[0]], len(epoch)) == []
    assert unusual(epoch[1], [*epoch, epoch[1]], len(epoch)) == [
        "batch: 100% of the samples are copies of another one, usually 0%"
    ]


def test_nothing_is_said_without_enough_batches_to_compare():
    assert unusual(torch.zeros(16, 20), [torch.randn(16, 20)] * 7) == []
    assert unusual("text", ["text"] * 20) == []
    assert unusual([torch.zeros(16, 20)], [[torch.randn(8)]] * 20) == []


def test_incident_names_what_differs_in_its_batch(tmp_path):
    """Batch 31 holds one sample again and again; its loss is not finite."""

    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss / 0 if batch[0].unique(dim=0).shape[0] == 1 else loss

    x, y = torch.randn(60 * 16, 8), torch.randn(60 * 16)
    x[31 * 16 : 32 * 16] = x[31 * 16].clone()
    data = DataLoader(TensorDataset(x, y), 16)
    monitor = GradientMonitor()
    fit(tmp_path, [monitor, Diagnosis(), AutoRollback()], Fails, data, max_epochs=1, max_steps=-1)
    (incident,) = monitor.incidents
    assert incident.first.step == 31
    assert incident.cause == "bad batch"
    assert "copies of another one, usually 0%" in " ".join(incident.likely_causes[0].evidence)
