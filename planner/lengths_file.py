"""Files of lengths: one JSON object a row, such as {"prompt_tokens": 812, "output_tokens": 190}.

`tokenspeed lengths` writes them. A row without `output_tokens` is one whose answer is not known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenspeed_plan.planner.foreign_yaml import read_file
from tokenspeed_plan.planner.token_lengths import Lengths
from tokenspeed_plan.plans.errors import SpecError

LENGTHS_FILE_HINT = "`tokenspeed lengths batch.jsonl -o lengths.jsonl` writes such a file"
MAX_LENGTH = 100_000_000
# The key of a row that each key of a workload is summarised from.
LENGTH_KEYS = {"first_turn_tokens": "prompt_tokens", "output_tokens": "output_tokens"}


def read_lengths(path: Path, near: Path, key: str) -> Lengths:
    """The summary of a file for one key of a workload.

    Args:
        path: looked up from the current folder, then from `near`.
        near: the folder of the spec.
        key: one of `LENGTH_KEYS`.

    Raises:
        SpecError: it cannot be read, a line is no row of lengths, or no row has this length.
    """
    if not path.is_absolute() and not path.is_file() and (near / path).is_file():
        path = near / path
    text = read_file(path, LENGTHS_FILE_HINT)
    field = LENGTH_KEYS[key]
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            length = _length(line, field, f"{path}:{number}")
            if length is not None:
                found.append(length)
    if not found:
        raise SpecError(f"no row of `{path}` has `{field}`", LENGTHS_FILE_HINT)
    return Lengths.of(found)


def _length(line: str, field: str, where: str) -> int | None:
    """One length of a row; None where the row does not know it."""
    row = _row(line, where)
    length = row.get(field)
    if length is None:
        return None
    if type(length) is not int or not 1 <= length <= MAX_LENGTH:
        raise SpecError(
            f"`{where}`: `{field}` is not a whole number from 1 to {MAX_LENGTH}", LENGTHS_FILE_HINT
        )
    return length


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise SpecError(f"`{where}` is no JSON object", LENGTHS_FILE_HINT)
    return row
