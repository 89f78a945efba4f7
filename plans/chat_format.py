"""How a chat template spells what is no plain text: calls of tools, thinking, parts of a message.

A template is asked once, by rendering probes; the server then reads answers by what it showed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

MAX_TAG_TOKENS = 16  # of a tag and the space after it, however it is cut into tokens
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
THINK_BEGIN, THINK_END = "<think>", "</think>"

# Between the tags of a call: `<function=NAME>` with a `<parameter=KEY>` for each argument
# (Qwen3-Coder, Qwen3.5), or a JSON object of `name` and `arguments` (Hermes, Qwen3).
CallFormat = Literal["tags", "json"]


class Chat(NamedTuple):
    """What a chat template renders.

    Attributes:
        messages: as transformers takes them.
        tools: JSON schemas of functions; None without tools.
        variables: further ones of the template, as `enable_thinking`.
    """

    messages: list[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a chat template can write, and so what its model's answers may hold.

    Attributes:
        calls: how a call of a tool is written; None if the template knows no tools.
        thinks: thoughts stand between tags of their own.
        takes_parts: the content of a message may be a list of its parts.
        takes_late_systems: a system message may come after others.
    """

    calls: CallFormat | None = None
    thinks: bool = False
    takes_parts: bool = False
    takes_late_systems: bool = True

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that an answer's text must show, whatever the tokenizer thinks of them."""
        found: tuple[str, ...] = ()
        if self.calls:
            found += (CALL_BEGIN, CALL_END)
        if self.thinks:
            found += (THINK_BEGIN, THINK_END)
        return found
