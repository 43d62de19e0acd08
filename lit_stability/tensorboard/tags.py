"""How a run's data are named and laid out in its event file: what writer and plugin agree on.

Imports neither torch nor TensorBoard.

======================================  =====================================  ====================
tag                                     tensor                                 metadata (JSON)
======================================  =====================================  ====================
``stability/steps``                     float64, one per field                 fields, precisions
``stability/layers/QUANTITY/NAMES``     float32, one per layer                 quantity, names
``stability/incident/ID/TIME``          string, the incident as JSON           none
======================================  =====================================  ====================

NAMES is a digest of the layers' names, so that a run whose layers change, as when a backbone
unfreezes, begins another series; TIME tells incidents of a run apart from those of one that it
began over. Steps and layers of further optimizers carry ``_1`` and so on. The step of every event
is the number of the attempt, which never goes back: an event file may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

PLUGIN = "stability"
"""Name of the plugin, in the metadata of every tag and in TensorBoard's routes."""
SAMPLES = 2000
"""Samples of a tag that TensorBoard is asked to keep."""
SCHEMA = 1
"""Version of the layout; a reader passes over newer ones."""
QUANTITIES = ("grad_norm", "update_ratio")
"""What is known layer by layer."""
INCIDENTS = f"{PLUGIN}/incident/"


def steps_tag(optimizer: int) -> str:
    """The tag of the rows of an optimizer.

    >>> steps_tag(0), steps_tag(1)
    ('stability/steps', 'stability/steps_1')
    """
    return f"{PLUGIN}/steps{_suffix(optimizer)}"


def layers_prefix(optimizer: int, quantity: str) -> str:
    """What the tags of a quantity begin with.

    >>> layers_prefix(1, "grad_norm")
    'stability/layers_1/grad_norm/'
    """
    return f"{PLUGIN}/layers{_suffix(optimizer)}/{quantity}/"


def layers_tag(optimizer: int, quantity: str, names: Sequence[str]) -> str:
    """The tag of a quantity of these layers."""
    digest = hashlib.sha256("\n".join(names).encode("utf8", "surrogatepass")).hexdigest()
    return layers_prefix(optimizer, quantity) + digest[:8]


def incident_tag(incident: int, started: float) -> str:
    """The tag of an incident.

    >>> incident_tag(3, 1700000000.5)
    'stability/incident/3/1700000000'
    """
    return f"{INCIDENTS}{incident}/{int(started)}"


def metadata(**content: object) -> bytes:
    """What goes with a tag.

    >>> metadata(names=["a"])
    b'{"schema": 1, "names": ["a"]}'
    """
    return json.dumps({"schema": SCHEMA, **content}).encode("ascii")


def _suffix(optimizer: int) -> str:
    return f"_{optimizer}" if optimizer else ""
