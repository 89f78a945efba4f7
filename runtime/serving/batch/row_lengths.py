"""How many tokens the rows of a batch file have, and their answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.lengths_file import RowLengths
from tokenspeed_plan.runtime.request import Request
from tokenspeed_plan.runtime.request_check import MAX_INT32
from tokenspeed_plan.runtime.serving.batch.files import InputFile, InputLine
from tokenspeed_plan.runtime.serving.batch.lines import Row, parse_row
from tokenspeed_plan.runtime.serving.openai.bodies import ChatBody, InvalidRequestError
from tokenspeed_plan.runtime.serving.openai.conversion import (
    Encoder,
    RequestLimits,
    split_prompts,
    to_requests,
)

_MOST = MAX_INT32  # no plan limits the lengths yet
_ANY = RequestLimits(_MOST, 1, _MOST, takes_penalties=True)


class _Usage(NamedTuple):
    """What an answer says of its row: tokens of all prompts, and of all choices."""

    prompt_tokens: int
    output_tokens: int


def row_lengths(
    batch: Path, answers: Path | None, tokenizer: Encoder | None
) -> Iterator[RowLengths]:
    """The lengths of each sequence of each row: one for each choice of each prompt.

    A row without an answer counts as its `max_tokens`; without a tokenizer it is left out.

    Args:
        batch: rows, as `tokenspeed run --input` takes them.
        answers: an output of these rows; others in it are not looked at.
        tokenizer: counts the tokens of prompts.

    Raises:
        RequestError: a file cannot be read, or a row cannot be run; names the line.
    """
    known: Mapping[str, _Usage] = {}
    if answers is not None:
        known = dict(_answered(answers))
    with InputFile(batch) as source:
        for line in source.lines():
            try:
                row = _row(line)
                yield from _sequences(row, known.get(row.custom_id), tokenizer)
            except InvalidRequestError as error:
                raise _cannot_run(batch, line, error) from error


def row_prompts(batch: Path, tokenizer: Encoder) -> Iterator[Sequence[int]]:
    """The tokens of each prompt of each row.

    Raises:
        RequestError: the file cannot be read, or a row cannot be run; names the line.
    """
    with InputFile(batch) as source:
        for line in source.lines():
            try:
                row = _row(line)
                yield from (request.prompt_ids for request in _requests(row, tokenizer))
            except InvalidRequestError as error:
                raise _cannot_run(batch, line, error) from error


def _cannot_run(batch: Path, line: InputLine, error: InvalidRequestError) -> RequestError:
    problem = f"`{batch}:{line.number}` cannot be run: {error}"
    return RequestError(problem, "mend it, or take it out")


def _requests(row: Row, tokenizer: Encoder) -> Sequence[Request]:
    """One request for each prompt; nothing is answered, so that no form is enforced."""
    body = row.body.model_copy(update={"response_format": None, "tool_choice": None})
    return to_requests(body, row.key, tokenizer, _ANY)[:: row.body.n or 1]


def _row(line: InputLine) -> Row:
    if line.fault is not None:
        raise InvalidRequestError(line.fault)
    return parse_row(line.raw, line.number, "")


def _sequences(row: Row, usage: _Usage | None, tokenizer: Encoder | None) -> Iterator[RowLengths]:
    """Several choices of an answer have its tokens in equal parts."""
    num_choices = row.body.n or 1
    output = row.body.max_tokens
    if isinstance(row.body, ChatBody):
        output = row.body.max_completion_tokens or output
    prompts: list[int] = []
    if tokenizer is not None:
        prompts = [len(request.prompt_ids) for request in _requests(row, tokenizer)]
    elif usage is not None:
        parts = len(split_prompts(row.body))
        prompts = [round(usage.prompt_tokens / parts)] * parts
    if usage is not None and prompts:
        output = max(round(usage.output_tokens / (len(prompts) * num_choices)), 1)
    for prompt in prompts:
        for _ in range(num_choices):
            yield RowLengths(max(prompt, 1), output)


def _answered(path: Path) -> Iterator[tuple[str, _Usage]]:
    """The usage of each row that was answered, by its `custom_id`; others are passed over."""
    with InputFile(path) as source:
        for line in source.lines():
            try:
                answer: Any = json.loads(line.raw)
                usage = answer["response"]["body"]["usage"]
                found = _Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
                yield str(answer["custom_id"]), found
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
