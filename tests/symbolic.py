"""An executor that computes names instead of numbers: state and keys are the hash of all tokens that went into them.

A row that was written for another prefix, a page of another request, a slot that was overwritten: each shows at once,
as the hash of what is read is not the hash of what should be there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.reference.batch import advance
from torch import Tensor

EMPTY = 0
VOCAB = 97


def after(value: int, token: int) -> int:
    """The name of a prefix and one token more."""
    return hash((value, token))


def said(value: int) -> int:
    """The token that follows a prefix."""
    return value % VOCAB


def answer(prompt_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What a request must say."""
    value, tokens = EMPTY, list(prompt_ids)
    for token in prompt_ids:
        value = after(value, token)
    for _ in range(count):
        tokens.append(said(value))
        value = after(value, tokens[-1])
    return tuple(tokens[len(prompt_ids) :])


class SymbolicExecutor:
    """Takes the place of `Executor`: same inputs, same outputs, `advance` on the device included."""

    def __init__(self, plan: Plan) -> None:
        self.limits = plan.limits
        self.state: dict[int, int] = {0: EMPTY}
        self.keys: dict[tuple[int, int], tuple[int, int]] = {}  # (page, place) -> before, with the token there
        self.num_runs = 0
        self._buffers: dict[str, Tensor] = {}
        self._told: list[int] = []

    def prepare(self) -> None:
        pass

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        size = max(self.limits.max_tokens, self.limits.max_seqs) + 1
        columns = -(-self.limits.max_seq_len // self.limits.page_size)
        if name not in self._buffers:
            shape = (
                (size, {"page_table": columns, "logits": VOCAB}[name]) if name in ("page_table", "logits") else (size,)
            )
            self._buffers[name] = torch.zeros(shape, dtype=torch.int64)
        count = num_tokens if name in ("token_ids", "positions", "slot_mapping") else num_seqs
        return self._buffers[name][: count + (name == "cu_seqlens")]

    def copy_page(self, source: int, target: int) -> int:
        for place in range(self.limits.page_size):
            self.keys[target, place] = self.keys.get((source, place), (-1, -1))
        return 1

    def fetch(self, *values: Tensor) -> Callable[[], tuple[list[int], ...]]:
        """Told in the order of the runs, as a GPU would."""
        number, found = self.num_runs, tuple(value.flatten().tolist() for value in values)
        self._told.append(number)

        def tell() -> tuple[list[int], ...]:
            assert self._told.pop(0) == number
            return found

        return tell

    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        self.num_runs += 1
        held: dict[str, Any] = {name: self.buffer(name, num_tokens, num_seqs) for name in program.inputs}
        lists = {name: tensor.tolist() for name, tensor in held.items()}
        bounds = lists.get("cu_seqlens", list(range(num_seqs + 1)))
        writes = [row for row in lists["write_rows"] if row != self.limits.spare_row]
        assert len(set(writes)) == len(writes)
        assert not set(writes) & set(lists["read_rows"])
        assert 0 not in writes
        values = [self._one(lists, index, bounds[index], bounds[index + 1]) for index in range(num_seqs)]
        self.buffer("next_tokens", num_tokens, num_seqs).copy_(torch.tensor([said(value) for value in values]))
        if program.phase == "decode":
            names = ("next_tokens", "page_table", "token_ids", "positions", "slot_mapping", "context_lens",
                     "read_rows", "write_rows", "draw")  # fmt: skip
            views = (self.buffer(name, num_tokens, num_seqs) for name in names)
            advance({"page_size": self.limits.page_size}, *views)

    def _one(self, lists: dict[str, Any], index: int, start: int, end: int) -> int:
        """Compute tokens `start` to `end` of the batch, which belong to sequence `index`."""
        size, context = self.limits.page_size, lists["context_lens"][index]
        value = before = self.state[lists["read_rows"][index]]
        for at in range(start, end):
            slot, token = lists["slot_mapping"][at], lists["token_ids"][at]
            self.keys[slot // size, slot % size] = (value, token)
            value = after(value, token)
        if lists["write_rows"][index] != self.limits.spare_row:
            pages, seen = lists["page_table"][index], EMPTY
            for position in range(context):
                assert position != context - (end - start) or seen == before, "state and keys of different prefixes"
                found, token = self.keys[pages[position // size], position % size]
                assert found == seen, f"the key at {position} is not of this prefix"
                seen = after(seen, token)
            assert seen == value
        self.state[lists["write_rows"][index]] = value
        return value
