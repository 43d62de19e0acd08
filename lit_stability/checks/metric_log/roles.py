"""Chooses by their names which metrics are the training loss, the gradient norm and so on.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lit_stability.checks.metric_log.series import MetricLog, Series

_HELD_OUT = frozenset(
    {"val", "valid", "validation", "eval", "evaluation", "dev", "test", "predict"}
)
_LOSSES = frozenset(
    {"loss", "nll", "elbo", "xent", "crossentropy", "ce", "bce", "mse", "objective"}
)
_NO_LOSS = frozenset({"scale", "scaler", "weight", "coef", "factor", "lr", "grad", "norm", "best"})
_PLAIN = frozenset({"train", "training", "step", "epoch", "batch", "total", "mean", "avg", "all"})
"""Words that do not make a loss a part of another one, as ``box`` does in ``train/box_loss``."""
_FEWEST = 0.05
"""A series with a smaller share of the points of the longest one is a summary."""


class NoLossError(LookupError):
    """Raised if a log has no series that can be the training loss."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The series that the analysis uses, without the points that later attempts replaced."""

    loss: Series
    every_loss: Series
    """The loss with these points."""
    validation_loss: Series | None = None
    gradient_norm: Series | None = None
    learning_rates: tuple[Series, ...] = ()
    """One for each parameter group."""
    loss_scale: Series | None = None


def words_of(name: str) -> list[str]:
    """Returns the words of a metric's name in lower case.

    >>> words_of("train/lossStep"), words_of("lr-AdamW/pg1"), words_of("grad_2.0_norm_total")
    (['train', 'loss', 'step'], ['lr', 'adam', 'w', 'pg1'], ['grad', '2', '0', 'norm', 'total'])
    """
    separated = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return re.findall(r"[a-z0-9]+", separated.lower())


def choose_roles(log: MetricLog, loss: str | None = None) -> Roles:
    """Returns the series of a log that the analysis uses.

    Args:
        log: Of one run.
        loss: Name of the training loss; by default chosen by name. A loss of whole steps is
            preferred to its mean over epochs, and a total to its parts.

    Raises:
        NoLossError: If there is no series of that name, or none that looks like a training loss.
    """
    chosen = _named(log, loss) if loss is not None else _training_loss(log)
    return Roles(
        loss=chosen.in_force(),
        every_loss=chosen,
        validation_loss=_in_force(_validation_loss(log, chosen.name)),
        gradient_norm=_in_force(_gradient_norm(log)),
        learning_rates=tuple(s.in_force() for s in _learning_rates(log)),
        loss_scale=_in_force(_loss_scale(log)),
    )


def _named(log: MetricLog, name: str) -> Series:
    found = log.series.get(name)
    if found is None:
        raise NoLossError(f"has no metric {name!r}; it has {_listed(log)}")
    return found


def _training_loss(log: MetricLog) -> Series:
    losses = [s for s in log.series.values() if _is_loss(s.name) and not _is_held_out(s.name)]
    if not losses:
        raise NoLossError(
            f"no metric is named like a training loss; choose one with --loss NAME: {_listed(log)}"
        )
    longest = max(map(len, losses))
    return min((s for s in losses if len(s) >= _FEWEST * longest), key=_rank_of_loss)


def _rank_of_loss(series: Series) -> tuple[bool, int, bool, int, str]:
    """Returns a key by which the best training loss is the smallest."""
    words = set(words_of(series.name))
    parts = len(words - _PLAIN - _LOSSES)
    training = bool(words & {"train", "training"})
    return "loss" not in words, parts, not training, -len(series), series.name


def _validation_loss(log: MetricLog, loss: str) -> Series | None:
    """Returns the held-out loss whose name is closest to that of the training loss."""
    own = set(words_of(loss)) - _PLAIN
    found = [s for s in log.series.values() if _is_loss(s.name) and _is_held_out(s.name)]
    found = [s for s in found if "test" not in words_of(s.name)] or found

    def distance(series: Series) -> tuple[int, int]:
        words = set(words_of(series.name)) - _PLAIN - _HELD_OUT
        return len(words ^ own), -len(series)

    return min(found, key=distance, default=None)


def _gradient_norm(log: MetricLog) -> Series | None:
    """Returns the norm of all gradients; that of a layer has a longer name."""
    found = []
    for series in log.series.values():
        words = words_of(series.name)
        if ("norm" in words and {"grad", "gradient", "grads", "gradients"} & set(words)) or (
            series.name.lower().endswith("gradnorm")
        ):
            total = bool({"total", "all", "global"} & set(words))
            layer = bool({"weight", "bias"} & set(words))
            found.append(((layer, not total, "clipped" in words, len(words)), series.name, series))
    return min(found, default=(None, "", None), key=lambda each: each[:2])[2]


def _learning_rates(log: MetricLog) -> list[Series]:
    found = []
    for series in log.series.values():
        words = words_of(series.name)
        named = "lr" in words or {"learning", "rate"} <= set(words)
        if named and not {"momentum", "decay", "ratio", "scale", "factor", "best"} & set(words):
            found.append(series)
    return found


def _loss_scale(log: MetricLog) -> Series | None:
    for series in log.series.values():
        words = words_of(series.name)
        if "scaler" in words or (
            words[-1:] == ["scale"]
            and (len(words) == 1 or {"loss", "grad", "amp", "fp16", "train"} & set(words))
        ):
            return series
    return None


def _in_force(series: Series | None) -> Series | None:
    return None if series is None else series.in_force()


def _is_loss(name: str) -> bool:
    words = set(words_of(name))
    return bool(words & _LOSSES) and not words & _NO_LOSS


def _is_held_out(name: str) -> bool:
    return bool(set(words_of(name)) & _HELD_OUT)


def _listed(log: MetricLog, most: int = 20) -> str:
    names: Iterable[str] = sorted(log.series)
    listed = ", ".join([*names][:most]) or "no metric at all"
    return listed + (f" and {len(log.series) - most} more" if len(log.series) > most else "")
