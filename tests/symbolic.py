"""An executor that computes names instead of numbers: state and keys are the hash of all tokens that went into them.

A row that was written for another prefix, a page of another request, a slot that was overwritten:
each shows at once, as the hash of what is read is not the hash of what should be there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import STOP_IDS
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.inputs import KEPT
from tokenspeed_plan.runtime.reference import delta, speculation
from tokenspeed_plan.runtime.reference.batch import advance

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
        self.limits = plan.pool.limits
        self.state: dict[int, int] = {0: EMPTY}
        self.kept: dict[int, list[int]] = {}  # row of state -> tokens of the last step
        self.keys: dict[
            tuple[int, int], tuple[int, int]
        ] = {}  # (page, place) -> before, with the token there
        self.num_runs = 0
        self._buffers: dict[str, Tensor] = {}
        self.host_outputs: list[int] = []

    def prepare(self) -> None:
        pass

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        limits = self.limits
        size = max(limits.max_tokens, limits.max_seqs * (limits.max_depth + 1)) + 1
        widths = {
            "page_table": limits.table_pages,
            "logits": VOCAB,
            "verify_logits": VOCAB,
            "stop_ids": STOP_IDS,
        }
        if limits.max_depth:
            widths[f"drafts_{limits.max_depth}"] = limits.max_depth + 1
        if limits.state_slots_per_seq > 2:
            widths["dst_state_slots"] = limits.state_slots_per_seq - 1
        if name not in self._buffers:
            shape = (size, widths[name]) if name in widths else (size,)
            self._buffers[name] = torch.zeros(shape, dtype=torch.int64)
        per_token = ("token_ids", "positions", "slot_mapping", "verify_tokens", "verify_logits")
        count = num_tokens if name in per_token else num_seqs
        return (
            self._buffers[name]
            if name in KEPT
            else self._buffers[name][: count + (name == "cu_seqlens")]
        )

    def copy_page(self, source: int, target: int) -> int:
        for place in range(self.limits.page_size):
            self.keys[target, place] = self.keys.get((source, place), (-1, -1))
        return 1

    def fetch(self, *values: Tensor) -> Callable[[], tuple[list[int], ...]]:
        """Told in the order of the runs, as a GPU would."""
        number, found = self.num_runs, tuple(value.flatten().tolist() for value in values)
        self.host_outputs.append(number)

        def tell() -> tuple[list[int], ...]:
            assert self.host_outputs.pop(0) == number
            return found

        return tell

    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        self.num_runs += 1

        def view(name: str) -> Tensor:
            return self.buffer(name, num_tokens, num_seqs)

        lists: dict[str, Any] = {name: view(name).tolist() for name in program.inputs}
        rows = program.query_len
        bounds = lists.get("cu_seqlens", list(range(0, num_tokens + 1, rows)))
        lists["dst_state_slots"] = [
            [row] if isinstance(row, int) else row for row in lists["dst_state_slots"]
        ]
        writes = [
            row
            for some in lists["dst_state_slots"]
            for row in some
            if row != self.limits.pad_state_slot
        ]
        assert len(set(writes)) == len(writes)
        assert not set(writes) & set(lists["src_state_slots"])
        assert 0 not in writes
        values = [
            self._rows(lists, index, bounds[index], bounds[index + 1], rows)
            for index in range(num_seqs)
        ]
        lasts = [0] * num_seqs
        if rows > 1:
            lasts = self._verify(program, view, values)
        else:
            view("next_tokens").copy_(torch.tensor([said(value[-1]) for value in values]))
        for index, last in enumerate(lasts):
            computed = bounds[index + 1] - bounds[index] if rows == 1 else last + 1
            self._check(
                lists,
                index,
                bounds[index],
                computed,
                lists["context_lens"][index] - rows + 1 + last,
            )
        if program.depth:
            ends = [
                value[last if rows > 1 else -1] for value, last in zip(values, lasts, strict=True)
            ]
            unknown = [lists.get("following", [-1] * num_seqs)[index] for index in range(num_seqs)]
            view(program.drafts).copy_(torch.tensor([*map(self._drafts, ends, unknown)]))
        if program.phase == "decode":
            if self.limits.kept_inputs:
                delta.commit_state_len(
                    {"query_len": rows}, view("context_lens"), view("state_lens")
                )
            names = (
                "page_table",
                "token_ids",
                "positions",
                "slot_mapping",
                "context_lens",
                "src_state_slots",
                "dst_state_slots",
                "rng_offset",
            )
            state = [view(name) for name in names]
            if rows > 1:
                attrs = {"page_size": self.limits.page_size, "query_len": rows}
                speculation.advance_rows(attrs, view("accepted"), view(program.drafts), *state)
            else:
                advance({"page_size": self.limits.page_size}, view("next_tokens"), *state)

    def _verify(
        self, program: Program, view: Callable[[str], Tensor], values: list[list[int]]
    ) -> list[int]:
        view("verify_tokens").copy_(
            torch.tensor([said(value) for rows in values for value in rows])
        )
        names = (
            "token_ids",
            "verify_tokens",
            "context_lens",
            "src_state_slots",
            "max_lens",
            "stop_ids",
            "seed",
            "rng_offset",
            "forced_accept",
            "accept_counts",
        )
        accepted, *_ = speculation.accept({"query_len": program.query_len}, *map(view, names))
        view("accepted").copy_(accepted)
        return accepted.tolist()  # type: ignore[no-any-return]

    def _drafts(self, value: int, following: int) -> list[int]:
        """What is said after a prefix, and guesses at what comes then, some of which are wrong."""
        tokens = [said(value)]
        value = after(value, tokens[0] if following < 0 else following)
        while len(tokens) <= self.limits.max_depth:
            tokens.append(said(value) if value % 5 else 1)
            value = after(value, tokens[-1])
        return tokens

    def _rows(
        self, lists: dict[str, Any], index: int, start: int, end: int, rows: int
    ) -> list[int]:
        """Compute tokens `start` to `end` of the batch, which belong to sequence `index`: the name after each."""
        size, names = self.limits.page_size, list[int]()
        read, write = lists["src_state_slots"][index], lists["dst_state_slots"][index][0]
        value = self.state[read]
        if "state_lens" in lists:
            come_true = lists["context_lens"][index] - rows - lists["state_lens"][index]
            assert 0 <= come_true <= len(self.kept.get(read, []))
            for token in self.kept.get(read, [])[:come_true]:
                value = after(value, token)
            self.state[write], self.kept[write] = value, lists["token_ids"][start:end]
        for at in range(start, end):
            slot, token = lists["slot_mapping"][at], lists["token_ids"][at]
            self.keys[slot // size, slot % size] = (value, token)
            value = after(value, token)
            names.append(value)
        for row, name in zip(
            lists["dst_state_slots"][index], names if rows > 1 else names[-1:], strict=False
        ):
            if "state_lens" not in lists:
                self.state[row] = name
        return names

    def _check(
        self, lists: dict[str, Any], index: int, start: int, count: int, context: int
    ) -> None:
        """All keys that the last of `count` rows sees must be of the prefix that its state is of."""
        writes, size, seen = lists["dst_state_slots"][index], self.limits.page_size, EMPTY
        if self.limits.pad_state_slot in writes:
            return
        pages, before = (
            lists["page_table"][index],
            lists["context_lens"][index] - self._num_rows(lists),
        )
        for position in range(context):
            assert "state_lens" not in lists or position != before or self.state[writes[0]] == seen
            found, token = self.keys[pages[position // size], position % size]
            assert found == seen, f"the key at {position} is not of this prefix"
            seen = after(seen, token)
        if "state_lens" not in lists:
            many = "max_lens" in lists and self._num_rows(lists) > 1
            assert self.state[writes[count - 1 if many else 0]] == seen, (
                "state and keys of different prefixes"
            )

    def _num_rows(self, lists: dict[str, Any]) -> int:
        return len(lists["token_ids"]) // len(lists["src_state_slots"])
