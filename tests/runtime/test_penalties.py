"""Penalties, biases and min-p: by transformers' processors, by hand, and with drafts."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_fake import LIMITS, FakeTokenizer
from checkpoints import KINDS, load_oracle
from drafting import PROMPTS, plan_of
from launches import LateLaunch, captured
from torch import Tensor

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.ops import adjustment_words
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.adjustments import TokenCounts
from tokenspeed_plan.runtime.reference.sampling import adjust, filtered, sample
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError, parse_body
from tokenspeed_plan.runtime.serving.openai.conversion import to_requests

VOCAB = 50
MOST = 24
HEAVY: dict[str, Any] = {
    "presence_penalty": 0.7,
    "frequency_penalty": 0.9,
    "repetition_penalty": 1.4,
    "logit_bias": ((3, 2.5), (40, -9.0)),
}


@pytest.fixture(scope="module")
def folder(checkpoint: Any) -> Path:
    return Path(checkpoint("moe"))


@cache
def penalised_plan(folder: Path, depth: int) -> Any:
    rollback = "recompute" if depth else "snapshot"
    return plan_of.__wrapped__(folder, depth, rollback, serving={"penalties": True})


def answers(folder: Path, depth: int, ahead: bool = False, **params: Any) -> list[tuple[int, ...]]:
    """Each second prompt is not penalised."""
    plan = penalised_plan(folder, depth)
    plan = captured(plan) if ahead else plan
    late = LateLaunch() if ahead else None
    engine = Engine.from_plan(plan, folder, launch=late)
    done: dict[str, tuple[int, ...]] = {}
    free = {"temperature": params.get("temperature", 0.0)}
    for number, prompt in enumerate(PROMPTS):
        chosen = free if number % 2 else params
        sampling = SamplingParams(max_tokens=MOST, ignore_eos=True, seed=number, **chosen)
        engine.add(Request(str(number), tuple(prompt), sampling))
    while len(done) < len(PROMPTS):
        done |= {item.request_id: item.token_ids for item in engine.step()}
    assert late is None or late.heads > MOST / 4
    return [done[name] for name in sorted(done)]


@pytest.mark.slow
@pytest.mark.parametrize("heat", [0.0, 0.9])
def test_drafts_change_nothing(heat: float, trained_moe: Path) -> None:
    params = {"temperature": heat, "min_p": 0.05, **HEAVY}
    wanted = answers(trained_moe, 0, **params)
    free = answers(trained_moe, 0, temperature=heat)
    same = [a == b for a, b in zip(wanted, free, strict=True)]
    assert same[1] and same[3] and not all(same)
    for depth, ahead in ((3, False), (0, True), (3, True)):
        assert answers(trained_moe, depth, ahead, **params) == wanted, (depth, ahead)


@pytest.mark.slow
def test_the_repetition_penalty_is_that_of_transformers(trained_moe: Path) -> None:
    oracle = load_oracle(trained_moe, KINDS["moe"])
    found = answers(trained_moe, 3, repetition_penalty=1.7)
    for number in (0, 2, 4):
        made = oracle.generate(
            torch.tensor([list(PROMPTS[number])]),
            max_new_tokens=MOST,
            do_sample=False,
            repetition_penalty=1.7,
            eos_token_id=None,
        )
        assert tuple(made[0, len(PROMPTS[number]) :].tolist()) == found[number]


def adjusted(
    logits_RV: Tensor, params: SamplingParams, prompt: list[int], tokens: list[int], drafts: Any
) -> Tensor:
    """The logits of all queries of one sequence."""
    counts = TokenCounts(params, prompt)
    for token in tokens:
        counts.add(token)
    words = torch.zeros(1, adjustment_words(VOCAB, 100), dtype=torch.int32)
    counts.fill(words.numpy()[0], drafts)
    one = [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
    (found,) = adjust(
        {"query_len": len(logits_RV)},
        logits_RV,
        torch.tensor([tokens[-1], *drafts], dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        *(torch.tensor([value]) for value in one),
        words,
    )
    return found


def test_what_is_penalised_by_hand() -> None:
    """OpenAI's sum, on tokens of the answer alone; the drafts before a query are in it too."""
    torch.manual_seed(0)
    logits, prompt, tokens, drafts = torch.randn(4, VOCAB), [1, 2, 2], [5, 6, 5], [6, 9, 6]
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = adjusted(logits, params, prompt, tokens, drafts)
    for query in range(4):
        counts = Counter(tokens + drafts[:query])
        wanted = logits[query].clone()
        for token, count in counts.items():
            wanted[token] -= 0.25 * count + 0.5
        assert torch.allclose(found[query], wanted)
    biased = adjusted(logits, SamplingParams(logit_bias=((2, -3.0), (9, 4.0))), [], [5], drafts)
    change = (biased - logits).nonzero()[:, 1].tolist()
    assert change == [2, 9] * 4 and torch.allclose((biased - logits)[:, 9], torch.tensor(4.0))


def test_what_is_repeated_by_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(1)
    logits, prompt, tokens, drafts = torch.randn(3, VOCAB), [1, 2, 2], [5, 6], [7, 2]
    params = SamplingParams(repetition_penalty=1.3)
    found = adjusted(logits, params, prompt, tokens, drafts)
    oracle = RepetitionPenaltyLogitsProcessor(1.3)
    for query in range(3):
        ids = torch.tensor([prompt + tokens + drafts[:query]])
        assert torch.allclose(found[query : query + 1], oracle(ids, logits[query : query + 1]))


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_min_p_is_that_of_transformers(share: float) -> None:
    from transformers import MinPLogitsWarper

    torch.manual_seed(2)
    logits = torch.randn(20, VOCAB) * 2
    ones = torch.ones(20)
    probs, ids = filtered(logits, ones * 0.7, ones, ones.long() * 0, ones * share)
    wanted = MinPLogitsWarper(share)(torch.zeros(20, 1), logits / 0.7).double().softmax(-1)
    found = torch.zeros(20, VOCAB, dtype=torch.float64).scatter(1, ids, probs)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_plan_without_the_operator_takes_no_penalties(folder: Path) -> None:
    engine = Engine.from_plan(plan_of(folder, 0), folder)
    for params in ({"min_p": 0.1}, {"presence_penalty": 1.0}, {"logit_bias": ((1, 1.0),)}):
        with pytest.raises(RequestError, match="takes no penalties"):
            engine.add(Request("0", (1,), SamplingParams(**params)))


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"presence_penalty": 1, "frequency_penalty": -0.5}, {"presence_penalty": 1.0}),
        ({"repetition_penalty": 1.1, "min_p": 0.2}, {"repetition_penalty": 1.1, "min_p": 0.2}),
        ({"logit_bias": {"7": 5, "9": 0}}, {"logit_bias": ((7, 5.0),)}),
    ],
)
def test_bodies(fields: dict[str, Any], params: dict[str, Any]) -> None:
    from dataclasses import replace

    body = parse_body("/v1/completions", {"prompt": "a"} | fields)
    (request,) = to_requests(body, "0", FakeTokenizer(), replace(LIMITS, takes_penalties=True))
    assert all(getattr(request.params, name) == value for name, value in params.items())
    with pytest.raises(InvalidRequestError, match=r"serving\.penalties") as caught:
        to_requests(body, "0", FakeTokenizer(), LIMITS)
    assert caught.value.param in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
        {"min_p": 2},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"256": 1}},
        {"logit_bias": {"01": 1, "1": 2}},
        {"logit_bias": {"1": True}},
    ],
)
def test_bodies_that_mean_nothing(fields: dict[str, Any]) -> None:
    from dataclasses import replace

    with pytest.raises(InvalidRequestError) as caught:
        body = parse_body("/v1/completions", {"prompt": "a"} | fields)
        to_requests(body, "0", FakeTokenizer(), replace(LIMITS, takes_penalties=True))
    assert caught.value.param in fields


def test_the_distribution_with_a_draft() -> None:
    """Over many seeds the first token, and the one after an accepted draft, are drawn as they must
    be: the second query counts the draft. Without it the test fails."""
    count = 30_000
    torch.manual_seed(3)
    logits, draft = torch.randn(VOCAB) * 1.5, 4
    logits[draft] = 3.0
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.5)
    rows = adjusted(logits.repeat(2, 1), params, [1], [2, 2], [draft])
    ones = torch.ones(count)
    attrs = {"num_valid_tokens": VOCAB, "query_len": 2}
    zeros = torch.zeros(count, dtype=torch.int64)
    drawing = (ones, ones, zeros, torch.arange(count), zeros, ones * 0.01)
    (tokens,) = sample(attrs, rows.repeat(count, 1), *drawing)
    first, second = tokens.view(-1, 2).unbind(1)
    after = second[first == draft]
    assert len(after) > 1000
    assert is_drawn_from(first, by_hand(logits, [1], [2, 2]))
    assert is_drawn_from(after, by_hand(logits, [1], [2, 2, draft]))
    assert not is_drawn_from(after, by_hand(logits, [1], [2, 2]))


def by_hand(logits: Tensor, prompt: list[int], answer: list[int]) -> Tensor:
    """Probabilities with the penalties of the test above."""
    changed = logits.double().clone()
    for token in {*prompt, *answer}:
        changed[token] *= 1 / 1.5 if changed[token] > 0 else 1.5
    for token, number in Counter(answer).items():
        changed[token] -= 0.5 * number + 1.0
    probs = changed.softmax(-1)
    kept = probs * (probs >= 0.01 * probs.max())
    return kept / kept.sum()


def is_drawn_from(tokens: Tensor, probs: Tensor) -> bool:
    """Whether a chi-squared statistic is below what one in a million draws is above."""
    found = torch.bincount(tokens.long(), minlength=VOCAB).double()
    expected = probs * len(tokens)
    kept = expected >= 5
    value = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    free = int(kept.sum()) - 1
    limit = free * (1 - 2 / (9 * free) + 4.75 * (2 / (9 * free)) ** 0.5) ** 3
    return bool(value < limit) and not found[probs == 0].any()


def test_counts_of_many_tokens() -> None:
    """More than the array begins with; a draft that is new leaves nothing behind."""
    counts = TokenCounts(SamplingParams(repetition_penalty=1.2), range(100, 170))
    for token in (*range(200, 300), 200, 100):
        counts.add(token)
    words = np.zeros(1 + 3 * 300, dtype=np.int32)
    for _ in range(2):
        end = counts.fill(words, [7, 200, 7, 8])
        seen = {int(t): int(c) for t, c, _ in words[1:end].reshape(-1, 3)}
        assert words[0] == len(seen) == 172 and (seen[7], seen[8]) == (0, 0)
        assert (seen[100], seen[101], seen[200], seen[299]) == (3, 1, 4, 2)
    counts.add(8)
    assert counts.fill(words, []) == 1 + 3 * 171
