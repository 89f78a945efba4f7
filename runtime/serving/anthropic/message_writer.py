"""Chunks of a chat -> the content blocks and events of Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenspeed_plan.runtime.serving.events import TEXT, Frame

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
        self._pieces: list[str] = []  # of its text, or of the input of a call
        self._growth: Frame | None = None  # the event that adds to it
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

    def take(self, delta: Json) -> Iterator[Json | bytes]:
        """Events of what a message has gained; those that add to a block come written."""
        if delta.get("reasoning_content"):
            yield from self._grow("thinking", delta["reasoning_content"])
        if delta.get("content"):
            yield from self._grow("text", delta["content"])
        for entry in delta.get("tool_calls") or []:
            yield from self._call(entry)

    def finish(self, reason: str, counts: Json) -> Iterator[Json]:
        """The last events. Numbers of tokens come as chats count them."""
        yield from self._close()
        cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        usage = {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts["completion_tokens"],
        }
        stop = {"stop_reason": _REASONS[reason], "stop_sequence": None}
        self._message |= stop | {"usage": usage}
        yield {"type": "message_delta", "delta": stop, "usage": usage}
        yield {"type": "message_stop"}

    def fail(self, message: str) -> list[Json]:
        """The last event of a message that cannot be had."""
        return [{"type": "error", "error": {"type": "api_error", "message": message}}]

    def _grow(self, kind: str, text: str) -> Iterator[Json | bytes]:
        """Add to a block, or begin one."""
        _, field = _DELTAS[kind]
        if self._block is None or self._block["type"] != kind:
            block = {"type": kind, field: ""}
            if kind == "thinking":
                block["signature"] = ""
            yield from self._open(block)
        yield self._add(text)

    def _call(self, entry: Json) -> Iterator[Json | bytes]:
        """Begin a call, or add to its arguments."""
        function = entry["function"]
        if "id" in entry:
            named = {"id": entry["id"].replace("call_", "toolu_"), "name": function["name"]}
            yield from self._open({"type": "tool_use"} | named | {"input": {}})
        if function["arguments"]:
            yield self._add(function["arguments"])

    def _add(self, text: str) -> bytes:
        """Add to the block that grows."""
        self._pieces.append(text)
        assert self._growth is not None
        return self._growth.written(text)

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._block = block
        self._blocks.append(block)
        index, name = len(self._blocks) - 1, "content_block_delta"
        kind, field = _DELTAS[block["type"]]
        grown = {"type": name, "index": index, "delta": {"type": kind, field: TEXT}}
        self._growth = Frame(grown, name)
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _close(self) -> Iterator[Json]:
        block, self._block = self._block, None
        if block is None:
            return
        text, self._pieces = "".join(self._pieces), []
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            _, field = _DELTAS[block["type"]]
            block[field] = text
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}


def _object(arguments: str) -> Json:
    """The arguments of a call; nothing where they were cut short."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
