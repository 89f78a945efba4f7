"""One line of an OpenAI batch file: what it may say, and the requests that it asks for."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenspeed_plan.plans.canon import canonical, sha256
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.request import Request, SamplingParams

Url = Literal["/v1/completions", "/v1/chat/completions"]
MAX_LINE_BYTES = 64 << 20

TokenId = Annotated[int, Field(ge=0)]


class RowError(ValueError):
    """A line that cannot be run; the message is one line. `param` and `code` are what OpenAI's API calls the fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """A chat as one prompt."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Body(_Strict):
    """What both endpoints take. Fields with one legal value are there to be refused by name."""

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
    """One turn of a chat; further fields are left to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    role: str
    content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """Parts that are all text are one text."""
        if not isinstance(content, list):
            return content
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(
            part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
        ):
            raise ValueError("only parts of type `text` are supported")
        return "".join(part["text"] for part in parts)


class ChatBody(_Body):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Line(_Strict):
    custom_id: Annotated[str, Field(min_length=1, max_length=4096)]
    method: Literal["POST"]
    url: Url
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A line that passed its checks. `key` names the line's content under one plan."""

    line: int
    custom_id: str
    url: Url
    body: CompletionBody | ChatBody
    key: str


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowError(f"{text:.40} is beyond the range of a double")
    return value


def parse_json(raw: bytes, what: str = "line") -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        RowError: it is none.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise RowError(f"the {what} has {len(raw)} bytes, the most is {MAX_LINE_BYTES}")
    data = _parse_json(raw, what)
    if not isinstance(data, dict):
        raise RowError(f"the {what} is not a JSON object")
    return data


def _parse_json(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
    except RowError:
        raise
    except UnicodeDecodeError:
        raise RowError(f"the {what} is not UTF-8") from None
    except RecursionError:
        raise RowError(f"the {what} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError(f"the {what} is not JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowError(f"the {what} is not JSON: {error}") from None


def parse_row(raw: bytes, line: int, plan_digest: str) -> Row:
    """A checked row.

    Raises:
        RowError: what is wrong with it.
    """
    data = parse_json(raw)
    try:
        head = _Line.model_validate(data)
    except ValidationError as error:
        raise explain(error, _Line) from None
    try:
        body = parse_body(head.url, head.body)
        key = "batch_req_" + sha256(plan_digest + canonical(data))[:32]
        head.custom_id.encode()
    except RowError as error:
        raise RowError(f"body: {error}") from None
    except (UnicodeEncodeError, RecursionError):
        raise RowError("the line holds text that is not Unicode, or is nested too deeply") from None
    return Row(line, head.custom_id, head.url, body, key)


def parse_body(url: Url, data: dict[str, Any]) -> CompletionBody | ChatBody:
    """The body of a request to one of the endpoints.

    Raises:
        RowError: what is wrong with it.
    """
    kind: type[CompletionBody | ChatBody] = CompletionBody if url == "/v1/completions" else ChatBody
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise explain(error, kind) from None


def explain(error: ValidationError, model: type[BaseModel]) -> RowError:
    """One line for the most telling of pydantic's complaints."""
    first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        near = difflib.get_close_matches(field, model.model_fields, 1)
        rest = f"did you mean `{near[0]}`?" if near else "it is not supported"
        return RowError(
            f"unknown field `{_ascii(field)}`, {rest}", _ascii(field), "unsupported_parameter"
        )
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RowError(f"`{field}` is missing", field, "missing_required_parameter")
    text = _ascii(
        f"`{field}`: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r:.60}"
    )
    return RowError(text, field, "invalid_value")


def _ascii(text: str) -> str:
    """One line of ASCII."""
    return text.encode("unicode_escape").decode()


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What a plan can serve, as far as a row can know."""

    max_seq_len: int
    default_max_tokens: int
    vocab_size: int


def check_row(row: Row, tokenizer: Tokenizer, limits: RowLimits) -> None:
    """Find what would be refused later, without tokenising where bytes already tell.

    A byte-level tokenizer never makes more tokens of ASCII than there are bytes; other text may
    grow when normalised.

    Raises:
        RowError: see `to_requests`.
    """
    body = row.body
    prompt = body.prompt if isinstance(body, CompletionBody) else None
    if (
        isinstance(prompt, str)
        and prompt.isascii()
        and 0 < len(prompt) <= limits.max_seq_len - (body.max_tokens or 1)
    ):
        return
    to_requests(row, tokenizer, limits)


def to_requests(row: Row, tokenizer: Tokenizer, limits: RowLimits) -> tuple[Request, ...]:
    """One request for each of the row's `n` choices.

    Raises:
        RowError: an empty, overlong or malformed prompt.
    """
    ids = _prompt_ids(row, tokenizer)
    if not ids:
        raise RowError("the prompt is empty")
    if max(ids) >= limits.vocab_size:
        raise RowError(f"token id {max(ids)} is not in the vocabulary of {limits.vocab_size}")
    room = limits.max_seq_len - len(ids)
    asked = row.body.max_tokens
    if isinstance(row.body, ChatBody):
        asked = row.body.max_completion_tokens or asked
    if room < (asked or 1):
        raise RowError(
            f"{len(ids)} prompt tokens and max_tokens {asked or 1} are over the plan's limit of "
            f"{limits.max_seq_len} (max_seq_len)",
            "messages" if isinstance(row.body, ChatBody) else "prompt",
            "context_length_exceeded",
        )
    base = _params(row, asked or min(limits.default_max_tokens, room))
    seed = row.body.seed if row.body.seed is not None else int(row.key[-15:], 16)
    return tuple(
        Request(f"{row.key}:{choice}", tuple(ids), base(seed + choice))
        for choice in range(row.body.n or 1)
    )


def _prompt_ids(row: Row, tokenizer: Tokenizer) -> list[int]:
    try:
        if isinstance(row.body, ChatBody):
            return tokenizer.encode(
                tokenizer.render_chat([m.model_dump(exclude_none=True) for m in row.body.messages])
            )
        prompt: Any = row.body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise RowError(f"the row has {len(prompt)} prompts, write one row for each")
            prompt = prompt[0]
        return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    except RequestError as error:
        raise RowError(error.message) from None
    except (UnicodeEncodeError, TypeError) as error:
        raise RowError(f"the prompt is not Unicode text: {_ascii(str(error))}") from None


def _params(row: Row, max_tokens: int) -> Any:
    body = row.body
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    logprobs = body.logprobs if isinstance(body, CompletionBody) else None
    if isinstance(body, ChatBody) and body.logprobs:
        logprobs = body.top_logprobs or 0

    def with_seed(seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,  # OpenAI's default
            top_p=body.top_p or 1.0,
            top_k=max(body.top_k or 0, 0),
            seed=seed,
            stop=tuple(text for text in stop if text),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            num_logprobs=logprobs,
        )

    return with_seed
