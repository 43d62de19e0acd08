"""Where an alert is sent: a webhook, or whatever apprise reaches.

A URL holds a secret: no message repeats more of it than its scheme.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_stability.incidents.log import to_json
from lit_stability.redaction import redacted, redacted_tree

VARIABLE = "LIT_STABILITY_ALERTS"
"""Environment variable with targets, separated by spaces, for an `Alerts` that is given none."""

Send = Callable[[Mapping[str, Any]], object]
"""Sends the fields of an alert; raises if it was not delivered."""


def targets_given(targets: str | Sequence[str]) -> list[str]:
    """Returns the targets of an argument, or of the environment if it is empty.

    >>> targets_given("https://example.org/hook")
    ['https://example.org/hook']
    """
    listed = [targets] if isinstance(targets, str) else list(targets)
    return listed or os.environ.get(VARIABLE, "").split()


def sender_of(target: str, timeout: float) -> Send:
    """Returns what sends an alert to a target.

    Args:
        target: ``http://`` or ``https://``, to which JSON is posted, or a URL of apprise.
        timeout: of a webhook, in seconds.

    Raises:
        ValueError: if it is no URL, if apprise is needed and not installed, or does not know it.
    """
    scheme = target.partition("://")[0]
    if "://" not in target or not scheme:
        raise ValueError(
            "a target of Alerts must be a URL such as https://host/hook or slack://token, got one "
            f"of {len(target)} characters without a scheme"
        )
    if scheme in ("http", "https"):
        return lambda fields: _post(target, fields, timeout)
    try:
        import apprise
    except ImportError as error:
        raise ValueError(
            f"Alerts needs apprise for a target {scheme}://...; pip install 'lit-stability[alerts]'"
            ", or give the http:// or https:// address of a webhook"
        ) from error
    service = apprise.Apprise()
    if not service.add(target):
        raise ValueError(
            f"apprise does not accept the target {scheme}://...; see the list of its services at "
            "https://github.com/caronc/apprise/wiki"
        )
    return lambda fields: _notify(service, fields)


def _post(url: str, fields: Mapping[str, Any], timeout: float) -> None:
    data = to_json(redacted_tree(dict(fields))).encode("utf8", "backslashreplace")
    headers = {"Content-Type": "application/json", "User-Agent": "lit-stability"}
    request = urllib.request.Request(url, data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            pass
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise OSError(f"the webhook answered {error.code} {error.reason}") from None


def _notify(service: Any, fields: Mapping[str, Any]) -> None:
    if not service.notify(title=redacted(fields["title"]), body=redacted(fields["text"])):
        raise OSError("apprise did not deliver the message")
