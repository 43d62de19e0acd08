"""Reads what the page requests from TensorBoard's data provider, as JSON types.

May import numpy, but not torch. Uses only the interface of TensorBoard's data provider, no HTTP.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import numpy as np

from lit_stability.incidents.step_history import FIELDS, PRECISIONS
from lit_stability.tensorboard.tags import INCIDENTS, PLUGIN, SCHEMA, layers_prefix, steps_tag

log = logging.getLogger("tensorboard")

_ALL = 2**31 - 1
"""More samples than any tag has; ``--samples_per_plugin`` limits how many are kept."""


class NoDataError(LookupError):
    """Raised if the run does not exist or has no data of this plugin."""


@dataclass(frozen=True)
class StabilityData:
    """Reads the data of one experiment for one request.

    Args:
        provider: TensorBoard's data provider.
        context: context of the request.
        experiment: id of the experiment.
    """

    provider: Any
    context: Any
    experiment: str

    def runs(self) -> list[dict[str, Any]]:
        """Returns all runs that have data of this plugin, sorted by name.

        Each entry has the number of steps and layers of the first optimizer, and for every
        optimizer its index and the part of the model that it trains.
        """
        tags = self._list()
        rows = self._read(runs=None, tags=[steps_tag(0)])
        return [
            {
                "run": run,
                "steps": len(_in_force(rows.get(run, {}).get(steps_tag(0), []))),
                "layers": len(_names(_series(tags[run], layers_prefix(0, "grad_norm")))),
                "incidents": sum(tag.startswith(INCIDENTS) for tag in tags[run]),
                "last": _last_step(rows.get(run, {}).get(steps_tag(0), [])),
                "optimizers": _optimizers(tags[run]),
            }
            for run in sorted(tags)
        ]

    def steps(self, run: str, optimizer: int = 0) -> dict[str, Any]:
        """Returns the rows of a run, ordered by step attempt.

        Args:
            run: name of the run.
            optimizer: index in ``trainer.optimizers``.

        Raises:
            NoDataError: if the run has no steps of this optimizer.
        """
        tag = steps_tag(optimizer)
        about = self._tags_of(run).get(tag)
        if about is None:
            raise NoDataError(f"run {run!r} has no steps of optimizer {optimizer}")
        return {
            "fields": about.get("fields", list(FIELDS)),
            "rows": [datum.numpy.tolist() for datum in self._samples(run, tag)],
            "precisions": about.get("precisions", list(PRECISIONS)),
        }

    def layers(self, run: str, quantity: str, optimizer: int = 0) -> dict[str, Any]:
        """Returns a quantity by layer and step attempt; empty if it was never measured.

        Args:
            run: name of the run.
            quantity: one of `lit_stability.tensorboard.tags.QUANTITIES`.
            optimizer: index in ``trainer.optimizers``.

        Raises:
            NoDataError: if the run has no data of this plugin.
        """
        series = _series(self._tags_of(run), layers_prefix(optimizer, quantity))
        names = _names(series)
        found = {tag: self._samples(run, tag) for tag in series}
        attempts = np.array([d.step for data in found.values() for d in data], dtype=np.int64)
        values = np.full((len(attempts), len(names)), np.nan, dtype="<f4")
        column_of = {name: column for column, name in enumerate(names)}
        row = 0
        for tag, data in found.items():
            columns = [column_of[name] for name in series[tag]["names"]]
            if data:
                values[row : row + len(data), columns] = np.stack([d.numpy for d in data])
            row += len(data)
        order = np.argsort(attempts, kind="stable")
        return {
            "names": names,
            "attempts": attempts[order].tolist(),
            "steps": self._steps_at(run, optimizer, attempts[order]),
            "values": base64.b64encode(values[order].tobytes()).decode("ascii"),
        }

    def incidents(self, run: str) -> list[dict[str, Any]]:
        """Returns the latest record of each incident of a run, in the order they were opened.

        Raises:
            NoDataError: if the run has no data of this plugin.
        """
        tags = [tag for tag in self._tags_of(run) if tag.startswith(INCIDENTS)]
        data = self._read(runs=[run], tags=tags).get(run, {}) if tags else {}
        found = [_incident(run, tag, data[tag][-1]) for tag in tags if data.get(tag)]
        return sorted(filter(None, found), key=lambda i: (i.get("attempt", 0), i.get("time", 0)))

    def _steps_at(self, run: str, optimizer: int, attempts: Any) -> list[int]:
        """Returns ``global_step`` of attempts, extrapolated from the last row if one is missing."""
        data = self._samples(run, steps_tag(optimizer))
        if not data:
            return attempts.tolist()  # type: ignore[no-any-return]
        known = np.array([d.step for d in data])
        steps = np.array([d.numpy[1] for d in data]).astype(np.int64)
        before = np.maximum(np.searchsorted(known, attempts, side="right") - 1, 0)
        return (steps[before] + attempts - known[before]).tolist()  # type: ignore[no-any-return]

    def _list(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """Returns run -> tag -> metadata, without tags of a newer layout version."""
        listed = self.provider.list_tensors(
            self.context, experiment_id=self.experiment, plugin_name=PLUGIN
        )
        tags = {
            run: {tag: _about(series.plugin_content) for tag, series in found.items()}
            for run, found in listed.items()
        }
        return {run: readable for run in tags if (readable := _readable(run, tags[run]))}

    def _tags_of(self, run: str) -> dict[str, Mapping[str, Any]]:
        tags = self._list()
        if run not in tags:
            raise NoDataError(f"no run {run!r} with data of the Stability tab")
        return tags[run]

    def _samples(self, run: str, tag: str) -> list[Any]:
        return _in_force(self._read(runs=[run], tags=[tag]).get(run, {}).get(tag, []))

    def _read(self, *, runs: Sequence[str] | None, tags: Sequence[str]) -> Mapping[str, Any]:
        from tensorboard.data.provider import RunTagFilter

        found: Mapping[str, Any] = self.provider.read_tensors(
            self.context,
            experiment_id=self.experiment,
            plugin_name=PLUGIN,
            downsample=_ALL,
            run_tag_filter=RunTagFilter(runs=runs, tags=tags),
        )
        return found


def _about(content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {"schema": 0}
    return found if isinstance(found, dict) else {"schema": 0}


def _readable(run: str, tags: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    newer = [tag for tag, about in tags.items() if about.get("schema", 0) > SCHEMA]
    if newer:
        _warn(
            f"run {run} has data of a newer lit-stability, which are ignored: upgrade lit-stability"
        )
    return {tag: about for tag, about in tags.items() if tag not in newer}


def _series(tags: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Mapping[str, Any]]:
    return {tag: about for tag, about in tags.items() if tag.startswith(prefix)}


def _optimizers(tags: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the index of each optimizer, and the module that contains all its layers."""
    return [
        {"index": i, "part": common_part(_names(_series(tags, layers_prefix(i, "grad_norm"))))}
        for i in range(len(tags))
        if steps_tag(i) in tags
    ]


def common_part(names: Sequence[str]) -> str:
    """Returns the innermost module that contains all parameters; "" for the whole model.

    >>> common_part(["gan.critic.0.weight", "gan.critic.1.bias"]), common_part(["a.b", "ab.c"])
    ('gan.critic', '')
    """
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda parts: len({*parts}) == 1, levels))


def _names(series: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the layers of all series; the longest series comes first, in model order."""
    by_length = sorted((about["names"] for about in series.values()), key=len, reverse=True)
    return list(dict.fromkeys(name for names in by_length for name in names))


def _in_force(data: Iterable[Any]) -> list[Any]:
    """Returns samples in order of their attempts; of repeated attempts, only the later ones.

    A job that resumes a checkpoint continues the count from there. What the previous job did after
    that checkpoint is no longer part of the run.
    """
    kept: list[Any] = []
    for datum in data:
        while kept and kept[-1].step >= datum.step:
            kept.pop()
        kept.append(datum)
    return kept


def _last_step(data: Sequence[Any]) -> int | None:
    kept = _in_force(data)
    return int(kept[-1].numpy[1]) if kept else None


def _incident(run: str, tag: str, datum: Any) -> dict[str, Any] | None:
    try:
        found = json.loads(datum.numpy.item())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        _warn(f"run {run}: {tag} is damaged and ignored")
        return None
    return found


@cache
def _warn(message: str) -> None:
    """Logs each warning once, because the page polls."""
    log.warning(message)
