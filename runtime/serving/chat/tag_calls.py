"""Calls in tags: `<function=NAME>` with a `<parameter=KEY>` for each argument (Qwen3.5).

The format escapes nothing, so a value may hold what looks like its own end. It ends at a
`</parameter>` behind which the call goes on as a call does: with another argument, or its end.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tokenspeed_plan.plans.chat_format import CALL_BEGIN, CALL_END, THINK_END
from tokenspeed_plan.runtime.serving.chat.answer_parts import Part
from tokenspeed_plan.runtime.serving.chat.argument_types import is_word, to_json, types_of
from tokenspeed_plan.runtime.serving.chat.growing_text import GrowingText

Json = dict[str, Any]
FUNCTION, FUNCTION_END = "<function=", "</function>"
_VALUE, _VALUE_END = "<parameter=", "</parameter>"
_STRING = ("string",)


class TagOpening(NamedTuple):
    """The begin of a call.

    Attributes:
        end: the place after it.
        is_wrapped: it has a `<tool_call>`, so that its end has one too.
    """

    name: str
    end: int
    is_wrapped: bool


def tag_opening(text: GrowingText) -> TagOpening | None:
    """The call that a text begins with, if it does; some models leave `<tool_call>` out."""
    inner, at = text.literal(0, CALL_BEGIN), 0
    if inner is not None:
        at = text.space(inner)
    found = text.tag(at, FUNCTION)
    if found is None:
        return None
    return TagOpening(*found, inner is not None)


class TagCall:
    """Reads one call behind its opening.

    Args:
        opening: its begin.
        schema: JSON schema of the function's arguments; None if it is not known.
        parts: where its parts go.
    """

    def __init__(self, opening: TagOpening, schema: Any, parts: list[Part]) -> None:
        self._is_wrapped = opening.is_wrapped
        self._schema = schema
        self._parts = parts
        self._keys: set[str] = set()
        self._has_brace = False
        self._value: _Value | None = None
        parts.append(Part("call", opening.name))

    def read(self, text: GrowingText) -> bool:
        """Read on; returns whether the call is over."""
        while text.text:
            if self._value is not None:
                self._read_value(text, self._value)
            elif self._read_tag(text):
                return True
        return False

    def finish(self, is_cut: bool) -> None:
        """End the call where the answer ends; what was cut short stays so."""
        if is_cut:
            return
        if self._value is not None:
            self._value.end()
        self._end()

    def _end(self) -> None:
        self._add("}")

    def _add(self, text: str) -> None:
        if not self._has_brace:
            self._has_brace = True
            self._parts.append(Part("arguments", "{"))
        self._parts.append(Part("arguments", text))

    def _read_tag(self, text: GrowingText) -> bool:
        """Read what stands between two arguments; returns whether the call is over."""
        text.drop(text.space(0))
        found = text.tag(0, _VALUE)
        if found is not None:
            self._begin_value(found[0])
            text.drop(found[1])
            return False
        end = self._end_of_call(text, 0)
        if end is None and text.literal(0, CALL_BEGIN) is None:
            text.drop(1)  # nothing that belongs here
            return False
        self._end()
        text.drop(end or 0)
        return True

    def _end_of_call(self, text: GrowingText, at: int) -> int | None:
        """The place after the end of the call; None if it does not end there."""
        end = text.literal(at, FUNCTION_END)
        if end is None:
            return text.literal(at, CALL_END)
        if not self._is_wrapped:
            return end
        return text.literal(text.space(end), CALL_END) or end

    def _begin_value(self, key: str) -> None:
        if self._keys:
            self._add(", ")
        self._keys.add(key)
        self._add(json.dumps(key, ensure_ascii=False, allow_nan=False) + ": ")
        self._value = _Value(self._types_of(key), self._parts, self._is_word(key))

    def _is_word(self, key: str) -> bool:
        """Whether space around an argument is none of its own."""
        if not isinstance(self._schema, dict):
            return False
        properties = self._schema.get("properties")
        return isinstance(properties, dict) and is_word(properties.get(key), self._schema)

    def _types_of(self, key: str) -> tuple[str, ...]:
        """The types that an argument may have."""
        if not isinstance(self._schema, dict):
            return ()
        properties = self._schema.get("properties")
        if not isinstance(properties, dict):
            return ()
        return types_of(properties.get(key), self._schema)

    def _read_value(self, text: GrowingText, value: _Value) -> None:
        """Read a piece of a value; the line break before its end is not its own."""
        if not value.has_begun:
            text.drop(text.literal(0, "\n") or 0)
            value.has_begun = True
            return
        sign = text.text.find("<")
        if sign < 0:
            sign = len(text.text)
        start = sign - text.text.endswith("\n", 0, sign)
        if start:
            value.add(text.drop(start))
            return
        if text.is_end(sign):
            text.drop(sign)
            return
        end = self._end_of_value(text, sign)
        if end is None:
            value.add(text.drop(sign + 1))
            return
        value.end()
        self._value = None
        text.drop(end)

    def _end_of_value(self, text: GrowingText, at: int) -> int | None:
        """The place after the end of the value; None if it does not end there."""
        end = text.literal(at, _VALUE_END)
        if end is None:
            return self._forgotten_end(text, at)
        if self._goes_on(text, text.space(end)):
            return end
        return None

    def _goes_on(self, text: GrowingText, at: int) -> bool:
        """Whether a call goes on there, as it does behind an argument."""
        if text.is_end(at):
            return True
        found = text.tag(at, _VALUE)
        if found is not None:
            return found[0] not in self._keys
        end = text.literal(at, FUNCTION_END)
        if end is None:
            end = at
        elif not self._is_wrapped or text.is_end(text.space(end)):
            return text.literal(text.space(end), _VALUE_END) is None
        return self._is_over(text, text.space(end))

    def _is_over(self, text: GrowingText, at: int) -> bool:
        """Whether a call in its tags ends there, and no value around it goes on."""
        end = text.literal(at, CALL_END)
        return end is not None and text.literal(text.space(end), _VALUE_END) is None

    def _forgotten_end(self, text: GrowingText, at: int) -> int | None:
        """Where a value ends whose `</parameter>` is missing: before the end of the whole call.

        Behind that comes nothing, or another call, or the end of the thought that it is in.
        """
        end = text.literal(at, FUNCTION_END)
        if end is None:
            return None
        end = text.literal(text.space(end), CALL_END)
        if end is None:
            return None
        after = text.space(end)
        if text.is_end(after):
            return at
        for tag in (CALL_BEGIN, THINK_END):
            if text.literal(after, tag) is not None:
                return at
        return None


class _Value:
    """The value of one argument, as it comes; a string goes on at once, others when they end."""

    def __init__(self, types: tuple[str, ...], parts: list[Part], is_word: bool) -> None:
        self.has_begun = False
        self._types = types
        self._is_word = is_word
        self._is_string = types == _STRING and not is_word
        self._parts = parts
        self._pieces: list[str] = []
        if self._is_string:
            self._add('"')

    def _add(self, text: str) -> None:
        self._parts.append(Part("arguments", text))

    def add(self, text: str) -> None:
        """Take a piece of it."""
        if self._is_string:
            self._add(json.dumps(text, ensure_ascii=False, allow_nan=False)[1:-1])
        else:
            self._pieces.append(text)

    def end(self) -> None:
        """It is complete."""
        if self._is_string:
            self._add('"')
        else:
            text = "".join(self._pieces)
            self._add(to_json(text.strip() if self._is_word else text, self._types))
