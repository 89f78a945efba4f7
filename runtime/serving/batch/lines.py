"""Lines of OpenAI batch files: input line -> checked row with its key; result -> output line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tokenspeed_plan.plans.canon import canonical, sha256
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.chat.answer_parser import AnswerRules
from tokenspeed_plan.runtime.serving.openai.answers import choice, usage, with_thoughts
from tokenspeed_plan.runtime.serving.openai.bodies import (
    MAX_FIELDS,
    ChatBody,
    CompletionBody,
    InvalidRequestError,
    StrictModel,
    Url,
    explain,
    parse_body,
    parse_json,
)
from tokenspeed_plan.runtime.streaming import Decoder

Json = dict[str, Any]
KEY_PREFIX = "batch_req_"
MAX_NAME_CHARS = 4096  # of a `custom_id`
REQUEST_FAILED = "request_failed"


class _Line(StrictModel):
    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    method: Literal["POST"]
    url: Url
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row that passed its checks.

    Attributes:
        line: its line in the file, from 1.
        key: `id` of its answer: digest of the plan and the row, so that an answer is found again;
            empty where no plan was named.
    """

    line: int
    custom_id: str
    body: CompletionBody | ChatBody
    key: str


def parse_row(raw: bytes, line: int, plan_digest: str | None) -> Row:
    """Parse and check a line. Without a plan, its row has no key.

    Raises:
        InvalidRequestError: what is wrong with it.
    """
    data = parse_json(raw)
    if len(data) > MAX_FIELDS:
        raise InvalidRequestError(f"the line has {len(data)} fields, the most is {MAX_FIELDS}")
    try:
        head = _Line.model_validate(data)
    except ValidationError as error:
        raise explain(error, _Line) from None
    try:
        body = parse_body(head.url, head.body)
        key = ""
        if plan_digest is not None:
            key = KEY_PREFIX + sha256(plan_digest + canonical(data))[:32]
        head.custom_id.encode()
    except InvalidRequestError as error:
        raise InvalidRequestError(f"body: {error}") from None
    except (UnicodeEncodeError, RecursionError):
        raise InvalidRequestError(
            "the line holds text that is not Unicode, or is nested too deeply"
        ) from None
    return Row(line, head.custom_id, body, key)


def custom_id_of(raw: bytes) -> str | None:
    """The name that a refused line gives itself, as far as the line can be read.

    Only what comes before it has to be JSON. Half a surrogate pair, which many readers refuse,
    stays as its escape.
    """
    try:
        name = _value_of("custom_id", raw.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
        return None
    return name.encode("utf-8", "backslashreplace").decode()


def _value_of(name: str, text: str) -> object:
    """The value of a key of the JSON object that the text begins with; None without one.

    Raises:
        ValueError: the text before it is not JSON.
    """
    decoder = json.JSONDecoder()
    at = _after(text, 0, "{")
    while True:
        key, at = decoder.raw_decode(text, at)
        value, at = decoder.raw_decode(text, _after(text, at, ":"))
        if key == name:
            return value
        at = _after(text, at, ",")


def _after(text: str, at: int, sign: str) -> int:
    """The place after a sign and the space around it.

    Raises:
        ValueError: it is not there.
    """
    found = re.compile(rf"\s*{re.escape(sign)}\s*").match(text, at)
    if found is None:
        raise ValueError(f"no `{sign}`")
    return found.end()


def answer_line(
    row: Row,
    completions: Sequence[Completion],
    decoder: Decoder,
    model: str,
    rules: AnswerRules | None = None,
) -> Json:
    """Output line of an answered row.

    Args:
        row: what was asked.
        completions: one for each choice.
        decoder: for log probabilities.
        model: its name, where the row has none.
        rules: how an answer is read that is not text alone.

    The same answer gives the same bytes, so the line holds no time: `created` is 0.
    """
    name, kind = "cmpl", "text_completion"
    if isinstance(row.body, ChatBody):
        name, kind = "chatcmpl", "chat.completion"
    choices = [
        choice(row.body, index, completion, decoder, rules)
        for index, completion in enumerate(completions)
    ]
    firsts = completions[:: row.body.n or 1]  # of each prompt
    num_prompt_tokens = sum(completion.num_prompt_tokens for completion in firsts)
    digest = row.key.removeprefix(KEY_PREFIX)
    body = {
        "id": f"{name}-{digest}",
        "object": kind,
        "created": 0,
        "model": row.body.model or model,
        "choices": choices,
        "usage": with_thoughts(usage(num_prompt_tokens, completions), completions, rules, decoder),
    }
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    return {"id": row.key, "custom_id": row.custom_id, "response": response, "error": None}


def error_line(custom_id: str | None, line: int, code: str, message: str) -> Json:
    """Output line of a row that was refused or failed."""
    error = {"code": code, "message": message, "line": line}
    return {
        "id": f"{KEY_PREFIX}line_{line}",
        "custom_id": custom_id,
        "response": None,
        "error": error,
    }


def failure_line(row: Row, completions: Sequence[Completion]) -> Json | None:
    """Output line of a row of which a choice has failed; None where none has."""
    errors = [completion.error for completion in completions if completion.error is not None]
    if not errors:
        return None
    return error_line(row.custom_id, row.line, REQUEST_FAILED, errors[0])


def encode_line(line: Mapping[str, object]) -> bytes:
    """An output line as it stands in the file, its newline included."""
    text = json.dumps(line, ensure_ascii=True, sort_keys=True, allow_nan=False)
    return text.encode() + b"\n"
