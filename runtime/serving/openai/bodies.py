"""Bodies of OpenAI requests: accepted fields, and errors that name the field at fault.

The server and batch files share these rules: a null is a field that is not set, a field that would
change nothing is accepted, one that would change the answer in a way that is not there is refused.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)

from tokenspeed_plan.plans.ops import MAX_BIASED
from tokenspeed_plan.plans.text import complaint
from tokenspeed_plan.runtime.request_check import (
    MAX_BIAS,
    MAX_INT32,
    MAX_REPETITION,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MIN_REPETITION,
    ascii_text,
)
from tokenspeed_plan.runtime.serving.openai.chat_fields import Messages, Tools, Variables
from tokenspeed_plan.runtime.serving.openai.no_ops import drop_no_ops

Url = Literal["/v1/completions", "/v1/chat/completions"]
# Of one body or line: the text of four million tokens. Parsed it takes up to thirty times this.
MAX_JSON_BYTES = 16 << 20
MAX_DEPTH = 64  # of lists and objects in each other
MAX_PROMPTS = 2048  # OpenAI's
MAX_CHOICES = 1024  # prompts times `n`
MAX_PROMPT_IDS = 1 << 22
MAX_FIELDS = 1024  # of a body
MAX_EXACT = 1 << 53  # a double has every integer up to here
HALF_PAIR = re.compile("[\ud800-\udfff]")

MODEL_NOT_FOUND = "model_not_found"
UNSUPPORTED = "unsupported_parameter"
TRY_LATER = "try_later"
_OF_TOOLS = ("tool_choice", "parallel_tool_calls")  # they say nothing without tools


def _whole(value: Any) -> Any:
    """2.0 as 2: some languages have one kind of number."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
# pydantic's complaint about each of a million entries takes a minute and gigabytes: the first will
# do, wherever a list may be long.
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]


class InvalidRequestError(ValueError):
    """A request that cannot be run.

    Attributes:
        param: name of the field at fault, as in OpenAI's error object.
        code: OpenAI's code for the fault.

    The message is one line.
    """

    @property
    def status(self) -> int:
        """HTTP's status code."""
        return {MODEL_NOT_FOUND: 404, TRY_LATER: 503}.get(self.code or "", 400)

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def unsupported(name: str, why: str) -> InvalidRequestError:
    """The error of a field, or of a value of one, that is not served."""
    return InvalidRequestError(f"`{name}` is not supported: {why}", name, UNSUPPORTED)


def invalid(name: str, why: str) -> InvalidRequestError:
    """The error of a field whose value means nothing."""
    return InvalidRequestError(f"`{name}`: {why}", name, "invalid_value")


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _kind_of_stop(value: Any) -> str | None:
    """Which form of `stop` is meant: an error is about that one."""
    kinds: dict[type[Any], str] = {str: "string", list: "strings"}
    return kinds.get(type(value))


def _kind_of_prompt(value: Any) -> str | None:
    """Which form of `prompt` is meant; the first entry of a list tells."""
    if not isinstance(value, list):
        return _kind_of_stop(value)
    kinds: dict[type[Any], str] = {str: "strings", list: "lists"}
    first = next(iter(value), 0)
    return kinds.get(type(first), "ids")


def _one_of(kind: Any, wanted: str) -> Discriminator:
    return Discriminator(
        kind, custom_error_type="wrong_kind", custom_error_message=f"Input should be {wanted}"
    )


_TAGS = {"string", "strings", "ids", "lists"}
Stop = Annotated[
    Annotated[StopString, Tag("string")]
    | Annotated[list[StopString], Field(max_length=4), Tag("strings")],
    _one_of(_kind_of_stop, "a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("strings")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("lists")],
    _one_of(_kind_of_prompt, "a string, token ids, or a list of these"),
]


class _Body(StrictModel):
    """Fields of both endpoints that say something; `no_ops.py` has those that may say nothing."""

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=1 << 31)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    response_format: Any = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION, le=MAX_REPETITION)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASED)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionBody(_Body):
    """Body of /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class ChatBody(_Body):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    chat_template_kwargs: Variables | None = None

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that an answer may call."""
        if self.tool_choice == "none":
            return []
        return self.tools or []


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequestError(f"{text:.40} is beyond the range of a double")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def parse_json(raw: bytes, what: str = "line") -> dict[str, Any]:
    """Parse a JSON object; `what` names it in errors.

    Raises:
        InvalidRequestError: it is too long, not UTF-8, not JSON or not an object.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise InvalidRequestError(f"the {what} has {len(raw)} bytes, the most is {MAX_JSON_BYTES}")
    data = _parse_json(raw, what)
    if not isinstance(data, dict):
        raise InvalidRequestError(f"the {what} is not a JSON object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deeper(data, MAX_DEPTH):
        raise InvalidRequestError(f"the {what} is nested too deeply")
    if rb"\u" in raw:  # the only way to write half of a surrogate pair
        _refuse_half_pairs(data, what)
    return data


def _is_deeper(data: Any, depth: int) -> bool:
    """Whether there are more than `depth` lists and objects in each other."""
    level = [data]
    for _ in range(depth):
        level = [child for parent in level for child in _children(parent)]
        level = [child for child in level if isinstance(child, (list, dict))]
    return bool(level)


def _children(parent: Any) -> Iterator[Any]:
    if isinstance(parent, dict):
        return iter(parent.values())
    return iter(parent)


def _refuse_half_pairs(data: dict[str, Any], what: str) -> None:
    """Refuse text that cannot be written as UTF-8.

    Raises:
        InvalidRequestError: with the field that holds it.
    """
    half, path = _half_pair(data), list[str]()
    if half is None:
        return
    value: Any = data
    while isinstance(value, dict):
        name = next(name for name in value if _half_pair([name, value[name]]))
        path.append(ascii_text(name)[:80])
        value = value[name]
        if _half_pair(name):
            break
    shown = ".".join(path)
    raise InvalidRequestError(
        f"`{shown}` of the {what} is not Unicode text: `{ascii_text(half)}` is half of a pair",
        path[0],
        "invalid_value",
    )


def _half_pair(value: Any) -> str | None:
    """A half of a surrogate pair in a JSON value, if there is one."""
    found = HALF_PAIR.search(json.dumps(value, ensure_ascii=False, allow_nan=False))
    if found is None:
        return None
    return found[0]


def _parse_json(raw: bytes, what: str) -> Any:
    try:
        return _DECODER.decode(raw.removeprefix(BOM_UTF8).decode())
    except InvalidRequestError:
        raise
    except UnicodeDecodeError:
        raise InvalidRequestError(f"the {what} is not UTF-8") from None
    except RecursionError:
        raise InvalidRequestError(f"the {what} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the {what} is not JSON at column {error.colno}: {error.msg}"
        ) from None
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidRequestError(f"the {what} is not JSON: {error}") from None


def parse_body(url: Url, data: dict[str, Any]) -> CompletionBody | ChatBody:
    """The body of a request to one of the endpoints.

    Raises:
        InvalidRequestError: a field is unknown, missing, not supported or out of range.
    """
    model: type[CompletionBody | ChatBody] = ChatBody
    if url == "/v1/completions":
        model = CompletionBody
    if len(data) > MAX_FIELDS:
        raise InvalidRequestError(f"the body has {len(data)} fields, the most is {MAX_FIELDS}")
    fields = drop_nulls(data)
    kept = {}
    if model is ChatBody and fields.get("tools"):
        kept = {name: fields.pop(name) for name in _OF_TOOLS if name in fields}
    unsupported = drop_no_ops(fields, model.model_fields)
    if unsupported:
        name, wanted = unsupported
        raise InvalidRequestError(
            f"`{name}` is not supported: leave it out, or send {wanted}, "
            f"got {_shown(fields[name])}",
            name,
            UNSUPPORTED,
        )
    try:
        body = model.model_validate(fields | kept)
    except ValidationError as error:
        raise explain(error, model) from None
    _check_together(body)
    return body


def drop_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are set: OpenAI's clients send null for the others."""
    return {name: value for name, value in fields.items() if value is not None}


def _check_together(body: CompletionBody | ChatBody) -> None:
    """Refuse fields that do not fit together.

    Raises:
        InvalidRequestError: with the field at fault.
    """
    if isinstance(body, ChatBody):
        _check_chat(body)
        return
    num_prompts = 1
    if isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int):
        num_prompts = len(body.prompt)
    num_choices = num_prompts * (body.n or 1)
    if num_choices > MAX_CHOICES:
        raise InvalidRequestError(
            f"the request has {num_choices} choices (prompts x n), at most {MAX_CHOICES}",
            "n",
            "invalid_value",
        )


def _check_chat(body: ChatBody) -> None:
    """Refuse fields of a chat that do not fit together.

    Raises:
        InvalidRequestError: with the field at fault.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError(
            "`top_logprobs` is only for `logprobs: true`", "top_logprobs", "invalid_value"
        )


def explain(error: ValidationError, model: type[BaseModel]) -> InvalidRequestError:
    """One line about one of pydantic's complaints; an unknown field comes first."""
    errors = error.errors(include_url=False)
    unknown = [item for item in errors if item["type"] == "extra_forbidden"]
    first = (unknown or errors)[0]
    location = first["loc"]
    field = ""
    if location:
        field = ascii_text(str(location[0]))
    if first["type"] == "extra_forbidden" and len(location) == 1:
        return _unknown_field(str(location[0]), model)
    if first["type"] == "missing" and len(location) == 1:
        return InvalidRequestError(f"`{field}` is missing", field, "missing_required_parameter")
    reason = ascii_text(complaint(first["msg"]))
    text = f"`{_path(location)}`: {reason}, got {_shown(first['input'])}"
    return InvalidRequestError(text, field, "invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """Where in the body, as `messages[0].role`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _TAGS:
            path += f".{part}"
    return ascii_text(path.removeprefix("."))


def _shown(value: Any) -> str:
    """The beginning of a value, as one line of ASCII; a long one is not written out to be cut."""
    if isinstance(value, (str, list)):
        value = value[:60]
    return ascii_text(f"{value!r:.60}")


def _unknown_field(field: str, model: type[BaseModel]) -> InvalidRequestError:
    name = ascii_text(field[:80])
    advice = "it is not supported"
    near = difflib.get_close_matches(field[:80], model.model_fields, 1)
    if near:
        advice = f"did you mean `{near[0]}`?"
    return InvalidRequestError(f"unknown field `{name}`, {advice}", name, "unsupported_parameter")
