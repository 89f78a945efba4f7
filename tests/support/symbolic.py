"""An executor that computes names instead of numbers.

The name of a prefix is the hash of its tokens. A state slot holds the name of the prefix that it is
the state of, and each place of the KV cache the name of the prefix before it with its token. A slot
of another prefix, a page of another request, a place that was overwritten: each shows at once,
because the name that is read is not the name that should be there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import BATCH_STATE
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.reference import delta, speculation
from tokenspeed_plan.runtime.reference.step_inputs import advance

EMPTY = 0
VOCAB = 97


def after(value: int, token: int) -> int:
    """The name of a prefix and one token more."""
    return hash((value, token))


def next_token(value: int) -> int:
    """The token that follows a prefix."""
    return value % VOCAB


def answer(prompt_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The right answer to a request."""
    value, tokens = EMPTY, list(prompt_ids)
    for token in prompt_ids:
        value = after(value, token)
    for _ in range(count):
        tokens.append(next_token(value))
        value = after(value, tokens[-1])
    return tuple(tokens[len(prompt_ids) :])


class SymbolicExecutor:
    """Stands in for `Executor`: same inputs and outputs, `advance` on the device included."""

    def __init__(self, plan: Plan) -> None:
        self.limits = plan.pool.limits
        self.state: dict[int, int] = {0: EMPTY}
        self.kept: dict[int, list[int]] = {}  # state slot -> tokens of the last step
        # (page, place) -> the name of the prefix before it, and the token there
        self.keys: dict[tuple[int, int], tuple[int, int]] = {}
        self.num_runs = 0
        self.programs: list[tuple[str, int]] = []  # those that were run
        self.host_outputs: list[int] = []
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
        self.num_runs += 1
        self.programs.append((program.phase, program.bucket))

        def view(name: str) -> Tensor:
            return self.buffer(name, num_tokens, num_seqs)

        lists: dict[str, Any] = {name: view(name).tolist() for name in program.inputs}
        queries = program.query_len
        bounds = lists.get("cu_seqlens", list(range(0, num_tokens + 1, queries)))
        slots = [[one] if isinstance(one, int) else one for one in lists["dst_state_slots"]]
        lists["dst_state_slots"] = slots
        self._check_slots(lists)
        spans = list(pairwise(bounds[: num_seqs + 1]))
        values = [self._compute(lists, i, *span, queries) for i, span in enumerate(spans)]
        lasts = [0] * num_seqs  # the last accepted query of each sequence
        if queries > 1:
            lasts = self._verify(program, view, values)
        else:
            tokens = [next_token(value[-1]) for value in values]
            view("next_tokens").copy_(torch.tensor(tokens))
        for index, (start, end) in enumerate(spans):
            computed = end - start if queries == 1 else lasts[index] + 1
            context = lists["context_lens"][index] - queries + 1 + lasts[index]
            self._check(lists, index, start, computed, context)
        if program.depth:
            self._draft(program, view, lists, values, lasts)
        if program.phase == "decode":
            self._advance(program, view)

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
        lists: dict[str, Any],
        values: list[list[int]],
        lasts: list[int],
    ) -> None:
        drafts = []
        following = lists.get("following", [-1] * len(values))
        for value, last, token in zip(values, lasts, following, strict=True):
            end = value[last] if program.query_len > 1 else value[-1]
            drafts.append(self._drafts(end, token))
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

    def _verify(
        self, program: Program, view: Callable[[str], Tensor], values: list[list[int]]
    ) -> list[int]:
        tokens = [next_token(value) for one in values for value in one]
        view("verify_tokens").copy_(torch.tensor(tokens))
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
        """The token after a prefix, and drafts of the next ones, some of which are wrong."""
        tokens = [next_token(value)]
        value = after(value, tokens[0] if following < 0 else following)
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
        if self.limits.pad_state_slot in writes:
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
