"""Reads what the page requests from TensorBoard's data provider, as JSON types.

May import numpy, but not torch. Uses only the interface of TensorBoard's data provider, no HTTP.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lit_stability.incidents.step_history import FIELDS, PRECISIONS
from lit_stability.incidents.verdict import verdict_of
from lit_stability.tensorboard.run_summary import (
    in_force,
    names_of,
    series_of,
    summary_of,
    width_of,
)
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
        return [summary_of(run, listed[run], rows[run], states[run]) for run in sorted(listed)]

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
        series = series_of(tags.about, prefix)
        damaged = [tag for tag in tags.damaged if tag.startswith(prefix)]
        if damaged and not series:
            raise DamagedDataError(f"run {run!r}: {damaged[0]}: {tags.damaged[damaged[0]]}")
        names = names_of(series)
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
            DamagedDataError: if its last step cannot be read.
        """
        incidents = self.incidents(run)
        return verdict_of(incidents, None if incidents else self._length_of(run)).as_dict()

    def _length_of(self, run: str) -> int:
        """Returns the number of optimizer steps of a run so far; 0 if it is not known."""
        tag, tags = steps_tag(0), self._tags_of(run)
        found = self._read(runs=[run], tags=[STATUS, tag]).get(run, {})
        ended = [read_status(datum.numpy) for datum in found.get(STATUS, [])[-1:]]
        last = whole_rows(found.get(tag, [])[-1:], width_of(tags, tag), steps=True)
        steps = [int(status["step"]) for status in ended if status]
        return max([0, *steps, *(int(datum.numpy[1]) + 1 for datum in last)])

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
        return self._samples(run, tag, width_of(tags, tag), steps=True)

    def _samples(self, run: str, tag: str, width: int, *, steps: bool = False) -> list[Any]:
        data = self._read(runs=[run], tags=[tag]).get(run, {}).get(tag, [])
        whole = whole_rows(data, width, steps=steps)
        if len(whole) < len(data):
            _warn(f"run {run}: {tag} has damaged values, which are ignored")
        return in_force(whole)

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
