"""Two pools under a simulated load: times by hand, and the real pools' orders, steps and bytes."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conversations import squeezed
from launches import captured
from pool_pairs import Pools, nothing_is_held, plan_of_two, pools, returning, squeezed_prefill

from tokenspeed_plan.planner.advisor.plan_prices import plan_pair, plan_steps
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands import simulate_load
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.simulation.load import Load, Turns, Users
from tokenspeed_plan.runtime.simulation.load_results import PromptsComputed, Simulated
from tokenspeed_plan.runtime.simulation.load_run import simulate
from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes
from tokenspeed_plan.runtime.simulation.virtual_link import LayerBytes, Link

VOCAB = 480
PREFILL_US, DECODE_US, HANDSHAKE_US = 1000.0, 100.0, 300.0
FAST = Link((LayerBytes(1 << 20, 0), LayerBytes(0, 1 << 22)), float("inf"), HANDSHAKE_US)


class Times:
    """A token of a prompt takes 1 ms, a decode step 0.1 ms."""

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        return PREFILL_US * tokens

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        return DECODE_US

    def host_us(self, seqs: int, prompts: int) -> float:
        return 0.0


def prompts_of(found: Simulated) -> PromptsComputed:
    assert found.prompts is not None
    return found.prompts


def one_by_one(prompt: int, output: int, count: int) -> Users:
    return Users([Turns(prompt, 0, (output,))] * count, 1, vocab_size=VOCAB)


def test_the_first_token_of_a_lone_prompt(checkpoint: Any) -> None:
    """Its prompt but for one token, what is exposed of the transfer, and one decode step."""
    plan = plan_of_two(checkpoint("moe"))
    pair = PairTimes(Times(), FAST, FAST)
    found = simulate(plan, Times(), one_by_one(200, 5, 3), pair=pair)
    assert len(found.answers) == 3
    for answer in found.answers:
        expected_us = 199 * PREFILL_US + HANDSHAKE_US + DECODE_US
        assert answer.ttft_s == pytest.approx(expected_us * 1e-6)
        assert answer.decode_s == pytest.approx(4 * DECODE_US * 1e-6)
    prompts = prompts_of(found)
    assert prompts.counts.done == 3 and not prompts.counts.alone
    assert prompts.busy_s == pytest.approx(3 * 0.199)
    assert found.busy_s == pytest.approx(15 * DECODE_US * 1e-6)
    # `exposed_us` is told in whole microseconds.
    assert prompts.counts.exposed_s == pytest.approx(3 * HANDSHAKE_US * 1e-6, abs=2e-6)


def test_a_slow_link_shows_what_computation_does_not_hide(checkpoint: Any) -> None:
    """Two layers in equal parts of a step: the link is busy from the end of the first one on."""
    plan = plan_of_two(checkpoint("moe"))
    page_size, num_tokens = plan.pool.limits.page_size, 31
    pages = -(-num_tokens // page_size)
    layers = (LayerBytes(100, 0), LayerBytes(0, 400))
    for rate, exposed_us in (
        (1e6, 400.0 + HANDSHAKE_US),  # the first one's part is there when the second is computed
        (1e4, 1e2 * (100 * pages + 400) - num_tokens / 2 * PREFILL_US + HANDSHAKE_US),
    ):
        link = Link(layers, rate, HANDSHAKE_US)
        load = one_by_one(num_tokens + 1, 2, 1)
        found = simulate(plan, Times(), load, pair=PairTimes(Times(), link, link))
        expected_us = num_tokens * PREFILL_US + exposed_us + DECODE_US
        assert found.answers[0].ttft_s == pytest.approx(expected_us * 1e-6)


def test_prompts_do_not_hold_up_the_tokens_of_others(checkpoint: Any) -> None:
    """A pool that does both makes everybody wait for each prompt."""
    plan = plan_of_two(checkpoint("moe"))

    def load() -> Users:
        talks = [Turns(40 + number % 50, 0, (20 + number % 7,)) for number in range(40)]
        return Users(talks, 4, vocab_size=VOCAB)

    pair = PairTimes(Times(), FAST, FAST)
    found = simulate(plan, Times(), load(), pair=pair)
    assert {round(each.tpot_s * 1e6) for each in found.answers} == {round(DECODE_US)}
    alone = simulate(plan, Times(), load())
    assert max(each.tpot_s for each in alone.answers) > 10 * DECODE_US * 1e-6
    assert prompts_of(found).counts.done == 40


class Recorder:
    """What a loop launches."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self._inner = engine.loop._launcher
        engine.loop._launcher = self  # type: ignore[assignment]

    def start(self, batch: Any, part: Any = "whole") -> float:
        self.steps.append((batch.program.phase, batch.program.bucket, batch.num_tokens))
        return self._inner.start(batch, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def run_real(made: Pools, load: Load) -> None:
    """The real pools under the load of one user, who reads each answer before the next turn."""
    engine = made.engine
    while load.next_time_s() is not None:
        engine.add(load.pop().request)
        while not engine.is_idle:
            for completion in engine.step():
                load.answered(completion, 0.0)


def lone_talks() -> Users:
    """Conversations of one user after the other, of other lengths each."""
    made = [
        Turns(20 + 37 * number % 90, 5 + number % 30, (3 + number % 20, 1 + number % 7, 2))
        for number in range(12)
    ]
    return Users(made, 1, think_s=1.0, vocab_size=VOCAB)


@pytest.mark.parametrize("returns", [False, True])
def test_orders_and_steps_are_those_of_the_real_pools(returns: bool, checkpoint: Any) -> None:
    """One user: what is ordered, computed, handed over and offered depends on no time.

    Whether an answer still goes back when the next conversation begins does.
    """
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    if returns:
        plan = returning(plan)
    with pools(plan, folder) as made:
        chunk = plan.pool.limits.max_tokens
        handovers = made.connect([made.add_prefill(chunk=chunk)])
        own, other = Recorder(made.engine), Recorder(made.prefills[0])
        run_real(made, lone_talks())
        nothing_is_held(made)
        pair = plan_pair(plan, plan_steps(plan, folder))
        found = simulate(plan, Times(), lone_talks(), pair=pair)
        assert told(found.steps) == own.steps
        assert told(prompts_of(found).steps) == other.steps
        real, simulated = asdict(handovers.counts), asdict(prompts_of(found).counts)
        for counts in (real, simulated):
            del counts["wait_s"], counts["exposed_s"], counts["returned_bytes"]
            returned = counts.pop("returned")
            assert (returned > 10) == returns
            counts["ended"] = returned + counts.pop("dropped")
        assert simulated == real


def told(steps: Any) -> list[tuple[str, int, int]]:
    return [(step.phase, step.bucket, step.tokens) for step in steps]


class Uneven:
    """Steps whose time depends on all that a step is said to have."""

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        return 90.0 * tokens + 7.0 * seqs + 0.3 * context

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        return 800.0 + 11.0 * bucket + 3.0 * seqs + 0.7 * context

    def host_us(self, seqs: int, prompts: int) -> float:
        return 40.0 + 9.0 * seqs + 60.0 * prompts


def some_load(dice: random.Random) -> Users:
    turns = dice.choice([1, 3])
    made = [
        Turns(dice.randrange(1, 90), dice.randrange(30), tuple(dice.choices(range(1, 30), k=turns)))
        for _ in range(45 // turns)
    ]
    users, rate = dice.choice([(1, 0.0), (5, 0.0), (9, 0.0), (None, 30.0)])
    return Users(made, users, rate, dice.choice([0.0, 0.05]), VOCAB, dice.randrange(100))


def some_plan(whole: Plan, dice: random.Random) -> Plan:
    """Few pages, so that prompts wait for memory and sequences are preempted, in some cases."""
    plan = squeezed(
        whole,
        max_seqs=dice.choice([4, 8]),
        num_pages=dice.choice([24, 40, 120]),
        num_checkpoints=6,
    )
    plan = squeezed_prefill(plan, dice.choice([24, 60]))
    if dice.random() < 0.5:
        plan = returning(plan, token_us=dice.choice([10.0, 2e3]))
    return captured(plan) if dice.random() < 0.5 else plan


def said(found: Simulated) -> dict[str, Any]:
    """All that a simulation says, but for the time that it took."""
    prompts = prompts_of(found)
    all_of_it: dict[str, Any] = {
        "steps": [asdict(step) for step in found.steps],
        "prompt_steps": [asdict(step) for step in prompts.steps],
        "answers": [asdict(answer) for answer in found.answers],
        "counts": asdict(prompts.counts),
        "metrics": [asdict(found.metrics), asdict(prompts.metrics)],
        "times": (found.total_s, found.busy_s, prompts.busy_s),
    }
    for metrics in all_of_it["metrics"]:
        del metrics["host_s"]
    return all_of_it


def test_all_are_answered_and_sleep_changes_nothing(checkpoint: Any) -> None:
    """Random loads, under pressure; every step, answer and count as if nobody slept."""
    whole = plan_of_two(checkpoint("moe"))
    handed = returned = preempted = 0
    for seed in range(16):
        plan = some_plan(whole, random.Random(seed))
        link = Link((LayerBytes(1000, 0), LayerBytes(0, 8000)), 1e7, 50.0)
        pair = PairTimes(Uneven(), link, replace(link, bytes_per_s=3e6))
        runs = [
            simulate(plan, Uneven(), some_load(random.Random(seed)), every_step=each, pair=pair)
            for each in (True, False)
        ]
        awake, asleep = map(said, runs)
        assert asleep == awake, seed
        assert len(awake["answers"]) == 45
        handed += awake["counts"]["done"]
        returned += awake["counts"]["returned"]
        preempted += awake["metrics"][0]["preemptions"]
    assert handed > 200 and returned > 10 and preempted > 0


@pytest.fixture
def two_pools(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The command's bundle is a plan of two pools."""
    plan = plan_of_two(checkpoint("moe"))
    monkeypatch.setattr(simulate_load, "load_plan", lambda bundle: plan)
    return plan


def simulated(*options: str) -> Any:
    return CliRunner().invoke(main, ["simulate", ".", "--requests", "30", *options])


def test_the_command_simulates_both_pools(two_pools: Plan, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    done = simulated("--users", "3", "--json", "--trace", str(trace), "--html", str(page))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["pools"] == ["decode", "prefill"]
    prompts = found["prompts"]
    assert prompts["handed_over"] > 0
    assert 0 < prompts["exposed_ms"] <= prompts["wait_ms"]
    assert 0 < prompts["device_busy"] <= 1
    events = json.loads(trace.read_text())["traceEvents"]
    steps = sum(program["steps"] for program in prompts["programs"])
    assert sum(event["pid"] == "device of prompts" for event in events) == steps
    assert "Steps of the pool that computes prompts" in page.read_text()
    assert "pool of prompts: device busy" in simulated("--users", "3").stdout


def test_the_largest_load_of_both_pools(two_pools: Plan) -> None:
    level_ms = json.loads(simulated("--users", "1", "--json").stdout)["ttft_ms"]["p95"] * 4
    found = simulated("--most", "users", "--ttft-ms", str(level_ms), "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["users"] > 1
