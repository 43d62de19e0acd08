"""Text from files and from other programs, made safe to print on a terminal.

A tensor name may hold escape sequences that colour or clear the screen, characters that reverse the
direction of writing, and line breaks that fake a line of a report. Imports nothing.
"""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Returns text with every character that is not printable as its escape sequence.

    Letters of all languages are printable; control characters, marks of direction, line breaks and
    spaces of unusual width are not.

    Args:
        text: of any origin.
        keep: characters that are not escaped.

    >>> printable("net.\x1b[31mweight\u202e"), printable("层.weight"), printable("a\nb", keep="\n")
    ('net.\\x1b[31mweight\\u202e', '层.weight', 'a\nb')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
