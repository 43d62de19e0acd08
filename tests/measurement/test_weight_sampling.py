"""What a sample says of whole tensors, against what can be worked out by hand."""

import pytest
import torch

from lit_stability.measurement.norms import peaks_of
from lit_stability.measurement.weight_sampling import WeightSampler


@pytest.mark.parametrize(
    ("tensors", "norms", "first", "second"),
    [
        ([[3.0, -4.0, 12.0]], [5.0], [12.0], [4.0]),
        # One of several equally large ones is left out, not all.
        ([[2.0, -2.0, 2.0, 1.0]], [3.0], [2.0], [2.0]),
        ([[7.0]], [0.0], [7.0], [0.0]),
        ([[0.0, 0.0]], [0.0], [0.0], [0.0]),
        # The torn element does not drown the others.
        ([[1e18, 0.3, 0.4]], [0.5], [1e18], [0.4]),
        # Large ones are sampled first, and answered in the order given.
        ([[1.0, 2.0], [1.0] * 4096, [5.0]], [1.0, 64.0, 0.0], [2.0, 1.0, 5.0], [1.0, 1.0, 0.0]),
    ],
)
def test_extents_leave_the_largest_element_out(tensors, norms, first, second):
    samples = WeightSampler([torch.tensor(t) for t in tensors])
    found = samples.extents(samples.gather()).tolist()
    count = len(tensors)
    # Of 4096 ones, 511 of the 512 that are sampled stand for all.
    assert found[:count] == pytest.approx(norms, rel=2e-3)
    assert found[count : 2 * count] == pytest.approx(first)
    assert found[2 * count :] == pytest.approx(second)


def test_peaks_are_the_largest_absolute_values_of_any_format():
    tensors = [
        torch.tensor([1.0, -3.0]),
        torch.tensor([2.0, 0.5], dtype=torch.float16),
        torch.empty(0),
        torch.tensor([[float("nan"), 1.0]]),
        torch.tensor([3.0 - 4.0j]),
    ]
    (found,) = peaks_of(tensors)
    assert found.nan_to_num(-1.0).tolist() == [3.0, 2.0, 0.0, -1.0, 4.0]
    assert peaks_of([]) == []


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 16])
def test_sample_takes_evenly_spread_blocks_and_small_tensors_whole(blocks):
    """However the blocks are joined; the large tensors come first."""
    large, small = torch.arange(1000.0), torch.tensor([-1.0, -2.0])
    samples = WeightSampler([small, large], blocks)
    starts = range(0, blocks * (1000 // blocks), 1000 // blocks)
    wanted = [float(i) for start in starts for i in range(start, start + 32)]
    assert samples.gather().tolist() == [*wanted, -1.0, -2.0]
    large += 1
    assert samples.gather().tolist() == [*(x + 1 for x in wanted), -1.0, -2.0]


SIZES = {
    "many large ones of one size": [1000] * 20,
    "few of each size": [700, 10, 1000, 700, 10, 5000],
    "many and few in turn": [9, *[600] * 17, 3000, *[30] * 20, 2000, 8, 9, *[64] * 16],
    "some are empty": [0, 900, 0, 5] * 6,
}


@pytest.mark.parametrize("blocks", [2, 16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sample_of_many_tensors_is_that_of_each_with_the_largest_first(sizes, blocks):
    tensors = [torch.randn(n) + i for i, n in enumerate(sizes)]
    samples = WeightSampler(tensors, blocks)
    parts = [WeightSampler([t], blocks).gather() for t in tensors]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    gathered = samples.gather()
    assert torch.equal(gathered, torch.cat([parts[i] for i in order]))
    sums = [float(part.double().sum()) for part in parts]
    found = samples.sums(gathered).tolist()
    assert [found[i] for i in samples.positions] == pytest.approx(sums, rel=1e-5, abs=1e-4)
    apart = [
        WeightSampler([t], blocks).extents(part) for t, part in zip(tensors, parts, strict=True)
    ]
    assert torch.allclose(samples.extents(gathered), torch.stack(apart, dim=1).reshape(-1))
