"""Batches: their steps are the scheduler's, their size is the cheapest, their pages are enough."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import make_spec
from conversations import check_all_is_given_back, squeezed
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import planned
from specs import merged
from symbolic import SymbolicExecutor, answer

from tokenspeed_plan.planner.advisor.batch_run import BatchLimits, run_batch
from tokenspeed_plan.planner.advisor.buckets import CAPTURE_US, MAX_BUCKETS, fitted_buckets
from tokenspeed_plan.planner.advisor.plan_prices import batch_prediction
from tokenspeed_plan.planner.advisor.resolve import Decided, resolve
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.passes.limits import Holding, decode_buckets
from tokenspeed_plan.planner.spec import Spec, load_spec
from tokenspeed_plan.planner.token_lengths import Lengths, rows_of
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision, Plan, Program
from tokenspeed_plan.runtime import Engine, Request, SamplingParams

ROWS = {"kind": "batch", "first_turn_tokens": 1024, "output_tokens": 256}
VARIED = {
    "first_turn_tokens": {"mean": 40, "p95": 100, "max": 200},
    "output_tokens": {"mean": 12, "p95": 30, "max": 60},
}


class OneEach:
    """Every step takes a microsecond, and a token of a prompt another."""

    def prefill_us(self, tokens: int) -> float:
        return 1.0 + tokens

    def prefill_host_us(self, tokens: int, num_seqs: int) -> float:
        return 0.0

    def decode_us(self, num_seqs: int, context_tokens: float) -> float:
        self.contexts.append((num_seqs, context_tokens))
        return 1.0

    def decode_host_us(self, num_seqs: int) -> float:
        return 0.25

    def tokens(self, num_seqs: int) -> float:
        return 1.0

    def __init__(self) -> None:
        self.contexts: list[tuple[int, float]] = []


class CountingExecutor(SymbolicExecutor):
    """Counts prefill steps, and decode steps by their sequences."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.prefills, self.decodes = 0, Counter[int]()

    def run(
        self,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: Any = None,
        part: Any = "whole",
    ) -> None:
        if program.phase == "prefill":
            self.prefills += 1
        else:
            self.decodes[num_seqs] += 1
        super().run(program, num_tokens, num_seqs, change)


def steps_of(plan: Plan, rows: list[tuple[int, int]], shared: int = 0) -> tuple[int, Counter[int]]:
    """Prefill steps, and decode steps by their sequences, of an engine that answers rows."""
    executor = CountingExecutor(plan)
    engine = Engine(plan, executor, cache=bool(shared))  # type: ignore[arg-type]
    for index, (prompt, output) in enumerate(rows):
        ids = tuple((index * 7 * (place >= shared) + place * 3) % 90 for place in range(prompt))
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add(Request(str(index), ids, params))
    while engine.num_unfinished:
        engine.step()
    return executor.prefills, executor.decodes


@pytest.mark.parametrize(("chunk", "gathered"), [(64, 0), (200, 0), (200, 130)])
@pytest.mark.parametrize("varied", [False, True])
def test_a_run_takes_the_steps_of_the_scheduler(
    chunk: int, gathered: int, varied: bool, tiny_plan: Plan
) -> None:
    """All alike step for step; of lengths that vary, whose prompts change places, on average."""
    plan = squeezed(
        tiny_plan,
        max_tokens=chunk,
        interleaved_tokens=chunk,
        gathered_tokens=gathered,
        max_seqs=6,
        checkpoint_interval=512,
    )
    lengths = (Lengths(60, 150, 280), Lengths(20, 40, 64))
    if not varied:
        lengths = (Lengths.all_alike(60), Lengths.all_alike(20))
    rows = list(rows_of(*lengths, 40))
    prefills, decodes = steps_of(plan, rows)
    run = run_batch(rows, BatchLimits(6, chunk, chunk, gathered), OneEach())
    assert run.output_tokens == sum(output for _, output in rows)
    if varied:
        assert run.prefill_steps == pytest.approx(prefills, rel=0.1)
        assert sum(run.decode_steps.values()) == pytest.approx(decodes.total(), rel=0.05)
        assert run.mean_batch == pytest.approx(
            sum(size * count for size, count in decodes.items()) / decodes.total(), rel=0.05
        )
    else:
        assert (run.prefill_steps, run.decode_steps) == (prefills, decodes)


def test_prompts_that_begin_alike_take_the_steps_of_the_scheduler(tiny_plan: Plan) -> None:
    """The first of them computes what they share, and the others their own tokens."""
    plan = squeezed(
        tiny_plan, max_tokens=64, interleaved_tokens=64, max_seqs=6, checkpoint_interval=512
    )
    rows, shared = [(128 + 20, 10)] * 20, 128
    prefills, decodes = steps_of(plan, rows, shared)
    run = run_batch(rows, BatchLimits(6, 64, 64, 0, shared), OneEach())
    assert run.prefill_us == run.prefill_steps + shared + 20 * 20
    assert run.computed_tokens == shared + 20 * 20
    assert (run.prefill_steps, run.decode_steps) == (prefills, decodes)


def test_a_run_by_hand() -> None:
    """Two of three rows at once, of ten tokens and three: each chunk of twenty takes two."""
    prices = OneEach()
    run = run_batch([(10, 3)] * 3, BatchLimits(2, 20, 20), prices)
    # prefill 2; decode 2 at contexts of 11 and 12; prefill 1; decode 1 twice
    assert (run.prefill_steps, run.decode_steps) == (2, {2: 2, 1: 2})
    assert (run.prefill_us, run.decode_us, run.host_us) == (21 + 11, 4.0, 1.0)
    assert prices.contexts == [(2, 11.5), (1, 11.5)]
    assert run.total_s == pytest.approx(37e-6)
    assert run.output_tokens_per_s == pytest.approx(9 / 37e-6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_a_run_computes_every_token_once(
    rows: list[tuple[int, int]], seqs: int, chunk: int, interleaved: int
) -> None:
    run = run_batch(rows, BatchLimits(seqs, chunk, min(chunk, interleaved)), OneEach())
    made = sum(size * count for size, count in run.decode_steps.items())
    assert made == sum(output - 1 for _, output in rows)
    assert run.prefill_us == run.prefill_steps + sum(prompt for prompt, _ in rows)
    assert max(run.decode_steps, default=0) <= seqs


def spec_for(model: str = "35b-a3b", **changes: Any) -> Spec:
    data: dict[str, Any] = {
        "version": 1,
        "model": {"preset": f"qwen3.5-{model}"},
        "target": {"gpu": "H200"},
        "speculation": "off",
        "objective": {"minimize": "cost_per_token"},
        "workload": ROWS,
    }
    return Spec.model_validate(merged(data, changes))


def decided_for(spec: Spec) -> tuple[Decided, dict[str, Decision]]:
    ledger = Ledger()
    config, _ = load_preset(str(spec.model.preset))
    decided = resolve(spec, config, find_hardware(spec.target.gpu), ledger)
    return decided, {decision.name: decision for decision in ledger.decisions}


def test_prompts_share_a_chunk_where_that_is_cheaper() -> None:
    """A chunk is longer than a row; agents, who do not wait together, keep theirs."""
    batch, decisions = decided_for(spec_for(workload={"concurrency": 128}))
    assert batch.knobs.prefill_chunk >= 4 * (1024 + 256)
    tried = decisions["prefill_chunk"].options
    costs = [option.numbers["cost_per_million_tokens_usd"] for option in tried]
    value = batch.predicted.values["cost_per_million_tokens_usd"]
    assert len(costs) >= 3 and all(value < cost for cost in costs)
    alone, _ = decided_for(spec_for(workload={"concurrency": 1}))
    assert alone.knobs.prefill_chunk == 2048
    agents, _ = decided_for(spec_for(workload={"kind": "agentic", "concurrency": 128}))
    assert agents.knobs.prefill_chunk <= 2048


def test_prompts_wait_for_each_other_where_answers_vary() -> None:
    varied = {
        "first_turn_tokens": {"mean": 1024, "p95": 2600, "max": 8000},
        "output_tokens": {"mean": 256, "p95": 650, "max": 2048},
        "concurrency": 128,
        "rows": 1000,
    }
    waiting, decisions = decided_for(spec_for(workload=varied))
    assert 0 < waiting.gathered_tokens <= waiting.knobs.prefill_chunk
    assert "times the tokens" in decisions["gathering"].reason
    alike, others = decided_for(spec_for(workload={"concurrency": 128}))
    assert alike.gathered_tokens == 0 and "gathering" not in others
    agents, _ = decided_for(spec_for(workload={"kind": "agentic", "concurrency": 16}))
    assert agents.gathered_tokens == 0


def test_prompts_that_wait_have_the_same_answers(tiny_plan: Plan) -> None:
    """The last rows of a batch, for which nobody comes any more, do not wait."""
    rows = list(rows_of(Lengths(60, 150, 280), Lengths(20, 40, 64), 40))
    plan = squeezed(tiny_plan, gathered_tokens=300, interleaved_tokens=512, max_seqs=6)
    engine = Engine(plan, SymbolicExecutor(plan))  # type: ignore[arg-type]
    prompts = [
        tuple((i * 7 + place) % 90 for place in range(size)) for i, (size, _) in enumerate(rows)
    ]
    for index, (_, output) in enumerate(rows):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add(Request(str(index), prompts[index], params))
    ended = []
    while engine.num_unfinished:
        ended += engine.step()
    assert len(ended) == len(rows)
    for done in ended:
        index = int(done.request_id)
        assert done.token_ids == answer(prompts[index], rows[index][1])
    check_all_is_given_back(engine.scheduler.cache)


def test_auto_finds_the_cheapest_number_of_sequences() -> None:
    spec = spec_for()
    assert spec.workload.concurrency == "auto"
    decided, decisions = decided_for(spec)
    curve = decisions["concurrency"].options
    assert decisions["concurrency"].value == f"{decided.num_seqs} sequences"
    rates = [option.numbers["tokens_per_s_gpu"] for option in curve]
    sizes = [int(option.what.split()[0]) for option in curve]
    assert len(curve) > 10 and sizes == sorted(sizes) and decided.num_seqs in sizes
    assert rates[sizes.index(decided.num_seqs)] >= 0.99 * max(rates)
    capacity = find_hardware("H200").memory_bytes / (1 << 30)
    assert all(option.numbers["memory_gib"] <= capacity for option in curve)
    assert max(decided.depths) == decided.num_seqs
    few, _ = decided_for(spec_for(workload={"rows": 20}))
    assert few.num_seqs <= 20


def test_auto_keeps_the_service_levels() -> None:
    free, _ = decided_for(spec_for())
    level = 0.5 * free.predicted.values["tpot_ms"]
    held, decisions = decided_for(spec_for(slo={"tpot_ms": level}))
    assert held.num_seqs < free.num_seqs
    assert decisions["service_levels"].value == "met"


def test_predict_takes_the_number_that_plan_takes() -> None:
    spec = spec_for("9b")
    decided, _ = decided_for(spec)
    found = search(spec, load_preset("qwen3.5-9b")[0])[1]
    assert found.best.concurrency == decided.num_seqs
    with pytest.raises(SpecError, match="GiB on each H200"):
        decided_for(spec_for("397b-a17b"))


def test_more_sequences_fit_where_lengths_vary() -> None:
    """Pages are for the mean and a margin; the longest one fits in any case."""
    longest = {"first_turn_tokens": 8000, "output_tokens": 2048, "concurrency": 64}
    varied = {
        "first_turn_tokens": {"mean": 1024, "p95": 2600, "max": 8000},
        "output_tokens": {"mean": 256, "p95": 650, "max": 2048},
        "concurrency": 64,
    }
    many, _ = decided_for(spec_for(workload=longest))
    fewer_pages, _ = decided_for(spec_for(workload=varied))
    assert fewer_pages.predicted.largest_concurrency > 1.3 * many.predicted.largest_concurrency


@settings(deadline=None)
@given(
    st.floats(1, 5000),
    st.floats(0, 1e6),
    st.integers(1, 512),
    st.integers(1, 200),
    st.sampled_from([16, 64]),
)
def test_pages_are_for_the_mean_and_one_longest(
    mean: float, variance: float, num_seqs: int, longest: int, page_size: int
) -> None:
    pages = Holding(mean, variance).pages(num_seqs, longest, page_size)
    assert longest + 1 <= pages <= num_seqs * (longest + 1)
    if pages < num_seqs * (longest + 1):
        assert pages * page_size >= num_seqs * mean
    assert Holding().pages(num_seqs, longest, page_size) == num_seqs * (longest + 1)


def test_rows_that_are_all_the_longest_lose_nothing(checkpoint: Any) -> None:
    """Far more than was planned for: some are preempted, and every answer is the right one."""
    spec = make_spec(checkpoint("moe"), workload=VARIED | {"concurrency": 12})
    plan = planned(spec)
    limits = plan.pool.limits
    assert limits.num_pages < 12 * (limits.max_seq_len // limits.page_size)
    assert limits.max_seq_len >= 260 and limits.default_max_tokens == 60
    engine = Engine(plan, SymbolicExecutor(plan))  # type: ignore[arg-type]
    prompts = [tuple((i * 5 + place) % 89 for place in range(200)) for i in range(24)]
    for index, ids in enumerate(prompts):
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        engine.add(Request(str(index), ids, params))
    ended = []
    while engine.num_unfinished:
        ended += engine.step()
    assert engine.metrics.preemptions > 0 and len(ended) == 24
    for done in ended:
        assert done.token_ids == answer(prompts[int(done.request_id)], 60)
    check_all_is_given_back(engine.scheduler.cache)


def test_rows_that_begin_alike_fit_in_pages_that_are_held_once(checkpoint: Any) -> None:
    """All sequences run at once and none is preempted, in a third of the pages of other rows."""
    workload = {"first_turn_tokens": 520, "output_tokens": 16, "concurrency": 12, "rows": 24}
    spec, shared = make_spec(checkpoint("moe"), workload=workload), 450
    alone = planned(spec)
    spec = make_spec(checkpoint("moe"), workload=workload | {"shared_prompt_tokens": shared})
    plan = planned(spec)
    assert plan.pool.limits.num_pages < alone.pool.limits.num_pages / 3
    engine = Engine(plan, SymbolicExecutor(plan))  # type: ignore[arg-type]
    prompts = [
        tuple((place * 3 + i * 7 * (place >= shared)) % 89 for place in range(520))
        for i in range(24)
    ]
    for index, ids in enumerate(prompts):
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        engine.add(Request(str(index), ids, params))
    ended, most = [], 0
    while engine.num_unfinished:
        ended += engine.step()
        most = max(most, len(engine.scheduler.running))
    assert (engine.metrics.preemptions, most) == (0, 12)
    for done in ended:
        assert done.token_ids == answer(prompts[int(done.request_id)], 16)


def cost_of(buckets: tuple[int, ...], steps: dict[int, int]) -> float:
    """Microseconds of all steps, where a step takes as many as its bucket, and of all captures."""
    times = [count * 100.0 * min(b for b in buckets if b >= n) for n, count in steps.items()]
    return sum(times) + CAPTURE_US * len(buckets)


@settings(deadline=None)
@given(st.dictionaries(st.integers(1, 128), st.integers(1, 3000), max_size=40))
def test_buckets_pay_for_their_capture(steps: dict[int, int]) -> None:
    """No worse than powers of two, nor than with one bucket less."""
    kept = decode_buckets(128)
    found = fitted_buckets(steps, kept, lambda size: 100.0 * size)
    assert set(kept) <= set(found) and len(found) <= MAX_BUCKETS
    assert found == tuple(sorted(found))
    assert cost_of(found, steps) <= cost_of(kept, steps)
    for extra in set(found) - set(kept):
        without = tuple(size for size in found if size != extra)
        assert cost_of(found, steps) <= cost_of(without, steps)


def test_sixty_five_sequences_need_not_pay_for_128() -> None:
    kept = decode_buckets(128)
    found = fitted_buckets({65: 100_000}, kept, lambda size: 100.0 * size)
    assert min(size for size in found if size >= 65) <= 72
    assert fitted_buckets({65: 10}, kept, lambda size: 100.0 * size) == kept


def test_a_plan_has_the_buckets_of_its_batch() -> None:
    varied = {
        "first_turn_tokens": {"mean": 1024, "p95": 2600, "max": 8000},
        "output_tokens": {"mean": 256, "p95": 650, "max": 2048},
        "concurrency": 128,
    }
    few, _ = decided_for(spec_for(workload=varied | {"rows": 256}))
    many, _ = decided_for(spec_for(workload=varied | {"rows": 2000}))
    assert set(decode_buckets(128)) <= set(few.depths) <= set(range(1, 129))
    assert len(many.depths) <= MAX_BUCKETS
    agents, _ = decided_for(spec_for(workload=ROWS | {"kind": "agentic", "concurrency": 48}))
    assert tuple(agents.depths) == decode_buckets(48)


def test_a_plan_predicts_any_batch(checkpoint: Any) -> None:
    """The tokens of a plan's own rows; twice the rows take about twice as long, alone or not."""
    spec = make_spec(checkpoint("moe"))
    plan = planned(spec)
    rows = [(300, 64)] * (8 * 8)
    own = batch_prediction(plan, Path(), rows)
    assert own["output_tokens_per_s"] == pytest.approx(
        plan.predicted.values["tokens_per_s_gpu"], rel=0.01
    )
    twice = batch_prediction(plan, Path(), rows * 2)
    assert twice["total_s"] == pytest.approx(2 * own["total_s"], rel=0.02)
    parts = own["prefill_s"] + own["decode_s"] + own["host_s"]
    assert own["total_s"] == pytest.approx(parts, rel=1e-3)
    assert own["mean_batch"] == pytest.approx(8, rel=0.05)


@settings(deadline=None)
@given(st.floats(1, 4000), st.floats(1, 4), st.floats(1.2, 8))
def test_lengths_have_their_mean_and_tail(mean: float, tail: float, longest: float) -> None:
    lengths = Lengths(mean, mean * tail, math.ceil(mean * tail * longest) + 1)
    found = lengths.quantiles(2000)
    assert found == sorted(found) and found[0] >= 1 and found[-1] <= lengths.longest
    assert fmean(found) == pytest.approx(mean, rel=0.06, abs=0.6)
    if 1.1 < tail < 3.5 and mean > 50 and longest > 4:
        assert found[1899] == pytest.approx(lengths.p95, rel=0.12)
    assert sorted(lengths.sample(50, 3)) == lengths.quantiles(50)


def test_a_file_of_lengths_becomes_its_summary(tmp_path: Path) -> None:
    rows = [{"prompt_tokens": n, "output_tokens": 2 * n} for n in range(1, 101)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = (
        "{version: 1, model: {preset: qwen3.5-9b}, target: {gpu: H200}, workload: "
        "{first_turn_tokens: {lengths: rows.jsonl}, output_tokens: {lengths: rows.jsonl}}}"
    )
    (tmp_path / "spec.yaml").write_text(text)
    workload = load_spec(tmp_path / "spec.yaml").workload
    assert workload.prompts == Lengths(50.5, 95, 100)
    assert workload.outputs == Lengths(101, 190, 200)
    assert workload.max_conversation_tokens == 300
    with pytest.raises(SpecError, match="tokens on average"):
        load_spec(tmp_path / "spec.yaml", ["workload.shared_prompt_tokens=60"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read"),
        (b"\xff", "cannot read"),
        (b"", "has no rows"),
        (b"{}", "not a whole number"),
        (b"[1]", ":1` is no JSON object"),
        (b"\n{'a'}", ":2` is no JSON object"),
        (b'{"prompt_tokens": 0}', "not a whole number"),
        (b'{"prompt_tokens": true}', "not a whole number"),
        (b'{"prompt_tokens": 100000001}', "not a whole number from 1 to 100000000"),
        (b'{"prompt_tokens": 1, "output_tokens": 0}', "`output_tokens` is not"),
        (b'{"prompt_tokens": 1}', "no row of .* has `output_tokens`"),
    ],
)
def test_a_file_of_lengths_that_is_none(text: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_bytes(text)
    (tmp_path / "spec.yaml").write_text(
        "{version: 1, model: {preset: qwen3.5-9b}, target: {gpu: H200}, workload: "
        "{output_tokens: {lengths: rows.jsonl}}}"
    )
    with pytest.raises(SpecError, match=says) as refused:
        load_spec(tmp_path / "spec.yaml")
    assert "tokenspeed lengths" in refused.value.hint


def line_of(name: str, **body: Any) -> str:
    head = {"custom_id": name, "method": "POST", "url": "/v1/completions"}
    return json.dumps(head | {"body": body})


def answer_of(name: str, prompt: int, output: int) -> str:
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return json.dumps({"custom_id": name, "response": {"body": {"usage": usage}}})


def lengths(tmp_path: Path, rows: list[str], answers: list[str], *more: str) -> Any:
    (tmp_path / "batch.jsonl").write_text("\n".join(rows))
    (tmp_path / "out.jsonl").write_text("\n".join(answers))
    named = ["--answers", str(tmp_path / "out.jsonl")] if answers else []
    out = tmp_path / "lengths.jsonl"
    command = ["lengths", str(tmp_path / "batch.jsonl"), "-o", str(out), *named, *more]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    return done, found


def test_lengths_are_those_of_the_answers(tmp_path: Path) -> None:
    rows = [
        line_of("a", prompt="x", max_tokens=50),
        line_of("b", prompt=["x", "y"], n=2),
        line_of("never", prompt="z", max_tokens=9),
    ]
    answers = [answer_of("a", 7, 20), answer_of("b", 10, 40), "{broken", answer_of("other", 1, 1)]
    done, found = lengths(tmp_path, rows, answers)
    assert done.exit_code == 0, done.output
    assert found == [
        {"prompt_tokens": 7, "output_tokens": 20},
        *[{"prompt_tokens": 5, "output_tokens": 10}] * 4,
    ]
    assert "first_turn_tokens: {mean: 5.4, p95: 7, max: 7}" in done.stderr


def test_lengths_of_rows_without_answers(tmp_path: Path) -> None:
    """The demo's tokenizer counts prompts, and `max_tokens` stands for the answer."""
    rows = [line_of("a", prompt="def f(x):", max_tokens=30), line_of("b", prompt="import os")]
    done, found = lengths(tmp_path, rows, [], "--model", "examples/demo/model")
    assert done.exit_code == 0, done.output
    assert found[0]["output_tokens"] == 30 and "output_tokens" not in found[1]
    assert all(2 <= row["prompt_tokens"] <= 9 for row in found)


def test_lengths_need_a_tokenizer_or_answers(tmp_path: Path) -> None:
    done, _ = lengths(tmp_path, [line_of("a", prompt="x")], [])
    assert done.exit_code == 2 and "nothing says how long prompts are" in done.stderr
    done, _ = lengths(tmp_path, ["{}"], [answer_of("a", 1, 1)])
    assert done.exit_code == 2 and "batch.jsonl:1` cannot be run" in done.stderr
    done, _ = lengths(tmp_path, [line_of("a", prompt="x")], [], "--model", "no/such")
    assert done.exit_code == 2 and "no folder `no/such`" in done.stderr
