"""The form that a body asks of its answer, as a structural tag of XGrammar."""

from __future__ import annotations

from typing import Any, Protocol

from tokenspeed_plan.plans.chat_format import (
    CALL_BEGIN,
    CALL_END,
    THINK_BEGIN,
    THINK_END,
    CallFormat,
    ChatFormat,
)
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.grammars.grammar_compiler import CompilerBusy
from tokenspeed_plan.runtime.grammars.matcher import Grammar
from tokenspeed_plan.runtime.request_check import ascii_text
from tokenspeed_plan.runtime.serving.openai.bodies import (
    TRY_LATER,
    UNSUPPORTED,
    ChatBody,
    CompletionBody,
    InvalidRequestError,
    invalid,
    unsupported,
)
from tokenspeed_plan.runtime.serving.openai.json_schemas import SchemaError, enforced_schema

Json = dict[str, Any]

MAX_SPACE = 32  # characters of space in a row, where JSON allows any
_ANY_TEXT: Json = {"type": "any_text"}
_BEFORE: Json = {"type": "regex", "pattern": "[ \\n]{0,4}"}  # an answer, and behind a thought
_OBJECT: Json = {"type": "object"}


class Grammars(Protocol):
    """Compiles forms of answers."""

    def compile(self, form: Json) -> Grammar:
        """The grammar of a form.

        Raises:
            RequestError: there is none.
        """


def grammar_of(
    body: CompletionBody | ChatBody, spelled: str, format: ChatFormat, grammars: Grammars | None
) -> Grammar | None:
    """What the answers of a body may be; None where it asks for no form.

    Args:
        body: of the request.
        spelled: the end of its prompt, special tokens spelled out.
        format: of its model's chats.
        grammars: compiles forms; None where the plan takes none.

    Raises:
        InvalidRequestError: the form means nothing, or cannot be enforced.
    """
    field, form = _form(body, format, enforces=grammars is not None)
    if form is None:
        return None
    if grammars is None:
        raise unsupported(
            field, "the plan takes no grammars, which can force it: plan with `serving.grammar`"
        )
    if body.ignore_eos:
        raise invalid("ignore_eos", f"an answer with a `{field}` ends where its form does")
    if isinstance(body, ChatBody) and format.thinks:
        form = _after_thoughts(form, spelled.rstrip())
    else:
        form = _sequence(_BEFORE, form)
    try:
        return grammars.compile(form)
    except RequestError as error:
        code = TRY_LATER if isinstance(error, CompilerBusy) else "invalid_value"
        raise InvalidRequestError(f"`{field}`: {error.message}", field, code) from None


def _sequence(*forms: Json) -> Json:
    return {"type": "sequence", "elements": list(forms)}


def _after_thoughts(form: Json, prompt_end: str) -> Json:
    """The form behind what is thought, which has none."""
    if prompt_end.endswith(THINK_END):
        return form
    if prompt_end.endswith(THINK_BEGIN):
        return _sequence(_tag("", _ANY_TEXT, THINK_END), _BEFORE, form)
    thought = _sequence(_BEFORE, _tag(THINK_BEGIN, _ANY_TEXT, THINK_END))
    return _sequence({"type": "optional", "content": thought}, _BEFORE, form)


def _tag(begin: str, content: Json, end: str) -> Json:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _form(
    body: CompletionBody | ChatBody, format: ChatFormat, enforces: bool
) -> tuple[str, Json | None]:
    """The form of what is said and called, and the field that asks for it."""
    answer = None
    if body.response_format is not None:
        answer = _response_form(body.response_format)
    if not isinstance(body, ChatBody):
        return "response_format", answer
    tools = _forced_tools(body)
    if tools:
        return "tool_choice", _calls(tools, body, _call_format(format))
    if body.callable_tools and format.calls is not None:
        if answer is not None:
            either = [answer, _calls(body.callable_tools, body, format.calls)]
            return "response_format", {"type": "or", "elements": either}
        if enforces and any(_is_strict(tool) for tool in body.callable_tools):
            return "tools", _strict_calls(body, format.calls)
    return "response_format", answer


def _response_form(asked: Any) -> Json | None:
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _json(_OBJECT)
    if kind != "json_schema":
        raise invalid("response_format", "`type` should be text, json_object or json_schema")
    wanted = asked.get("json_schema")
    if not isinstance(wanted, dict) or "schema" not in wanted:
        raise invalid("response_format", "`json_schema` should be an object with a `schema`")
    return _json(_enforced(wanted["schema"], "response_format", "schema"))


def _json(schema: Any) -> Json:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_SPACE}


def _enforced(schema: Any, field: str, place: str) -> Any:
    try:
        return enforced_schema(schema, place)
    except SchemaError as error:
        raise InvalidRequestError(
            f"`{field}`: {ascii_text(str(error))}", field, UNSUPPORTED
        ) from None


def _forced_tools(body: ChatBody) -> list[Json]:
    """The tools of which an answer must call one; none where it need not.

    Raises:
        InvalidRequestError: the choice means nothing, or is not known here.
    """
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return []
    tools = body.tools or []
    if choice == "required":
        if not tools:
            raise invalid("tool_choice", '"required" needs `tools`')
        return tools
    if not isinstance(choice, dict) or not isinstance(choice.get("type"), str):
        raise invalid("tool_choice", 'input should be "auto", "none", "required" or a function')
    if choice["type"] != "function":
        raise unsupported("tool_choice", "of tools only functions can be named")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise invalid("tool_choice", "the function is none of `tools`")
    return named[:1]


def _call_format(format: ChatFormat) -> CallFormat:
    if format.calls is None:
        raise unsupported("tool_choice", "the model's chat template knows no calls")
    return format.calls


def _calls(tools: list[Json], body: ChatBody, calls: CallFormat) -> Json:
    """One call or several, and nothing else."""
    is_one = isinstance(body.tool_choice, dict) or body.parallel_tool_calls is False
    return {
        "type": "tags_with_separator",
        "tags": [_call(tool, calls) for tool in tools],
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": is_one,
    }


def _strict_calls(body: ChatBody, calls: CallFormat) -> Json:
    """Any text, and calls; those of strict tools as their schemas say."""
    return {
        "type": "triggered_tags",
        "triggers": [CALL_BEGIN],
        "tags": [_call(tool, calls, is_free=not _is_strict(tool)) for tool in body.callable_tools],
        "stop_after_first": body.parallel_tool_calls is False,
    }


def _is_strict(tool: Json) -> bool:
    return tool["function"].get("strict") is True


def _call(tool: Json, calls: CallFormat, is_free: bool = False) -> Json:
    """A call of a tool, as the chat template writes one."""
    name = tool["function"]["name"]
    begin, end = f"{CALL_BEGIN}\n<function={name}>\n", f"\n</function>\n{CALL_END}"
    if calls == "json":
        begin = f'{CALL_BEGIN}\n{{"name": "{name}", "arguments": '
        end = f"}}\n{CALL_END}"
    if is_free:
        return _tag(begin, _ANY_TEXT, end)
    return _tag(begin, _arguments(tool, calls), end)


def _arguments(tool: Json, calls: CallFormat) -> Json:
    function = tool["function"]
    schema = function.get("parameters") or _OBJECT
    found = _json(_enforced(schema, "tools", f"{function['name']}.parameters"))
    if calls == "tags":
        found |= {"style": "qwen_xml", "max_whitespace_cnt": 1}
    return found
