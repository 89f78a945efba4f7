"""Chunks of a chat -> the items and typed events of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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

    def take(self, delta: Json) -> list[Json]:
        """Events of what a message has gained."""
        events: list[Json] = []
        if delta.get("reasoning_content"):
            events += self._text("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            events += self._text("message", delta["content"])
        for entry in delta.get("tool_calls") or []:
            events += self._call(entry)
        return events

    def finish(self, reason: str, counts: Json) -> list[Json]:
        """The last events. Numbers of tokens come as chats count them."""
        events = self._close()
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
        return [*events, self._event(name, response=self.response)]

    def fail(self, code: str, message: str) -> list[Json]:
        """The last event of a response that cannot be had."""
        self._response |= {"status": "failed", "error": {"code": code, "message": message}}
        return [self._event("response.failed", response=self.response)]

    def _event(self, kind: str, **fields: Any) -> Json:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, "sequence_number": number} | fields

    def _on_item(self, kind: str, **fields: Any) -> Json:
        """An event about the item that grows."""
        assert self._item is not None
        place = {"item_id": self._item["id"], "output_index": len(self._output) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _on_text(self, kind: str, **fields: Any) -> Json:
        """An event about the text of the item that grows."""
        found = self._on_item(kind, content_index=0, **fields)
        if kind.startswith("output_text"):
            found["logprobs"] = []
        return found

    def _open(self, prefix: str, item: Json) -> list[Json]:
        events = self._close()
        self._item = {"id": f"{prefix}_{self._key}_{len(self._output)}"} | item
        self._output.append(self._item)
        shown = self._item | {"status": "in_progress"}
        index = len(self._output) - 1
        event = self._event("response.output_item.added", output_index=index, item=shown)
        return [*events, event]

    def _close(self) -> list[Json]:
        """Events of the end of the item that grows."""
        item = self._item
        if item is None:
            return []
        item["status"] = "completed"
        events = list(self._ends(item))
        index = len(self._output) - 1
        events.append(self._event("response.output_item.done", output_index=index, item=item))
        self._item = None
        return events

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

    def _text(self, kind: str, text: str) -> Iterator[Json]:
        """Add to a text, or begin one."""
        part_kind = _TEXT_KINDS[kind]
        if self._item is None or self._item["type"] != kind:
            yield from self._open_text(kind, part_kind)
        assert self._item is not None
        self._item["content"][0]["text"] += text
        yield self._on_text(f"{part_kind}.delta", delta=text)

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

    def _call(self, entry: Json) -> Iterator[Json]:
        """Begin a call, or add to its arguments."""
        function, field = entry["function"], "arguments"
        if "id" in entry:
            item = {"type": "function_call", "call_id": entry["id"], "name": function["name"]}
            if function["name"] in self._namespaced:
                item["namespace"], item["name"] = self._namespaced[function["name"]]
            if function["name"] in self._customs:
                item["type"] = "custom_tool_call"
                yield from self._open("ctc", item | {"input": ""})
            else:
                yield from self._open("fc", item | {"arguments": ""})
        assert self._item is not None
        if self._item["type"] == "custom_tool_call":
            self._item["input"] += function["arguments"]
        elif function["arguments"]:
            self._item[field] += function["arguments"]
            yield self._on_item("function_call_arguments.delta", delta=function["arguments"])
