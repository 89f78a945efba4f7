"""OpenAI's Responses API -> the fields of a chat. It keeps nothing: each request has all items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenspeed_plan.runtime.serving.openai.bodies import invalid, unsupported

Json = dict[str, Any]

# Fields whose only values here are those that ask for nothing.
_NO_OPS: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "store": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "context_management": ([],),
}
_WHY = {"store": "no response is kept", "background": "a response is not kept for later"}
# What would need an earlier response, which is not kept.
_STATE = ("previous_response_id", "conversation", "prompt")
_DROPPED = ("client_metadata", "include", "stream_options")
# Tools that OpenAI runs itself; nobody runs them here, so the model is not told of them.
_HOSTED = ("web_search", "web_search_preview", "image_generation")
_INPUT = "input"  # the one argument of a tool that takes plain text
_ITEM_TEXTS = ("reasoning_text", "summary_text", "text")


def chat_of_response(asked: Json) -> Json:
    """The chat that a request asks for. What both APIs name alike stays as it is.

    Raises:
        InvalidRequestError: it asks for what a chat does not have.
    """
    chat = dict(asked)
    for name in _STATE:
        if chat.pop(name, None) is not None:
            raise unsupported(name, "nothing is kept between requests: send all items in `input`")
    for name, values in _NO_OPS.items():
        if chat.pop(name, values[0]) not in values:
            raise unsupported(name, _WHY.get(name, "leave it out"))
    for name in _DROPPED:
        chat.pop(name, None)
    chat["messages"] = _messages(chat.pop("instructions", None), chat.pop("input", None))
    tools = _tools(chat.pop("tools", None))
    if tools:
        chat["tools"] = tools
    if "tool_choice" in chat:
        chat["tool_choice"] = _choice(chat["tool_choice"])
    if "max_output_tokens" in chat:
        chat["max_completion_tokens"] = chat.pop("max_output_tokens")
    chat |= _reasoning(chat.pop("reasoning", None)) | _text(chat.pop("text", None))
    return chat


def _reasoning(asked: Any) -> Json:
    """How much to think; there are no summaries."""
    if asked is None:
        return {}
    if not isinstance(asked, dict):
        raise invalid("reasoning", "input should be an object")
    effort = asked.get("effort")
    return {} if effort is None else {"reasoning_effort": effort}


def _text(asked: Any) -> Json:
    """The form of the text."""
    if asked is None:
        return {}
    if not isinstance(asked, dict):
        raise invalid("text", "input should be an object")
    found: Json = {}
    if asked.get("verbosity") is not None:
        found["verbosity"] = asked["verbosity"]
    form = asked.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        inner = {name: value for name, value in form.items() if name != "type"}
        form = {"type": "json_schema", "json_schema": inner}
    if form is not None:
        found["response_format"] = form
    return found


def _choice(asked: Any) -> Any:
    """Which tools may be called; a function or a custom tool is named in other words."""
    if isinstance(asked, dict) and asked.get("type") in ("function", "custom"):
        return {"type": "function", "function": {"name": asked.get("name")}}
    return asked


def _tools(asked: Any) -> list[Json]:
    if asked is None:
        return []
    if not isinstance(asked, list):
        raise invalid("tools", "input should be a list")
    return [found for number, tool in enumerate(asked) for found in _tool(f"tools[{number}]", tool)]


def _tool(place: str, tool: Any) -> Iterator[Json]:
    """A tool as chats have it, all of a namespace, or none for one that OpenAI would run."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind == "function":
        function = {name: value for name, value in tool.items() if name != "type"}
        yield {"type": "function", "function": function}
    elif kind == "custom":
        yield _custom_tool(tool)
    elif kind == "namespace" and isinstance(tool.get("tools"), list):
        for number, inner in enumerate(tool["tools"]):
            for found in _tool(f"{place}.tools[{number}]", inner):
                found["function"]["name"] = _flat(tool.get("name"), found["function"].get("name"))
                yield found
    elif kind not in _HOSTED:
        raise unsupported(place, "only `function` and `custom` tools can be called here")


def _flat(namespace: Any, name: Any) -> Any:
    """The name by which the model knows a function of a namespace."""
    if isinstance(namespace, str) and isinstance(name, str):
        return f"{namespace}.{name}"
    return name


def namespaced(asked: Json) -> dict[str, tuple[str, str]]:
    """The namespace and the name of each function that has one, by the name the model knows."""
    found: dict[str, tuple[str, str]] = {}
    for tool in asked.get("tools") or []:
        space = tool.get("name")
        if tool.get("type") == "namespace" and isinstance(space, str):
            names = [inner["name"] for inner in tool["tools"] if "name" in inner]
            found |= {_flat(space, name): (space, name) for name in names}
    return found


def _custom_tool(tool: Json) -> Json:
    """A tool that takes plain text, as a function of one text."""
    text = {"type": "object", "properties": {_INPUT: {"type": "string"}}, "required": [_INPUT]}
    function = {"name": tool.get("name"), "parameters": text}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def custom_names(asked: Json) -> frozenset[str]:
    """Names of the tools that take plain text."""
    tools = asked.get("tools") or []
    return frozenset(tool["name"] for tool in tools if tool.get("type") == "custom")


def custom_input(arguments: str) -> str:
    """The plain text that a custom tool is called with."""
    try:
        found = json.loads(arguments)[_INPUT]
    except (ValueError, KeyError, TypeError):
        return arguments
    return found if isinstance(found, str) else arguments


def _messages(instructions: Any, asked: Any) -> list[Json]:
    messages: list[Json] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(asked, str):
        return [*messages, {"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise invalid("input", "input should be a string or a list of items")
    turns = _Turns(messages)
    for number, item in enumerate(asked):
        if not isinstance(item, dict):
            raise invalid(f"input[{number}]", "an item is an object")
        turns.add(number, item)
    return messages


class _Turns:
    """Makes messages of items: what the model has said in one turn are several of them."""

    def __init__(self, messages: list[Json]) -> None:
        self._messages = messages
        self._has_turn = False  # the last message is the model's, and may get more

    def add(self, number: int, item: Json) -> None:
        """Add an item.

        Raises:
            InvalidRequestError: its kind is not known here.
        """
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            self._other({"role": item.get("role"), "content": item.get("content")})
        elif kind == "message":
            self._say(item.get("content"))
        elif kind == "reasoning":
            self._think(item)
        elif kind in ("function_call", "custom_tool_call"):
            self._call(kind, item)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            result = {"content": item.get("output"), "tool_call_id": item.get("call_id")}
            self._other({"role": "tool"} | result)
        else:
            raise unsupported(f"input[{number}].type", f"there are no items {str(kind)[:40]!a}")

    def _other(self, message: Json) -> None:
        self._messages.append(message)
        self._has_turn = False

    def _turn(self) -> Json:
        if not self._has_turn:
            self._messages.append({"role": "assistant", "content": None})
            self._has_turn = True
        return self._messages[-1]

    def _say(self, content: Any) -> None:
        turn = self._turn()
        if turn["content"] is not None or "tool_calls" in turn:
            self._has_turn = False
            turn = self._turn()
        turn["content"] = content

    def _think(self, item: Json) -> None:
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list):
            raise invalid("input", "the content of a thought is a list of parts")
        known = [part for part in parts if isinstance(part, dict)]
        texts = [part.get("text") for part in known if part.get("type") in _ITEM_TEXTS]
        turn = self._turn()
        if turn["content"] is not None or "tool_calls" in turn:
            self._has_turn = False
            turn = self._turn()
        turn["reasoning_content"] = "\n".join(text for text in texts if isinstance(text, str))

    def _call(self, kind: str, item: Json) -> None:
        arguments = item.get("arguments")
        if kind == "custom_tool_call":
            arguments = json.dumps({_INPUT: item.get("input")}, allow_nan=False)
        name = _flat(item.get("namespace"), item.get("name"))
        function = {"name": name, "arguments": arguments}
        call = {"type": "function", "id": item.get("call_id"), "function": function}
        self._turn().setdefault("tool_calls", []).append(call)
