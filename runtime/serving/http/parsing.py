"""The body of a request -> what it asks of the engine, with the models and checks of batch files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenspeed_plan.runtime.request import Request
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, no_model
from tokenspeed_plan.runtime.serving.openai.requests import (
    ChatBody,
    CompletionBody,
    Row,
    RowError,
    RowLimits,
    Tokenizer,
    Url,
    explain,
    parse_body,
    parse_json,
    to_requests,
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _StreamFields(_Strict):
    """What a body has here and not in a batch file."""

    stream: bool | None = None
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A body that passed its checks. `requests` holds `num_choices` choices for each prompt, prompt after prompt."""

    key: str
    body: CompletionBody | ChatBody
    requests: tuple[Request, ...]
    num_choices: int
    stream: bool
    include_usage: bool

    @property
    def is_chat(self) -> bool:
        """Which of the two endpoints."""
        return isinstance(self.body, ChatBody)


def parse(
    raw: bytes, url: Url, model: str, tokenizer: Tokenizer, limits: RowLimits
) -> ParsedRequest:
    """Check a body and make its requests.

    Raises:
        ApiError: what is wrong with it.
    """
    try:
        given = {
            name: value for name, value in parse_json(raw, "body").items() if value is not None
        }
        fields = _stream_fields(
            {name: given.pop(name) for name in _StreamFields.model_fields if name in given}
        )
        body = parse_body(url, given)
        if body.model not in (None, model):
            raise no_model(str(body.model), model)
        rows = [Row(0, "", url, part, uuid4().hex) for part in _prompts(body)]
        requests = tuple(request for row in rows for request in to_requests(row, tokenizer, limits))
    except RowError as error:
        raise ApiError(400, str(error), error.code, error.param) from None
    options = fields.stream_options or _StreamOptions()
    return ParsedRequest(
        rows[0].key, body, requests, body.n or 1, bool(fields.stream), bool(options.include_usage)
    )


def _stream_fields(given: dict[str, Any]) -> _StreamFields:
    try:
        fields = _StreamFields.model_validate(given)
    except ValidationError as error:
        raise explain(error, _StreamFields) from None
    if fields.stream_options and not fields.stream:
        raise RowError(
            "`stream_options` is only for `stream: true`", "stream_options", "invalid_value"
        )
    return fields


def _prompts(body: CompletionBody | ChatBody) -> list[CompletionBody | ChatBody]:
    """A body for each of its prompts."""
    if isinstance(body, CompletionBody) and isinstance(body.prompt, list) and len(body.prompt) > 1:
        several = [prompt for prompt in body.prompt if isinstance(prompt, (str, list))]
        return [body.model_copy(update={"prompt": prompt}) for prompt in several] or [body]
    return [body]
