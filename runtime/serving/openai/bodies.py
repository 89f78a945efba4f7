"""Bodies of OpenAI requests: accepted fields, and errors that name the field at fault."""

from __future__ import annotations

import difflib
import json
import math
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Url = Literal["/v1/completions", "/v1/chat/completions"]
MAX_JSON_BYTES = 64 << 20

TokenId = Annotated[int, Field(ge=0)]


class InvalidRequestError(ValueError):
    """A request that cannot be run.

    Attributes:
        param: name of the field at fault, as in OpenAI's error object.
        code: OpenAI's code for the fault.

    The message is one line.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Body(StrictModel):
    """Fields of both endpoints.

    A field with one legal value is listed so that other values are refused by name.
    """

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    stream: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionBody(_Body):
    """Body of /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class Message(BaseModel):
    """One message of a chat. Fields beyond these are passed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    role: str
    content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        """Join a list of text parts into one string."""
        if not isinstance(content, list):
            return content
        if not all(_is_text_part(part) for part in content):
            raise ValueError("only parts of type `text` are supported")
        return "".join(part["text"] for part in content)


def _is_text_part(part: object) -> bool:
    if not isinstance(part, dict) or part.get("type") != "text":
        return False
    return isinstance(part.get("text"), str)


class ChatBody(_Body):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequestError(f"{text:.40} is beyond the range of a double")
    return value


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
    return data


def _parse_json(raw: bytes, what: str) -> Any:
    try:
        text = raw.decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
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
        InvalidRequestError: a field is unknown, missing or out of range.
    """
    model: type[CompletionBody | ChatBody] = ChatBody
    if url == "/v1/completions":
        model = CompletionBody
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model) from None


def explain(error: ValidationError, model: type[BaseModel]) -> InvalidRequestError:
    """One line about one of pydantic's complaints; an unknown field comes first."""
    errors = error.errors(include_url=False)
    unknown = [item for item in errors if item["type"] == "extra_forbidden"]
    first = (unknown or errors)[0]
    location = first["loc"]
    field = ""
    if location:
        field = str(location[0])
    if first["type"] == "extra_forbidden" and len(location) == 1:
        return _unknown_field(field, model)
    if first["type"] == "missing" and len(location) == 1:
        return InvalidRequestError(f"`{field}` is missing", field, "missing_required_parameter")
    reason = first["msg"][0].lower() + first["msg"][1:]
    text = escape(f"`{field}`: {reason}, got {first['input']!r:.60}")
    return InvalidRequestError(text, field, "invalid_value")


def _unknown_field(field: str, model: type[BaseModel]) -> InvalidRequestError:
    name = escape(field)
    advice = "it is not supported"
    near = difflib.get_close_matches(field, model.model_fields, 1)
    if near:
        advice = f"did you mean `{near[0]}`?"
    return InvalidRequestError(f"unknown field `{name}`, {advice}", name, "unsupported_parameter")


def escape(text: str) -> str:
    """The text as one line of ASCII."""
    return text.encode("unicode_escape").decode()
