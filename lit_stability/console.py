"""Writes the log of this package to a screen on which progress bars are drawn as well.

A bar of rich or tqdm moves the cursor, so that what a log handler writes beside it is overwritten,
or glued to it. In a notebook a record may be shown as a card instead. Imports the standard library
only; rich, tqdm and IPython are used where they are loaded.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TextIO, cast

PREFIX = "[stability]"
"""Beginning of every record, so that the lines can be found among those of other programs."""


def attach(logger: logging.Logger) -> logging.Logger:
    """Has a logger write beside progress bars, with the prefix; returns the logger.

    What a `logging.StreamHandler` would write to a terminal is written through the progress bar
    that is drawn there. All other handlers, such as those of files, get each record as usual.

    Args:
        logger: whose records to show; nothing happens if it is attached already.

    >>> logger = attach(attach(logging.getLogger("example")))
    >>> len(logger.filters)
    1
    """
    if _prefixed not in logger.filters:
        logger.addFilter(_prefixed)
        usual = logger.callHandlers
        # Neither a handler nor a filter can wrap what the handlers of the loggers above do.
        logger.callHandlers = partial(_call_handlers, logger, usual)  # type: ignore[method-assign]
    return logger


def show_card(card: object) -> dict[str, object]:
    """Returns the ``extra`` of a record that a notebook shows as a card, in place of its lines.

    Args:
        card: with ``_repr_html_``. The same object is shown once, and drawn again in its place when
            a later record has it too.
    """
    return {"stability_card": card}


def _has_shown(record: logging.LogRecord) -> bool:
    """Shows the card of a record, if there is one and this is a notebook."""
    card: Any = getattr(record, "stability_card", None)
    ipython: Any = sys.modules.get("IPython") if card is not None else None
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return False
    known = hasattr(card, "display_id")
    if not known:
        card.display_id = uuid.uuid4().hex
    try:
        ipython.display.display(card, display_id=card.display_id, update=known)
    except Exception:  # of a frontend or a publisher of its own; the lines are shown instead
        return False
    return True


def rich_draws() -> bool:
    """Returns whether rich draws something on the terminal now, such as a progress bar."""
    return _stream_of_rich() is not None


def _prefixed(record: logging.LogRecord) -> bool:
    record.msg = f"{PREFIX} {record.msg}"
    return True


def _call_handlers(
    logger: logging.Logger,
    usual: Callable[[logging.LogRecord], None],
    record: logging.LogRecord,
) -> None:
    """Does what `logging.Logger.callHandlers` does; a screen is written to through its bar."""
    handlers = [*_handlers_of(logger)]
    if _has_shown(record):
        handlers = [handler for handler in handlers if not _writes_below_a_cell(handler)]
    elif not any(map(_is_screen, handlers)):
        usual(record)
        return
    for handler in handlers:
        if record.levelno < handler.level:
            continue
        if _is_screen(handler):
            _show(cast("logging.StreamHandler[TextIO]", handler), record)
        else:
            handler.handle(record)


def _handlers_of(logger: logging.Logger) -> Iterator[logging.Handler]:
    above: logging.Logger | None = logger
    while above is not None:
        yield from above.handlers
        above = above.parent if above.propagate else None


def _is_screen(handler: logging.Handler) -> bool:
    """Whether a handler only writes lines to a terminal; one that does more is left to do it."""
    if not isinstance(handler, logging.StreamHandler):
        return False
    plain = type(handler).emit is logging.StreamHandler.emit
    stream = handler.stream
    return plain and hasattr(stream, "isatty") and not stream.closed and bool(stream.isatty())


def _writes_below_a_cell(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return type(stream).__module__.startswith("ipykernel")


def _show(handler: logging.StreamHandler[TextIO], record: logging.LogRecord) -> None:
    """Does what the handler does, with the bars out of the way."""
    if not handler.filter(record):
        return
    try:
        text = _wrapped(handler.format(record), _columns(handler.stream))
        with _without_tqdm():
            (_stream_of_rich() or handler.stream).write(text + handler.terminator)
            handler.flush()
    except Exception:
        handler.handleError(record)


def _columns(stream: TextIO) -> int:
    """Returns the width of a terminal; 0 if it has none, as in a notebook."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):
        return 0


def _wrapped(text: str, columns: int) -> str:
    r"""Returns the text with its lines broken between words; what continues a line is indented.

    Args:
        text: of one or more lines.
        columns: that a line may have; 0 for any number.

    >>> print(_wrapped("one two three\n  four five six", 10))
    one two
      three
      four
        five
        six
    """
    return "\n".join(
        textwrap.fill(
            line,
            columns,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        if 0 < columns < len(line)
        else line
        for line in text.split("\n")
    )


def _stream_of_rich() -> TextIO | None:
    """Returns the stream that writes above what rich draws; None if it draws nothing.

    While it does, it has put that stream in the place of the standard ones.
    """
    module: Any = sys.modules.get("rich.file_proxy")
    streams = (sys.stderr, sys.stdout) if module else ()
    return next((each for each in streams if isinstance(each, module.FileProxy)), None)


def _without_tqdm() -> AbstractContextManager[Any]:
    """Returns a context in which the bars of tqdm are cleared; they are drawn again after it."""
    module: Any = sys.modules.get("tqdm.std")
    return module.tqdm.external_write_mode() if module else nullcontext()
