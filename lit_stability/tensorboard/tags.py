"""Names and layout of a run's data in its event file, shared by writer and plugin.

Imports neither torch nor TensorBoard.

======================================  =====================================  ====================
tag                                     tensor                                 metadata (JSON)
======================================  =====================================  ====================
``stability/steps``                     float64, one per field                 fields, precisions
``stability/layers/QUANTITY/NAMES``     float32, one per layer                 quantity, names
``stability/incident/ID/TIME``          string, the incident as JSON           none
``stability/status``                    string, the status as JSON             none
======================================  =====================================  ====================

NAMES is a digest of the layer names, so that a run whose layers change, for example when a backbone
is unfrozen, starts another series. TIME separates the incidents of a run from those of an earlier
run in the same folder. Tags of further optimizers have the suffix ``_1`` and so on. The step of
every event is the number of the step attempt, since steps in an event file must not decrease.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

PLUGIN = "stability"
"""Name of the plugin, in the metadata of every tag and in TensorBoard's routes."""
SAMPLES = 2000
"""Number of samples per tag that TensorBoard is asked to keep."""
SCHEMA = 1
"""Version of the layout; readers ignore newer versions."""
STATUS_SCHEMA = 2
"""The same for the status of a run, which versions that only know 1 ignore."""
RunState = Literal["running", "finished", "stopped", "interrupted", "failed"]
"""``stopped``: by this package. ``interrupted``: by a signal. ``failed``: another exception."""
QUANTITIES = ("grad_norm", "update_ratio")
"""Quantities that are written by layer."""
STEPS = f"{PLUGIN}/steps"
LAYERS = f"{PLUGIN}/layers"
INCIDENTS = f"{PLUGIN}/incident/"
"""Prefixes of the tags of steps, layers and incidents."""
STATUS = f"{PLUGIN}/status"
"""Tag of whether the run goes on."""


def steps_tag(optimizer: int) -> str:
    """Returns the tag of an optimizer's rows.

    >>> steps_tag(0), steps_tag(1)
    ('stability/steps', 'stability/steps_1')
    """
    return f"{STEPS}{_suffix(optimizer)}"


def layers_prefix(optimizer: int, quantity: str) -> str:
    """Returns the prefix of a quantity's tags.

    >>> layers_prefix(1, "grad_norm")
    'stability/layers_1/grad_norm/'
    """
    return f"{LAYERS}{_suffix(optimizer)}/{quantity}/"


def layers_tag(optimizer: int, quantity: str, names: Sequence[str]) -> str:
    """Returns the tag of a quantity of these layers."""
    digest = hashlib.sha256("\n".join(names).encode("utf8", "surrogatepass")).hexdigest()
    return layers_prefix(optimizer, quantity) + digest[:8]


def incident_tag(incident: int, started: float) -> str:
    """Returns the tag of an incident.

    >>> incident_tag(3, 1700000000.5)
    'stability/incident/3/1700000000'
    """
    return f"{INCIDENTS}{incident}/{int(started)}"


def metadata(**content: object) -> bytes:
    """Returns the JSON metadata of a tag.

    >>> metadata(names=["a"])
    b'{"schema": 1, "names": ["a"]}'
    """
    return json.dumps({"schema": SCHEMA, **content}).encode("ascii")


def _suffix(optimizer: int) -> str:
    return f"_{optimizer}" if optimizer else ""
