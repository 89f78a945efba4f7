"""What goes wrong for one sequence is its own: others get their answers, all is given back."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import check_all_is_given_back
from drafting import PROMPTS, plan_of
from safetensors.torch import load_file, save_file

from tokenspeed_plan.plans.errors import CanaryError, EngineStopped, PlanError, RequestFailed
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import AsyncEngine, Completion, Engine, Request, SamplingParams
from tokenspeed_plan.runtime.canary import golden
from tokenspeed_plan.runtime.output import OutputProcessor
from tokenspeed_plan.runtime.request import NewToken
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.serving.batch.lines import encode_line

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
FREE = (0, 0, 0, 0)
EMBEDDING = "model.language_model.embed_tokens.weight"
MaybeRaise = Callable[[str], None]
Spoil = Callable[[pytest.MonkeyPatch, Engine, MaybeRaise], None]


def taken(engine: Engine) -> tuple[int, ...]:
    used = engine.usage
    return used.waiting, used.running, used.state_slots, used.pages


def answers(engine: Engine) -> dict[str, Completion]:
    """The answers to all prompts, each under its number."""
    for number, ids in enumerate(PROMPTS):
        engine.add(Request(str(number), tuple(ids), PARAMS))
    done: dict[str, Completion] = {}
    while engine.num_unfinished:
        done |= {item.request_id: item for item in engine.step()}
    return done


def spoil_tokens(patch: pytest.MonkeyPatch, engine: Engine, maybe_raise: MaybeRaise) -> None:
    append = OutputProcessor.append_tokens

    def appended(self: Any, sequence: Sequence, output: Any, look: Any) -> list[NewToken]:
        new_tokens = append(self, sequence, output, look)
        maybe_raise(sequence.request.request_id)
        return new_tokens

    patch.setattr(OutputProcessor, "append_tokens", appended)


def spoil_texts(patch: pytest.MonkeyPatch, engine: Engine, maybe_raise: MaybeRaise) -> None:
    complete = OutputProcessor.completion

    def completion(self: Any, sequence: Sequence) -> Completion:
        maybe_raise(sequence.request.request_id)
        return complete(self, sequence)

    patch.setattr(OutputProcessor, "completion", completion)


def spoil_callbacks(patch: pytest.MonkeyPatch, engine: Engine, maybe_raise: MaybeRaise) -> None:
    def on_token(token: NewToken) -> None:
        maybe_raise(token.request_id)

    patch.setattr(engine, "on_token", on_token)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("spoil", [spoil_tokens, spoil_texts, spoil_callbacks])
def test_an_error_ends_its_own_sequence(
    spoil: Spoil, depth: int, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("moe")
    engine = Engine.from_plan(plan_of(folder, depth), folder)
    wanted = answers(engine)
    rng = random.Random(depth)
    for victims in ({"0"}, {"1", "3"}, set(wanted)):
        when = rng.random()

        def maybe_raise(name: str, victims: set[str] = victims, when: float = when) -> None:
            if name in victims and (spoil is spoil_texts or rng.random() < when):
                raise KeyError("\ud800, and more\n")

        before = engine.metrics.failed_requests
        with monkeypatch.context() as patch:
            spoil(patch, engine, maybe_raise)
            found = answers(engine)
        failed = {name for name, item in found.items() if item.finish_reason == "error"}
        assert set(found) == set(wanted) and failed <= victims
        assert failed or spoil is not spoil_texts
        for name, item in found.items():
            if name in failed:
                assert str(item.error).startswith("KeyError: ") and str(item.error).isascii()
                with pytest.raises(RequestFailed):
                    item.check()
            else:
                assert item.token_ids == wanted[name].token_ids
        assert engine.metrics.failed_requests - before == len(failed)
        assert taken(engine) == FREE
    again = answers(engine)
    assert {n: item.token_ids for n, item in again.items()} == {
        n: item.token_ids for n, item in wanted.items()
    }


def test_a_failure_reaches_its_caller_alone(
    tiny_plan: Plan, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one from where a request enters the thread."""
    engine = Engine.from_plan(tiny_plan, checkpoint("moe"))
    (wanted,) = engine.generate([[2]], PARAMS)

    def maybe_raise(name: str) -> None:
        if name == "bad":
            raise ValueError("no text")

    add = Engine.add

    def added(self: Engine, request: Request) -> None:
        if request.request_id == "worse":
            raise OverflowError("too large")
        add(self, request)

    spoil_tokens(monkeypatch, engine, maybe_raise)
    monkeypatch.setattr(Engine, "add", added)

    async def run() -> None:
        seen: list[Completion] = []
        async with AsyncEngine(engine) as served, asyncio.timeout(60):
            served.on_completion = seen.append
            bad = served.submit([Request("bad", (1,), PARAMS)])
            worse = served.submit([Request("worse", (1,), PARAMS)])
            good = served.stream([2], PARAMS)
            for stream, says in ((bad, "ValueError: no text"), (worse, "too large")):
                with pytest.raises(RequestFailed, match=says):
                    await stream.completions()
            assert [done.token_ids for done in await good.completions()] == [wanted.token_ids]
            assert served.error is None and served.num_open == 0
            assert sorted(done.finish_reason for done in seen) == ["error", "error", "length"]

    asyncio.run(run())
    assert taken(engine) == FREE


def test_a_device_that_fails_ends_the_engine(tiny_plan: Plan, checkpoint: Any) -> None:
    engine = Engine.from_plan(tiny_plan, checkpoint("moe"))

    def fail(*args: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine.executor.run = fail  # type: ignore[method-assign]
    with pytest.raises(EngineStopped, match=r"the device has failed: .*illegal memory access"):
        engine.generate([[1]], PARAMS)


@cache
def damaged(folder: Path, out: Path, name: str, row: int | None, value: float) -> Path:
    """A copy of a checkpoint with one number that is none."""
    shutil.copytree(folder, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1, tensors[name].shape[-1])[row or 0, 0] = value
            save_file(tensors, path)
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(
    value: float, temperature: float, tiny_plan: Plan, checkpoint: Any, tmp_path: Path
) -> None:
    """Only for who meets them: one row of the embedding is damaged."""
    folder = damaged(checkpoint("moe"), tmp_path / "damaged", EMBEDDING, 9, value)
    engine = Engine.from_plan(tiny_plan, folder)
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=temperature)
    good, bad = engine.generate([[1, 2, 3], [1, 2, 9]], params)
    (wanted,) = Engine.from_plan(tiny_plan, checkpoint("moe")).generate([[1, 2, 3]], params)
    assert good.token_ids == wanted.token_ids
    assert (bad.token_ids, bad.text, bad.error) == ((), "", "the model's logits are not numbers")
    with pytest.raises(RequestFailed, match="not numbers"):
        list(engine.stream([9] * 40, params))
    after = engine.generate([[1, 2, 3] * size for size in (9, 19, 29)], params)
    assert not [done.error for done in after if done.error], "what it has left behind is not read"
    with pytest.raises(CanaryError, match=r"canary prompt 0: .*not numbers"):
        golden(engine, [[9]], 4)
    assert taken(engine) == FREE


def test_what_failed_requests_leave_in_memory_is_not_read(tiny_plan: Plan, checkpoint: Any) -> None:
    engine = Engine.from_plan(tiny_plan, checkpoint("moe"))
    prompts = [[1, 2, 3] * size for size in (9, 19, 29)]
    wanted = [done.token_ids for done in engine.generate(prompts, PARAMS)]
    dirty = Engine.from_plan(tiny_plan, checkpoint("moe"))
    for view in (*dirty.executor.memory.states("kv_cache"), *dirty.executor.memory.states("state")):
        view[1:] = float("nan")  # slot 0 is zero for ever
    assert [done.token_ids for done in dirty.generate(prompts, PARAMS)] == wanted


def weight(engine: Engine, name: str) -> torch.Tensor:
    program = engine.plan.pool.programs[0]
    return engine.executor.buffer_of(program, name, 1, 1)


@pytest.mark.parametrize("length", [48, 53])  # the end of a page, and the middle of one
def test_a_prefix_whose_numbers_were_wrong_is_not_cached(
    length: int, tiny_plan: Plan, checkpoint: Any
) -> None:
    """The fault is over, and what others share of the prompt stays cached."""
    engine = Engine.from_plan(tiny_plan, checkpoint("moe"))
    shared = [(7 * number) % 200 + 10 for number in range(32)]
    good, bad = shared + [3] * 20, shared + [(9 + number) % 200 for number in range(length)]
    other = shared + [4] * 20  # leaves a state where the prompts part, and gets its answer from it
    wanted = Engine.from_plan(tiny_plan, checkpoint("moe"), cache=False).generate([good, bad])
    engine.generate([good])
    engine.generate([other])
    row = weight(engine, "embed.table")[9]
    right = row.clone()
    row.fill_(float("nan"))
    (failed,) = engine.generate([bad])
    assert failed.error and taken(engine) == FREE
    row.copy_(right)
    again = engine.generate([bad])[0]
    shares = engine.generate([good])[0]
    assert [again.error, again.token_ids] == [None, wanted[1].token_ids]
    assert shares.token_ids == wanted[0].token_ids
    assert again.num_cached_tokens == shares.num_cached_tokens == len(shared)
    check_all_is_given_back(engine.scheduler.cache)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_told_of_a_row_of_the_head_that_is_no_number(
    value: float, tiny_plan: Plan, checkpoint: Any, tmp_path: Path
) -> None:
    """All other logits are numbers, so that the argmax is any token."""
    folder = damaged(checkpoint("moe"), tmp_path / "damaged", "lm_head.weight", 300, value)
    engine = Engine.from_plan(tiny_plan, folder)
    told: list[NewToken] = []
    engine.on_token = told.append
    (done,) = engine.generate([[1, 2, 3]], PARAMS)
    assert (done.error, told) == ("the model's logits are not numbers", [])


def test_stop_tokens_that_the_model_does_not_have_are_no_plan(
    tiny_plan: Plan, checkpoint: Any
) -> None:
    for ids in ((1 << 40,), (-1,), (tiny_plan.model.vocab_size,)):
        model = tiny_plan.model.model_copy(update={"eos_token_ids": ids})
        plan = tiny_plan.model_copy(update={"model": model})
        with pytest.raises(PlanError, match="eos_token_id"):
            Engine(plan, Engine.from_plan(tiny_plan, checkpoint("moe")).executor)


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_line({"logprob": float("nan")})
    assert json.loads(encode_line({"logprob": -0.5})) == {"logprob": -0.5}
