"""`Alerts`: sends a message when an incident opens, when the fit stops and when it ends.

May import Lightning.
"""

import platform
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

from lit_stability.background import Background
from lit_stability.callbacks.alerts.rate_limit import RateLimit
from lit_stability.callbacks.alerts.targets import VARIABLE, Send, sender_of, targets_given
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import monitor_of, require_monitor, run_of
from lit_stability.detectors.anomaly import require
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.incidents.report import responses_text
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer

log = suite_logger()

Event = Literal["open", "stop", "end"]


class Alerts(StabilityCallback):
    """Sends a message when an incident opens, when the fit stops and when it ends.

    A target is the address of a webhook (``https://...``), to which JSON is posted, or a URL of
    `apprise <https://github.com/caronc/apprise>`_ (Slack, mail, Teams and some hundred others,
    ``pip install 'lit-stability[alerts]'``). Rank 0 sends.

    * ``open``: an incident was opened; with what was done, and what to try. At most one message in
      ``min_interval``; the next one says how many were held back.
    * ``stop``: the fit ended in an exception, `TrainingStopped` among them.
    * ``end``: the fit finished, or was interrupted; with the number of incidents.

    Messages are sent from a thread, three times at most if that fails, which is logged once. Only
    the end of a fit waits for the last one, for ``timeout`` at most. Nothing here ends a fit.

    The JSON has ``event``, ``title``, ``text``, ``run``, ``step``, ``host``, ``time`` (seconds
    since 1970), ``incidents`` (their number so far) and ``incident``, the record of the one that
    the message is about, as in ``incidents.jsonl``, or null.

    Args:
        targets: one or several; by default those in the environment variable
            ``LIT_STABILITY_ALERTS``, separated by spaces. The URL of a target is a secret: there
            it stays out of configs and checkpoints.
        events: those that are sent.
        min_interval: seconds between two messages of an incident.
        timeout: seconds after which a webhook that does not answer is given up, and for which the
            end of a fit waits for messages.

    Raises:
        ValueError: if a target is no URL or needs a package that is missing, or if another
            argument is out of its range.

    >>> Alerts("https://example.org/hook", events=["stop"]).events
    ('stop',)
    """

    def __init__(
        self,
        targets: str | Sequence[str] = (),
        *,
        events: Sequence[Event] = ("open", "stop", "end"),
        min_interval: float = 60.0,
        timeout: float = 10.0,
    ) -> None:
        require(min_interval >= 0, "min_interval", min_interval, "0 or more seconds")
        require(timeout > 0, "timeout", timeout, "more than 0 seconds")
        known = get_args(Event)
        require(not isinstance(events, str), "events", events, "a list")
        require({*events} <= {*known}, "events", events, f"a list of {', '.join(known)}")
        self.targets = targets if isinstance(targets, str) else tuple(targets)
        self.events = tuple(events)
        self.min_interval, self.timeout = min_interval, timeout
        for target in targets_given(self.targets):
            sender_of(target, timeout)  # a typo is an error now, and not at the first incident
        self._fit: _Fit | None = None

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_fit": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepares to send, on rank 0.

        Raises:
            ValueError: without a `GradientMonitor` before it.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        self._fit = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            targets = targets_given(self.targets)
            self._fit = _Fit(self, trainer, [sender_of(each, self.timeout) for each in targets])
            if not targets:
                log.info("Alerts sends nothing: give it targets, or set %s", VARIABLE)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Keeps an incident that was opened until the responses of all callbacks are known."""
        if self._fit is not None and incident.occurrences == 1:
            self._fit.opened.append(incident)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Announces incidents that were opened in this batch."""
        if self._fit is not None:
            self._fit.announce()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announces that the fit has finished."""
        if self._fit is not None:
            self._fit.end("end", f"finished at step {trainer.global_step}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Announces that the fit was stopped, has failed or was interrupted."""
        if self._fit is None:
            return
        fit, step = self._fit, trainer.global_step
        reason = f"{type(exception).__name__}: {exception}".rstrip(": ")
        if isinstance(exception, TrainingStopped):
            fit.end("stop", str(exception), exception.incident)
        elif isinstance(exception, Exception):
            fit.end("stop", f"failed at step {step}: {reason}")
        else:
            fit.end("end", f"interrupted at step {step}: {reason}")
        self._fit = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Releases the trainer."""
        self._fit = None


class _Fit:
    """The messages of one fit."""

    def __init__(self, owner: Alerts, trainer: Trainer, senders: Sequence[Send]) -> None:
        self._owner, self._trainer = owner, trainer
        self._senders = [(Background("alerts"), send) for send in senders]
        """One thread for each, so that a target which hangs holds up no other."""
        self._limit = RateLimit(owner.min_interval)
        self.opened: list[Incident] = []
        """Incidents that are not announced yet."""

    def announce(self) -> None:
        """Sends a message for each incident that was opened, as far as the limit allows."""
        opened, self.opened = self.opened, []
        for incident in opened if "open" in self._owner.events else []:
            held_back = self._limit.take(time.monotonic())
            if held_back is not None:
                more = f"\n{held_back} more since the last message" if held_back else ""
                title = f"incident {incident.id}: {incident.first.kind}"
                self._send("open", title, _in_words(incident) + more, incident)

    def end(self, event: Event, text: str, incident: Incident | None = None) -> None:
        """Sends the last message and waits for it, for some seconds at most."""
        if incident is None:
            self.announce()  # else the last message is about it
        count = len(monitor_of(self._trainer).incidents)
        if event in self._owner.events:
            what = "training stopped" if event == "stop" else "training ended"
            self._send(event, what, f"{text}\nincidents: {count}", incident)
        until = time.monotonic() + self._owner.timeout
        for background, _ in self._senders:
            background.close(max(0.0, until - time.monotonic()))

    def _send(self, event: Event, title: str, text: str, incident: Incident | None) -> None:
        run = run_of(self._trainer)
        fields = {
            "event": event,
            "title": f"{title} (run {run})",
            "text": text,
            "run": run,
            "step": self._trainer.global_step,
            "host": platform.node(),
            "time": time.time(),
            "incidents": len(monitor_of(self._trainer).incidents),
            "incident": None if incident is None else _without_source(incident.as_dict()),
        }
        for background, send in self._senders:
            background.call("an alert was not delivered", partial(send, fields))


def _without_source(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without the lines of the program, which stay on this machine."""
    origin = {k: v for k, v in (record["origin"] or {}).items() if not k.startswith("source")}
    return record | {"origin": origin or None}


def _in_words(incident: Incident) -> str:
    first = incident.first
    lines = [
        f"step {first.step}, epoch {incident.epoch}, batch {incident.batch_idx}: {first.message}",
        f"cause: {incident.cause or 'unknown'}",
        f"done: {responses_text(incident) or 'nothing'}",
        f"what to try: {incident.remedy}",
    ]
    return "\n".join([*lines, *([f"details: {incident.path}"] if incident.path else [])])
