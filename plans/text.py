"""Text that comes from files, and text that goes to a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def read_utf8(path: Path) -> str:
    """The text of a file, as UTF-8 whatever the locale, its line ends as they are.

    Digests are of bytes: a text read this way has the digest of its file.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    return path.read_bytes().decode("utf-8")


def complaint(message: str) -> str:
    """A message of pydantic as the end of a sentence, without the word for its kind."""
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def first_complaint(error: ValidationError) -> str:
    """Where a file is not what a model wants, and why: the first of pydantic's complaints."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return printable_line(f"`{where}`: {complaint(first['msg'])}")


def printable(text: str) -> str:
    """The text with all that a terminal would obey, hide or refuse spelled as an escape.

    These are control characters such as ESC, marks that reorder the text around them, and halves of
    surrogate pairs, which no terminal can be sent. Line feeds and tabs stay.
    """
    return _escaped(text, "\n\t")


def printable_line(text: str) -> str:
    """The same for text that must stay on its line: line feeds and tabs are escaped too."""
    return _escaped(text, "")


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(_escape(one, kept) for one in text)


def _escape(character: str, kept: str) -> str:
    if character.isprintable() or character in kept:
        return character
    return character.encode("unicode_escape").decode("ascii")
