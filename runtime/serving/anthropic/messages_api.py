"""Anthropic's Messages API -> the fields of a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenspeed_plan.runtime.serving.openai.bodies import invalid, unsupported

Json = dict[str, Any]

# A counter that Claude Code puts before its system prompt: it changes with each request, so that
# nothing behind it would be found in the prefix cache.
BILLING = "x-anthropic-billing-header:"
_DROPPED = ("betas", "context_management", "cache_control", "diagnostics", "inference_geo")
_NOTHING: dict[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": ()}
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
_TOOL_KINDS = (None, "custom")


def chat_of_message(asked: Json, drops_billing: bool = False) -> Json:
    """The chat that a request asks for. What both APIs name alike stays as it is.

    Args:
        asked: the request.
        drops_billing: leave out Claude Code's counter.

    Raises:
        InvalidRequestError: it asks for what a chat does not have.
    """
    chat = dict(asked)
    for name in _DROPPED:
        chat.pop(name, None)
    for name, values in _NOTHING.items():
        value = chat.pop(name, None)
        if value is not None and value not in values:
            raise unsupported(name, "leave it out")
    chat["messages"] = _messages(chat.pop("system", None), chat.get("messages"), drops_billing)
    if "stop_sequences" in chat:
        chat["stop"] = chat.pop("stop_sequences")
    tools = chat.pop("tools", None)
    if tools:
        chat["tools"] = _tools(tools)
    chat |= _choice(chat.pop("tool_choice", None))
    chat |= _thinking(chat.pop("thinking", None), chat.pop("output_config", None))
    return chat


def _tools(asked: Any) -> list[Json]:
    if not isinstance(asked, list) or not all(isinstance(tool, dict) for tool in asked):
        raise invalid("tools", "input should be a list of tools")
    return [_tool(number, tool) for number, tool in enumerate(asked)]


def _tool(number: int, tool: Json) -> Json:
    if tool.get("type") not in _TOOL_KINDS:
        raise unsupported(f"tools[{number}].type", "tools of Anthropic's own are not run here")
    function = {"name": tool.get("name")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    function["parameters"] = tool.get("input_schema")
    return {"type": "function", "function": function}


def _choice(asked: Any) -> Json:
    """Which tools may be called."""
    if asked is None:
        return {}
    kind = asked.get("type") if isinstance(asked, dict) else None
    if not isinstance(kind, str):
        raise invalid("tool_choice", "input should be an object with a `type`")
    found: Json = {"tool_choice": _CHOICES.get(kind, asked)}
    if kind == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": asked.get("name")}}
    if asked.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _thinking(asked: Any, config: Any) -> Json:
    """Whether to think, and how much; there is no budget of tokens for it."""
    found: Json = {}
    if isinstance(config, dict):
        if config.get("format") is not None:
            found["response_format"] = _form(config["format"])
        if config.get("effort") is not None:
            found["reasoning_effort"] = config["effort"]
    if asked is None:
        return found
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise invalid("thinking", "`type` should be enabled, disabled or adaptive")
    return found | {"chat_template_kwargs": {"enable_thinking": kind != "disabled"}}


def _form(asked: Any) -> Json:
    """The form of the text."""
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        raise invalid("output_config.format", "`type` should be json_schema")
    return {"type": "json_schema", "json_schema": {"schema": asked.get("schema")}}


def _messages(system: Any, asked: Any, drops_billing: bool) -> list[Json]:
    messages: list[Json] = []
    if system is not None:
        texts = _texts("system", system)
        if drops_billing:
            texts = [text for text in texts if not text.startswith(BILLING)]
        messages.append({"role": "system", "content": "\n".join(texts)})
    if not isinstance(asked, list) or not asked:
        raise invalid("messages", "input should be a list with at least one message")
    for number, message in enumerate(asked):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise invalid(place, "a message is an object")
        messages += _turn(place, message)
    return messages


def _texts(place: str, content: Any) -> list[str]:
    """The texts of a content that may have nothing else."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise invalid(place, "a content is a string or a list of blocks")
    return [_text(f"{place}[{number}]", block) for number, block in enumerate(content)]


def _text(place: str, block: Any) -> str:
    if not isinstance(block, dict) or block.get("type") != "text":
        raise unsupported(place, "only blocks of type `text` are supported here")
    if not isinstance(block.get("text"), str):
        raise invalid(place, "a block of type `text` has a `text`")
    return str(block["text"])


def _turn(place: str, message: Json) -> Iterator[Json]:
    """A message as those of a chat: results of tools are messages of their own, and come first."""
    content, role = message.get("content"), message.get("role")
    if not isinstance(content, list):
        yield {"role": role, "content": content}
        return
    if role == "assistant":
        yield _assistant(place, content)
        return
    rest: list[Json] = []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "tool_result":
            rest.append(block)
            continue
        texts = _texts(f"{place}.content[{number}]", block.get("content") or "")
        called = {"content": "\n".join(texts), "tool_call_id": block.get("tool_use_id")}
        yield {"role": "tool"} | called
    if rest or not content:
        yield {"role": role, "content": "\n".join(_texts(f"{place}.content", rest))}


def _assistant(place: str, content: list[Any]) -> Json:
    """What the model has thought, said and called."""
    texts, thoughts, calls = [], [], list[Json]()
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False, allow_nan=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"type": "function", "id": block.get("id"), "function": function})
        elif kind != "redacted_thinking":
            texts.append(_text(f"{place}.content[{number}]", block))
    message: Json = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message
