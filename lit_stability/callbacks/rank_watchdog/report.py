"""What every rank writes before it ends with the others. Imports no Lightning."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lit_stability.callbacks.rank_watchdog.watch import RankWatch
from lit_stability.detectors import Anomaly
from lit_stability.distributed.heartbeat_verdict import Verdict
from lit_stability.incidents import Incident
from lit_stability.incidents.log import IncidentRecord
from lit_stability.lightning_choice import suite_logger
from lit_stability.outside import guarded

log = suite_logger()

EXIT_CODE = 75
"""Exit code of all ranks after a hang: ``EX_TEMPFAIL``, "try again later"."""

AT_MOST = 5.0
"""Seconds for each part of the report: a disk or a console that hangs must not keep the process."""


class HangReport:
    """Writes the stacks of this rank, one line of the log, and ends the process.

    Args:
        file: to which every rank appends its stacks; None for the console.
        run: returns the id of the run, for the record.
    """

    def __init__(self, file: Path | None, run: Callable[[], str] = str) -> None:
        self.file, self._run = file, run

    def __call__(self, watch: RankWatch, verdict: Verdict) -> NoReturn:
        """Ends this process with `EXIT_CODE`, together with the others."""
        own = watch.own_beat(0)
        who = watch.meeting.identities[watch.meeting.rank]
        header = (
            f"rank {watch.meeting.rank} ({who}), {own.place}, for {own.idle:.0f} s\n"
            f"  verdict: {verdict.text}\n"
        )
        _within(AT_MOST, lambda: self._write(header))
        if verdict.reporter == watch.meeting.rank:
            _within(AT_MOST, lambda: self._log(verdict))
            _within(AT_MOST, lambda: self._record(verdict, own.step))
        watch.exchange.wrote()
        _wait_for_others(watch, verdict)
        _let_the_reason_end_first(watch, verdict)
        if verdict.kind == "silent":
            for rank in verdict.ranks:
                # It cannot end itself, and would keep its device.
                watch.meeting.identities[rank].kill(who)
        _within(AT_MOST, _flush)
        os._exit(EXIT_CODE)

    def _write(self, header: str) -> None:
        text = f"{header}{_stacks()}\n".encode()
        try:
            if self.file is None:
                raise OSError
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # One write, so that the ranks do not write into each other's part.
            with self.file.open("ab", buffering=0) as file:
                file.write(text)
        except OSError:
            sys.stderr.write(text.decode())

    def _log(self, verdict: Verdict) -> None:
        where = "the console" if self.file is None else self.file
        log.error(
            "the fit hangs: %s. Python stacks of all ranks: %s. All ranks end with exit code %d",
            verdict.text,
            where,
            EXIT_CODE,
        )

    def _record(self, verdict: Verdict, step: int) -> None:
        """Adds a row to the record of incidents, which has no number of its own: 0."""
        if self.file is None:
            return
        anomaly = Anomaly(
            kind=f"hang: {verdict.kind}",
            step=step,
            value=round(verdict.seconds, 1),
            signal="seconds without progress",
            message=verdict.text,
        )
        incident = Incident(0, anomaly, run=self._run(), path=str(self.file))
        incident.close("stopped", step)
        record = IncidentRecord(self.file.with_name("incidents.jsonl"))
        what = f"the hang cannot be recorded in {record.path}"
        guarded(self, what, lambda: record.append("close", incident))


def _stacks() -> str:
    """The Python stacks of all threads: files, lines and functions, no values."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _wait_for_others(watch: RankWatch, verdict: Verdict) -> None:
    """Waits until all have written: a launcher ends the others when the first process ends."""
    deadline = time.monotonic() + AT_MOST
    while time.monotonic() < deadline and watch.has_store(verdict):
        if watch.exchange.written >= verdict.living:
            # Rank 0 has the store, from which the others are about to read the same.
            time.sleep(0.3)
            return
        time.sleep(0.02)


def _let_the_reason_end_first(watch: RankWatch, verdict: Verdict) -> None:
    """Waits for a rank that raised: a launcher reports the process that ends first."""
    me = watch.meeting.identities[watch.meeting.rank]
    deadline = time.monotonic() + AT_MOST * (verdict.kind == "raised")
    raised = [watch.meeting.identities[rank] for rank in verdict.ranks]
    while time.monotonic() < deadline and not all(each.has_ended(me) for each in raised):
        time.sleep(0.02)


def _within(seconds: float, call: Callable[[], None]) -> None:
    def run() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
