"""How uneven a router is: from counts of a law, and from a real model's choices."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import load_oracle, write_family

from tokenspeed_plan.planner.advisor.routing import Routing
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.routing_file import read_skew

EXPERTS, PER_TOKEN = 64, 8


def drawn(skew: float, num_tokens: int, seed: int) -> Routing:
    """Tokens that each choose different experts by a Zipf law (exponential races), two layers."""
    rng = random.Random(seed)
    weights = [(rank + 1.0) ** -skew for rank in range(EXPERTS)]
    layers = []
    for _ in range(2):
        counts = [0] * EXPERTS
        for _ in range(num_tokens):
            races = [rng.expovariate(weight) for weight in weights]
            for chosen in sorted(range(EXPERTS), key=races.__getitem__)[:PER_TOKEN]:
                counts[chosen] += 1
        layers.append(counts)
    return Routing(layers, num_tokens, PER_TOKEN)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_the_exponent_of_a_law_is_found(skew: float) -> None:
    assert drawn(skew, 2000, seed=1).skew == pytest.approx(skew, abs=0.08)


def test_few_tokens_do_not_look_uneven() -> None:
    """The shares of 40 tokens' choices would: their hits of 16 tokens are 55, not 57 as here."""
    few, many = drawn(0.0, 40, seed=2), drawn(0.0, 4000, seed=3)
    assert few.distinct(16) == pytest.approx(many.distinct(16), rel=0.01)


def test_all_tokens_hit_what_was_hit() -> None:
    found = Routing([[3, 1, 0, 4]], 4, 2)
    assert found.distinct(4) == 3
    assert found.distinct(1) == pytest.approx(2)


def test_a_spec_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"skew": 0.625}))
    text = (
        "version: 1\nmodel: {preset: qwen3.5-35b-a3b}\ntarget: {gpu: H200}\n"
        "workload: {skew: routing.json, first_turn_tokens: 10, output_tokens: 10}\n"
    )
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    assert load_spec(spec).workload.routing_skew == 0.625
    for content in ("[", "[]", "{}", '{"skew": 5}', '{"skew": NaN}', '{"skew": true}'):
        path.write_text(content)
        with pytest.raises(SpecError, match=r"routing\.json"):
            load_spec(spec)
    with pytest.raises(SpecError, match="cannot read"):
        read_skew(tmp_path / "no.json")


@pytest.mark.slow
def test_a_model_is_measured_as_transformers_chooses(tmp_path: Path) -> None:
    """The choices of each layer's router on the same tokens, counted by hooks."""
    folder = write_family(tmp_path / "model", "qwen3_moe")
    rng = random.Random(4)
    prompts = [[rng.randrange(3, 60) for _ in range(length)] for length in (5, 40, 17)]
    rows = tmp_path / "rows.jsonl"
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": prompt, "max_tokens": 1},
        }
        for number, prompt in enumerate(prompts)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)))
    done = CliRunner().invoke(main, ["measure-routing", str(folder), "--input", str(rows)])
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "routing.json").read_text())
    assert found["tokens"] == 5 + 40 + 17
    counts = oracle_counts(folder, prompts)
    config = json.loads((folder / "config.json").read_text())
    wanted = Routing(counts, found["tokens"], config["num_experts_per_tok"])
    assert found["skew"] == wanted.skew
    assert found["distinct_experts"] == {
        str(batch): round(wanted.distinct(batch), 2) for batch in wanted.batches
    }
    assert found["distinct_experts"]
    dense = write_family(tmp_path / "dense", "qwen3")
    refused = CliRunner().invoke(main, ["measure-routing", str(dense), "--input", str(rows)])
    assert refused.exit_code == 2 and "has no experts" in refused.output


def oracle_counts(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """How many tokens chose each expert, by layer, from the inputs of transformers' routers."""
    model = load_oracle(folder)
    counts: dict[str, torch.Tensor] = {}

    def hook(name: str, module: Any) -> Any:
        def count(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
            logits = inputs[0].reshape(-1, module.weight.shape[1]) @ module.weight.T
            chosen = logits.topk(module.top_k, dim=-1).indices.flatten()
            found = torch.bincount(chosen, minlength=len(module.weight))
            counts[name] = counts.get(name, torch.zeros_like(found)) + found

        return count

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(hook(name, module))
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    return [counts[name].tolist() for name in counts]
