"""Body of an HTTP request -> requests of the engine, with the checks that batch files have too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from pydantic import ValidationError

from tokenspeed_plan.runtime.request import Request
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError
from tokenspeed_plan.runtime.serving.openai.bodies import (
    UNSUPPORTED,
    ChatBody,
    CompletionBody,
    InvalidRequestError,
    StrictModel,
    Url,
    drop_nulls,
    explain,
    parse_body,
    parse_json,
)
from tokenspeed_plan.runtime.serving.openai.conversion import Encoder, RequestLimits, to_requests

Json = dict[str, Any]


class _StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _StreamFields(StrictModel):
    """Fields that a body has over HTTP and not in a batch file."""

    stream: bool | None = None
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A body that passed its checks.

    Attributes:
        key: unique; part of the answer's `id`.
        requests: `num_choices` for each prompt, prompt after prompt.
        include_usage: whether a stream ends with an event of token counts.
        counts_on: whether each event of a stream has the counts so far.
        asked: the body as it came.
    """

    key: str
    body: CompletionBody | ChatBody
    requests: tuple[Request, ...]
    num_choices: int
    stream: bool
    include_usage: bool
    counts_on: bool = False
    asked: Json = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether it came to the chat endpoint."""
        return isinstance(self.body, ChatBody)


def parse(
    raw: bytes,
    url: Url,
    model: str,
    tokenizer: Encoder,
    limits: RequestLimits,
    translate: Callable[[Json], Json] | None = None,
) -> ParsedRequest:
    """Check a body and make its requests.

    Args:
        raw: the body.
        url: the endpoint whose rules hold.
        model: the name that is served.
        tokenizer: for its prompt.
        limits: of the plan.
        translate: makes the endpoint's body of another API's.

    Raises:
        ApiError: what is wrong with it.
    """
    try:
        asked = drop_nulls(parse_json(raw, "body"))
        fields = dict(asked)
        if translate is not None:
            fields = drop_nulls(translate(asked))
        return _parse(asked, fields, url, tokenizer, replace(limits, model=model))
    except InvalidRequestError as error:
        raise ApiError(error.status, str(error), error.code, error.param) from None


def _parse(
    asked: Json, fields: Json, url: Url, tokenizer: Encoder, limits: RequestLimits
) -> ParsedRequest:
    stream_fields = _pop_stream_fields(fields)
    body = parse_body(url, fields)
    if stream_fields.stream and isinstance(body, CompletionBody) and body.echo:
        raise InvalidRequestError("`echo` is not streamed", "echo", UNSUPPORTED)
    key = uuid4().hex
    options = stream_fields.stream_options or _StreamOptions()
    return ParsedRequest(
        key=key,
        body=body,
        requests=to_requests(body, key, tokenizer, limits),
        num_choices=body.n or 1,
        stream=bool(stream_fields.stream),
        include_usage=bool(options.include_usage),
        counts_on=bool(options.continuous_usage_stats),
        asked=asked,
    )


def _pop_stream_fields(fields: dict[str, Any]) -> _StreamFields:
    """Take the fields of streaming out of a body's fields.

    Raises:
        InvalidRequestError: they have a wrong value, or do not fit together.
    """
    names = [name for name in _StreamFields.model_fields if name in fields]
    values = {name: fields.pop(name) for name in names}
    try:
        stream_fields = _StreamFields.model_validate(values)
    except ValidationError as error:
        raise explain(error, _StreamFields) from None
    options = stream_fields.stream_options
    if options and options.include_usage and not stream_fields.stream:
        raise InvalidRequestError(
            "`stream_options` is only for `stream: true`", "stream_options", "invalid_value"
        )
    return stream_fields
