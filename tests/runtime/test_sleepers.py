"""Sequences that sleep through a simulation: nothing is otherwise than if they were awake."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
from conversations import squeezed
from drafting import plan_of
from launches import captured

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.simulation.load import Turns, Users
from tokenspeed_plan.runtime.simulation.load_results import Simulated
from tokenspeed_plan.runtime.simulation.load_run import simulate
from tokenspeed_plan.runtime.simulation.sleepers import Sleepers

VOCAB = 97


class Times:
    """Steps whose time depends on all that a step is said to have."""

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        return 90.0 * tokens + 7.0 * seqs + 0.3 * context

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        return 800.0 + 11.0 * bucket + 3.0 * seqs + 0.7 * context

    def host_us(self, seqs: int, prompts: int) -> float:
        return 40.0 + 9.0 * seqs + 60.0 * prompts


def load(dice: random.Random) -> Users:
    """Conversations of a random kind."""
    turns = dice.choice([1, 1, 3])
    alike = dice.random() < 0.3
    talks = []
    for _ in range(60 // turns):
        outputs = tuple(20 if alike else dice.randrange(1, 40) for _ in range(turns))
        prompt = 12 if alike else dice.randrange(1, 40)
        talks.append(Turns(prompt, dice.randrange(6), outputs))
    users, rate = dice.choice([(1, 0.0), (5, 0.0), (9, 0.0), (None, 30.0), (None, 120.0)])
    think_s = dice.choice([0.0, 0.05])
    return Users(talks, users, rate, think_s, VOCAB, dice.randrange(100))


def small(plan: Plan, dice: random.Random) -> Plan:
    """Few pages, so that sequences are preempted and checkpoints evicted, in some cases."""
    return squeezed(
        plan,
        page_size=4,
        max_seq_len=180,
        max_tokens=16,
        interleaved_tokens=dice.choice([8, 16]),
        gathered_tokens=dice.choice([0, 12]),
        max_seqs=dice.choice([4, 8]),
        num_pages=dice.choice([45, 60, 200]),
        num_checkpoints=4,
        checkpoint_interval=8,
        min_checkpoint_tokens=4,
    )


def told(found: Simulated) -> dict[str, Any]:
    """All that a simulation says, but for the time that it took."""
    metrics = asdict(found.metrics)
    del metrics["host_s"]
    return {
        "steps": [asdict(step) for step in found.steps],
        "answers": [asdict(answer) for answer in found.answers],
        "metrics": metrics,
        "total_s": found.total_s,
        "busy_s": found.busy_s,
    }


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("family", ["moe", "dense"])
def test_sleep_changes_nothing(ahead: bool, family: str, checkpoint: Any) -> None:
    """Every step, its time and its size; every answer; every counter."""
    whole = plan_of(checkpoint(family), 0)
    preempted = 0
    for seed in range(12):
        plan = small(whole, random.Random(seed))
        if ahead:
            plan = captured(plan)
        awake = told(simulate(plan, Times(), load(random.Random(seed)), every_step=True))
        assert told(simulate(plan, Times(), load(random.Random(seed)))) == awake, seed
        preempted += awake["metrics"]["preemptions"]
    assert preempted > 0


def test_sequences_do_sleep(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of ten tokens come in their sleep."""
    slept = []
    wake = Sleepers.wake

    def noted(self: Sleepers, sequence: Any) -> Any:
        slept.append(self.steps - self.since[sequence])
        return wake(self, sequence)

    monkeypatch.setattr(Sleepers, "wake", noted)
    plan = captured(squeezed(plan_of(checkpoint("moe"), 0), max_seqs=8, max_seq_len=256))
    users = Users([Turns(16, 0, (200,))] * 16, 8, vocab_size=VOCAB)
    found = simulate(plan, Times(), users)
    assert sum(slept) > 0.9 * found.metrics.decode_tokens
