"""Chunks of a chat -> the content blocks and events of Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Of each kind of block: the kind of its deltas, and their field.
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class MessageWriter:
    """Writes one message, as it grows.

    Args:
        key: unique; part of the id.
        model: its name.
        num_prompt_tokens: of the request.
    """

    def __init__(self, key: str, model: str, num_prompt_tokens: int) -> None:
        self._blocks: list[Json] = []
        self._block: Json | None = None  # the last one, while it grows
        self._input = ""  # of a call that grows
        self._message: Json = {
            "id": f"msg_{key}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": num_prompt_tokens, "output_tokens": 0},
        }

    @property
    def message(self) -> Json:
        """The message as far as it is there."""
        return self._message | {"content": self._blocks}

    def begin(self) -> list[Json]:
        """The first events."""
        return [{"type": "message_start", "message": self._message | {"content": []}}]

    def take(self, delta: Json) -> list[Json]:
        """Events of what a message has gained."""
        events: list[Json] = []
        if delta.get("reasoning_content"):
            events += self._grow("thinking", delta["reasoning_content"])
        if delta.get("content"):
            events += self._grow("text", delta["content"])
        for entry in delta.get("tool_calls") or []:
            events += self._call(entry)
        return events

    def finish(self, reason: str, counts: Json) -> list[Json]:
        """The last events. Numbers of tokens come as chats count them."""
        events = list(self._close())
        cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        usage = {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts["completion_tokens"],
        }
        stop = {"stop_reason": _REASONS[reason], "stop_sequence": None}
        self._message |= stop | {"usage": usage}
        return [
            *events,
            {"type": "message_delta", "delta": stop, "usage": usage},
            {"type": "message_stop"},
        ]

    def _grow(self, kind: str, text: str) -> Iterator[Json]:
        """Add to a block, or begin one."""
        delta, field = _DELTAS[kind]
        if self._block is None or self._block["type"] != kind:
            block = {"type": kind, field: ""}
            if kind == "thinking":
                block["signature"] = ""
            yield from self._open(block)
        assert self._block is not None
        self._block[field] += text
        yield self._delta({"type": delta, field: text})

    def _call(self, entry: Json) -> Iterator[Json]:
        """Begin a call, or add to its arguments."""
        function = entry["function"]
        if "id" in entry:
            named = {"id": entry["id"].replace("call_", "toolu_"), "name": function["name"]}
            yield from self._open({"type": "tool_use"} | named | {"input": {}})
        self._input += function["arguments"]
        if function["arguments"]:
            delta, field = _DELTAS["tool_use"]
            yield self._delta({"type": delta, field: function["arguments"]})

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._block = block
        self._blocks.append(block)
        index = len(self._blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _close(self) -> Iterator[Json]:
        block, self._block = self._block, None
        if block is None:
            return
        if block["type"] == "tool_use":
            block["input"], self._input = _object(self._input), ""
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}


def _object(arguments: str) -> Json:
    """The arguments of a call; nothing where they were cut short."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
