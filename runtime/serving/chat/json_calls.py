"""Calls as JSON: `<tool_call>{"name": NAME, "arguments": {...}}</tool_call>` (Hermes, Qwen3)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tokenspeed_plan.plans.chat_format import CALL_BEGIN, CALL_END
from tokenspeed_plan.runtime.serving.chat.answer_parts import ToolCall
from tokenspeed_plan.runtime.serving.chat.argument_types import strict_json
from tokenspeed_plan.runtime.serving.chat.growing_text import GrowingText

_SIGNS = re.compile(r'[{}"\\]')
_BEGUN = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_ARGUMENTS = ("arguments", "parameters")


def json_opening(text: GrowingText) -> int | None:
    """Where the object of a call begins, if the text begins with a call."""
    inner = text.literal(0, CALL_BEGIN)
    if inner is None:
        return None
    start = text.space(inner)
    if text.literal(start, "{") is None:
        return None
    return start


@dataclass(slots=True)
class ObjectScan:
    """Looks for the end of an object in a text that grows; no character is looked at twice.

    Attributes:
        at: the place up to which it has looked.
        depth: objects that are open there.
    """

    at: int
    depth: int = 0
    in_string: bool = False

    def end(self, text: str) -> int | None:
        """The place after the object; None if it has not come yet."""
        while True:
            found = _SIGNS.search(text, self.at)
            if found is None:
                self.at = len(text)
                return None
            if found[0] == "\\" and found.end() == len(text):
                self.at = found.start()
                return None
            self.at = found.end() + (found[0] == "\\")
            if found[0] == '"':
                self.in_string = not self.in_string
            elif not self.in_string:
                self.depth += {"{": 1, "}": -1}.get(found[0], 0)
                if not self.depth:
                    return self.at


def whole_call(raw: str) -> ToolCall | None:
    """The call that an object describes, its arguments to the byte; None if it describes none."""
    try:
        data = strict_json(raw)
    except ValueError:
        return _lax_call(raw)
    name, arguments = _members(data)
    if name is None:
        return None
    if isinstance(arguments, str):
        return _from_text(name, arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(name, _raw_arguments(raw) or "{}")


def _members(data: dict[str, object]) -> tuple[str | None, object]:
    """The name of the function, and its arguments."""
    name = data.get("name")
    if not isinstance(name, str) or not name:
        return None, None
    for key in _ARGUMENTS:
        if data.get(key) is not None:
            return name, data[key]
    return name, {}


def _from_text(name: str, arguments: str) -> ToolCall | None:
    """A call whose arguments are the text of an object."""
    try:
        if isinstance(strict_json(arguments), dict):
            return ToolCall(name, arguments)
    except ValueError:
        pass
    return None


def _lax_call(raw: str) -> ToolCall | None:
    """A call whose strings hold line breaks as they are; its JSON is written again."""
    try:
        data = json.loads(raw, strict=False)
        name, arguments = _members(data)
        if name is not None and isinstance(arguments, dict):
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        pass
    return None


def _raw_arguments(raw: str) -> str:
    """The text of the arguments in an object that is JSON; of equal keys the last one counts."""
    decoder = json.JSONDecoder()
    found, at = {}, raw.index("{") + 1
    while True:
        at = _after_space(raw, at)
        if raw[at] == "}":
            break
        key, at = decoder.raw_decode(raw, at)
        start = _after_space(raw, _after_space(raw, at) + 1)  # behind the colon
        value, at = decoder.raw_decode(raw, start)
        if value is not None:
            found[key] = raw[start:at]
        at = _after_space(raw, at)
        if raw[at] == ",":
            at += 1
    return next((found[key] for key in _ARGUMENTS if key in found), "")


def _after_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def unfinished_call(raw: str, is_cut: bool) -> ToolCall | None:
    """The call of an object that does not come to its end.

    Where the answer was cut short, so are its arguments; else a last brace may be forgotten.
    """
    found = _BEGUN.match(raw)
    if found is None:
        return None
    try:
        name = strict_json(found[1])
        _, end = json.JSONDecoder().raw_decode(raw, found.end())
    except (ValueError, RecursionError):
        if not is_cut:
            return None
        name, end = found[1][1:-1], len(raw)
    rest = raw[end:].replace(CALL_END, "").strip(" \t\r\n}")
    if rest or not raw.startswith("{", found.end()):
        return None
    return ToolCall(name, raw[found.end() : end])
