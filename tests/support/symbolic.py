"""An executor that computes names instead of numbers.

The name of a prefix is the hash of its tokens. A state slot holds the name of the prefix that it is
the state of, and each place of the KV cache the name of the prefix before it with its token. A slot
of another prefix, a page of another request, a place that was overwritten: each shows at once,
because the name that is read is not the name that should be there. One name stands for numbers that
are none: it spreads to all that is made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import (
    BATCH_STATE,
    IS_MASKED,
    LATE_INPUTS,
    MASK_WORD_BITS,
    TOKEN_MASK,
    mask_words,
)
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.reference import delta, speculation
from tokenspeed_plan.runtime.reference.step_inputs import advance

EMPTY = 0
SPOILT = -13  # the name of what is no number
VOCAB = 97


def after(value: int, token: int) -> int:
    """The name of a prefix and one token more."""
    return SPOILT if value == SPOILT else hash((value, token))


def next_token(value: int, mask_W: list[int] | None = None) -> int:
    """The token that follows a prefix: the first that the mask has; 0 where none is right."""
    if value == SPOILT:
        return 0
    for token in range(value, value + VOCAB):
        if mask_W is None or _has(mask_W, token % VOCAB):
            return token % VOCAB
    return 0


def _has(mask_W: list[int], token: int) -> int:
    return mask_W[token // MASK_WORD_BITS] >> (token % MASK_WORD_BITS) & 1


def allows(count: int, token: int) -> bool:
    """Whether a token may come after `count` tokens of an answer in `Form`."""
    return (token + count) % 3 > 0


def answer(prompt_ids: tuple[int, ...], count: int, formed: bool = False) -> tuple[int, ...]:
    """The right answer to a request; `formed`: in `Form`."""
    value, tokens = EMPTY, list(prompt_ids)
    for token in prompt_ids:
        value = after(value, token)
    for place in range(count):
        token = next_token(value)
        while formed and not allows(place, token):
            token = (token + 1) % VOCAB
        tokens.append(token)
        value = after(value, token)
    return tuple(tokens[len(prompt_ids) :])


@dataclass
class FormMatcher:
    """Where an answer in `Form` is."""

    count: int = 0

    def fill(self, mask_RW: np.ndarray, row: int) -> None:
        bits = np.array([allows(self.count, token) for token in range(mask_RW.shape[1] * 32)])
        mask_RW[row] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> bool:
        if not allows(self.count, token_id):
            return False
        self.count += 1
        return True

    def rollback(self, count: int) -> None:
        self.count -= count


class Form:
    """A grammar: a third of all tokens may not come, each time another one."""

    def matcher(self) -> FormMatcher:
        return FormMatcher()


@dataclass
class Head:
    """A step whose tokens are not chosen yet."""

    lists: dict[str, Any]
    spans: list[tuple[int, int]]
    values: list[list[int]]


class SymbolicExecutor:
    """Stands in for `Executor`: same inputs and outputs, `advance` on the device included."""

    def __init__(self, plan: Plan) -> None:
        self.limits = plan.pool.limits
        self._mask_words = mask_words(plan.model.vocab_size)
        self.state: dict[int, int] = {0: EMPTY}
        self.kept: dict[int, list[int]] = {}  # state slot -> tokens of the last step
        # (page, place) -> the name of the prefix before it, and the token there
        self.keys: dict[tuple[int, int], tuple[int, int]] = {}
        self.num_runs = 0
        self.programs: list[tuple[str, int]] = []  # those that were run
        self.host_outputs: list[int] = []
        self.spoils: int | None = None  # the row of the next step that is computed wrong
        self._was_spoilt = False
        self._heads: list[Head] = []  # of the step in flight, where it has no tail yet
        io = [arena for arena in plan.pool.arenas if arena.name == "io"]
        self._memory = PlanMemory(plan, Arenas(io), {})

    def prepare(self) -> None:
        pass

    def buffer(self, name: str, num_tokens: int, num_seqs: int) -> Tensor:
        return self._memory.buffer(name, num_tokens, num_seqs)

    def copy_page(self, source: int, target: int) -> int:
        for place in range(self.limits.page_size):
            self.keys[target, place] = self.keys.get((source, place), (-1, -1))
        return 1

    def copy_to_host(self, *values: Tensor) -> Callable[[], tuple[list[int], ...]]:
        """The values are read in the order of the runs, as from a GPU."""
        number, found = self.num_runs, tuple(value.flatten().tolist() for value in values)
        self.host_outputs.append(number)

        def wait() -> tuple[list[int], ...]:
            assert self.host_outputs.pop(0) == number
            return found

        return wait

    def run(
        self,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: object = None,
        part: object = "whole",
    ) -> None:
        def view(name: str) -> Tensor:
            return self.buffer(name, num_tokens, num_seqs)

        if part != "tail":
            assert not self._heads, "a step is launched before the tail of another one"
            self.num_runs += 1
            self.programs.append((program.phase, program.bucket))
            self._heads.append(self._run_head(program, view, num_tokens, num_seqs))
        if part != "head":
            self._run_tail(program, view, self._heads.pop())

    def _run_head(
        self, program: Program, view: Callable[[str], Tensor], num_tokens: int, num_seqs: int
    ) -> Head:
        """All but the choice of tokens."""
        lists: dict[str, Any] = {
            name: view(name).tolist() for name in program.inputs if name not in LATE_INPUTS
        }
        queries = program.query_len
        bounds = lists.get("cu_seqlens", list(range(0, num_tokens + 1, queries)))
        slots = [[one] if isinstance(one, int) else one for one in lists["dst_state_slots"]]
        lists["dst_state_slots"] = slots
        self._check_slots(lists)
        spans = list(pairwise(bounds[: num_seqs + 1]))
        values = [self._compute(lists, i, *span, queries) for i, span in enumerate(spans)]
        self.spoils = None
        if self._was_spoilt:
            rows = [name for value in values for name in value[-queries:]]
            wrong_T1 = torch.tensor([[name == SPOILT] for name in rows])
            view(program.logits).zero_().masked_fill_(wrong_T1, float("nan"))
        return Head(lists, spans, values)

    def _run_tail(self, program: Program, view: Callable[[str], Tensor], head: Head) -> None:
        lists, queries, values = head.lists, program.query_len, head.values
        masks = self._masks(program, view)
        tokens = [
            next_token(value, mask)
            for mine, some in zip(values, masks, strict=True)
            for value, mask in zip(mine[-queries:], some, strict=True)
        ]
        lasts = [0] * len(values)  # the last accepted query of each sequence
        if queries > 1:
            view("verify_tokens").copy_(torch.tensor(tokens))
            lasts = self._verify(program, view)
        else:
            view("next_tokens").copy_(torch.tensor(tokens))
        for index, (start, end) in enumerate(head.spans):
            computed = end - start if queries == 1 else lasts[index] + 1
            context = lists["context_lens"][index] - queries + 1 + lasts[index]
            self._check(lists, index, start, computed, context)
        if program.depth:
            self._draft(program, view, head, tokens, lasts)
        if program.phase == "decode":
            self._advance(program, view)

    def _masks(
        self, program: Program, view: Callable[[str], Tensor]
    ) -> list[list[list[int]] | list[None]]:
        """For each query of each sequence its mask, if it has one."""
        if TOKEN_MASK not in program.inputs:
            count = len(view("context_lens"))
            return [[None] * program.query_len for _ in range(count)]
        rows = view(TOKEN_MASK)
        masks_SRW = rows.view(len(rows), -1, self._mask_words)[:, : program.query_len].tolist()
        is_masked = view(IS_MASKED).tolist()
        free: list[None] = [None] * program.query_len
        return [mask if has else free for mask, has in zip(masks_SRW, is_masked, strict=True)]

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        buffer = self.buffer(name, 0, first + len(rows))
        buffer[first:, : rows.shape[1]] = rows

    def _check_slots(self, lists: dict[str, Any]) -> None:
        """No slot is written twice, or read by another; slot 0 is never written.

        A sequence itself writes the slot that it reads only where the plan says so.
        """
        written = [slot for some in lists["dst_state_slots"] for slot in some]
        written = [slot for slot in written if slot != self.limits.pad_state_slot]
        assert len(set(written)) == len(written)
        assert 0 not in written
        for index, slot in enumerate(lists["src_state_slots"]):
            others = lists["dst_state_slots"].copy()
            if self.limits.in_place:
                del others[index]
            assert all(slot not in written for written in others)

    def _draft(
        self,
        program: Program,
        view: Callable[[str], Tensor],
        head: Head,
        tokens: list[int],
        lasts: list[int],
    ) -> None:
        drafts, queries = [], program.query_len
        following = head.lists.get("following", [-1] * len(lasts))
        for index, (last, known) in enumerate(zip(lasts, following, strict=True)):
            value = head.values[index][-queries:][last]
            drafts.append(self._drafts(value, tokens[index * queries + last], known))
        view(program.drafts).copy_(torch.tensor(drafts))

    def _advance(self, program: Program, view: Callable[[str], Tensor]) -> None:
        """The inputs of the next step, by the reference bodies."""
        queries = program.query_len
        if self.limits.kept_inputs:
            attrs = {"query_len": queries}
            delta.commit_state_len(attrs, view("context_lens"), view("state_lens"))
        state = [view(name) for name in ("page_table", *BATCH_STATE)]
        if queries > 1:
            sizes = {"page_size": self.limits.page_size, "query_len": queries}
            speculation.advance_rows(sizes, view("accepted"), view(program.drafts), *state)
        else:
            attrs = {"page_size": self.limits.page_size, "in_place": self.limits.in_place}
            advance(attrs, view("next_tokens"), *state)

    def _verify(self, program: Program, view: Callable[[str], Tensor]) -> list[int]:
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

    def _drafts(self, value: int, token: int, following: int) -> list[int]:
        """The token after a prefix, and drafts of the next ones, some of which are wrong."""
        tokens = [token]
        value = after(value, token if following < 0 else following)
        while len(tokens) <= self.limits.max_depth:
            tokens.append(next_token(value) if value % 5 else 1)
            value = after(value, tokens[-1])
        return tokens

    def _compute(
        self, lists: dict[str, Any], index: int, start: int, end: int, queries: int
    ) -> list[int]:
        """Compute tokens `start` to `end`, of sequence `index`; gives the name after each."""
        size, names = self.limits.page_size, list[int]()
        read, write = lists["src_state_slots"][index], lists["dst_state_slots"][index]
        value = self.state[read]
        if "state_lens" in lists:
            value = self._recompute(lists, index, queries)
        if index == self.spoils or self._sees_spoilt(lists, index, end - start):
            self._was_spoilt, value = True, SPOILT
        if "state_lens" in lists:
            self.state[write[0]], self.kept[write[0]] = value, lists["token_ids"][start:end]
        for at in range(start, end):
            slot, token = lists["slot_mapping"][at], lists["token_ids"][at]
            self.keys[slot // size, slot % size] = (value, token)
            value = after(value, token)
            names.append(value)
        if "state_lens" not in lists:
            states = names if queries > 1 else names[-1:]
            self.state.update(zip(write, states, strict=False))
        return names

    def _sees_spoilt(self, lists: dict[str, Any], index: int, count: int) -> bool:
        """Whether a key before the `count` tokens of a sequence is no number."""
        size, pages = self.limits.page_size, lists["page_table"][index]
        before = range(lists["context_lens"][index] - count) if self._was_spoilt else range(0)
        places = [(pages[position // size], position % size) for position in before]
        return any(self.keys[place][0] == SPOILT for place in places if place in self.keys)

    def _recompute(self, lists: dict[str, Any], index: int, queries: int) -> int:
        """The name after those tokens of the last step that were accepted."""
        read = lists["src_state_slots"][index]
        kept = self.kept.get(read, [])
        accepted = lists["context_lens"][index] - queries - lists["state_lens"][index]
        assert 0 <= accepted <= len(kept)
        value = self.state[read]
        for token in kept[:accepted]:
            value = after(value, token)
        return value

    def _check(
        self, lists: dict[str, Any], index: int, start: int, count: int, context: int
    ) -> None:
        """All keys that the last of `count` queries sees are of the prefix that its state is of."""
        writes, size, seen = lists["dst_state_slots"][index], self.limits.page_size, EMPTY
        if self.limits.pad_state_slot in writes or self.state[writes[0]] == SPOILT:
            return
        pages, queries = lists["page_table"][index], self._num_queries(lists)
        before = lists["context_lens"][index] - queries
        for position in range(context):
            if "state_lens" in lists and position == before:
                assert self.state[writes[0]] == seen
            found, token = self.keys[pages[position // size], position % size]
            assert found == seen, f"the key at {position} is not of this prefix"
            seen = after(seen, token)
        if "state_lens" not in lists:
            verifies = "max_lens" in lists and queries > 1
            state = self.state[writes[count - 1 if verifies else 0]]
            assert state == seen, "state and keys of different prefixes"

    def _num_queries(self, lists: dict[str, Any]) -> int:
        return len(lists["token_ids"]) // len(lists["src_state_slots"])
