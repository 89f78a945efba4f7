"""Messages and tools of a chat: what a body may hold, and what its model's template gets to see."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from tokenspeed_plan.plans.chat_format import ChatFormat

Json = dict[str, Any]

MAX_TOOLS = 1024
# A name that a call can spell in every format.
_NAME = re.compile(r"[^\s<>\"\\]{1,128}")
# Which field of a part has its text; OpenAI's two APIs name the kinds differently.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# What a template gets from the server alone.
_OWN = ("messages", "tools", "documents", "add_generation_prompt")
_NO_THOUGHT = "none"


class _Function(BaseModel):
    """What an earlier turn has called; `arguments` as an object or as its text."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str
    arguments: Any = None


class _Call(BaseModel):
    """A call in an earlier turn."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    type: Literal["function"] = "function"
    function: _Function


class Message(BaseModel):
    """One message of a chat. Fields beyond these are passed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    role: str
    content: Any = None
    tool_calls: list[_Call] | None = None

    @field_validator("content", mode="after")
    @classmethod
    def _check_content(cls, content: Any) -> Any:
        """A text, or the texts of the parts of a list."""
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise ValueError("a content is a string or a list of parts")
        return [_text_of(part) for part in content]


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = None
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        text = part.get(_TEXTS.get(part["type"], ""))
    if not isinstance(text, str):
        raise ValueError("only parts of type `text` are supported")
    return text


def _check_tool(tool: Json) -> Json:
    """A tool as it came: templates show it so."""
    if tool.get("type") != "function":
        raise ValueError("only tools of type `function` are supported")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool needs a `function` with a `name`")
    if not _NAME.fullmatch(function["name"]):
        raise ValueError("a function has a name of 1 to 128 characters without space, quotes, <, >")
    if not isinstance(function.get("parameters", {}), (dict, type(None))):
        raise ValueError("the `parameters` of a function are a JSON schema")
    return tool


def _check_variables(variables: Json) -> Json:
    for name in _OWN:
        if name in variables:
            raise ValueError(f"`{name}` is not for the request to set")
    return variables


# The first complaint about a long list will do: a minute and gigabytes go into all of them.
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
Tools = Annotated[
    list[Annotated[Json, AfterValidator(_check_tool)]], Field(min_length=1, max_length=MAX_TOOLS)
]
Variables = Annotated[Json, AfterValidator(_check_variables)]


def schemas_of(tools: Sequence[Json]) -> dict[str, Any]:
    """The JSON schema of the arguments of each tool, by name."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function.get("parameters") for function in functions}


def template_variables(effort: str | None, given: Mapping[str, Any] | None) -> Json:
    """Variables of a template beside the messages; `effort` says how much to think."""
    variables: Json = {}
    if effort is not None:
        variables["reasoning_effort"] = effort
    if effort == _NO_THOUGHT:
        variables["enable_thinking"] = False
    return variables | dict(given or {})


def template_messages(messages: Sequence[Message], format: ChatFormat) -> list[Json]:
    """Messages as a chat template takes them.

    What a developer says is the system's. A turn that only calls has an empty text. A template that
    takes no parts gets them in lines of their own; one that takes no later system message gets all
    of them as its first.
    """
    found = [_template_message(message, format) for message in messages]
    if format.takes_late_systems or all(item["role"] != "system" for item in found[1:]):
        return found
    systems = [_joined(item, "\n") for item in found if item["role"] == "system"]
    others = [item for item in found if item["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(systems)}, *others]


def _template_message(message: Message, format: ChatFormat) -> Json:
    found = message.model_dump(exclude_none=True)
    if found["role"] == "developer":
        found["role"] = "system"
    if found["role"] == "assistant":
        found.setdefault("content", "")
    if not found.get("tool_calls", True):
        del found["tool_calls"]
    if isinstance(message.content, list):
        found["content"] = [{"type": "text", "text": text} for text in message.content]
        if not format.takes_parts:
            found["content"] = _joined(found, "\n")
    return found


def _joined(message: Json, between: str) -> str:
    """The text of a message."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return between.join(part["text"] for part in content)
