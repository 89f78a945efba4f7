"""Speculation changes how many steps an answer takes, and nothing else."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS
from click.testing import CliRunner
from conftest import ROOT, make_spec
from conversations import (
    check_all_is_given_back,
    poisoned,
    replay,
    squeezed,
)
from drafting import PROMPTS, conversations_of, plan_of, tokens_of
from launches import LateLaunch, captured
from planning import planned
from random_requests import answers_at_random
from torch import Tensor
from trained import Round, Twin

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.launch import EagerLaunch
from tokenspeed_plan.runtime.reference import speculation
from tokenspeed_plan.runtime.reference.sampling import filtered, sample

DEPTHS = (1, 2, 5)  # the least, one more, and the most


def engine_of(folder: Path, depth: int, rollback: str = "snapshot", **options: Any) -> Engine:
    return Engine.from_plan(plan_of(folder, depth, rollback), folder, **options)


@cache
def without_drafts(folder: Path, **params: Any) -> list[tuple[int, ...]]:
    """The answers of an engine that drafts nothing."""
    return tokens_of(engine_of(folder, 0), **params)


ROLLBACKS = ("snapshot", "recompute")


class TracingLaunch(EagerLaunch):
    """Records the drafts of each decode step, and how many of them were accepted."""

    def __init__(self) -> None:
        self.rounds: list[tuple[Round, ...]] = []

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        memory = programs.memory
        token_ids = memory.buffer("token_ids", num_tokens, num_seqs).clone()
        super().run(programs, program, num_tokens, num_seqs, part)
        if program.phase == "decode":
            accepted = memory.buffer("accepted", num_tokens, num_seqs).tolist()
            drafts = token_ids.view(num_seqs, -1)[:, 1:].tolist()
            self.rounds.append(
                tuple(Round(tuple(d), n) for d, n in zip(drafts, accepted, strict=True))
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rollback"), [("moe", "snapshot"), ("dense", "snapshot"), ("moe", "recompute")]
)
@pytest.mark.parametrize("depth", DEPTHS)
def test_trained_checkpoints_give_the_same_tokens(
    kind: str, rollback: str, depth: int, trained: Any
) -> None:
    """Greedy and sampled, in fewer steps; each possible number of drafts is accepted somewhere."""
    folder = trained(kind)
    trace = TracingLaunch()
    fast = engine_of(folder, depth, rollback, launch=trace)
    assert tokens_of(fast, most=64) == without_drafts(folder, most=64)
    hot = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    assert tokens_of(fast, **hot) == without_drafts(folder, **hot) != without_drafts(folder)
    accepted = Counter(found.accepted for step in trace.rounds for found in step)
    assert set(accepted) == set(range(depth + 1))
    assert fast.metrics.tokens_per_pass > 1.3
    assert fast.metrics.copied_bytes == 0
    counts = fast.accept_counts
    assert counts[0] == accepted.total()
    assert [a - b for a, b in pairwise([*counts, 0])] == [accepted[n] for n in range(depth + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "dense", "tied", "flat", "ratio3", "deep", "yarn"])
def test_random_checkpoints_give_the_same_tokens(kind: str, checkpoint: Any) -> None:
    folder = checkpoint(kind)
    wanted = without_drafts(folder)
    for depth in DEPTHS if kind in ("moe", "dense") else (3,):
        assert tokens_of(engine_of(folder, depth)) == wanted
    assert tokens_of(engine_of(folder, 3, "recompute")) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "tied"])
def test_drafts_of_a_part_of_the_vocabulary(kind: str, trained: Any, checkpoint: Any) -> None:
    """Drafts come from the given part of the vocabulary only, and the tokens are the same."""
    folder = trained(kind) if kind == "moe" else checkpoint(kind)
    wanted = tokens_of(engine_of(folder, 0), most=48)
    for part in (64, 300):
        spec = make_spec(folder, speculation={"depth": 3, "draft_vocab": part})
        trace = TracingLaunch()
        engine = Engine.from_plan(planned(spec), folder, launch=trace)
        assert tokens_of(engine, most=48) == wanted
        # Where a sequence has no drafts after a prefill, they are padding: 0.
        assert (
            max(draft for step in trace.rounds for found in step for draft in found.drafts) < part
        )
        if kind == "moe":
            assert engine.metrics.tokens_per_pass > 1.05


@pytest.mark.slow
def test_the_demo_model_gives_the_same_tokens() -> None:
    path = ROOT / "examples/demo/spec.yaml"
    spec = load_spec(path)
    model = find_model(spec, path)
    assert model.folder is not None
    wanted: list[tuple[int, ...]] = []
    for depth in (0, *DEPTHS):
        change = {"speculation": {"depth": depth} if depth else "off"}
        plan = compile_plan(spec.model_validate(spec.model_dump() | change), model)
        engine = Engine.from_plan(plan, model.folder)
        assert engine.tokenizer is not None
        texts = ("def fibonacci(n):\n", "import os\n\n\nclass Path:\n", "The quick brown fox")
        found = tokens_of(engine, [engine.tokenizer.encode(text) for text in texts], 48)
        wanted = wanted or found
        assert found == wanted
        assert depth == 0 or engine.metrics.tokens_per_pass > 1.4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_rounds_are_those_of_the_twin(kind: str, trained: Any) -> None:
    """Drafts and accepted counts of each step equal those of the twin, which caches nothing."""
    folder = trained(kind)
    twin = Twin(folder, KINDS[kind])
    for prompt, depth in (([3, 4, 5], 3), (list(range(70)), 2), ([7, 300, 20, 11], 5)):
        ids, rounds = twin.rounds(prompt, 40, depth)
        trace = TracingLaunch()
        engine = engine_of(folder, depth, launch=trace, chunk=32)
        assert tokens_of(engine, [prompt], 40) == [tuple(ids)]
        found = [step[0] for step in trace.rounds]
        assert found[:-1] == rounds[:-1]  # the last one may be cut at the end
        assert found[-1].drafts == rounds[-1].drafts
        assert len({made.accepted for made in rounds}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("seed", "rollback"), [(0, "snapshot"), (1, "snapshot"), (1, "recompute"), (2, "recompute")]
)
def test_conversations_through_the_cache(
    seed: int, rollback: str, ahead: bool, trained: Any
) -> None:
    """Shared, branched and edited prefixes, few pages and cancelled requests change no answer."""
    folder = trained("moe")
    conversations = conversations_of(folder, 8, seed)
    plan = squeezed(
        plan_of(folder, 1 + 2 * seed, rollback), num_pages=24, num_checkpoints=6, max_seqs=6
    )
    engine = poisoned(captured(plan) if ahead else plan, folder, late=ahead)
    replay(engine, conversations, seed, cancel=0.05)
    assert engine.metrics.hit_tokens
    assert engine.metrics.tokens_per_pass > 1.02
    check_all_is_given_back(engine.scheduler.cache)


@pytest.mark.slow
@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize("ahead", [False, True])
def test_more_than_fits_is_preempted_and_goes_on(ahead: bool, rollback: str, trained: Any) -> None:
    """Prompts in chunks and answers of six pages each, with sixteen in all."""
    folder = trained("moe")
    plan = squeezed(plan_of(folder, 4, rollback), num_pages=16, num_checkpoints=4, max_seqs=4)
    engine = poisoned(captured(plan) if ahead else plan, folder, late=ahead, chunk=16)
    prompts = [[index, *range(20)] for index in range(5)]
    assert tokens_of(engine, prompts, 64) == tokens_of(engine_of(folder, 0), prompts, 64)
    assert engine.metrics.preemptions
    assert engine.metrics.tokens_per_pass > 1.3
    check_all_is_given_back(engine.scheduler.cache)


def ending(engine: Engine, params: SamplingParams) -> tuple[tuple[int, ...], str, str]:
    """An answer to the first prompt, and why it has ended."""
    (done,) = engine.generate(PROMPTS[:1], params)
    return done.token_ids, done.text, done.finish_reason


@cache
def endings(folder: Path) -> list[tuple[SamplingParams, Any]]:
    """Token limits, stop tokens and stop strings, and the answers without drafts."""
    plain = engine_of(folder, 0)
    (whole,) = tokens_of(plain, PROMPTS[:1], 40)
    assert plain.tokenizer is not None
    ends: list[dict[str, Any]] = [{"max_tokens": most} for most in range(1, 12)]
    ends += [{"stop_token_ids": (token,)} for token in dict.fromkeys(whole)]
    # More stop tokens than the kernel compares.
    ends += [{"stop_token_ids": tuple(range(t, t + 200))} for t in (0, 100, 250)]
    ends += [{"stop": (plain.tokenizer.decode([token]),)} for token in dict.fromkeys(whole[8:24])]
    every = [SamplingParams(**{"max_tokens": 40, "ignore_eos": True} | each) for each in ends]
    return [(params, ending(plain, params)) for params in every]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ahead", "rollback"), [(False, "snapshot"), (True, "snapshot"), (True, "recompute")]
)
def test_ends_in_the_middle_of_a_run(ahead: bool, rollback: str, trained: Any) -> None:
    """Token limits, stop tokens and stop strings end answers as they do without speculation."""
    folder = trained("dense")
    plan = plan_of(folder, 4, rollback)
    fast = Engine.from_plan(captured(plan) if ahead else plan, folder)
    for params, wanted in endings(folder):
        assert ending(fast, params) == wanted, params
    check_all_is_given_back(fast.scheduler.cache)


@cache
def plain_engine(folder: Path) -> Engine:
    """Without drafts and without a cache."""
    return engine_of(folder, 0, cache=False)


@cache
def plain_answer(folder: Path, prompt: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The answer of that engine."""
    (ids,) = tokens_of(plain_engine(folder), [list(prompt)], most)
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize("ahead", [False, True])
def test_the_next_turn_goes_on_where_the_last_one_ended(
    ahead: bool, rollback: str, trained: Any
) -> None:
    """The cache has the state at the end of an answer, wherever the answer ends.

    With `recompute` a step that was launched ahead has left it; else it has the state before the
    last step, which is at most `query_len` tokens earlier.
    """
    folder, plan = trained("dense"), plan_of(trained("dense"), 4, rollback)
    fast = Engine.from_plan(captured(plan) if ahead else plan, folder)
    exact = 0
    for number in range(24):
        prompt = [number, *PROMPTS[1]]
        *_, last = plain_answer(folder, tuple(prompt), 8 + number)
        ends = (
            {"max_tokens": 8 + number}
            if number % 2
            else {"max_tokens": 40, "stop_token_ids": (last,)}
        )
        params = SamplingParams(**{"ignore_eos": True} | ends)
        (first,) = fast.generate([prompt], params)
        turn = [*prompt, *first.token_ids, 9, 8]
        (second,) = fast.generate([turn], SamplingParams(max_tokens=12, ignore_eos=True))
        missing = len(prompt) + len(first.token_ids) - 1 - second.num_cached_tokens
        exact += not missing
        assert missing == 0 if rollback == "snapshot" else missing <= (1 if ahead else 5)
        assert second.token_ids == plain_answer(folder, tuple(turn), 12)
    if ahead:
        assert exact == 24 if rollback == "snapshot" else exact > 12
    assert fast.metrics.lost_checkpoints == 0


@pytest.mark.slow
@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_a_state_that_was_overwritten_is_not_cached(rollback: str, trained: Any) -> None:
    """A stop string is found after the next step has overwritten the state there; this is counted.

    With `recompute` the state before that step is still there.
    """
    folder, plan = trained("dense"), captured(plan_of(trained("dense"), 4, rollback))
    fast, plain = Engine.from_plan(plan, folder), engine_of(folder, 0)
    assert plain.tokenizer is not None
    (whole,) = tokens_of(plain, PROMPTS[:1], 40)
    for token in whole[8:24]:
        params = SamplingParams(
            max_tokens=40, ignore_eos=True, stop=(plain.tokenizer.decode([token]),)
        )
        (first,) = fast.generate(PROMPTS[:1], params)
        turn = [*PROMPTS[0], *first.token_ids, 9, 8]
        assert tokens_of(fast, [turn], 12) == tokens_of(plain, [turn], 12)
    assert (fast.metrics.lost_checkpoints > 0) == (rollback == "snapshot")
    check_all_is_given_back(fast.scheduler.cache)


@pytest.mark.slow
def test_each_token_is_reported_with_its_logprobs(trained: Any) -> None:
    folder = trained("moe")
    reported: list[Any] = []
    answers = []
    for depth in (0, 3):
        engine = engine_of(folder, depth)
        params = SamplingParams(max_tokens=20, ignore_eos=True, num_logprobs=3)
        news: list[Any] = []
        engine.on_token = news.append
        answers.append(engine.generate(PROMPTS[:2], params))
        reported.append(
            {
                p: [n.token_id for n in news if n.request_id == p]
                for p in sorted({n.request_id for n in news})
            }
        )
    assert reported[0] == reported[1]
    for one, other in zip(*answers, strict=True):
        assert one.token_ids == other.token_ids == tuple(item.token_id for item in other.logprobs)
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


@pytest.mark.slow
def test_a_request_may_be_cancelled_by_the_callback(trained: Any) -> None:
    engine = engine_of(trained("moe"), 5)
    seen: list[int] = []

    def stop(new: Any) -> None:
        seen.append(new.token_id)
        if len(seen) == 9:
            engine.cancel("a")

    engine.on_token = stop
    engine.add(Request("a", tuple(PROMPTS[0]), SamplingParams(max_tokens=40, ignore_eos=True)))
    while engine.num_unfinished:
        assert engine.step() == []
    assert seen == list(tokens_of(engine_of(trained("moe"), 0), PROMPTS[:1], 9)[0])
    check_all_is_given_back(engine.scheduler.cache)


@pytest.mark.slow
def test_batch_files(trained: Any, tmp_path: Path) -> None:
    """The command answers a file as it does without speculation."""
    body = {
        "prompt": PROMPTS[0],
        "max_tokens": 30,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    rows = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"prompt": prompt, "temperature": i % 2 * 0.7, "seed": i},
        }
        for i, prompt in enumerate(PROMPTS)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for depth in (0, 3):
        spec = tmp_path / f"{depth}.yaml"
        made = make_spec(trained("moe"), speculation={"depth": depth} if depth else "off")
        spec.write_text(json.dumps(made.model_dump(mode="json", exclude_none=True)))
        bundle, output = tmp_path / f"bundle{depth}", tmp_path / f"{depth}.jsonl"
        for words in (
            ["plan", spec, "-o", bundle],
            ["show", bundle],
            ["run", bundle, "--input", tmp_path / "in.jsonl", "--output", output],
        ):
            done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
            assert done.exit_code == 0, done.output
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        found.append([line["response"]["body"]["choices"][0]["token_ids"] for line in lines])
    assert found[0] == found[1]
    differ = CliRunner().invoke(
        main, ["diff", str(tmp_path / "bundle0"), str(tmp_path / "bundle3")]
    )
    assert "speculation" in differ.output


def unforced(count: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds and RNG offsets of `count` sequences, and no simulated acceptance."""
    return torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.zeros(rows)


def accept_by_rule(verified: Tensor, draft: Tensor) -> Tensor:
    """The first tokens that steps commit: an accepted draft, else the target's token."""
    count, zeros = len(verified), torch.zeros(len(verified), dtype=torch.int32)
    rows = torch.stack((zeros, draft.int()), 1).flatten()
    stops = torch.full((count, 8), -1, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int64)
    accepted, _, last = speculation.accept(
        {"query_len": 2},
        rows,
        verified.flatten().int(),
        zeros + 9,
        zeros + 1,
        zeros + 100,
        stops,
        *unforced(count, 2),
        counts,
    )
    return torch.where(accepted == 1, draft, last)


def accept_always(verified: Tensor, draft: Tensor) -> Tensor:
    """A broken rule, which accepts 30 % of all drafts, whatever the target's tokens."""
    return torch.where(torch.rand(len(draft)) < 0.3, draft, verified[:, 0])


def chi_squared(found: Tensor, probs: Tensor) -> tuple[float, float]:
    """The statistic, and the limit above which one in 100,000 lies (Wilson and Hilferty)."""
    expected = probs * found.sum()
    kept = expected >= 5
    rest = torch.tensor([found[~kept].sum(), expected[~kept].sum()])
    parts = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum() + (
        rest[0] - rest[1]
    ) ** 2 / max(rest[1], 1)
    free = int(kept.sum()) - 1 + int(rest[1] > 1)
    return float(parts), free * (1 - 2 / (9 * free) + 4.27 * (2 / (9 * free)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.5, 1.0, 12), (1.2, 0.6, 0)]
)
def test_the_distribution_is_the_targets(temperature: float, top_p: float, top_k: int) -> None:
    """The first token of a step over 40,000 seeds, for two drafts; a broken rule is detected."""
    count, vocab = 40_000, 40
    torch.manual_seed(1)
    logits = torch.randn(vocab) * 1.5
    params = (
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.full((count,), top_k),
    )
    probs, ids = filtered(logits[None], params[0][:1], params[1][:1], params[2][:1])
    wanted = torch.zeros(vocab, dtype=torch.float64).index_add(0, ids[0], probs[0] / probs.sum())
    attrs = {"num_valid_tokens": vocab, "query_len": 2}
    (verified,) = sample(
        attrs,
        logits.expand(2 * count, -1),
        *params,
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
    )
    for draft in (int(wanted.argmax()), int(ids[0, 2])):
        guess = torch.full((count,), draft)
        found = torch.bincount(
            accept_by_rule(verified.view(-1, 2), guess).long(), minlength=vocab
        ).double()
        value, limit = chi_squared(found, wanted)
        assert value < limit
        broken = torch.bincount(
            accept_always(verified.view(-1, 2), guess).long(), minlength=vocab
        ).double()
        value, limit = chi_squared(broken, wanted)
        assert value > limit


def test_accept_by_hand() -> None:
    """All drafts right; the second wrong; cut at a stop token; cut at `max_lens`; padding."""
    rows = torch.tensor([[1, 5, 6], [1, 5, 6], [1, 5, 6], [1, 5, 6], [0, 0, 0]], dtype=torch.int32)
    verified = torch.tensor(
        [[5, 6, 7], [5, 9, 7], [5, 6, 7], [5, 6, 7], [0, 0, 0]], dtype=torch.int32
    )
    stops = torch.full((5, 8), -1, dtype=torch.int32)
    stops[2, 3] = 5
    lens, reads = torch.tensor([13, 23, 33, 43, 3]), torch.tensor([4, 5, 6, 7, 0])
    limits, counts = torch.tensor([99, 99, 99, 42, 0]), torch.tensor([100, 10, 1, 0])
    accepted, after, last = speculation.accept(
        {"query_len": 3},
        rows.flatten(),
        verified.flatten(),
        lens.int(),
        reads.int(),
        limits.int(),
        stops,
        *unforced(5, 3),
        counts,
    )
    assert accepted.tolist() == [2, 1, 0, 1, 0]
    assert after.tolist() == [13, 22, 31, 42, 1]
    assert last.tolist() == [7, 9, 5, 6, 0]
    assert counts.tolist() == [104, 13, 2, 0]


def test_simulated_acceptance() -> None:
    """Drafts are accepted in the given shares, whatever they are, within the sequence's limit."""
    count, forced = 40_000, torch.tensor([0.9, 0.5, -1.0, 0.0])
    rows, verified = torch.zeros(count, 4).int(), torch.ones(count, 4).int()
    zeros, stops = torch.zeros(count).int(), torch.full((count, 8), -1).int()
    seeds, offsets, _ = unforced(count, 4)
    operands = (
        rows.flatten(),
        verified.flatten(),
        zeros + 9,
        zeros + 1,
        zeros + 100,
        stops,
        seeds,
        offsets,
    )
    counts = torch.zeros(4, dtype=torch.int64)
    (accepted, *_) = speculation.accept({"query_len": 4}, *operands, forced, counts)
    shares = [counts[1] / counts[0], counts[2] / counts[1]]
    assert shares == pytest.approx([0.9, 0.5], abs=0.01)
    assert counts.tolist() == [int((accepted >= n).sum()) for n in range(4)]
    assert counts[3] == 0  # A negative share accepts nothing; at 0 the tokens are compared.
    again, *_ = speculation.accept(
        {"query_len": 4}, *operands[:-1], offsets + 1, forced, counts.clone()
    )
    assert not again.equal(accepted)
    short, *_ = speculation.accept(
        {"query_len": 4}, *operands[:4], zeros + 7, *operands[5:], torch.ones(4), counts.clone()
    )
    assert short.tolist() == [1] * count


def test_advance_rows_by_hand() -> None:
    """Two sequences of two queries and padding, in pages of four; the first outgrows its pages."""
    state = [
        torch.tensor(x, dtype=torch.int32)
        for x in (
            [5, 6, 7, 8, 0, 0],
            [6, 7, 2, 3, 0, 1],
            [26, 27, 6, 7, 36, 37],
            [8, 4, 2],
            [1, 4, 0],
            [[2, 3, 10], [5, 6, 11], [12, 12, 12]],
            [4, 0, 0],
        )
    ]
    table = torch.tensor([[4, 6, 9], [1, 3, 9], [9, 9, 9]], dtype=torch.int32)
    drafts = torch.tensor([[50, 51], [60, 61], [70, 71]], dtype=torch.int32)
    accepted = torch.tensor([1, 0, 0], dtype=torch.int32)
    speculation.advance_rows({"page_size": 4, "query_len": 2}, accepted, drafts, table, *state)
    assert [x.tolist() for x in state] == [
        [50, 51, 60, 61, 0, 0],
        [8, 9, 3, 4, 0, 1],
        [36, 37, 7, 12, 36, 37],
        [10, 5, 2],
        [3, 5, 0],
        [[2, 1, 10], [4, 6, 11], [12, 12, 12]],
        [6, 1, 0],
    ]


@pytest.mark.slow
def test_random_requests_at_random_moments(trained: Any) -> None:
    """Mixed stops, logprobs, temperatures and lengths, launched ahead or not: answers are equal."""
    folder, rng = trained("moe"), random.Random(3)
    requests = [
        Request(
            str(i),
            tuple(rng.randrange(60) for _ in range(rng.choice((1, 2, 17, 64, 70)))),
            SamplingParams(
                max_tokens=rng.choice((1, 2, 3, 9, 40)),
                ignore_eos=True,
                temperature=rng.choice((0.0, 0.0, 0.8)),
                seed=i,
                stop_token_ids=tuple(rng.sample(range(60), rng.choice((0, 0, 6, 20)))),
                num_logprobs=rng.choice((None, None, None, 2)),
            ),
        )
        for i in range(24)
    ]
    plans = [
        plan_of(folder, 0),
        plan_of(folder, 3),
        captured(plan_of(folder, 3)),
        captured(plan_of(folder, 3, "recompute")),
    ]
    found = []
    for plan in plans:
        engine = Engine.from_plan(plan, folder, launch=LateLaunch())
        found.append(answers_at_random(engine, requests, rng))
    assert all(other == found[0] for other in found[1:])
