"""An agent's conversations through the engine: a long first turn, then short ones, each sent when the last is answered.

Every turn repeats all that was said before it, as a client without a memory does.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations of `users` at once; each has `turns` turns, and each turn's answer `output_tokens` tokens."""

    first_turn_tokens: int
    turn_tokens: int
    turns: int
    output_tokens: int
    users: int
    seed: int = 0

    @classmethod
    def of(cls, plan: Plan, **changes: int | None) -> Workload:
        """What the plan was made for, with changes where they are given."""
        spec = plan.spec["workload"]
        planned = {name: spec[name] for name in ("first_turn_tokens", "turn_tokens", "turns", "output_tokens")}
        given = {name: value for name, value in changes.items() if value is not None}
        return cls(**{**planned, "users": spec["concurrency"], **given})

    @property
    def longest_tokens(self) -> int:
        """Tokens of a whole conversation."""
        return self.first_turn_tokens + (self.turns - 1) * self.turn_tokens + self.turns * self.output_tokens


@dataclass(slots=True)
class _User:
    """One conversation: what has been said, and how long each turn took."""

    token_ids: list[int]
    sent_s: float = 0.0
    turn: int = 0


def converse(engine: Engine, workload: Workload) -> dict[str, Any]:
    """Hold all conversations to their end; times in milliseconds, medians over the users.

    Raises:
        PlanError: the plan's sequences are too short for such conversations.
    """
    if workload.longest_tokens > engine.max_seq_len:
        raise PlanError(
            f"a conversation has {workload.longest_tokens} tokens, the plan's sequences at most {engine.max_seq_len}",
            "lower --first-turn, --turn, --turns or --outputs, or plan for them",
        )
    _warm_up(engine, workload)
    return _Run(engine, workload).all()


def _warm_up(engine: Engine, workload: Workload) -> None:
    """Whatever is loaded or built at its first use: a prompt of some chunks, and an answer."""
    length = min(workload.first_turn_tokens, 2 * engine.plan.limits.max_tokens)
    engine.generate([[1] * length], SamplingParams(max_tokens=WARM_UP_TOKENS, ignore_eos=True))


class _Run:
    def __init__(self, engine: Engine, workload: Workload) -> None:
        self.engine, self.workload = engine, workload
        self._random = torch.Generator().manual_seed(workload.seed)
        self._users = {str(index): _User([]) for index in range(workload.users)}
        self._of_turn: dict[int, list[tuple[Completion, float]]] = defaultdict(list)

    def all(self) -> dict[str, Any]:
        before, begun = self.engine.metrics.copy(), time.perf_counter()
        for name in self._users:
            self._send(name, self.workload.first_turn_tokens)
        while self.engine.num_unfinished:
            for done in self.engine.step():
                self._answer(done)
        return self._report(time.perf_counter() - begun) | self._counted(self.engine.metrics.since(before).as_dict())

    def _send(self, name: str, count: int) -> None:
        user, vocab = self._users[name], self.engine.vocab_size
        user.token_ids += torch.randint(0, vocab, (count,), generator=self._random).tolist()
        user.sent_s = time.perf_counter()
        params = SamplingParams(max_tokens=self.workload.output_tokens, ignore_eos=True)
        self.engine.add(Request(name, tuple(user.token_ids), params))

    def _answer(self, done: Completion) -> None:
        user = self._users[done.request_id]
        self._of_turn[user.turn].append((done, time.perf_counter() - user.sent_s))
        user.token_ids += done.token_ids
        user.turn += 1
        if user.turn < self.workload.turns:
            self._send(done.request_id, self.workload.turn_tokens)

    def _report(self, wall_s: float) -> dict[str, Any]:
        turns = [self._of_turn[turn] for turn in sorted(self._of_turn)]
        answers = [answer for turn in turns for answer in turn]
        outputs = sum(len(done.token_ids) for done, _ in answers)
        gaps = [done.decode_s / (len(done.token_ids) - 1) for done, _ in answers if len(done.token_ids) > 1]
        prompts = sum(done.num_prompt_tokens for done, _ in answers)
        return {
            "workload": asdict(self.workload),
            "plan": self.engine.plan.digest,
            "model": self.engine.plan.model.name,
            "hit_rate": sum(done.num_cached_tokens for done, _ in answers) / prompts,
            "ttft_ms": [_median_ms([done.ttft_s for done, _ in turn]) for turn in turns],
            "tpot_ms": _median_ms(gaps) if gaps else None,
            "turn_time_ms": [_median_ms([taken for _, taken in turn]) for turn in turns],
            "tokens_per_s": outputs / wall_s,
            "tokens_per_s_per_user": outputs / sum(taken for _, taken in answers),
            "tokens_per_s_per_gpu": outputs / wall_s / self.engine.plan.target.count,
        }

    def _counted(self, counted: dict[str, float]) -> dict[str, Any]:
        return {
            "host_us_per_step": counted["host_us_per_step"],
            "state_bytes_copied_per_step": counted["copied_bytes_per_step"],
            "metrics": counted,
        }


def _median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def as_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    load = found["workload"]
    lines = [
        f"{found['model']}: {load['users']} users, {load['first_turn_tokens']} tokens and then {load['turn_tokens']} a "
        f"turn, {load['turns']} turns of {load['output_tokens']} tokens out",
        f"  {found['hit_rate']:.1%} of the prompt tokens were in the cache; "
        f"{found['tokens_per_s']:.0f} tokens/s in all, {found['tokens_per_s_per_user']:.0f} a user, "
        f"{found['tokens_per_s_per_gpu']:.0f} a GPU",
        f"  host {found['host_us_per_step']:.0f} us a step, {found['state_bytes_copied_per_step']:.0f} bytes of state "
        "copied a step" + (f", {found['tpot_ms']:.2f} ms a token" if found["tpot_ms"] else ""),
        f"  {'turn':>6} {'first token ms':>14} {'whole turn ms':>14}",
    ]
    rows = zip(found["ttft_ms"], found["turn_time_ms"], strict=True)
    return "\n".join(lines + [f"  {i:>6} {first:>14.2f} {whole:>14.2f}" for i, (first, whole) in enumerate(rows, 1)])
