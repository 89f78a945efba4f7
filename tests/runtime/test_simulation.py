"""A simulated load: the engine's own scheduling, and times that can be reckoned by hand."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT
from conversations import squeezed
from drafting import plan_of
from host_tiers import with_host
from launches import captured
from symbolic import VOCAB, SymbolicExecutor

from tokenspeed_plan.planner.advisor.load_capacity import largest_count, largest_rate
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.cache.slot_copies import SlotCopy
from tokenspeed_plan.runtime.simulation.load import Load, Turns, Users
from tokenspeed_plan.runtime.simulation.load_report import Levels, figures, percentiles_ms
from tokenspeed_plan.runtime.simulation.load_results import Simulated
from tokenspeed_plan.runtime.simulation.load_run import simulate
from tokenspeed_plan.runtime.simulation.recorded import Recorded, RecordedRow, read_recorded
from tokenspeed_plan.runtime.simulation.virtual_steps import VirtualClock, VirtualMover

DEMO = ROOT / "plans/frozen/demo-cpu"
PREFILL_US, DECODE_US = 1000.0, 100.0


class Times:
    """A token of a prompt takes 1 ms, a decode step 0.1 ms, the host what is said."""

    def __init__(self, host_us: float = 0.0) -> None:
        self._host_us = host_us

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        return PREFILL_US * tokens

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        return DECODE_US

    def host_us(self, seqs: int, prompts: int) -> float:
        return self._host_us


def small(plan: Plan, **limits: int) -> Plan:
    """With pages of four tokens and four sequences, unless `limits` say otherwise."""
    few = {"page_size": 4, "max_seq_len": 64, "max_tokens": 16, "interleaved_tokens": 8}
    few |= {"max_seqs": 4, "num_pages": 40, "num_checkpoints": 4, "checkpoint_interval": 8}
    return squeezed(plan, **(few | {"min_checkpoint_tokens": 4} | limits))


def users(count: int = 4, talks: int = 30, turns: int = 2) -> Users:
    """Conversations of other lengths each."""
    made = [
        Turns(1 + 7 * number % 23, 3, tuple(1 + (5 * number + turn) % 17 for turn in range(turns)))
        for number in range(talks)
    ]
    return Users(made, count, vocab_size=VOCAB)


def run_engine(engine: Engine, load: Load) -> None:
    """The real engine under the load, whose requests come as soon as they are known."""
    while load.next_time_s() is not None or engine.num_unfinished or engine.has_step_in_flight:
        while load.next_time_s() is not None:
            engine.add(load.pop().request)
        for completion in engine.step():
            load.answered(completion, 0.0)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("pages", [18, 40, 80])
def test_steps_are_those_of_the_engine(ahead: bool, pages: int, checkpoint: Any) -> None:
    """The same programs in the same order, the same hits, evictions and preemptions."""
    plan = small(plan_of(checkpoint("moe"), 0), num_pages=pages)
    if ahead:
        plan = captured(plan)
    executor = SymbolicExecutor(plan)
    engine = Engine(plan, executor)  # type: ignore[arg-type]
    run_engine(engine, users())
    found = simulate(plan, Times(), users())
    assert len(found.answers) == 60
    assert [(step.phase, step.bucket) for step in found.steps] == executor.programs
    real, simulated = engine.metrics.as_dict(), found.metrics.as_dict()
    for name in ("host_s", "host_us_per_step", "copied_bytes", "copied_bytes_per_step"):
        del real[name], simulated[name]
    assert real == simulated
    assert (found.metrics.preemptions > 0) == (pages == 18)


def one_by_one(prompt: int, output: int, count: int) -> Users:
    return Users([Turns(prompt, 0, (output,))] * count, 1, vocab_size=VOCAB)


def test_times_of_a_lone_user(checkpoint: Any) -> None:
    plan = small(plan_of(checkpoint("moe"), 0))
    found = simulate(plan, Times(), one_by_one(10, 5, 3))
    for answer in found.answers:
        assert answer.ttft_s == pytest.approx(10 * PREFILL_US * 1e-6)
        assert answer.decode_s == pytest.approx(4 * DECODE_US * 1e-6)
        assert answer.queue_s == 0.0
    assert found.total_s == found.busy_s == pytest.approx(3 * (0.010 + 0.0004))


def test_the_host_hides_behind_steps_that_are_launched_ahead(checkpoint: Any) -> None:
    """Step after step it adds its time; ahead of the device it adds only what is longer."""
    plan = small(plan_of(checkpoint("moe"), 0))
    answers = {}
    for ahead, host_us in ((False, 40.0), (True, 40.0), (True, 140.0)):
        made = captured(plan) if ahead else plan
        found = simulate(made, Times(host_us), one_by_one(10, 41, 1))
        answers[ahead, host_us] = found.answers[0].decode_s / 40 * 1e6
    assert answers[False, 40.0] == pytest.approx(DECODE_US + 40.0)
    assert answers[True, 40.0] == pytest.approx(DECODE_US, rel=0.05)
    assert answers[True, 140.0] == pytest.approx(140.0, rel=0.05)


def test_a_token_attends_to_what_its_own_sequence_has(checkpoint: Any) -> None:
    """The end of a long prompt is not cheaper where a short one begins in its step."""
    contexts = []

    class Noted(Times):
        def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
            contexts.append((tokens, context))
            return super().prefill_us(tokens, seqs, context)

    plan = small(plan_of(checkpoint("moe"), 0), interleaved_tokens=16, checkpoint_interval=64)
    load = Users([Turns(30, 0, (1,)), Turns(2, 0, (1,))], 2, vocab_size=VOCAB)
    simulate(plan, Noted(), load)
    # 16 of the long one; then its last 14, behind these 16, beside the 2 of the short one.
    assert contexts == [(16, 0.0), (16, 14.0)]


def test_a_clock_waits_for_the_device() -> None:
    clock = VirtualClock()
    clock.launch(10.0, 100.0)
    clock.launch(10.0, 100.0)
    assert clock() == pytest.approx(20e-6)
    assert clock.free_s == pytest.approx(210e-6)
    clock.wait_until(clock.free_s)
    clock.wait_until(0.0)
    clock.launch(10.0, 100.0)
    assert clock.free_s == pytest.approx(320e-6)


def test_copies_to_the_host_take_their_bytes_over_the_rate(checkpoint: Any) -> None:
    """Each direction has the whole link, and begins when all that was launched is done."""
    plan = with_host(small(plan_of(checkpoint("moe"), 0)), 400, 100)
    clock = VirtualClock()
    mover = VirtualMover(plan, clock)
    clock.launch(0.0, 500.0)
    two, one = (SlotCopy(True, (1,) * count, (1,) * count, 1, 1) for count in (2, 1))
    first, second = mover.start_copy(two), mover.start_copy(one)
    page_s, state_s = (plan.pool.slot_bytes(name) * 1e-9 for name in ("kv_cache", "state"))
    assert not first.is_done()
    first.wait()
    assert clock() == pytest.approx(500e-6 + 2 * page_s + state_s)
    out = mover.start_copy(SlotCopy(False, (1,), (1,), 1, 1))
    second.wait()
    assert clock() == pytest.approx(500e-6 + 3 * page_s + 2 * state_s)
    assert out.is_done()


def test_what_the_device_gave_up_comes_back(checkpoint: Any) -> None:
    plan = small(plan_of(checkpoint("moe"), 0), num_pages=18)
    lone = simulate(plan, Times(), users())
    found = simulate(with_host(plan, 400, 100, least_tokens=4), Times(), users())
    assert found.metrics.host_hits > 10
    assert found.metrics.computed_tokens < lone.metrics.computed_tokens
    assert figures(found, Levels())["host_hits"] == found.metrics.host_hits


@pytest.mark.parametrize("accepted", [(0.0,), (1.0,), (0.8, 0.5)])
def test_drafts_are_accepted_by_chance(accepted: tuple[float, ...], checkpoint: Any) -> None:
    plan = plan_of(checkpoint("moe"), 2)
    load = Users([Turns(5, 0, (200,))] * 40, 4, vocab_size=VOCAB)
    found = simulate(plan, Times(), load, accepted, seed=3)
    first, second = (*accepted, accepted[-1])[:2]
    expected = 1.0 + first + first * second
    assert found.metrics.tokens_per_pass == pytest.approx(expected, rel=0.03)


def test_arrivals_at_random_times_are_queued(checkpoint: Any) -> None:
    """An M/D/1 queue of prompts of 10 ms, at half of its capacity: they wait 5 ms on average.

    Source: Pollaczek and Khinchine, W = rho s / (2 (1 - rho)).
    """
    plan = small(plan_of(checkpoint("moe"), 0), max_seqs=1)
    load = Users([Turns(10, 0, (1,))] * 4000, None, starts_per_s=50.0, vocab_size=VOCAB)
    found = simulate(plan, Times(), load)
    times = sorted(answer.arrival_s for answer in found.answers)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    waits = statistics.fmean(answer.queue_s for answer in found.answers)
    assert waits == pytest.approx(0.005, rel=0.15)
    assert found.busy_s / found.total_s == pytest.approx(0.5, rel=0.05)


def test_users_think_between_turns(checkpoint: Any) -> None:
    plan = small(plan_of(checkpoint("moe"), 0))
    load = Users([Turns(10, 4, (3, 3))], 1, think_s=2.0, vocab_size=VOCAB)
    first, second = simulate(plan, Times(), load).answers
    end_s = first.arrival_s + first.ttft_s + first.decode_s
    assert second.arrival_s == pytest.approx(end_s + 2.0)
    assert second.prompt_tokens == 17
    assert second.cached_tokens > 0


def test_what_is_answered_is_told_meanwhile(checkpoint: Any) -> None:
    told: list[int] = []
    plan = small(plan_of(checkpoint("moe"), 0))
    found = simulate(plan, Times(), users(talks=6), progress=told.append)
    assert told == list(range(1, 1 + len(found.answers)))


def test_there_may_be_more_users_than_conversations() -> None:
    load = Users([Turns(10, 4, (3,))] * 2, 10**12, vocab_size=VOCAB)
    assert [load.pop().time_s for _ in range(2)] == [0.0, 0.0]
    assert load.next_time_s() is None


def test_recorded_requests_come_at_their_times(checkpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    rows = [(0.5, 8, 2), (0.0, 16, 3)]
    names = ("arrival_s", "prompt_tokens", "output_tokens")
    path.write_text("\n\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    read = read_recorded(path, 20)
    assert read == [RecordedRow(0.0, 16, 3), RecordedRow(0.5, 8, 2)]
    found = simulate(small(plan_of(checkpoint("moe"), 0)), Times(), Recorded(read, VOCAB))
    assert [answer.arrival_s for answer in found.answers] == [0.0, 0.5]
    assert [answer.prompt_tokens for answer in found.answers] == [16, 8]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no requests"),
        ("[1]", ":1` is no JSON object"),
        ("[" * 100_000, ":1` is no JSON object"),
        ('{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', "no time in seconds"),
        ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "no time in seconds"),
        ('{"arrival_s": true, "prompt_tokens": 1, "output_tokens": 1}', "no time in seconds"),
        ('{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 1}', "`prompt_tokens` is not"),
        ('{"arrival_s": 1, "prompt_tokens": 1}', "`output_tokens` is not"),
        (
            '{"arrival_s": 1, "prompt_tokens": 20, "output_tokens": 1}',
            "over the plan's limit of 20",
        ),
    ],
)
def test_a_bad_recording_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"recorded\.jsonl") as caught:
        read_recorded(path, 20)
    assert said in caught.value.message


def test_a_request_that_the_plan_cannot_hold_is_refused(checkpoint: Any) -> None:
    with pytest.raises(RequestError, match="64"):
        simulate(small(plan_of(checkpoint("moe"), 0)), Times(), one_by_one(60, 5, 1))


def test_percentiles_are_of_the_nearest_rank() -> None:
    found = percentiles_ms(number / 1000 for number in range(1, 201))
    assert found == {"p50": 100, "p90": 180, "p95": 190, "p99": 198}
    assert percentiles_ms([0.25]) == dict.fromkeys(found, 250)


@pytest.fixture(scope="module")
def loaded(checkpoint: Any) -> Iterator[Simulated]:
    yield simulate(small(plan_of(checkpoint("moe"), 0)), Times(), users())


def test_service_levels_are_counted(loaded: Simulated) -> None:
    ttfts = sorted(answer.ttft_s * 1e3 for answer in loaded.answers)
    middle = ttfts[len(ttfts) // 2 - 1]
    met = figures(loaded, Levels(ttft_ms=middle))["in_time"]
    assert met == pytest.approx(sum(one <= middle for one in ttfts) / len(ttfts), abs=1e-4)
    assert figures(loaded, Levels(tpot_ms=1e-6))["in_time"] < 0.2  # those of one token
    assert figures(loaded, Levels())["in_time"] == 1.0


def simulated(*options: str) -> Any:
    return CliRunner().invoke(main, ["simulate", str(DEMO), "--requests", "40", *options])


def test_the_command_says_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    first = simulated("--json", "--users", "4", "--trace", str(path))
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["requests"] == 40
    assert 0 < found["device_busy"] <= 1
    assert simulated("--json", "--users", "4").stdout == first.stdout
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event["name"] == "queue" for event in events) == 40
    assert all(event["dur"] >= 0 for event in events)
    assert "40 requests, 2 a second, in " in simulated("--arrivals", "2").stdout


def test_the_load_of_the_spec_is_named_and_judged_only_where_asked() -> None:
    """The demo plan has 16 sequences, and twice as many rows are there at once."""
    assert json.loads(simulated("--json").stdout)["users"] == 32
    text = simulated().stdout
    assert text.startswith("40 requests, 32 users at once, in ")
    assert "in time" not in text
    assert "0.0% of the requests in time" in simulated("--ttft-ms", "0.01").stdout


def test_two_loads_are_refused(tmp_path: Path) -> None:
    refused = simulated("--users", "3", "--arrivals", "2")
    assert refused.exit_code == 2
    assert "error: --users, --arrivals, --recorded and --most" in refused.output
    refused = simulated("--recorded", str(tmp_path / "none"))
    assert refused.exit_code == 2
    assert "cannot be read" in refused.output


def test_the_largest_load_in_time_is_found() -> None:
    """The next larger one is not."""
    found = simulated("--most", "users", "--tpot-ms", "12", "--json")
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    assert figures["in_time"] >= 0.95
    more = json.loads(
        simulated("--users", str(figures["users"] + 1), "--tpot-ms", "12", "--json").stdout
    )
    assert more["in_time"] < 0.95
    rates = json.loads(simulated("--most", "arrivals", "--ttft-ms", "900", "--json").stdout)
    assert rates["in_time"] >= 0.95
    assert rates["arrivals_per_s"] > 0


def test_a_load_that_is_never_in_time_is_refused() -> None:
    refused = simulated("--most", "users", "--tpot-ms", "0.001")
    assert refused.exit_code == 2
    assert "error: 95% of the requests are not in time" in refused.output
    assert "error: no service level" in simulated("--most", "users").output


@pytest.mark.parametrize("most", [0, 1, 2, 7, 100, 1000])
def test_the_largest_good_count(most: int) -> None:
    tried: list[int] = []

    def is_good(count: int) -> bool:
        tried.append(count)
        return count <= most

    assert largest_count(is_good, 1000) == (most or None)
    assert len(tried) <= 21


@pytest.mark.parametrize("limit", [1e-3, 0.7, 1.0, 130.0])
def test_the_largest_good_rate(limit: float) -> None:
    found = largest_rate(lambda rate: rate <= limit, 1.0)
    assert found is not None
    assert limit / 1.06 <= found <= limit
    assert largest_rate(lambda rate: False, 1.0) is None
