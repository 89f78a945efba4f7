"""Reads an answer as it grows: what is thought, what is said, and what is called.

However the answer is split, its parts are the same, since a part is only read once nothing that may
come changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed_plan.plans.chat_format import CALL_END, THINK_BEGIN, THINK_END, ChatFormat
from tokenspeed_plan.runtime.serving.chat.answer_parts import Part, ToolCall, joined
from tokenspeed_plan.runtime.serving.chat.growing_text import GrowingText, NeedMore
from tokenspeed_plan.runtime.serving.chat.json_calls import (
    ObjectScan,
    json_opening,
    unfinished_call,
    whole_call,
)
from tokenspeed_plan.runtime.serving.chat.tag_calls import TagCall, tag_opening

Schemas = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """How an answer is to be read.

    Attributes:
        format: of the chat template.
        is_thinking: the prompt ends inside of a thought.
        schemas: of the arguments of each tool; None where calls are not read.
        is_parallel: whether there may be more than one call.
    """

    format: ChatFormat
    is_thinking: bool = False
    schemas: Schemas | None = None
    is_parallel: bool = True


class _Prose:
    """Text of one kind. Space at its edges waits until something follows it."""

    def __init__(
        self, kind: Literal["reasoning", "content"], parts: list[Part], trims: bool
    ) -> None:
        self.kind = kind
        self.trims = trims  # whether space at the begin is left out
        self.is_line_start = True
        self._parts = parts
        self._held = ""

    def add(self, text: str) -> None:
        """Take a piece of it."""
        if self.trims:
            text = text.lstrip()
        if not text:
            return
        self.trims = False
        self.is_line_start = text.endswith("\n")
        held = self._held + text
        shown = held.rstrip()
        self._held = held[len(shown) :]
        if shown:
            self._parts.append(Part(self.kind, shown))

    def end(self, keeps_space: bool = False) -> None:
        """It is over; the space at its end is left out, unless it is kept."""
        if keeps_space and self._held:
            self._parts.append(Part(self.kind, self._held))
        self._held = ""
        self.trims = True
        self.is_line_start = True


@dataclass(slots=True)
class _JsonCall:
    """A call as JSON that is coming; `scan` looks for the end of its object."""

    start: int
    scan: ObjectScan
    end: int | None = None


class AnswerParser:
    """Reads one answer."""

    def __init__(self, rules: AnswerRules) -> None:
        self._rules = rules
        self._text = GrowingText()
        self._parts: list[Part] = []
        self._num_calls = 0
        self._call: TagCall | _JsonCall | None = None
        self._has_begun = not rules.format.thinks
        self._prose = _Prose("content", self._parts, trims=False)
        if rules.is_thinking:
            self._think()

    def push(self, text: str) -> list[Part]:
        """Read on; returns the parts that are certain now."""
        self._text.text += text
        self._read()
        return self._taken()

    def finish(self, is_cut: bool) -> list[Part]:
        """Read the end.

        Args:
            is_cut: the answer did not end by itself, so that a call may have no end.
        """
        self._text.ended = True
        self._read()
        if isinstance(self._call, TagCall):
            self._call.finish(is_cut)
        elif self._call is not None:
            self._finish_json(self._call, is_cut)
        self._prose.end(keeps_space=self._prose.kind == "content" and not self._prose.trims)
        return self._taken()

    def _taken(self) -> list[Part]:
        """The parts so far; of several calls only the first, where there may be one alone."""
        found = []
        for part in joined(self._parts):
            self._num_calls += part.kind == "call"
            is_more = part.kind in ("call", "arguments") and self._num_calls > 1
            if self._rules.is_parallel or not is_more:
                found.append(part)
        self._parts.clear()
        return found

    def _read(self) -> None:
        try:
            while self._text.text:
                self._step()
        except NeedMore:
            pass

    def _step(self) -> None:
        """Read one thing; the text gets shorter, or another thing is to be read."""
        if isinstance(self._call, TagCall):
            if self._call.read(self._text):
                self._call = None
        elif self._call is not None:
            self._read_json(self._call)
        elif not self._has_begun:
            self._begin()
        else:
            self._read_prose()

    def _begin(self) -> None:
        """See whether the answer begins with a thought."""
        end = self._text.literal(self._text.space(0), THINK_BEGIN)
        self._has_begun = True
        if end is not None:
            self._text.drop(end)
            self._think()

    def _think(self) -> None:
        self._prose = _Prose("reasoning", self._parts, trims=True)

    @property
    def _in_thought(self) -> bool:
        return self._prose.kind == "reasoning"

    def _read_prose(self) -> None:
        """Read up to the next tag, or a tag."""
        sign = self._text.text.find("<")
        if sign < 0:
            sign = len(self._text.text)
        if sign:
            self._prose.add(self._text.drop(sign))
        elif not self._read_tag():
            self._prose.add(self._text.drop(1))

    def _read_tag(self) -> bool:
        """Read a tag that says something; False if there is none."""
        if self._in_thought:
            end = self._text.literal(0, THINK_END)
            if end is not None:
                self._text.drop(end)
                self._prose.end()
                self._prose = _Prose("content", self._parts, trims=True)
                return True
        if self._rules.schemas is None:
            return False
        if self._rules.format.calls == "json":
            return self._begin_json()
        return self._begin_tags(self._rules.schemas)

    def _begin_tags(self, schemas: Schemas) -> bool:
        """Begin to read a call in tags.

        What is no known tool is only called where a call stands out as one.
        """
        opening = tag_opening(self._text)
        if opening is None:
            return False
        stands_out = opening.is_wrapped and not self._in_thought
        may_be_one = opening.is_wrapped or (self._prose.is_line_start and not self._in_thought)
        if not may_be_one or (opening.name not in schemas and not stands_out):
            return False
        self._prose.end()
        self._text.drop(opening.end)
        self._call = TagCall(opening, schemas.get(opening.name), self._parts)
        return True

    def _begin_json(self) -> bool:
        start = json_opening(self._text)
        if start is None:
            return False
        self._call = _JsonCall(start, ObjectScan(start))
        return True

    def _read_json(self, call: _JsonCall) -> None:
        """Read a call as JSON, which waits until it is whole."""
        if call.end is None:
            call.end = call.scan.end(self._text.text)
        if call.end is None:
            raise NeedMore
        found = self._called(whole_call(self._text.text[call.start : call.end]))
        if found is None:
            self._call = None
            self._prose.add(self._text.drop(call.end))
            return
        closing = self._text.literal(self._text.space(call.end), CALL_END)
        self._call = None
        self._text.drop(closing or call.end)
        self._emit(found)

    def _finish_json(self, call: _JsonCall, is_cut: bool) -> None:
        """Read what there is of a call that is not whole; text that is none stays text."""
        found = self._called(unfinished_call(self._text.text[call.start :], is_cut))
        if found is None:
            self._prose.add(self._text.text)
        else:
            self._emit(found)

    def _called(self, call: ToolCall | None) -> ToolCall | None:
        """The call, if it is one: in a thought only what is a known tool can be called."""
        if call is None or (self._in_thought and call.name not in (self._rules.schemas or {})):
            return None
        return call

    def _emit(self, call: ToolCall) -> None:
        self._prose.end()
        self._parts += [Part("call", call.name), Part("arguments", call.arguments)]
