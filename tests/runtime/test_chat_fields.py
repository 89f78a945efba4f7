"""Messages, tools and variables of a chat: what a body may hold, and what its template sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from batch_fake import LIMITS, FakeTokenizer
from chat_models import JSON_TEMPLATE, TAGS_TEMPLATE, tool

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.plans.chat_format import ChatFormat
from tokenspeed_plan.runtime.serving.anthropic.messages_api import chat_of_message
from tokenspeed_plan.runtime.serving.openai.bodies import (
    ChatBody,
    InvalidRequestError,
    parse_body,
)
from tokenspeed_plan.runtime.serving.openai.chat_fields import template_messages
from tokenspeed_plan.runtime.serving.openai.conversion import to_requests
from tokenspeed_plan.runtime.serving.openai.responses_api import chat_of_response

PARTS, PLAIN = ChatFormat(takes_parts=True, takes_late_systems=False), ChatFormat()
USER = {"role": "user", "content": "q"}
TOOLS = [tool("f", {"a": {"type": "string"}})]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> ChatBody:
    body = parse_body("/v1/chat/completions", {"messages": [USER]} | fields)
    assert isinstance(body, ChatBody)
    return body


def shown(messages: list[Any], format: ChatFormat) -> list[Any]:
    return template_messages(chat(messages=messages).messages, format)


def test_parts_are_shown_or_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}]
    message = {"role": "user", "content": parts}
    assert shown([message], PLAIN)[0]["content"] == "a\nb\nc"
    texts = [{"type": "text", "text": text} for text in "abc"]
    assert shown([message], PARTS)[0]["content"] == texts


def test_systems_come_first_where_they_must() -> None:
    messages = [
        {"role": "developer", "content": "a"},
        USER,
        {"role": "system", "content": [{"type": "text", "text": "b"}]},
    ]
    assert shown(messages, PARTS) == [{"role": "system", "content": "a\n\nb"}, USER]
    assert [item["role"] for item in shown(messages, PLAIN)] == ["system", "user", "system"]


def test_a_turn_that_only_calls_has_an_empty_text() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    (found,) = shown([turn], PLAIN)
    assert found == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert "tool_calls" not in shown([{"role": "assistant", "tool_calls": []}], PLAIN)[0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [tool("a b", {})]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"max_tokens": 1.5}, "max_tokens"),
    ],
)
def test_what_a_chat_may_not_hold(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "`: `messages` is not for the request to set"),
        ({"seed": 1 << 63}, f"`seed`: input should be less than or equal to {(1 << 63) - 1}, got "),
    ],
)
def test_a_refusal_has_our_words_and_the_right_number(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": True},
        {"max_tokens": 2.0, "n": 1.0, "seed": 5.0},
        {"service_tier": "flex", "store": False, "include": [], "prompt_cache_key": "k"},
        {"response_format": {"type": "text"}, "logit_bias": {}, "repetition_penalty": 1},
    ],
)
def test_what_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    chat(**fields)


def test_tools_need_a_template_that_shows_them() -> None:
    with pytest.raises(InvalidRequestError, match="knows no tools"):
        to_requests(chat(tools=TOOLS), "0", FakeTokenizer(), LIMITS)
    to_requests(chat(tools=TOOLS, tool_choice="none"), "0", FakeTokenizer(), LIMITS)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "yaml"}}, "response_format", "invalid_value"),
    ],
)
def test_forms_need_a_plan_that_takes_grammars(
    fields: dict[str, Any], param: str, code: str
) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.chat_format = replace(tokenizer.chat_format, calls="json")
    with pytest.raises(InvalidRequestError) as caught:
        to_requests(chat(**fields), "0", tokenizer, LIMITS)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_chat_may_use_the_room_that_is_left() -> None:
    (request,) = to_requests(chat(), "0", FakeTokenizer(), LIMITS)
    assert len(request.prompt_ids) + request.params.max_tokens == LIMITS.max_seq_len
    with pytest.raises(InvalidRequestError, match="max_tokens may be 57"):
        to_requests(chat(max_tokens=64), "0", FakeTokenizer(), LIMITS)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (TAGS_TEMPLATE, ChatFormat("tags", True, True, False)),
        (JSON_TEMPLATE, ChatFormat("json", True, True, False)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ChatFormat(None, False, False)),
        ("{{ raise_exception('no') }}", ChatFormat()),
        # It would write a call, and shows no tool that could be called.
        (TAGS_TEMPLATE.replace("tool | tojson", "''"), ChatFormat(None, True, True, False)),
    ],
)
def test_a_template_is_asked_how_it_writes(source: str, wanted: ChatFormat) -> None:
    assert ChatTemplate(source).format == wanted


def test_items_of_a_response_make_turns() -> None:
    found = chat_of_response(
        {
            "instructions": "i",
            "input": [
                {"role": "user", "content": "q"},
                {
                    "type": "reasoning",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "t"}],
                },
                {"type": "message", "role": "assistant", "content": "s"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "x"},
                {"type": "message", "role": "assistant", "content": "e"},
            ],
        }
    )["messages"]
    assert [message["role"] for message in found] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    turn = found[2]
    assert (turn["reasoning_content"], turn["content"]) == ("t", "s")
    assert [call["id"] for call in turn["tool_calls"]] == ["1", "2"]


def test_blocks_of_a_message_make_turns() -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cch=1;"}
    asked = {
        "system": [billing, {"type": "text", "text": "s"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "next"},
                    {"type": "tool_result", "tool_use_id": "1", "content": "x"},
                ],
            }
        ],
    }
    found = chat_of_message(asked, drops_billing=True)["messages"]
    assert [(m["role"], m["content"]) for m in found] == [
        ("system", "s"),
        ("tool", "x"),
        ("user", "next"),
    ]
    assert chat_of_message(asked)["messages"][0]["content"].startswith("x-anthropic")
