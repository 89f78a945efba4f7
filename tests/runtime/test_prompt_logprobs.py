"""Logprobs of prompts, as `echo` of completions and lm-eval's loglikelihood ask for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batch_fake import LIMITS, FakeTokenizer
from checkpoints import KINDS, load_oracle
from conversations import check_all_is_given_back, squeezed
from drafting import PROMPTS, plan_of
from launches import LateLaunch, captured

from tokenspeed_plan.runtime import Completion, Engine, Request, SamplingParams
from tokenspeed_plan.runtime.request import TokenLogprobs
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError
from tokenspeed_plan.runtime.serving.http.parsing import parse
from tokenspeed_plan.runtime.serving.openai.answers import choice
from tokenspeed_plan.runtime.serving.openai.bodies import CompletionBody, parse_body
from tokenspeed_plan.runtime.serving.openai.conversion import to_requests


@pytest.fixture(scope="module")
def wanted(checkpoint: Any) -> list[torch.Tensor]:
    """transformers' logprobs after each token of each prompt."""
    oracle = load_oracle(checkpoint("moe"), KINDS["moe"])
    with torch.no_grad():
        logits = [oracle(torch.tensor([list(prompt)])).logits[0] for prompt in PROMPTS]
    return [values.double().log_softmax(-1) for values in logits]


def run(engine: Engine, scored: frozenset[int]) -> list[Completion]:
    done: dict[str, Completion] = {}
    for number, prompt in enumerate(PROMPTS):
        params = SamplingParams(
            max_tokens=4,
            ignore_eos=True,
            num_logprobs=0,
            prompt_logprobs=2 if number in scored else None,
        )
        engine.add(Request(str(number), tuple(prompt), params))
    while len(done) < len(PROMPTS):
        done |= {completion.request_id: completion for completion in engine.step()}
    return [done[name] for name in sorted(done)]


@pytest.mark.parametrize("ahead", [False, True], ids=["eager", "ahead"])
@pytest.mark.parametrize("depth", [0, 2])
def test_scores_are_those_of_transformers(
    depth: int, ahead: bool, checkpoint: Any, wanted: list[torch.Tensor]
) -> None:
    """Also where memory is short, and where the cache knows the prompt; neighbours stay alike."""
    plan = squeezed(plan_of(checkpoint("moe"), depth), max_seqs=3)
    plan = captured(plan) if ahead else plan
    engine = Engine.from_plan(plan, checkpoint("moe"), launch=LateLaunch() if ahead else None)
    free = run(engine, frozenset())
    for _ in range(2):
        found = run(engine, frozenset({0, 1, 3}))
        assert [c.token_ids for c in found] == [c.token_ids for c in free]
        for number, (completion, prompt) in enumerate(zip(found, PROMPTS, strict=True)):
            scores = completion.prompt_logprobs
            assert len(scores) == (len(prompt) - 1 if number in (0, 1, 3) else 0)
            for place, score in enumerate(scores):
                after = wanted[number][place]
                assert score.token_id == prompt[place + 1]
                assert score.logprob == pytest.approx(float(after[score.token_id]), abs=2e-3)
                assert score.top[0][0] == int(after.argmax()) and len(score.top) == 2
    check_all_is_given_back(engine.scheduler.cache)


def test_an_echo() -> None:
    body = parse_body("/v1/completions", {"prompt": "ab", "echo": True, "logprobs": 1})
    assert isinstance(body, CompletionBody)
    (request,) = to_requests(body, "0", FakeTokenizer(), LIMITS)
    assert request.params.prompt_logprobs == 1
    scores = [TokenLogprobs(letter, -1.0 - letter, ((letter, -0.5),)) for letter in (98, 99)]
    done = Completion(
        *("0:0", (99,), "c", "length", 2, 0.0, 0.0),
        logprobs=(scores[1],),
        prompt_ids=(97, 98),
        prompt_logprobs=(scores[0],),
    )
    found = choice(body, 0, done, FakeTokenizer())  # type: ignore[arg-type]
    assert found["text"] == "abc"
    assert found["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -99.0, -100.0],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }
    plain = parse_body("/v1/completions", {"prompt": "ab", "echo": True})
    assert choice(plain, 0, done, FakeTokenizer())["text"] == "abc"  # type: ignore[arg-type]
    streamed = b'{"prompt": "ab", "echo": true, "stream": true}'
    with pytest.raises(ApiError, match="not streamed"):
        parse(streamed, "/v1/completions", "fake", FakeTokenizer(), LIMITS)
