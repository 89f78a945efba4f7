"""The parts that an answer consists of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Part(NamedTuple):
    """A piece of an answer; the texts of one kind in a row belong together.

    Attributes:
        kind: a thought, text for the user, the begin of a call, or a piece of its arguments.
        text: of a call: the name of its function. Arguments are JSON.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


@dataclass(slots=True)
class ToolCall:
    """A call of a function; `arguments` are JSON, cut short where the answer was."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    """An answer that was read to its end."""

    reasoning: str
    content: str
    calls: list[ToolCall]


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same parts, neighbours of one kind as one; calls stay apart."""
    found: list[Part] = []
    for part in parts:
        if found and part.kind == found[-1].kind != "call":
            found[-1] = Part(part.kind, found[-1].text + part.text)
        elif part.text:
            found.append(part)
    return found


def assembled(parts: Iterable[Part]) -> ParsedAnswer:
    """The answer that some parts make."""
    texts = {"reasoning": "", "content": ""}
    calls: list[ToolCall] = []
    for kind, text in joined(parts):
        if kind == "call":
            calls.append(ToolCall(text))
        elif kind == "arguments":
            calls[-1].arguments += text
        else:
            texts[kind] += text
    return ParsedAnswer(texts["reasoning"], texts["content"], calls)
