"""Growing text: whole characters, none withdrawn, and joined exactly the completion's text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import LateLaunch, captured

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Completion, Engine, Request, SamplingParams
from tokenspeed_plan.runtime.request import NewToken
from tokenspeed_plan.runtime.streaming import (
    AnswerText,
    ByteDetokenizer,
    Delta,
    Detokenizer,
    detokenizer,
)
from tokenspeed_plan.runtime.tokenizer import Tokenizer

DEMO = Tokenizer.load(ROOT / "examples/demo/model")
TOKENS = st.lists(st.integers(0, 2047), max_size=12)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["日本語", "🦜👩‍👩‍👧 ok", "é\u0301", "\ufffd\ufffd"]
)
MIXED = st.lists(TOKENS | TEXTS.map(DEMO.encode), max_size=4).map(
    lambda parts: [token for part in parts for token in part]
)


DETOKENIZERS = pytest.mark.parametrize("make", [Detokenizer, ByteDetokenizer])


class Spelled:
    """A tokenizer whose decoder looks at its neighbours: words, with a blank between two."""

    joins_bytes = False

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids)


@DETOKENIZERS
@settings(max_examples=300, deadline=None)
@given(ids=MIXED, cuts=st.randoms(use_true_random=False))
def test_pieces_are_a_prefix_that_never_changes(
    make: Any, ids: list[int], cuts: random.Random
) -> None:
    """This holds for any continuation, so that no piece contains half a character."""
    ids = [token for token in ids if not DEMO.is_special(token)]
    made, text, left = make(DEMO), "", list(ids)
    while left:
        size = cuts.randint(1, 3)
        text += made.push(left[:size])
        del left[:size]
        now = DEMO.decode(ids[: len(ids) - len(left)])
        assert DEMO.decode(ids).startswith(text)
        assert len(now) - len(text) <= 1, "at most one character waits"


@DETOKENIZERS
def test_a_character_of_many_tokens_comes_whole(make: Any) -> None:
    ids = DEMO.encode("a👍b")
    made = make(DEMO)
    assert len(ids) > 3
    assert [piece for token in ids if (piece := made.push([token]))] == ["a", "👍", "b"]


def test_a_decoder_that_looks_at_its_neighbours() -> None:
    made = detokenizer(Spelled())  # type: ignore[arg-type]
    assert "".join(made.push([token]) for token in range(5)) == "w0 w1 w2 w3 w4"


def answer_deltas(ids: Sequence[int], params: SamplingParams, size: int) -> tuple[list[Delta], str]:
    """Deltas of an answer that ends with the token that completes a stop string."""
    answer = AnswerText(Request("r", (1,), params), DEMO)
    ends = [
        n
        for n in range(1, len(ids) + 1)
        if any(stop in DEMO.decode(list(ids[:n])) for stop in params.stop)
    ]
    last = min(ends, default=len(ids))
    text = DEMO.decode(list(ids[:last]))
    cut = min((text.find(stop) for stop in params.stop if stop in text), default=len(text))
    tokens = [NewToken("r", token) for token in ids[: last - 1]]
    deltas = [answer.push(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    done = Completion("r", tuple(ids[:last]), text[:cut], "stop" if ends else "length", 1, 0.0, 0.0)
    return [*deltas, answer.finish(done)], text[:cut]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.integers(1, 4))
def test_what_may_become_a_stop_string_waits(data: st.DataObject, size: int) -> None:
    ids = data.draw(st.text("ab\né👍", min_size=1, max_size=20).map(DEMO.encode))
    stops = data.draw(st.lists(st.text("ab\né👍", min_size=1, max_size=5), max_size=3))
    deltas, text = answer_deltas(ids, SamplingParams(stop=tuple(stops)), size)
    assert "".join(delta.text for delta in deltas) == text
    done = deltas[-1].completion
    assert done and sum((delta.token_ids for delta in deltas), ()) == done.token_ids
    assert all(delta.token_ids for delta in deltas if delta.text), "text comes with tokens"


def test_text_that_is_no_stop_string_after_all_is_sent() -> None:
    deltas, _ = answer_deltas(DEMO.encode("abcabd abx"), SamplingParams(stop=("abd!",)), 1)
    assert "".join(delta.text for delta in deltas[:-1]).startswith("abcab"), (
        "`abc` cannot become `abd!` any more"
    )


@pytest.fixture(scope="module")
def engine(tiny_plan: Plan, checkpoint: Any) -> Engine:
    return Engine.from_plan(tiny_plan, checkpoint("moe"))


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_gives_what_generate_gives(seed: int, engine: Engine) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(500) for _ in range(rng.choice((1, 9, 70)))]
    params = SamplingParams(
        max_tokens=40, temperature=1.8, seed=seed, ignore_eos=True, num_logprobs=seed % 3 or None
    )
    (plain,) = engine.generate([ids], params)
    at = len(plain.text) // 2
    stopped = SamplingParams(
        max_tokens=40, temperature=1.8, seed=seed, ignore_eos=True, stop=(plain.text[at : at + 3],)
    )
    for chosen in (params, stopped):
        (wanted,) = engine.generate([ids], chosen)
        deltas = list(engine.stream(ids, chosen))
        assert "".join(delta.text for delta in deltas) == wanted.text
        assert sum((delta.token_ids for delta in deltas), ()) == wanted.token_ids
        assert sum((delta.logprobs for delta in deltas), ()) == wanted.logprobs
        assert [delta.completion is not None for delta in deltas] == [False] * (len(deltas) - 1) + [
            True
        ]
        assert len([delta for delta in deltas if delta.text]) > 3


def test_a_stream_that_is_closed_is_cancelled(engine: Engine) -> None:
    deltas = engine.stream([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True))
    next(deltas)
    assert engine.usage.running == 1 and engine.usage.state_slots == 2 and engine.usage.pages > 0
    deltas.close()
    assert taken(engine) == (0, 0, 0, 0) and engine.on_token is None


def taken(engine: Engine) -> tuple[int, ...]:
    used = engine.usage
    return used.waiting, used.running, used.state_slots, used.pages


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize("seed", range(4))
def test_cancelling_disturbs_nobody(
    seed: int, ahead: bool, tiny_plan: Plan, checkpoint: Any
) -> None:
    """Waiting, running or with a step in flight; slots and pages go to others at once."""
    rng, folder = random.Random(seed), checkpoint("moe")
    prompts = [[rng.randrange(400) for _ in range(rng.choice((1, 17, 90)))] for _ in range(24)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=seed)
    wanted = [
        done.token_ids for done in Engine.from_plan(tiny_plan, folder).generate(prompts, params)
    ]
    engine = (
        Engine.from_plan(captured(tiny_plan), folder, launch=LateLaunch())
        if ahead
        else Engine.from_plan(tiny_plan, folder)
    )
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), params))
    done: dict[str, Any] = {}
    cancelled: set[str] = set()
    while engine.num_unfinished:
        done |= {item.request_id: item.token_ids for item in engine.step()}
        if rng.random() < 0.5:
            name = str(rng.randrange(len(prompts)))
            cancelled |= {name} if engine.cancel(name) else set()
    assert 2 < len(cancelled) < 20
    assert done == {
        str(index): ids for index, ids in enumerate(wanted) if str(index) not in cancelled
    }
    assert taken(engine) == (0, 0, 0, 0)


def test_cancelling_what_is_not_there(engine: Engine) -> None:
    assert not engine.cancel("nobody")
    engine.generate([[1]], SamplingParams(max_tokens=1))
    assert not engine.cancel("0")


def test_a_name_is_used_once(engine: Engine) -> None:
    engine.add(Request("twice", (1,)))
    with pytest.raises(RequestError, match="`twice` is not finished"):
        engine.add(Request("twice", (1,)))
    assert engine.cancel("twice")
    engine.add(Request("twice", (1,)))
    assert engine.cancel("twice") and taken(engine) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"top_k": 1 << 31}, "top_k is 2147483648"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"num_logprobs": 513}, "num_logprobs is 513"),
    ],
)
def test_parameters_that_would_break_a_batch_are_refused(
    params: dict[str, Any], says: str, engine: Engine
) -> None:
    with pytest.raises(RequestError, match=says):
        engine.add(Request("r", (1,), SamplingParams(**params)))
