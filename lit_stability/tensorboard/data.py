"""Reads what the page requests from TensorBoard's data provider, as JSON types.

May import numpy, but not torch. Uses only the interface of TensorBoard's data provider, no HTTP.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import numpy as np

from lit_stability.incidents.step_history import FIELDS, PRECISIONS
from lit_stability.incidents.verdict import verdict_of
from lit_stability.tensorboard.run_tags import (
    RunTags,
    read_incident,
    read_status,
    read_tags,
    whole_rows,
)
from lit_stability.tensorboard.tags import INCIDENTS, PLUGIN, STATUS, layers_prefix, steps_tag

log = logging.getLogger("tensorboard")

_ALL = 2**31 - 1
"""More samples than any tag has; ``--samples_per_plugin`` limits how many are kept."""


class NoDataError(LookupError):
    """Raised if the run does not exist or has no data of this plugin."""


class DamagedDataError(ValueError):
    """Raised if data of the run exist but cannot be read; the other runs are not affected."""


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

        Each entry has the number of steps and layers of the first optimizer, for every optimizer
        its index and the part of the model that it trains, as ``problem`` what is damaged, or
        None, as ``updated`` the time of its last step, and as ``status`` its ``state``, ``step``
        and ``time`` (seconds since 1970), None for a run of an older version.
        """
        listed = self._list()
        rows = self._read_all(sorted(listed), steps_tag(0))
        states = self._read_all(sorted(listed), STATUS)
        return [_summary(run, listed[run], rows[run], states[run]) for run in sorted(listed)]

    def steps(self, run: str, optimizer: int = 0) -> dict[str, Any]:
        """Returns the rows of a run, ordered by step attempt.

        Args:
            run: name of the run.
            optimizer: index in ``trainer.optimizers``.

        Raises:
            NoDataError: if the run has no steps of this optimizer.
            DamagedDataError: if they cannot be read.
        """
        tag, tags = steps_tag(optimizer), self._tags_of(run)
        if tag in tags.damaged:
            raise DamagedDataError(f"run {run!r}: {tag} is damaged: {tags.damaged[tag]}")
        if tag not in tags.about:
            raise NoDataError(f"run {run!r} has no steps of optimizer {optimizer}")
        about = tags.about[tag]
        return {
            "fields": about.get("fields", list(FIELDS)),
            "rows": [datum.numpy.tolist() for datum in self._steps_of(run, optimizer, tags)],
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
            DamagedDataError: if all that it has of this quantity cannot be read.
        """
        tags, prefix = self._tags_of(run), layers_prefix(optimizer, quantity)
        series = _series(tags.about, prefix)
        damaged = [tag for tag in tags.damaged if tag.startswith(prefix)]
        if damaged and not series:
            raise DamagedDataError(f"run {run!r}: {damaged[0]}: {tags.damaged[damaged[0]]}")
        names = _names(series)
        found = {tag: self._samples(run, tag, len(series[tag]["names"])) for tag in series}
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
            "steps": self._steps_at(run, optimizer, tags, attempts[order]),
            "values": base64.b64encode(values[order].tobytes()).decode("ascii"),
        }

    def incidents(self, run: str) -> list[dict[str, Any]]:
        """Returns the latest record of each incident of a run, in the order they were opened.

        A damaged record is logged and left out.

        Raises:
            NoDataError: if the run has no data of this plugin.
        """
        tags = [tag for tag in self._tags_of(run).about if tag.startswith(INCIDENTS)]
        data = self._read(runs=[run], tags=tags).get(run, {}) if tags else {}
        found = [_incident(run, tag, data[tag][-1]) for tag in tags if data.get(tag)]
        return sorted(filter(None, found), key=lambda i: (i["attempt"], i["time"]))

    def verdict(self, run: str) -> dict[str, Any]:
        """Returns what the incidents of a run mean; see `lit_stability.incidents.verdict`.

        Raises:
            NoDataError: if the run has no data of this plugin.
        """
        return verdict_of(self.incidents(run), self._length_of(run)).as_dict()

    def _length_of(self, run: str) -> int:
        """Returns the number of optimizer steps of a run so far; 0 if it is not known."""
        tags = self._tags_of(run)
        ended = self._read(runs=[run], tags=[STATUS]).get(run, {}).get(STATUS, [])
        last = self._steps_of(run, 0, tags)[-1:]
        status = read_status(ended[-1].numpy) if ended else None
        return max(int(status["step"]) if status else 0, *(int(d.numpy[1]) + 1 for d in last), 0)

    def _steps_at(self, run: str, optimizer: int, tags: RunTags, attempts: Any) -> list[int]:
        """Returns ``global_step`` of attempts, extrapolated from the last row if one is missing."""
        data = self._steps_of(run, optimizer, tags)
        if not data:
            return attempts.tolist()  # type: ignore[no-any-return]
        known = np.array([d.step for d in data])
        steps = np.array([d.numpy[1] for d in data]).astype(np.int64)
        before = np.maximum(np.searchsorted(known, attempts, side="right") - 1, 0)
        return (steps[before] + attempts - known[before]).tolist()  # type: ignore[no-any-return]

    def _list(self) -> dict[str, RunTags]:
        """Returns the tags of each run; runs without any are omitted."""
        listed = self.provider.list_tensors(
            self.context, experiment_id=self.experiment, plugin_name=PLUGIN
        )
        runs = {
            run: read_tags({tag: series.plugin_content for tag, series in found.items()})
            for run, found in listed.items()
        }
        for run in (run for run, tags in runs.items() if tags.newer):
            _warn(
                f"run {run} has data of a newer lit-stability, which are ignored: upgrade "
                "lit-stability"
            )
        return {run: tags for run, tags in runs.items() if tags.about or tags.damaged}

    def _tags_of(self, run: str) -> RunTags:
        tags = self._list()
        if run not in tags:
            raise NoDataError(f"no run {run!r} with data of the Stability tab")
        return tags[run]

    def _steps_of(self, run: str, optimizer: int, tags: RunTags) -> list[Any]:
        tag = steps_tag(optimizer)
        if tag not in tags.about:
            return []
        return self._samples(run, tag, _width(tags, tag), steps=True)

    def _samples(self, run: str, tag: str, width: int, *, steps: bool = False) -> list[Any]:
        data = self._read(runs=[run], tags=[tag]).get(run, {}).get(tag, [])
        whole = whole_rows(data, width, steps=steps)
        if len(whole) < len(data):
            _warn(f"run {run}: {tag} has damaged values, which are ignored")
        return _in_force(whole)

    def _read_all(self, runs: Sequence[str], tag: str) -> dict[str, list[Any] | str]:
        """Returns the samples of a tag of each run; or the reason, if they cannot be read."""
        try:
            found = self._read(runs=None, tags=[tag])
            return {run: found.get(run, {}).get(tag, []) for run in runs}
        except DamagedDataError:
            # The provider reads all runs or none, so the damaged one is found by single requests.
            return {run: self._read_or_reason(run, tag) for run in runs}

    def _read_or_reason(self, run: str, tag: str) -> list[Any] | str:
        try:
            return list(self._read(runs=[run], tags=[tag]).get(run, {}).get(tag, []))
        except DamagedDataError as error:
            return str(error)

    def _read(self, *, runs: Sequence[str] | None, tags: Sequence[str]) -> Mapping[str, Any]:
        """Returns run -> tag -> samples.

        Raises:
            DamagedDataError: if the provider cannot read them, as for a tensor of unknown type.
        """
        from tensorboard.data.provider import RunTagFilter

        try:
            found: Mapping[str, Any] = self.provider.read_tensors(
                self.context,
                experiment_id=self.experiment,
                plugin_name=PLUGIN,
                downsample=_ALL,
                run_tag_filter=RunTagFilter(runs=runs, tags=tags),
            )
        except Exception as error:
            where = "the runs" if runs is None else f"run {runs[0]!r}"
            raise DamagedDataError(
                f"{where}: {tags[0]} cannot be read ({type(error).__name__}: {error})"
            ) from error
        return found


def _summary(
    run: str, tags: RunTags, rows: list[Any] | str, states: list[Any] | str
) -> dict[str, Any]:
    """Returns the entry of `StabilityData.runs` for a run.

    Args:
        run: its name.
        tags: its tags.
        rows: samples of its first optimizer; or why they cannot be read.
        states: the same for its status.
    """
    tag, unreadable = steps_tag(0), rows if isinstance(rows, str) else None
    data = [] if isinstance(rows, str) or tag not in tags.about else rows
    whole = whole_rows(data, _width(tags, tag), steps=True)
    broken = f"{tag}: {len(data) - len(whole)} of {len(data)} rows are damaged and ignored"
    steps = _in_force(whole)
    return {
        "run": run,
        "steps": len(steps),
        "layers": len(_names(_series(tags.about, layers_prefix(0, "grad_norm")))),
        "incidents": sum(tag.startswith(INCIDENTS) for tag in tags.about),
        "last": int(steps[-1].numpy[1]) if steps else None,
        "updated": steps[-1].wall_time if steps else None,
        "status": None if isinstance(states, str) or not states else read_status(states[-1].numpy),
        "optimizers": _optimizers(tags.about),
        "problem": tags.problem or unreadable or (broken if len(whole) < len(data) else None),
    }


def _width(tags: RunTags, tag: str) -> int:
    """Returns the number of values in a row of steps."""
    return len(tags.about.get(tag, {}).get("fields", FIELDS))


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


def _incident(run: str, tag: str, datum: Any) -> dict[str, Any] | None:
    found = read_incident(datum.numpy)
    if isinstance(found, str):
        _warn(f"run {run}: {tag} is damaged and ignored: {found}")
        return None
    return found


@cache
def _warn(message: str) -> None:
    """Logs each warning once, because the page polls."""
    log.warning(message)
