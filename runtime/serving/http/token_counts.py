"""Prompts as tokens and back, and their number: what clients ask before they send one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Protocol

from pydantic import Field, ValidationError

from tokenspeed_plan.runtime.serving.http.api_errors import ApiError
from tokenspeed_plan.runtime.serving.http.dialects import Dialect
from tokenspeed_plan.runtime.serving.openai.answers import ChatDecoder
from tokenspeed_plan.runtime.serving.openai.bodies import (
    InvalidRequestError,
    StrictModel,
    TokenIds,
    drop_nulls,
    explain,
    parse_body,
    parse_json,
)
from tokenspeed_plan.runtime.serving.openai.conversion import (
    Encoder,
    RequestLimits,
    check_model,
    prompt_ids,
)

Json = dict[str, Any]
MAX_COUNTED = 1 << 20  # tokens of a prompt that is not to be answered


class CountingTokenizer(Encoder, ChatDecoder, Protocol):
    """Text to tokens and back."""


class _Plain(StrictModel):
    """A text to be cut into tokens."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class _Tokens(StrictModel):
    """Tokens to be joined to a text."""

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_COUNTED)]


def refused(work: Callable[[], Json]) -> Json:
    """The result of some work on a body.

    Raises:
        ApiError: what is wrong with it.
    """
    try:
        return work()
    except InvalidRequestError as error:
        raise ApiError(error.status, str(error), error.code, error.param) from None


def count_tokens(
    raw: bytes, dialect: Dialect, tokenizer: CountingTokenizer, limits: RequestLimits
) -> Json:
    """How many tokens the prompt of a message has; of a body of Anthropic's Messages API.

    Raises:
        InvalidRequestError: what is wrong with it.
    """
    fields = dialect.fields(drop_nulls(parse_json(raw, "body")))
    fields.pop("stream", None)
    fields.pop("stream_options", None)
    body = parse_body(dialect.url, fields)
    check_model(body.model, limits)
    return {"input_tokens": len(prompt_ids(body, tokenizer, _counted(limits)))}


def tokenize(raw: bytes, tokenizer: CountingTokenizer, limits: RequestLimits) -> Json:
    """The tokens of a text or of a chat, as vLLM's clients ask for them.

    Raises:
        InvalidRequestError: what is wrong with the body.
    """
    fields = drop_nulls(parse_json(raw, "body"))
    with_texts = False
    if "messages" in fields:
        with_texts = bool(fields.pop("return_token_strs", False))
        body = parse_body("/v1/chat/completions", fields)
        check_model(body.model, limits)
        ids = prompt_ids(body, tokenizer, _counted(limits))
    else:
        plain = _checked(_Plain, fields)
        check_model(plain.model, limits)
        with_texts = plain.return_token_strs
        ids = tokenizer.encode(plain.prompt, plain.add_special_tokens)
    found: Json = {"count": len(ids), "max_model_len": limits.max_seq_len, "tokens": ids}
    if with_texts:
        found["token_strs"] = [tokenizer.spell([token]) for token in ids]
    return found


def detokenize(raw: bytes, tokenizer: CountingTokenizer, limits: RequestLimits) -> Json:
    """The text of some tokens.

    Raises:
        InvalidRequestError: what is wrong with the body.
    """
    body = _checked(_Tokens, drop_nulls(parse_json(raw, "body")))
    check_model(body.model, limits)
    worst = max(body.tokens, default=0)
    if worst >= limits.vocab_size:
        raise InvalidRequestError(
            f"token id {worst} is not in the vocabulary of {limits.vocab_size}", "tokens"
        )
    return {"prompt": tokenizer.spell(body.tokens)}


def _checked(model: type[Any], fields: Json) -> Any:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise explain(error, model) from None


def _counted(limits: RequestLimits) -> RequestLimits:
    return replace(limits, max_seq_len=max(limits.max_seq_len, MAX_COUNTED))
