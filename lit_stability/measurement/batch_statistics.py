"""Compares a batch with recent ones: repetition, constant rows, duplicates, labels, lengths, scale.

Of the last `RECENT` batches it looks at 64 samples, and 512 elements of each: 0.3 s where they have
512 x 512 tokens, on one CPU thread. So it is for the batch of an incident. May import torch, but
not Lightning.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_stability.measurement.tensor_tree import named_tensors

LEAST = 8
"""Batches needed for a comparison, and samples in each."""
CHANCE = 1e-5
"""Probability, for data in random order, with which a count may be called unusual."""
RECENT = 20
"""Batches that a batch is compared with, at most."""
_NGRAM = 4
_SAMPLES, _COLUMNS, _LABELS = 64, 512, 1024
"""Samples of a batch, elements of a sample and labels that are looked at, evenly spread, but for
the elements, which are the first."""
_SHARES = {
    "repeated n-grams": "{now:.0%} of the 4-grams of a sample repeat, usually {usual:.0%}",
    "constant": "{now:.0%} of the samples are constant, usually {usual:.0%}",
    "seen before": "{now:.0%} of the samples are copies of another one, usually {usual:.0%}",
}
_SIZES = {
    "length": "{now:.3g} elements before the padding, usually {usual:.3g}",
    "rms": "rms {now:.3g}, usually {usual:.3g}",
}


def unusual(batch: Any, recent: Sequence[Any], epoch_from: int = 0) -> list[str]:
    """Returns what is unusual in a batch, one phrase for each property of a tensor.

    A share is unusual if it is 20 points above that of every recent batch, and a size if its mean
    is twice the largest or half of the smallest mean; in addition, so many samples beyond the usual
    must have a probability below `CHANCE` (binomial). Batches in buckets, or a curriculum, are not
    in random order: the first condition is for them.

    Args:
        batch: containers with tensors, whose first dimension is that of the samples.
        recent: batches before it, of the same structure; with less than `LEAST`, nothing is found.
        epoch_from: index of the first of them that is of the same epoch: samples of another epoch
            come again.

    >>> tokens = [torch.arange(800).mul(7 + i).remainder(97).view(16, 50) for i in range(20)]
    >>> unusual(tokens[19], tokens[:19])
    []
    >>> unusual(torch.full((16, 50), 3), tokens)[0]
    'batch: 98% of the 4-grams of a sample repeat, usually 0%'
    """
    if len(recent) < LEAST:
        return []
    epoch_from = max(0, epoch_from - max(0, len(recent) - RECENT))
    recent = recent[-RECENT:]
    known = [dict(named_tensors(each)) for each in recent]
    found = []
    for name, tensor in named_tensors(batch):
        before = [each[name] for each in known if name in each]
        if len(before) >= LEAST and _is_of_samples(tensor):
            first = max(0, epoch_from - (len(known) - len(before)))
            found += [f"{name}: {text}" for text in _compare(tensor, before, first)]
    return found


def _is_of_samples(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_complex()
    return plain and tensor.ndim > 0 and len(tensor) >= LEAST and tensor.numel() > 0


def _compare(tensor: Tensor, before: Sequence[Tensor], epoch_from: int) -> list[str]:
    kind = tensor.dtype, tensor.ndim
    if not all(_is_of_samples(each) and (each.dtype, each.ndim) == kind for each in before):
        return []
    if tensor.ndim == 1:
        whole = not tensor.is_floating_point()
        return _label(tensor, before) if whole else []
    seen: Counter[int] = Counter()
    of_each = []
    for index, each in enumerate(before):
        if index == epoch_from:
            seen.clear()
        of_each.append(_of_rows(each, seen))
    if epoch_from == len(before):
        seen.clear()
    now = _of_rows(tensor, seen)
    found = []
    for quantity, values in now.items():
        rows = [each[quantity] for each in of_each if quantity in each]
        if len(rows) >= LEAST and _stands_out(quantity, values, rows):
            words = {**_SHARES, **_SIZES}[quantity]
            found.append(words.format(now=_mean(values), usual=_mean(map(_mean, rows))))
    return found


def _stands_out(quantity: str, values: list[float], before: list[list[float]]) -> bool:
    means, now = [_mean(each) for each in before], _mean(values)
    pool = sorted(value for each in before for value in each)
    low, high = pool[len(pool) // 100], pool[-1 - len(pool) // 100]
    if quantity in _SHARES:
        beyond = now > max(means) + 0.2
        count = sum(value > high for value in values)
    else:
        above = now > 2 * max(means)
        beyond = above or now < min(means) / 2
        count = sum(value > high if above else value < low for value in values)
    return beyond and _tail(count, len(values), 0.02) < CHANCE


def _label(tensor: Tensor, before: Sequence[Tensor]) -> list[str]:
    """Compares the most over-represented label with its share in the recent batches."""
    known = [Counter(_spread(each, _LABELS).tolist()) for each in before]
    usual, now = sum(known, Counter[int]()), Counter(_spread(tensor, _LABELS).tolist())
    total, size = usual.total(), now.total()
    for label, count in now.most_common(3):
        rate = (usual[label] + 1) / (total + 2)
        largest = max(each[label] / each.total() for each in known)
        share = count / size
        tail = _tail(count, size, rate) * max(1, len(usual))
        if tail < CHANCE and share > largest + 0.2:
            return [f"{share:.0%} of the labels are {label}, usually {usual[label] / total:.0%}"]
    return []


def _of_rows(tensor: Tensor, seen: Counter[int]) -> dict[str, list[float]]:
    """Returns the quantities of each sample; notes its content in ``seen``."""
    rows = _spread(tensor, _SAMPLES).flatten(1)[:, :_COLUMNS].cpu()
    if rows.is_floating_point():
        rows = rows.float()
        found = {"rms": rows.square().mean(1).sqrt().tolist()}
    elif rows.dtype is torch.bool:
        return {}
    else:
        found = {"length": [], "repeated n-grams": []}
        for row in rows.tolist():
            length = _length(row)
            grams = [tuple(row[i : i + _NGRAM]) for i in range(length - _NGRAM + 1)]
            found["length"].append(float(length))
            found["repeated n-grams"].append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    if rows.shape[1] > 1:
        found["constant"] = (rows.amax(1) == rows.amin(1)).double().tolist()
        keys = [hash(row.tobytes()) for row in rows.numpy()]
        copies = []
        for key in keys:
            copies.append(float(seen[key] > 0))
            seen[key] += 1
        found["seen before"] = copies
    return found


def _spread(tensor: Tensor, count: int) -> Tensor:
    """Returns at most so many entries of the first dimension, evenly spread."""
    return tensor.detach()[:: -(-len(tensor) // count)]


def _length(row: list[int]) -> int:
    """Returns the elements before the padding: the equal elements at the end, if there are many.

    >>> _length([5, 6, 7, 0, 0, 0, 0, 0]), _length([5, 6, 7, 7]), _length([3, 3, 3, 3, 3, 3])
    (3, 4, 6)
    """
    end = len(row)
    while end > 1 and row[end - 2] == row[-1]:
        end -= 1
    padding = len(row) - end + 1
    return end - 1 if padding > _NGRAM and padding < len(row) else len(row)


def _tail(count: int, samples: int, rate: float) -> float:
    """Returns the probability of at least so many successes.

    >>> round(_tail(2, 2, 0.5), 3), round(_tail(0, 5, 0.1), 3)
    (0.25, 1.0)
    """
    ways = math.lgamma(samples + 1)
    logs = (
        ways
        - math.lgamma(k + 1)
        - math.lgamma(samples - k + 1)
        + k * math.log(rate)
        + (samples - k) * math.log1p(-rate)
        for k in range(count, samples + 1)
    )
    return min(1.0, sum(map(math.exp, logs)))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
