"""Grammars in the engine: answers have their form, and drafts change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fake import LIMITS, FakeTokenizer
from drafting import PROMPTS, plan_of
from launches import LateLaunch, captured

from tokenspeed_plan.plans.bundle import seal
from tokenspeed_plan.plans.errors import PlanError, RequestError
from tokenspeed_plan.plans.ops import TOKEN_MASK, mask_words
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.runtime import Completion, Engine, Request, SamplingParams
from tokenspeed_plan.runtime.grammars import grammar_compiler as compiling
from tokenspeed_plan.runtime.grammars.grammar_compiler import GrammarCompiler, grammar_compiler
from tokenspeed_plan.runtime.grammars.matcher import Grammar, fill_ahead
from tokenspeed_plan.runtime.grammars.xgrammar_matcher import ALL_TOKENS
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError, parse_body
from tokenspeed_plan.runtime.serving.openai.conversion import to_requests
from tokenspeed_plan.runtime.tokenizer import Tokenizer

MOST = 40
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["kind", "size", "tags"],
}
FORM = {"type": "json_schema", "json_schema": SCHEMA, "max_whitespace_cnt": 1}


def is_right(text: str) -> bool:
    """Whether a text has the form of `SCHEMA`."""
    found = json.loads(text)
    return (
        list(found) == ["kind", "size", "tags"]
        and found["kind"] in ("red", "green")
        and 1 <= found["size"] <= 99
        and len(found["tags"]) <= 2
        and set(found["tags"]) <= {"a", "b"}
    )


@pytest.fixture(scope="module")
def folder(checkpoint: Any) -> Path:
    return Path(checkpoint("moe"))


@pytest.fixture(scope="module")
def compiler(folder: Path) -> GrammarCompiler:
    found = grammar_compiler(masked_plan(folder, 0), Tokenizer.load(folder))
    assert found is not None
    return found


@cache
def masked_plan(folder: Path, depth: int, rollback: str = "snapshot") -> Any:
    return plan_of.__wrapped__(folder, depth, rollback, serving={"grammar": True})


def answers(
    folder: Path, depth: int, grammar: Grammar, ahead: bool = False, **params: Any
) -> list[Completion]:
    """The first and the last prompt are free."""
    plan = masked_plan(folder, depth, "recompute" if depth else "snapshot")
    plan = captured(plan) if ahead else plan
    late = LateLaunch() if ahead else None
    engine = Engine.from_plan(plan, folder, launch=late)
    done: dict[str, Completion] = {}
    for number, prompt in enumerate(PROMPTS):
        is_free = number in (0, len(PROMPTS) - 1)
        sampling = SamplingParams(max_tokens=MOST, ignore_eos=is_free, seed=number, **params)
        engine.add(Request(str(number), tuple(prompt), sampling, None if is_free else grammar))
    while len(done) < len(PROMPTS):
        done |= {completion.request_id: completion for completion in engine.step()}
    assert not any(completion.error for completion in done.values())
    assert late is None or late.heads > MOST / 2, "heads are launched before masks are known"
    return [done[name] for name in sorted(done)]


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"temperature": 1.2}], ids=["greedy", "hot"])
def test_drafts_change_nothing_under_a_grammar(
    params: dict[str, Any], trained_moe: Path, compiler: GrammarCompiler
) -> None:
    """All that ends by itself has the form; free neighbours say what they say alone."""
    grammar = compiler.compile(FORM)
    plain = answers(trained_moe, 0, grammar, **params)
    for completion in plain[1:-1]:
        assert completion.finish_reason == "length" or is_right(completion.text), completion.text
    assert any(completion.finish_reason == "stop" for completion in plain[1:-1])
    wanted = [completion.token_ids for completion in plain]
    assert [c.token_ids for c in answers(trained_moe, 3, grammar, **params)] == wanted
    for depth in (0, 3):
        assert [c.token_ids for c in answers(trained_moe, depth, grammar, True, **params)] == wanted
    engine = Engine.from_plan(plan_of(trained_moe, 0), trained_moe)
    for number in (0, len(PROMPTS) - 1):
        sampling = SamplingParams(max_tokens=MOST, ignore_eos=True, seed=number, **params)
        (alone,) = engine.generate([PROMPTS[number]], sampling)
        assert alone.token_ids == wanted[number]


def test_an_answer_whose_grammar_ends_has_ended(folder: Path, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile({"type": "const_string", "value": "ab"})
    for completion in answers(folder, 3, grammar)[1:-1]:
        assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_plan_without_masks_takes_no_grammar(folder: Path, compiler: GrammarCompiler) -> None:
    engine = Engine.from_plan(plan_of(folder, 0), folder)
    with pytest.raises(RequestError, match="takes no grammars"):
        engine.add(Request("0", (1,), grammar=compiler.compile(FORM)))
    assert grammar_compiler(engine.plan, Tokenizer.load(folder)) is None


class _Letters:
    """Takes 1, 2, 3 in turn."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def fill(self, mask_RW: np.ndarray, row: int) -> None:
        mask_RW[row] = 1 << (len(self.taken) + 1)

    def accept(self, token_id: int) -> bool:
        if token_id != len(self.taken) + 1:
            return False
        self.taken.append(token_id)
        return True

    def rollback(self, count: int) -> None:
        del self.taken[len(self.taken) - count :]


@pytest.mark.parametrize(
    ("drafts", "masks"), [([1, 2], [2, 4, 8]), ([1, 1], [2, 4, 0]), ([3, 1], [2, 0, 0]), ([], [2])]
)
def test_masks_of_drafts(drafts: list[int], masks: list[int]) -> None:
    matcher, mask_RW = _Letters(), np.zeros((len(drafts) + 1, 1), dtype=np.int32)
    fill_ahead(matcher, mask_RW, drafts)
    assert mask_RW[:, 0].tolist() == masks and not matcher.taken


def test_a_matcher_goes_to_its_end_and_back(folder: Path, compiler: GrammarCompiler) -> None:
    tokenizer = Tokenizer.load(folder)
    matcher = compiler.compile({"type": "const_string", "value": "ab"}).matcher()
    mask_RW = np.zeros((1, mask_words(512)), dtype=np.int32)
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    end = masked_plan(folder, 0).model.eos_token_ids[0]
    assert not matcher.accept(b) and matcher.accept(a) and matcher.accept(b)
    matcher.fill(mask_RW, 0)
    bits = np.unpackbits(mask_RW.view(np.uint8), bitorder="little")
    assert bits.nonzero()[0].tolist() == [end]
    assert matcher.accept(end) and not matcher.accept(end)
    matcher.fill(mask_RW, 0)
    assert (mask_RW == ALL_TOKENS).all()
    matcher.rollback(2)
    assert matcher.accept(b)


BAD: dict[str, Any] = {
    "no text": {"type": "json_schema", "json_schema": {"enum": []}},
    "no form": {"type": "nothing"},
    "no text but a contradiction": {"type": "json_schema", "json_schema": False},
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compiled(name: str, compiler: GrammarCompiler) -> None:
    for _ in range(2):  # the second time it is known
        with pytest.raises(RequestError, match="cannot be enforced") as caught:
            compiler.compile(BAD[name])
        assert "\n" not in caught.value.message and ".cc" not in caught.value.message
    with pytest.raises(RequestError, match="characters, the most is"):
        compiler.compile({"type": "const_string", "value": "x" * (1 << 19)})


@pytest.mark.slow
def test_what_a_form_may_take(
    folder: Path, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes too long is given up, and the next one is compiled by another process."""
    monkeypatch.setattr(compiling, "MAX_CPU_S", 0.02)
    short = grammar_compiler(masked_plan(folder, 0), Tokenizer.load(folder))
    assert short is not None
    nested: Any = {"type": "integer"}
    for _ in range(9):
        nested = {"anyOf": [{"type": "array", "items": nested}, {"enum": list(range(600))}]}
    with pytest.raises(RequestError, match="takes too"):
        short.compile({"type": "json_schema", "json_schema": nested})
    monkeypatch.undo()
    assert short.compile({"type": "const_string", "value": "ab"})


def test_grammars_are_kept(
    folder: Path, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = [{"type": "const_string", "value": letter} for letter in "abcd"]
    first = compiler.compile(forms[0])
    assert compiler.compile(dict(reversed(forms[0].items()))) is first
    monkeypatch.setattr(compiling, "MAX_CACHED_CHARS", 1)
    kept = [compiler.compile(form) for form in forms]
    assert compiler.compile(forms[-1]) is kept[-1] and compiler.compile(forms[0]) is not first


def test_one_who_waits_for_others_is_sent_away(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = parse_body(
        "/v1/completions", {"prompt": "a", "response_format": {"type": "json_object"}}
    )
    limits = replace(LIMITS, grammars=compiler)
    monkeypatch.setattr(compiling, "MAX_WAIT_S", 0.01)
    with compiler._lock, pytest.raises(InvalidRequestError, match="being compiled") as caught:
        to_requests(body, "0", FakeTokenizer(), limits)
    assert caught.value.status == 503
    (request,) = to_requests(body, "0", FakeTokenizer(), limits)
    assert request.grammar is not None


def test_what_a_plan_with_grammars_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tokenizer = masked_plan(folder, 0), Tokenizer.load(folder)
    endless = plan.model_copy(update={"model": plan.model.model_copy(update={"eos_token_ids": ()})})
    with pytest.raises(RequestError, match="no token that ends"):
        grammar_compiler(endless, tokenizer)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="need `xgrammar`") as caught:
        grammar_compiler(plan, tokenizer)
    assert "tokenspeed-plan[grammar]" in caught.value.hint


@pytest.mark.parametrize("change", ["narrow", "floats", "one query"])
def test_a_mask_that_does_not_fit_is_refused(change: str, folder: Path) -> None:
    """Its columns are words for whole queries, as many as a step has."""
    plan = masked_plan(folder, 2)
    buffers = {buffer.name: buffer for buffer in plan.pool.buffers}
    tensor = buffers[TOKEN_MASK].tensor
    words = mask_words(plan.model.vocab_size)
    assert tensor.shape == ("num_seqs", 3 * words)
    wrong = {
        "narrow": tensor.reshaped(("num_seqs", 3 * words - 1)),
        "floats": TensorSpec.of(shape=tensor.shape, dtype="fp32"),
        "one query": tensor.reshaped(("num_seqs", words)),
    }[change]
    changed = buffers | {TOKEN_MASK: buffers[TOKEN_MASK].model_copy(update={"tensor": wrong})}
    with pytest.raises(PlanError):
        validate(seal(plan.with_pool(buffers=tuple(changed.values()))))
    validate(seal(plan))
