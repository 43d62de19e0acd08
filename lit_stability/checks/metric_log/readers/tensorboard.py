"""Reads the event files of TensorBoard.

Its own loader ends at a damaged record as at the end of the file; this reader reports it. Imports
neither torch nor Lightning, and the protocol buffers of TensorBoard only to read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lit_stability.checks.metric_log.series import MetricLog

NAME = "TensorBoard"
_HEADER = struct.Struct("<QI")
"""Length of a record and a checksum of the length."""
_CHECKED = 512
"""Largest record whose checksum is verified: in pure Python that takes 0.1 us a byte, and larger
records hold images and histograms."""
_LARGEST = 2**31
"""A protocol buffer cannot be larger; a length above it is damage."""


def accepts(file: Path) -> bool:
    """Returns whether the file is an event file, by its name."""
    return "tfevents" in file.name


def read(files: Sequence[Path]) -> MetricLog:
    """Reads all scalars, old values and new tensors alike.

    Args:
        files: The event files of one run. Their names begin with the time at which they were
            opened, so that of the first start of the run comes first.
    """
    files = sorted(files, key=lambda file: file.name)
    path = files[0] if len(files) == 1 else files[0].parent
    log = MetricLog(NAME, path, tuple(files))
    for file in files:
        with file.open("rb") as stream:
            _read_events(stream, file.name, log)
    return log


def _read_events(stream: BinaryIO, name: str, log: MetricLog) -> None:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    place = 0
    try:
        for at, record in _records(stream):
            place = at
            event = Event.FromString(record)
            for value in event.summary.value:
                number = _number(value)
                if number is not None:
                    log.add(value.tag, event.step, number, event.wall_time)
    except (DecodeError, ValueError) as error:
        log.problems.append(f"{name}: damaged after byte {place}, the rest is not read ({error})")


def _records(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Returns the place and the content of each record.

    Raises:
        ValueError: If the file is truncated or a checksum is wrong.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    while header := stream.read(_HEADER.size):
        place = stream.tell() - len(header)
        if len(header) < _HEADER.size:
            raise ValueError("truncated record")
        length, checksum = _HEADER.unpack(header)
        if length > _LARGEST or masked_crc32c(header[:8]) != checksum:
            raise ValueError("wrong checksum of a length")
        content = stream.read(length)
        footer = stream.read(4)
        if len(footer) < 4:
            raise ValueError("truncated record")
        if length <= _CHECKED and masked_crc32c(content) != struct.unpack("<I", footer)[0]:
            raise ValueError("wrong checksum of a record")
        yield place, content


def _number(value: Any) -> float | None:
    """Returns the number of a value; None for images, histograms, texts and larger tensors."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor":
        return None
    size = 1
    for dimension in value.tensor.tensor_shape.dim:
        size *= dimension.size
    if size != 1:
        return None
    from tensorboard.util.tensor_util import make_ndarray

    try:
        array = make_ndarray(value.tensor)
    except (TypeError, ValueError):  # of a type that numpy does not have
        return None
    return float(array.item()) if array.dtype.kind in "fiu" else None
