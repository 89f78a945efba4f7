"""Files of lengths: one JSON object a row, such as {"prompt_tokens": 812, "output_tokens": 190}.

`tokenspeed lengths` writes them; specs and `tokenspeed bench --workload batch` read them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.text import read_utf8

LENGTHS_FILE_HINT = "`tokenspeed lengths batch.jsonl -o lengths.jsonl` writes such a file"
MAX_LENGTH = 100_000_000


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
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise SpecError(f"`{where}` is no JSON object", LENGTHS_FILE_HINT)
    output = row.get("output_tokens")
    if output is not None:
        output = _length(output, "output_tokens", where)
    return RowLengths(_length(row.get("prompt_tokens"), "prompt_tokens", where), output)


def _length(value: Any, field: str, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_LENGTH:
        raise SpecError(
            f"`{where}`: `{field}` is not a whole number from 1 to {MAX_LENGTH}", LENGTHS_FILE_HINT
        )
    return value
