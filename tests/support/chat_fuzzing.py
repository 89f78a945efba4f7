"""Chats of all APIs, mutated: messages, tools, forms of answers; and any answer to them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from chat_models import JSON_TEMPLATE, TAGS_TEMPLATE, in_json, in_tags, tool

MODEL = Path(__file__).parents[2] / "examples" / "demo" / "model"
Json = Any

PROPERTIES = {
    "path": {"type": "string"},
    "count": {"type": ["integer", "null"]},
    "more": {"$ref": "#/$defs/More"},
    "kind": {"enum": ["a", 1, None]},
}
TOOLS: list[Json] = [
    tool("write", PROPERTIES, **{"$defs": {"More": {"type": "object"}}, "required": ["path"]}),
    tool("list", {}),
]
CALL = {"id": "c1", "type": "function", "function": {"name": "write", "arguments": '{"path": "a"}'}}
CHAT: Json = {
    "model": "m",
    "messages": [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, "you"]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [CALL],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "done"}]},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "and now?", "name": "u"},
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "max_tokens": 2.0,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
RESPONSE: Json = {
    "model": "m",
    "instructions": "be brief",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "h"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
        {"type": "function_call", "call_id": "c", "name": "write", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "done"},
        {"type": "custom_tool_call", "call_id": "d", "name": "patch", "input": "+a"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "done"},
    ],
    "tools": [
        {"type": "function", **TOOLS[0]["function"], "strict": True},
        {"type": "custom", "name": "patch", "description": "plain text"},
        {"type": "web_search"},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
    ],
    "tool_choice": "auto",
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "include": ["reasoning.encrypted_content"],
    "store": False,
    "max_output_tokens": 5,
    "prompt_cache_key": "k",
    "stream": True,
}
MESSAGE: Json = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "h", "signature": "s"},
                {"type": "text", "text": "x"},
                {"type": "tool_use", "id": "t", "name": "write", "input": {"path": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "d"}],
                },
                {"type": "text", "text": "and now?"},
            ],
        },
    ],
    "tools": [{"name": "write", "description": "w", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u"},
    "stream": True,
}
BODIES = {"chat": CHAT, "responses": RESPONSE, "messages": MESSAGE}
NEEDED = ("messages", "input", "model")
FORMS = (
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    {"type": "grammar"},
    [],
)
CHOICES = ("none", "required", {"type": "function", "function": {"name": "write"}}, {"type": 5}, 7)
SAID = (
    "hm\n</think>\n\n",
    "<think>\n",
    "text ",
    in_tags("write", {"path": "a</parameter>", "count": 5}),
    in_json("write", {"path": "b", "more": {"x": [1]}}),
    "<tool_call>\n<function=patch>\n<parameter=input>\n+a",
    "<tool_call>",
    '{"name": ',
    "</tool_call>",
    "é",
)


def make_chat(
    rng: random.Random, mutate: Callable[..., Json], encode: Callable[..., bytes]
) -> Json:
    """Files of an example: the API, its body, the model's template, and what is answered."""
    api = rng.choice(list(BODIES))
    whole = BODIES[api]
    body = {name: whole[name] for name in whole if name in NEEDED or rng.random() < 0.5}
    if api == "chat" and rng.random() < 0.2:
        body["response_format"] = rng.choice(FORMS)
    if rng.random() < 0.2:
        body["tool_choice"] = rng.choice(CHOICES)
    if rng.random() < 0.8:
        body = mutate(rng, body, rng.choice((1, 1, 2, 4)))
    said = "".join(rng.choice(SAID) for _ in range(rng.randrange(5)))
    plan = {
        "api": api,
        "template": rng.choice(("tags", "json", "none")),
        "said": said,
        "cuts": sorted(rng.randrange(len(said) + 1) for _ in range(4)),
        "reason": rng.choice(("stop", "length")),
    }
    return {"body.json": encode(body), "plan.json": json.dumps(plan).encode()}


@cache
def tokenizer_of(name: str) -> Any:
    from tokenspeed_plan.codegen.chat_template import ChatTemplate
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    templates = {"tags": TAGS_TEMPLATE, "json": JSON_TEMPLATE}
    if name in templates:
        return Tokenizer.load(MODEL, ChatTemplate(templates[name]))
    return Tokenizer.load(MODEL, ChatTemplate.load(MODEL))


def dialect_of(api: str) -> Any:
    from tokenspeed_plan.runtime.serving.http import dialects

    if api == "responses":
        return dialects.ResponsesDialect()
    if api == "messages":
        return dialects.MessagesDialect(drops_billing=True)
    return dialects.OwnDialect("/v1/chat/completions")


def answer_chat(files: Json, limits: Any) -> Json:
    """What is answered, whole and streamed.

    Raises:
        ApiError: the body is refused.
    """
    from tokenspeed_plan.runtime.serving.http.event_stream import event_stream
    from tokenspeed_plan.runtime.serving.http.parsing import parse
    from tokenspeed_plan.runtime.serving.http.responses import Answer

    plan = json.loads(files["plan.json"])
    tokenizer, dialect = tokenizer_of(plan["template"]), dialect_of(plan["api"])
    request = parse(files["body.json"], dialect.url, "m", tokenizer, limits, dialect.fields)
    answer = Answer(request, tokenizer, "m", 0)
    completions = [completion_of(item, plan, tokenizer) for item in request.requests]
    whole = dialect.whole(answer, completions)
    json.dumps(whole, allow_nan=False)
    if not request.stream:
        return whole, None
    deltas = deltas_of(completions, plan)
    events = asyncio.run(gathered(event_stream(dialect.writer(answer), deltas)))
    return whole, [parsed_event(event) for event in events]


def completion_of(request: Any, plan: Json, tokenizer: Any) -> Any:
    from tokenspeed_plan.runtime.request import Completion

    ids = tuple(tokenizer.encode(plan["said"], add_special_tokens=False))
    return Completion(
        request.request_id, ids, plan["said"], plan["reason"], len(request.prompt_ids), 0.1, 0.1
    )


async def deltas_of(completions: Json, plan: Json) -> AsyncIterator[Any]:
    from tokenspeed_plan.runtime.streaming import Delta

    said, cuts = plan["said"], [0, *plan["cuts"]]
    for start, end in pairwise(cuts):
        for completion in completions:
            yield Delta(completion.request_id, said[start:end])
    for completion in completions:
        yield Delta(completion.request_id, said[cuts[-1] :], completion.token_ids, (), completion)


async def gathered(events: AsyncIterator[bytes]) -> list[bytes]:
    data = b"".join([part async for part in events])
    assert data.endswith(b"\n\n")
    return data.split(b"\n\n")[:-1]


def parsed_event(event: bytes) -> Json:
    data = event.partition(b"data: ")[2].strip()
    return None if data == b"[DONE]" else json.loads(data)


def contradiction(whole: Json, events: Json) -> str | None:
    """What a stream says otherwise than the whole answer."""
    if events is None:
        return None
    if whole.get("object") == "response":
        last = events[-1]["response"]
        same = last["output"] == whole["output"] and last["status"] == whole["status"]
        if same and texts_of_parts(events) != texts_of_items(whole["output"]):
            return "a stream's parts are others"
        return None if same else "a stream's response is another one"
    if whole.get("type") == "message":
        kinds = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
        same = kinds == [block["type"] for block in whole["content"]]
        return None if same else "a stream's blocks are others"
    return chat_contradiction(whole, events)


def texts_of_items(output: Json) -> list[list[str]]:
    return [[part["text"] for part in item.get("content", [])] for item in output]


def texts_of_parts(events: Json) -> list[list[str]]:
    """The texts of all items, made of a stream as clients do: each event adds to what is there."""
    items: list[Json] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            items.append(event["item"])
        elif kind == "content_part.added":
            items[event["output_index"]]["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            part = items[event["output_index"]]["content"][event["content_index"]]
            part["text"] += event["delta"]
    return texts_of_items(items)


def chat_contradiction(whole: Json, events: Json) -> str | None:
    chunks = [choice for event in events if event for choice in event["choices"]]
    for choice in whole["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        text = "".join(chunk["delta"].get("content") or "" for chunk in mine)
        if text != (choice["message"]["content"] or ""):
            return "a stream's text is another one"
        entries = [entry for chunk in mine for entry in chunk["delta"].get("tool_calls", [])]
        pieces = "".join(entry["function"]["arguments"] for entry in entries)
        calls = choice["message"].get("tool_calls", [])
        if pieces != "".join(call["function"]["arguments"] for call in calls):
            return "a stream's arguments are others"
        if mine[-1]["finish_reason"] != choice["finish_reason"]:
            return "a stream ends for another reason"
    return None
