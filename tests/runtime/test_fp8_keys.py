"""Keys and values in FP8: planned, priced, and computed as transformers does with rounded ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, load_oracle, oracle_greedy, write_checkpoint
from conftest import make_spec
from planning import planned
from quantised_models import DEMO, NUM_TOKENS, held_out_ids, loss_of, prompts
from safetensors.torch import save_file

from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, SamplingParams

NAME = "fp8_keys"


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3, half to even: three bits of fraction, and none below 2^-9."""
    _, exponent = torch.frexp(x)
    step = torch.exp2((exponent - 4).clamp(min=-9).float())
    return (torch.round(x / step) * step).clamp(-448, 448)


SCALES = {"k": 1.0, "v": 1.0}


@cache
def attention() -> str:
    """The name under which transformers attends to rounded keys and values.

    It is imported late: it loads Triton, which other tests must load to interpret.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        k, v = SCALES["k"], SCALES["v"]
        key, value = rounded(key / k) * k, rounded(value / v) * v
        return sdpa_attention_forward(module, query, key, value, *args, **options)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def plan_of(folder: Path, dtype: str = "fp8", **changes: Any) -> Plan:
    spec = make_spec(folder, serving={"kv_dtype": dtype}, **changes)
    return planned(spec)


def ids_of(folder: Path, **changes: Any) -> list[list[int]]:
    engine = Engine.from_plan(plan_of(folder, **changes), folder)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    found = [list(done.token_ids) for done in engine.generate(prompts(), params)]
    again = engine.generate([[*prompt, 1] for prompt in prompts()], params)
    assert any(done.num_cached_tokens for done in again)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "kernel"])
def test_keys_give_the_tokens_of_transformers_with_rounded_ones(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / name, KINDS[name])
    oracle = load_oracle(folder, KINDS[name])
    oracle.config._attn_implementation = attention()
    wanted = [oracle_greedy(oracle, prompt, NUM_TOKENS) for prompt in prompts()]
    assert ids_of(folder) == wanted
    assert ids_of(folder, speculation={"depth": 2, "acceptance": 0.9}) == wanted


@pytest.mark.slow
def test_a_plan_halves_the_bytes_of_keys_and_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "moe", KINDS["moe"])
    plain, small = plan_of(folder, "bf16"), plan_of(folder)
    caches = [
        [buffer.tensor for buffer in plan.pool.buffers if buffer.arena == "kv_cache"]
        for plan in (plain, small)
    ]
    for one, other in zip(*caches, strict=True):
        assert (str(one.format), str(other.format)) == ("fp32", "fp8")
        assert one.size_bytes() == 4 * other.size_bytes()
    assert small.pool.memory_bytes_per_rank.kv_cache < plain.pool.memory_bytes_per_rank.kv_cache
    (decision,) = (item for item in small.decisions if item.name == "kv_dtype")
    assert decision.value == "fp8"
    assert "scale of the checkpoint, or 1" in decision.reason
    assert not [item for item in plain.decisions if item.name == "kv_dtype"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "taken", "other"), [("tpot", "fp8", "bf16"), ("turn_time", "bf16", "fp8")]
)
def test_auto_takes_what_the_objective_prefers(objective: str, taken: str, other: str) -> None:
    """Fewer bytes in decode; in prefill no function of a library reads FP8."""
    spec = make_spec(
        "x",
        model={"path": None, "preset": "qwen3.5-9b", "weights": "bf16"},
        target={"gpu": "H200"},
        objective={"minimize": objective},
        serving={"kv_dtype": "auto"},
        workload={"first_turn_tokens": 50_000, "concurrency": 8},
    )
    plan = planned(spec)
    (decision,) = (item for item in plan.decisions if item.name == "kv_dtype")
    assert (decision.value, decision.runner_up) == (taken, other)


def with_scales(folder: Path, value: torch.Tensor) -> Path:
    """The checkpoint with a file of scales of its attention layer."""
    attention = "model.language_model.layers.1.self_attn."
    names = [f"{attention}{key}_proj.{key}_scale" for key in "kv"]
    scales = {names[0]: value, names[1]: value / 4}
    save_file(scales, folder / "scales.safetensors")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] |= dict.fromkeys(names, "scales.safetensors")
    index.write_text(json.dumps(data))
    return folder


@pytest.mark.slow
def test_scales_of_a_checkpoint_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "moe", KINDS["moe"])
    oracle = load_oracle(folder, KINDS["moe"])
    oracle.config._attn_implementation = attention()
    monkeypatch.setitem(SCALES, "k", 0.03)
    monkeypatch.setitem(SCALES, "v", 0.0075)
    wanted = [oracle_greedy(oracle, prompt, NUM_TOKENS) for prompt in prompts()]
    assert ids_of(with_scales(folder, torch.tensor(0.03))) == wanted


@pytest.mark.parametrize(
    "value",
    [torch.tensor(-1.0), torch.tensor([1.0, 2.0]), torch.tensor(3), torch.tensor(torch.nan)],
    ids=["negative", "two numbers", "an integer", "no number"],
)
def test_bad_scales_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    folder = with_scales(write_checkpoint(tmp_path / "moe", KINDS["moe"]), value)
    with pytest.raises(SpecError, match=r"k_proj.k_scale` is stored as .* one positive") as refused:
        plan_of(folder)
    assert refused.value.hint


@pytest.mark.slow
def test_the_trained_model_loses_little() -> None:
    """FP8 keys and values cost the demo model under 0.3 % of its loss on unseen text."""
    ids = held_out_ids()
    before, after = loss_of(DEMO, ids), loss_of(DEMO, ids, attention())
    print(f"keys and values in FP8: {after / before - 1:+.4%} of {before:.3f} nats")
    assert before != after
    assert abs(after / before - 1) < 0.003
