"""Reads the file of a W&B run, ``run-<id>.wandb``, whether it was offline or not.

The file is a log in the format of LevelDB: a header of 7 bytes, then blocks of 32 KiB with records
that may span blocks. A record is a protocol buffer, of which only the few fields used here are
declared, so that wandb need not be installed. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from lit_stability.checks.metric_log.series import MetricLog, number_of

NAME = "W&B"
_MAGIC = b":W&B"
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
"""Checksum of type and content, length of the content, type."""
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
"""Types of a record: all of it, or a part."""
_STEP = ("global_step", "trainer/global_step", "train/global_step")
"""Keys of the optimizer step, which Lightning and Hugging Face log. W&B's own step counts calls."""


def accepts(file: Path) -> bool:
    """Returns whether the file is that of a run, by its name."""
    return file.suffix == ".wandb"


def read(files: Sequence[Path]) -> MetricLog:
    """Reads the history of a run, and whether and how it ended.

    Args:
        files: One file.
    """
    from google.protobuf.message import DecodeError

    (file,) = files
    log = MetricLog(NAME, file, (file,), complete=False)
    record_type = _record_type()
    place = 0
    with file.open("rb") as stream:
        try:
            for at, content in _records(stream):
                place = at
                record = record_type.FromString(content)
                if record.HasField("history"):
                    _add_row(record.history, log)
                if record.HasField("exit"):
                    log.complete, log.exit_code = True, record.exit.exit_code
        except (DecodeError, ValueError) as error:
            log.problems.append(f"damaged after byte {place}, the rest is not read ({error})")
    return log


def _add_row(history: Any, log: MetricLog) -> None:
    row = {}
    for item in history.item:
        value = _value(item)
        if value is not None:
            row[item.key or ".".join(item.nested_key)] = value
    own = row.pop("_step", history.step.num)
    time = row.pop("_timestamp", math.nan)
    step = next((row[key] for key in _STEP if key in row), own)
    if not math.isfinite(step):
        return
    for name, value in row.items():
        if not name.startswith("_") and name not in _STEP:
            log.add(name, int(step), value, time)


def _value(item: Any) -> float | None:
    match item.WhichOneof("typed"):
        case "integer":
            return float(item.integer)
        case "number":
            return float(item.number)
    try:
        return number_of(json.loads(item.value_json))
    except ValueError:
        return None


def _records(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Returns the place and the content of each record.

    Raises:
        ValueError: If the file is truncated, is no file of W&B, or a checksum is wrong.
    """
    place, parts = 7, b""
    if stream.read(7)[:4] != _MAGIC:
        raise ValueError("no header of W&B")
    while True:
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:  # the end of a block is filled with zeros
            stream.read(left)
            place += left
            continue
        header = stream.read(_HEADER.size)
        if not header and not parts:
            return
        if len(header) < _HEADER.size:
            raise ValueError("truncated record")
        checksum, length, kind = _HEADER.unpack(header)
        content = stream.read(length)
        if len(content) < length:
            raise ValueError("truncated record")
        if zlib.crc32(content, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError("wrong checksum")
        place += _HEADER.size + length
        parts = content if kind in (_WHOLE, _FIRST) else parts + content
        if kind in (_WHOLE, _LAST):
            yield place, parts
            parts = b""


@cache
def _record_type() -> Any:
    """Returns the message class of a record, with the numbers of wandb's `wandb_internal.proto`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    fields = descriptor_pb2.FieldDescriptorProto
    one, many = fields.LABEL_OPTIONAL, fields.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="lit_stability/wandb.proto", package="wandb_log")
    file.syntax = "proto3"
    for message, declared in {
        "Item": (
            ("key", 1, fields.TYPE_STRING, one, ""),
            ("nested_key", 2, fields.TYPE_STRING, many, ""),
            ("integer", 5, fields.TYPE_SINT64, one, ""),
            ("number", 6, fields.TYPE_DOUBLE, one, ""),
            ("value_json", 16, fields.TYPE_STRING, one, ""),
        ),
        "Step": (("num", 1, fields.TYPE_INT64, one, ""),),
        "Exit": (("exit_code", 1, fields.TYPE_INT32, one, ""),),
        "History": (
            ("item", 1, fields.TYPE_MESSAGE, many, "Item"),
            ("step", 2, fields.TYPE_MESSAGE, one, "Step"),
        ),
        "Record": (
            ("history", 2, fields.TYPE_MESSAGE, one, "History"),
            ("exit", 18, fields.TYPE_MESSAGE, one, "Exit"),
        ),
    }.items():
        added = file.message_type.add(name=message)
        for name, number, kind, label, of in declared:
            field = added.field.add(name=name, number=number, type=kind, label=label)
            if of:
                field.type_name = f".wandb_log.{of}"
            if name in ("integer", "number"):
                field.oneof_index = 0
        if message == "Item":
            added.oneof_decl.add(name="typed")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("wandb_log.Record"))
