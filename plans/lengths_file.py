"""Files of lengths: one JSON object a row, such as {"prompt_tokens": 812, "output_tokens": 190}.

`tokenspeed lengths` writes them; specs and `tokenspeed bench --workload batch` read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed_plan.plans.errors import SpecError, TokenspeedError
from tokenspeed_plan.plans.text import read_utf8

LENGTHS_FILE_HINT = "`tokenspeed lengths batch.jsonl -o lengths.jsonl` writes such a file"
MAX_LENGTH = 100_000_000
Refusal = Callable[[str], TokenspeedError]  # of a message


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of one sequence; `output_tokens` None where nothing says them."""

    prompt_tokens: int
    output_tokens: int | None

    def as_json(self) -> dict[str, int]:
        """As a line of a file of lengths."""
        row = {"prompt_tokens": self.prompt_tokens}
        if self.output_tokens is not None:
            row["output_tokens"] = self.output_tokens
        return row


def read_lengths(path: Path) -> list[RowLengths]:
    """The rows of a file of lengths, at least one.

    Raises:
        SpecError: it cannot be read, a line is no row of lengths, or there is none.
    """
    try:
        text = read_utf8(path)
    except (OSError, ValueError) as error:  # not UTF-8, or a path with a NUL
        raise SpecError(f"cannot read `{path}`: {error}", LENGTHS_FILE_HINT) from error
    lines = enumerate(text.splitlines(), start=1)
    rows = [_row(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise SpecError(f"`{path}` has no rows", LENGTHS_FILE_HINT)
    return rows


def _row(line: str, where: str) -> RowLengths:
    row = json_object(line, where, _refusal)
    output = None
    if row.get("output_tokens") is not None:
        output = length_of(row, "output_tokens", where, _refusal)
    return RowLengths(length_of(row, "prompt_tokens", where, _refusal), output)


def _refusal(message: str) -> SpecError:
    return SpecError(message, LENGTHS_FILE_HINT)


def json_object(line: str, where: str, refusal: Refusal) -> dict[str, Any]:
    """The JSON object of a line; `where` names it in the refusal that is raised otherwise."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise refusal(f"`{where}` is no JSON object")
    return row


def length_of(row: dict[str, Any], field: str, where: str, refusal: Refusal) -> int:
    """A number of tokens in a row; raises the refusal where it is none."""
    value = row.get(field)
    if type(value) is not int or not 1 <= value <= MAX_LENGTH:
        raise refusal(f"`{where}`: `{field}` is not a whole number from 1 to {MAX_LENGTH}")
    return value
