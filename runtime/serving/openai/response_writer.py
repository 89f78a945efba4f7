"""Chunks of a chat -> the items and typed events of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenspeed_plan.runtime.serving.events import NUMBER, TEXT, Frame
from tokenspeed_plan.runtime.serving.openai.responses_api import (
    custom_input,
    custom_names,
    namespaced,
)

Json = dict[str, Any]

# How an item of text spells itself: the kind of its part, and the names of its events.
_TEXT_KINDS = {"reasoning": "reasoning_text", "message": "output_text"}
# What a response repeats of its request, with the defaults.
_ECHOED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
}


class ResponseWriter:
    """Writes one response, as it grows.

    Args:
        asked: the request.
        key: unique; part of the ids.
        model: its name.
        created: in seconds since 1970.
    """

    def __init__(self, asked: Json, key: str, model: str, created: int) -> None:
        self._key = key
        self._customs = custom_names(asked)
        self._namespaced = namespaced(asked)
        self._output: list[Json] = []
        self._item: Json | None = None  # the last one, while it grows
        self._pieces: list[str] = []  # of its text, its input or its arguments
        self._growth: Frame | None = None  # the event that adds to it
        self._num_events = 0
        self._response: Json = {
            "id": f"resp_{key}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "model": model,
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "store": False,
        }
        for name, default in _ECHOED.items():
            value = asked.get(name)
            self._response[name] = default if value is None else value

    @property
    def response(self) -> Json:
        """The response as far as it is there."""
        return self._response | {"output": self._output}

    def begin(self) -> list[Json]:
        """The first events."""
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def take(self, delta: Json) -> Iterator[Json | bytes]:
        """Events of what a message has gained; what one shows may grow once the next is made.

        Those that add to a text come written.
        """
        if delta.get("reasoning_content"):
            yield from self._text("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            yield from self._text("message", delta["content"])
        for entry in delta.get("tool_calls") or []:
            yield from self._call(entry)

    def finish(self, reason: str, counts: Json) -> Iterator[Json]:
        """The last events. Numbers of tokens come as chats count them."""
        yield from self._close()
        self._response["status"] = "completed"
        if reason == "length":
            self._response["status"] = "incomplete"
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        thoughts = counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        self._response["usage"] = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thoughts},
            "total_tokens": counts["total_tokens"],
        }
        name = f"response.{self._response['status']}"
        yield self._event(name, response=self.response)

    def fail(self, message: str) -> list[Json]:
        """The last event of a response that cannot be had."""
        self._settle()
        error = {"code": "server_error", "message": message}
        self._response |= {"status": "failed", "error": error}
        return [self._event("response.failed", response=self.response)]

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "sequence_number": self._next_number()} | fields

    def _next_number(self) -> int:
        self._num_events += 1
        return self._num_events - 1

    def _on_item(self, kind: str, **fields: Any) -> Json:
        """An event about the item that grows."""
        return self._event(f"response.{kind}", **self._place, **fields)

    @property
    def _place(self) -> Json:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self._output) - 1}

    def _begin_to_grow(self, kind: str, **fields: Any) -> None:
        """Write ahead the event that adds to the item."""
        name = f"response.{kind}.delta"
        numbered = {"type": name, "sequence_number": NUMBER}
        self._growth = Frame(numbered | self._place | {"delta": TEXT} | fields, name)

    def _grow(self, text: str) -> bytes:
        """Add to the item."""
        self._pieces.append(text)
        assert self._growth is not None
        return self._growth.numbered(self._next_number(), text)

    def _settle(self) -> None:
        """Put what has come into the item that grows."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return
        if item["type"] in _TEXT_KINDS:
            item["content"][0]["text"] = text
        elif item["type"] == "custom_tool_call":
            item["input"] = text
        else:
            item["arguments"] = text

    def _on_text(self, kind: str, **fields: Any) -> Json:
        """An event about the text of the item that grows."""
        found = self._on_item(kind, content_index=0, **fields)
        if kind.startswith("output_text"):
            found["logprobs"] = []
        return found

    def _open(self, prefix: str, item: Json) -> Iterator[Json]:
        yield from self._close()
        self._pieces = []
        self._item = {"id": f"{prefix}_{self._key}_{len(self._output)}"} | item
        self._output.append(self._item)
        shown = self._item | {"status": "in_progress"}
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item=shown)

    def _close(self) -> Iterator[Json]:
        """Events of the end of the item that grows."""
        item = self._item
        if item is None:
            return
        self._settle()
        item["status"] = "completed"
        yield from self._ends(item)
        index = len(self._output) - 1
        yield self._event("response.output_item.done", output_index=index, item=item)
        self._item = None

    def _ends(self, item: Json) -> Iterator[Json]:
        """What ends in an item before it does."""
        if item["type"] in _TEXT_KINDS:
            part = item["content"][0]
            yield self._on_text(f"{part['type']}.done", text=part["text"])
            yield self._on_item("content_part.done", content_index=0, part=part)
        elif item["type"] == "custom_tool_call":
            item["input"] = custom_input(item["input"])
            yield self._on_item("custom_tool_call_input.done", input=item["input"])
        else:
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield self._on_item("function_call_arguments.done", **named)

    def _text(self, kind: str, text: str) -> Iterator[Json | bytes]:
        """Add to a text, or begin one."""
        part_kind = _TEXT_KINDS[kind]
        if self._item is None or self._item["type"] != kind:
            yield from self._open_text(kind, part_kind)
        yield self._grow(text)

    def _open_text(self, kind: str, part_kind: str) -> Iterator[Json]:
        part: Json = {"type": part_kind, "text": ""}
        item: Json = {"type": "reasoning", "summary": []}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item = {"type": "message", "role": "assistant"}
        yield from self._open(f"{kind[:3]}", item | {"content": []})
        assert self._item is not None
        self._item["content"].append(part)
        yield self._on_item("content_part.added", content_index=0, part=dict(part))
        more: Json = {"logprobs": []} if kind == "message" else {}
        self._begin_to_grow(part_kind, content_index=0, **more)

    def _call(self, entry: Json) -> Iterator[Json | bytes]:
        """Begin a call, or add to its arguments."""
        function = entry["function"]
        if "id" in entry:
            item = {"type": "function_call", "call_id": entry["id"], "name": function["name"]}
            if function["name"] in self._namespaced:
                item["namespace"], item["name"] = self._namespaced[function["name"]]
            if function["name"] in self._customs:
                item["type"] = "custom_tool_call"
                yield from self._open("ctc", item | {"input": ""})
            else:
                yield from self._open("fc", item | {"arguments": ""})
                self._begin_to_grow("function_call_arguments")
        assert self._item is not None
        if self._item["type"] == "custom_tool_call":
            self._pieces.append(function["arguments"])
        elif function["arguments"]:
            yield self._grow(function["arguments"])
