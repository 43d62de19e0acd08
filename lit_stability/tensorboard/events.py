"""Builds event file values directly: a hundred times cheaper than ``add_scalar`` for each.

May import TensorBoard's protocol buffers and numpy; imported only if a logger accepts events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING

from lit_stability.tensorboard.tags import PLUGIN


def metadata_of(content: bytes = b"") -> Any:
    """Returns the metadata for the first value of a tag, which assigns the tag to the plugin.

    Args:
        content: data for the plugin.
    """
    data = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
    # Data providers ignore tags without a data class.
    return SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)


def doubles(tag: str, values: Sequence[float], metadata: Any = None) -> Any:
    """Returns a float64 value of shape ``(len(values),)``."""
    return _numbers(tag, np.asarray(values, "<f8"), DT_DOUBLE, metadata)


def floats(tag: str, values: Sequence[float], metadata: Any = None) -> Any:
    """Returns a float32 value of shape ``(len(values),)``; too large numbers become Inf."""
    with np.errstate(over="ignore"):
        return _numbers(tag, np.asarray(values, "<f8").astype("<f4"), DT_FLOAT, metadata)


def text(tag: str, content: str, metadata: Any = None) -> Any:
    """Returns a value that holds one string."""
    data = content.encode("utf8", "backslashreplace")
    tensor = TensorProto(dtype=DT_STRING, string_val=[data], tensor_shape=TensorShapeProto())
    return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


def event_of(values: Sequence[Any]) -> Any:
    """Returns an event with these values; the file writer adds step and time."""
    return Event(summary=Summary(value=values))


def _numbers(tag: str, values: Any, dtype: int, metadata: Any) -> Any:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(values))])
    tensor = TensorProto(dtype=dtype, tensor_shape=shape, tensor_content=values.tobytes())
    return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
