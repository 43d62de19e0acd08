"""What the tests of the ranges share: rows of known values, and models of known spans."""

import torch
from torch import nn

from lit_stability.checks.precision_ranges.report import RangeReport
from lit_stability.checks.precision_ranges.tally import Tally


def row_of(values, kind="weight gradients", layer="layer"):
    """A row that has counted these values."""
    tally = Tally()
    tally.add(torch.as_tensor(values, dtype=torch.float32))
    return tally.row(kind, layer)


def report_of(*rows, **options):
    """A report of rows, in their order."""
    return RangeReport(rows, tuple(dict.fromkeys(row.layer for row in rows)), 1, **options)


class Twins(nn.Module):
    """Two branches that differ in one thing: what `hot` returns is 1e6 times larger."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cold, self.hot = nn.Linear(4, 4), nn.Linear(4, 4)
        self.hot.load_state_dict({k: 1e6 * v for k, v in self.cold.state_dict().items()})

    def forward(self, x):
        return self.cold(x) + 1e-6 * self.hot(x)


def mean_square(model, batch):
    """A step: the mean square of what the model makes of a batch."""
    return model(batch).square().mean()
