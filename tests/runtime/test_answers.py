"""Answers report tokens by their bytes, and end at stop strings that are special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed_plan.runtime.request import Completion, NewToken, Request, SamplingParams
from tokenspeed_plan.runtime.request import TokenLogprobs as Logprobs
from tokenspeed_plan.runtime.serving.openai.answers import TextOffsets, choice, logprobs_of
from tokenspeed_plan.runtime.serving.openai.bodies import ChatBody, CompletionBody
from tokenspeed_plan.runtime.streaming import AnswerText, StopSearch, text_before_stop
from tokenspeed_plan.runtime.tokenizer import Tokenizer

DEMO = Tokenizer.load(ROOT / "examples/demo/model")
CHAT = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}]})
TEXT = CompletionBody(prompt="x")
IDS = st.lists(st.integers(0, 2047) | st.integers(2000, 2020), max_size=10)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8).map(DEMO.encode)
MIXED = st.lists(IDS | TEXTS, max_size=3).map(lambda parts: [*chain(*parts)])


def logprobs(ids: Sequence[int], top: Sequence[int] = ()) -> tuple[Logprobs, ...]:
    likely = tuple((token, -float(rank)) for rank, token in enumerate(top, 1))
    return tuple(Logprobs(token, -0.5, likely) for token in ids)


def reported(body: Any, ids: Sequence[int], top: Sequence[int] = ()) -> Any:
    text = DEMO.decode(list(ids))
    done = Completion("r", tuple(ids), text, "stop", 1, 0.0, 0.0, logprobs(ids, top))
    return choice(body, 0, done, DEMO)["logprobs"]


@settings(max_examples=100, deadline=None)
@given(ids=MIXED.filter(bool))
def test_the_bytes_of_tokens_make_their_text(ids: list[int]) -> None:
    content = reported(CHAT, ids)["content"]
    data = b"".join(bytes(item["bytes"] or []) for item in content)
    assert data.decode("utf-8", "replace") == DEMO.spell(ids)
    for item in content:
        if item["bytes"] is not None and "\\x" not in item["token"]:
            assert item["token"].encode() == bytes(item["bytes"])


def test_parts_of_a_character_are_spelled_as_bytes() -> None:
    ids = [*DEMO.encode("a👍"), 2007, 2040]
    assert len(ids) > 5, "the character has several tokens"
    content = reported(CHAT, ids)["content"]
    assert content[0] == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    assert b"".join(bytes(item["bytes"]) for item in content[1:-2]) == "👍".encode()
    parts = ["".join(f"\\x{value:02x}" for value in item["bytes"]) for item in content[1:-2]]
    assert [item["token"] for item in content[1:-2]] == parts
    special, padding = content[-2:]
    assert (special["token"], bytes(special["bytes"])) == ("<|im_end|>", b"<|im_end|>")
    assert (padding["token"], padding["bytes"]) == ("token_id:2040", None)
    texts = reported(TEXT, ids)["tokens"]
    assert texts == ["a", *(f"bytes:{part}" for part in parts), "<|im_end|>", "token_id:2040"]


def test_likely_tokens_do_not_collide() -> None:
    top = list(range(2048))
    found = reported(TEXT, [64], top)["top_logprobs"][0]
    names = {DEMO.token_bytes(token) or token for token in top}
    assert len(found) == len(names) == len(top), "each has a name of its own"
    assert sorted(found.values(), reverse=True) == [-float(rank) for rank in range(1, 2049)]


@settings(max_examples=100, deadline=None)
@given(ids=MIXED.filter(bool), size=st.integers(1, 4))
def test_offsets_are_where_tokens_begin(ids: list[int], size: int) -> None:
    """In the text of the answer, which has no special tokens; also from piece to piece."""
    offsets = reported(TEXT, ids)["text_offset"]
    text = DEMO.decode(ids)
    for index, offset in enumerate(offsets):
        before = b"".join(DEMO.token_bytes(i) for i in ids[:index] if not DEMO.is_special(i))
        whole = before.decode("utf-8", "replace").rstrip("\ufffd")
        assert text.startswith(text[:offset]) and len(whole) <= offset
        assert offset <= len(before.decode("utf-8", "replace"))
        token = DEMO.token_bytes(ids[index])
        if token.isascii() and not DEMO.is_special(ids[index]) and not text.count("\ufffd"):
            assert text[offset : offset + len(token)] == token.decode()
    seen, parts = TextOffsets(DEMO), list[int]()
    for at in range(0, len(ids), size):
        parts += logprobs_of(TEXT, logprobs(ids[at : at + size]), DEMO, seen)["text_offset"]
    assert parts == offsets


SPECIAL = ("<|im_end|>", "<|im_start|>", "<think>")
PIECES = st.sampled_from(("a", "b", "\n", "<", "|im_end|>", "👍", *SPECIAL))
SPELLED = st.lists(PIECES, min_size=1, max_size=8).map("".join)
STOPS = st.lists(SPELLED.map(lambda text: text[:13]) | st.sampled_from(SPECIAL), max_size=3)


def plain_answer(ids: list[int], stops: Sequence[str]) -> tuple[int, str]:
    """Tokens up to the one that completes a stop string, and the text before that string."""
    ends = [
        end
        for end in range(1, len(ids) + 1)
        if any(stop in DEMO.spell(ids[:end]) for stop in stops)
    ]
    last = min(ends, default=len(ids))
    shown: list[str] = []
    for is_special, group in groupby(ids[:last], DEMO.is_special):
        shown += ["" if is_special else letter for letter in DEMO.spell(list(group))]
    spelled = DEMO.spell(ids[:last])
    begin = min((spelled.find(stop) for stop in stops if stop in spelled), default=len(spelled))
    return last, "".join(shown[:begin])


@settings(max_examples=200, deadline=None)
@given(ids=SPELLED.map(DEMO.encode), stops=STOPS, size=st.integers(1, 3))
def test_special_tokens_can_be_stop_strings(ids: list[int], stops: list[str], size: int) -> None:
    last, wanted = plain_answer(ids, stops)
    search = StopSearch(DEMO, stops)
    hits = [search.push(token) for token in ids]
    assert hits[: last - 1] == [False] * (last - 1)
    assert text_before_stop(DEMO, ids[:last], stops) == wanted
    answer = AnswerText(Request("r", (1,), SamplingParams(stop=tuple(stops))), DEMO)
    tokens = [NewToken("r", token) for token in ids[: last - 1]]
    deltas = [answer.push(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    done = Completion("r", tuple(ids[:last]), wanted, "stop", 1, 0.0, 0.0)
    deltas.append(answer.finish(done))
    assert "".join(delta.text for delta in deltas) == wanted, "nothing is withdrawn"
    assert sum((delta.token_ids for delta in deltas), ()) == done.token_ids


def test_a_special_token_ends_an_answer() -> None:
    ids = DEMO.encode("x\n<|vision_start|>y")
    cases = (("<|vision_start|>", 3, "x\n"), ("\n<|vision", 3, "x"), ("|>y", 4, "x\n"))
    for stop, count, text in cases:
        assert plain_answer(ids, [stop]) == (count, text)
        search = StopSearch(DEMO, [stop])
        assert [search.push(token) for token in ids].index(True) == count - 1
        assert text_before_stop(DEMO, ids[:count], [stop]) == text
