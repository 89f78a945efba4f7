"""Requests as they came once: one JSON object a line, with its time and its lengths."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.lengths_file import json_object, length_of
from tokenspeed_plan.plans.text import read_utf8
from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.simulation.load import Arrival, own_tokens, params_of

HINT = 'give lines such as {"arrival_s": 0.25, "prompt_tokens": 812, "output_tokens": 190}'
MAX_ARRIVAL_S = 1e9


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """A request: when it came, in seconds from the beginning, and its tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_recorded(path: Path, max_seq_len: int) -> list[RecordedRow]:
    """The requests of a file by their time.

    Raises:
        RequestError: the file cannot be read, or a line is no request of at most `max_seq_len`
            tokens.
    """
    try:
        text = read_utf8(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"`{path}` cannot be read as text: {error}", HINT) from None
    lines = enumerate(text.splitlines(), start=1)
    rows = [_row(line, f"{path}:{number}", max_seq_len) for number, line in lines if line.strip()]
    if not rows:
        raise RequestError(f"`{path}` has no requests", HINT)
    return sorted(rows, key=lambda row: row.arrival_s)


def _row(line: str, where: str, max_seq_len: int) -> RecordedRow:
    row = json_object(line, where, _refusal)
    arrival_s = row.get("arrival_s")
    if not isinstance(arrival_s, int | float) or isinstance(arrival_s, bool):
        arrival_s = math.nan
    if not 0 <= arrival_s <= MAX_ARRIVAL_S:
        raise _refusal(f"`{where}`: `arrival_s` is no time in seconds")
    prompt = length_of(row, "prompt_tokens", where, _refusal)
    output = length_of(row, "output_tokens", where, _refusal)
    if prompt + output > max_seq_len:
        raise RequestError(
            f"`{where}`: {prompt} prompt tokens and {output} new ones are over the plan's limit of "
            f"{max_seq_len} (max_seq_len)",
            "leave it out, or plan for longer conversations: raise `workload` in the spec",
        )
    return RecordedRow(float(arrival_s), prompt, output)


def _refusal(message: str) -> RequestError:
    return RequestError(message, HINT)


class Recorded:
    """Requests that come at their own times, whatever is answered.

    Args:
        rows: by their time.
        vocab_size: of the tokens of their prompts, which share nothing.
    """

    def __init__(self, rows: Iterable[RecordedRow], vocab_size: int) -> None:
        self._rows = deque(rows)
        self._vocab_size = vocab_size
        self._count = 0

    def next_time_s(self) -> float | None:
        """When the next one comes."""
        if not self._rows:
            return None
        return self._rows[0].arrival_s

    def pop(self) -> Arrival:
        """The next one."""
        row = self._rows.popleft()
        ids = tuple(own_tokens(self._count, row.prompt_tokens, self._vocab_size))
        self._count += 1
        params = params_of(row.output_tokens)
        return Arrival(row.arrival_s, Request(f"sim-{self._count}", ids, params))

    def answered(self, completion: Completion, now_s: float) -> None:
        """Nobody waits for it."""
