"""The engine beyond parity: stopping, sampling, logprobs, limits, the canary, bad checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from safetensors.torch import load_file, save_file

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.golden import with_canary
from tokenspeed_plan.plans.errors import (
    CanaryError,
    PlanError,
    RequestError,
    SpecError,
    TokenspeedError,
)
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.canary import check_canary
from tokenspeed_plan.runtime.reference.sampling import filtered, sample, uniform

PROMPT = list(range(60, 90))


@pytest.fixture(scope="module")
def engine(tiny_plan: Plan, checkpoint: Any) -> Engine:
    return Engine.from_plan(tiny_plan, checkpoint("moe"))


def greedy(engine: Engine, **params: Any) -> Any:
    return engine.generate(
        [PROMPT], SamplingParams(**({"max_tokens": 20, "ignore_eos": True} | params))
    )[0]


def test_max_tokens(engine: Engine) -> None:
    done = greedy(engine, max_tokens=7)
    assert (len(done.token_ids), done.finish_reason, done.num_prompt_tokens) == (
        7,
        "length",
        len(PROMPT),
    )


def test_stop_token_ends_the_answer_and_is_not_in_the_text(engine: Engine) -> None:
    full = greedy(engine)
    stop = full.token_ids[5]
    done = greedy(engine, stop_token_ids=(stop,))
    first = full.token_ids.index(stop)
    assert done.token_ids == full.token_ids[: first + 1]
    assert done.finish_reason == "stop"
    assert engine.tokenizer is not None
    assert done.text == engine.tokenizer.decode(full.token_ids[:first])


def test_eos_stops_unless_ignored(tiny_plan: Plan, checkpoint: Any, engine: Engine) -> None:
    token = greedy(engine).token_ids[3]
    facts = tiny_plan.model.model_copy(update={"eos_token_ids": (token,)})
    other = Engine.from_plan(tiny_plan.model_copy(update={"model": facts}), checkpoint("moe"))
    assert greedy(other, ignore_eos=False).finish_reason == "stop"
    assert greedy(other, ignore_eos=True).finish_reason == "length"


def test_stop_string_across_tokens(engine: Engine) -> None:
    text = greedy(engine).text
    middle = len(text) // 2
    stop = text[middle - 2 : middle + 2]
    done = greedy(engine, stop=("never in it \x00", stop))
    assert done.finish_reason == "stop"
    assert done.text == text[: text.index(stop)]


def test_logprobs_are_a_distribution(engine: Engine) -> None:
    done = greedy(engine, num_logprobs=512)
    for step, token in zip(done.logprobs, done.token_ids, strict=True):
        assert step.token_id == token == step.top[0][0]
        assert step.logprob == step.top[0][1]
        assert sum(
            torch.tensor([value for _, value in step.top], dtype=torch.float64).exp()
        ) == pytest.approx(1.0)


def test_seeds(engine: Engine) -> None:
    params = {"temperature": 1.5, "max_tokens": 12}
    one, same, other = (greedy(engine, seed=seed, **params).token_ids for seed in (1, 1, 2))
    assert one == same != other


def test_a_sampled_answer_does_not_depend_on_its_batch(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    alone = engine.generate([PROMPT], params)[0].token_ids
    requests = [Request("a", tuple(PROMPT), params), *(Request(str(i), (i, 9)) for i in range(10))]
    for request in reversed(requests):
        engine.add(request)
    done = {}
    while engine.num_unfinished:
        done |= {item.request_id: item for item in engine.step()}
    assert done["a"].token_ids == alone
    assert len(done) == 11


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("r", ()), "empty prompt"),
        (Request("r", (1,) * 365), "over the plan's limit of 368"),
        (Request("r", (1,), SamplingParams(max_tokens=368)), "max_seq_len"),
        (Request("r", (512,)), "token id 512 is not in the vocabulary"),
        (Request("r", (-1,)), "token id -1 is not in the vocabulary"),
        (Request("r", (1,), SamplingParams(max_tokens=0)), "max_tokens is 0"),
    ],
)
def test_requests_over_the_limits_are_refused(request_: Request, says: str, engine: Engine) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        engine.add(request_)
    assert caught.value.hint
    assert engine.num_unfinished == 0


def test_a_refused_prompt_leaves_no_other_behind(engine: Engine) -> None:
    with pytest.raises(RequestError):
        engine.generate([PROMPT, []])
    assert engine.num_unfinished == 0


def test_an_interrupted_call_leaves_nothing_behind(engine: Engine, monkeypatch: Any) -> None:
    expected = greedy(engine).token_ids
    steps = iter(range(3))
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: step(self) if next(steps) < 2 else interrupt())
    with pytest.raises(KeyboardInterrupt):
        greedy(engine)
    monkeypatch.undo()
    assert engine.num_unfinished == 0
    assert greedy(engine).token_ids == expected


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_top_k_over_the_vocabulary_is_no_filter(engine: Engine) -> None:
    plain, huge = (
        greedy(engine, temperature=1.0, seed=3, top_k=k).token_ids for k in (0, (1 << 31) - 1)
    )
    assert plain == huge
    with pytest.raises(RequestError, match="top_k is 2147483648"):
        greedy(engine, top_k=1 << 31)


def test_the_longest_sequence_fits_exactly(engine: Engine) -> None:
    (done,) = engine.generate([[1] * 304], SamplingParams(max_tokens=64, ignore_eos=True))
    assert len(done.token_ids) == 64


def test_many_requests_give_everything_back(engine: Engine) -> None:
    prompts = [[i % 500] * (i % 9 + 1) for i in range(40)]
    for _ in range(2):
        assert len(engine.generate(prompts, SamplingParams(max_tokens=3))) == 40


def draws(
    logits: torch.Tensor, count: int, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    rows = logits.expand(count, -1)
    (tokens,) = sample(
        {"num_valid_tokens": logits.shape[0]},
        rows,
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.full((count,), top_k, dtype=torch.int32),
        torch.full((count,), 11),
        torch.arange(count),
    )
    return torch.bincount(tokens, minlength=logits.shape[0])


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.7, 0), (2.0, 1.0, 5), (1.3, 0.8, 8)],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    torch.manual_seed(0)
    logits, count = torch.randn(16) * 1.5, 20_000
    probs, ids = filtered(
        logits[None], torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([top_k])
    )
    wanted = torch.zeros(16, dtype=torch.float64).scatter(0, ids[0], probs[0] / probs.sum()) * count
    counted = draws(logits, count, temperature, top_p, top_k)
    kept = wanted > 0
    assert counted[~kept].sum() == 0
    chi_squared = ((counted[kept] - wanted[kept]) ** 2 / wanted[kept]).sum().item()
    # 15 degrees of freedom: exceeded once in 2,000 times by chance, but the draws are fixed.
    assert chi_squared < 40


def test_filters_against_a_loop() -> None:
    torch.manual_seed(1)
    for _ in range(50):
        logits, top_p, top_k = torch.randn(12), float(torch.rand(())), int(torch.randint(0, 12, ()))
        order = logits.argsort(descending=True).tolist()[: top_k or None]
        probs, total, kept = logits[order].double().softmax(0).tolist(), 0.0, []
        for token, p in zip(order, probs, strict=True):
            if not kept or total < top_p:
                kept.append(token)
            total += p
        got, ids = filtered(
            logits[None], torch.ones(1), torch.tensor([top_p]), torch.tensor([top_k])
        )
        assert sorted(ids[0][got[0] > 0].tolist()) == sorted(kept)


def test_padded_tokens_are_never_drawn() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 8:] = 100.0
    many = logits.expand(500, -1)
    ones, zeros = torch.ones(500), torch.zeros(500, dtype=torch.int32)
    (tokens,) = sample(
        {"num_valid_tokens": 8},
        many,
        ones,
        ones,
        zeros,
        torch.zeros(500, dtype=torch.int64),
        torch.arange(500),
    )
    assert int(tokens.max()) < 8


def test_uniform_is_splitmix64() -> None:
    """The first outputs for seed 0, as published with the generator."""
    values = uniform(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert values.tolist() == [(w >> 11) * 2.0**-53 for w in wanted]


@pytest.fixture
def copied(checkpoint: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("moe"), tmp_path / "model"))


def planned(folder: Path, **changes: Any) -> Plan:
    spec = make_spec(folder, **changes)
    model = find_model(spec)
    return with_canary(compile_plan(spec, model), spec, model)


def edit(folder: Path, name: str, change: Any) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file({key: value for key, value in tensors.items() if value is not None}, path)


NORM = "model.language_model.layers.1.input_layernorm.weight"


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_the_canary_passes(weights: str, checkpoint: Any, trained_moe: Path) -> None:
    """bf16 needs a trained model: rounding changes which experts a random router chooses."""
    folder = checkpoint("moe") if weights == "fp32" else trained_moe
    plan = planned(folder, model={"path": str(folder), "weights": weights})
    assert len(plan.canary) == 3
    assert check_canary(plan, Engine.from_plan(plan, folder)) >= (48 if weights == "fp32" else 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (NORM, lambda w: w + 0.5),
        ("model.language_model.layers.1.self_attn.q_norm.weight", lambda w: w.roll(1)),
        ("lm_head.weight", lambda w: w.roll(1, 0)),
        ("lm_head.weight", lambda w: w * 1.1),  # the same tokens, other probabilities
        ("model.language_model.layers.0.mlp.experts.down_proj", lambda w: w.roll(1, 0)),
    ],
)
def test_the_canary_fails_with_other_weights(name: str, change: Any, copied: Path) -> None:
    plan = planned(copied)
    edit(copied, name, change)
    with pytest.raises(CanaryError, match="the reference says"):
        check_canary(plan, Engine.from_plan(plan, copied))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: None, "no tensor"),
        (lambda w: w[:64], r"is \[64\], the plan reads up to \[128\]"),
        (lambda w: w[None], r"\[1, 128\]"),
        (lambda w: w.to(torch.int32), "stored as I32"),
    ],
)
def test_another_checkpoint_is_refused(
    change: Any, says: str, tiny_plan: Plan, copied: Path
) -> None:
    edit(copied, NORM, change)
    with pytest.raises(PlanError, match="is not what was planned"):
        Engine.from_plan(tiny_plan, copied)
    facts = tiny_plan.model.model_copy(update={"shards": {}})  # a plan of before there were digests
    with pytest.raises(PlanError, match=says):
        Engine.from_plan(tiny_plan.model_copy(update={"model": facts}), copied)
    with pytest.raises(SpecError):  # and cannot be planned either
        planned(copied)


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 20, b"\x10\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_damaged_files_are_refused(damage: bytes, tiny_plan: Plan, copied: Path) -> None:
    next(copied.glob("*.safetensors")).write_bytes(damage)
    for attempt in (lambda: Engine.from_plan(tiny_plan, copied), lambda: planned(copied)):
        with pytest.raises(TokenspeedError) as caught:
            attempt()
        assert caught.value.hint


def test_a_changed_tokenizer_is_refused(tiny_plan: Plan, copied: Path) -> None:
    path = copied / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"x": 1}))
    with pytest.raises(PlanError, match="not the file that was planned"):
        Engine.from_plan(tiny_plan, copied)


def test_a_plan_for_a_gpu_is_refused_here(checkpoint: Any) -> None:
    spec = make_spec(checkpoint("moe"), target={"gpu": "H200"})
    with pytest.raises(PlanError, match="sm_90"):
        Engine.from_plan(compile_plan(spec, find_model(spec)), checkpoint("moe"))
