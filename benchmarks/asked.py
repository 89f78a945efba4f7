"""What `predict` answers is what was asked, or it refuses: random specs, judged one by one.

    python benchmarks/asked.py --specs 2000

Each spec states some of a layout, pools, drafts, the format of keys, chunks, a load and an engine,
many of them impossible. Every deployment that is priced, not the best one alone, must have all that
was stated; a refusal must say what is wrong and what to do. Writes how many were answered and how
many were refused for which reason, as JSON; the exit code is 1 where something else was answered.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.engine_profile import Engine, load_engine
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.models.config import ModelConfig, load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import TokenspeedError

ENGINES = sorted((Path(__file__).parent / "engines").glob("*.yaml"))
PRESETS = ("qwen3.5-0.8b", "qwen3.5-9b", "qwen3-8b", "qwen3.5-35b-a3b", "qwen3-30b-a3b")
GPUS = ("H200", "H100", "B200", "GB200", "A100", "cpu")
COUNTS = (1, 1, 2, 3, 4, 6, 8, 16)
WAYS = (1, 1, 2, 2, 3, 4, 8, 16)
Json = dict[str, Any]
# Another answer, or what a fault of the planner may raise.
FAULTS = (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def random_spec(dice: random.Random) -> Json:
    """A spec that states some things."""
    spec: Json = {
        "version": 1,
        "model": {"preset": dice.choice(PRESETS)},
        "target": {"gpu": dice.choice(GPUS), "count": dice.choice(COUNTS)},
        "workload": _workload(dice),
        "speculation": dice.choice(("off", "off", "auto", {"depth": dice.randint(1, 4)})),
    }
    if dice.random() < 0.3:
        spec["model"]["weights"] = dice.choice(("bf16", "fp8", "nvfp4"))
    if dice.random() < 0.8:
        spec["parallelism"] = _parallelism(dice)
    if dice.random() < 0.4:
        sides = {"prefill": dice.choice(WAYS), "decode": dice.choice(WAYS)}
        if dice.random() < 0.7:
            spec["target"]["count"] = sum(sides.values())
        spec["disaggregation"] = dice.choice(("off", sides, sides))
    if dice.random() < 0.4:
        serving = {"prefill_chunk": dice.choice((512, 2048, 8192)), "kv_dtype": "fp8"}
        spec["serving"] = dict(dice.sample(sorted(serving.items()), dice.randint(1, 2)))
    return spec


def _workload(dice: random.Random) -> Json:
    turns = dice.choice((1, 1, 4))
    load: Json = {
        "kind": dice.choice(("agentic", "batch")),
        "first_turn_tokens": dice.choice((1, *[1000] * 5, *[30_000] * 3, 300_000)),
        "turn_tokens": 200 * (turns > 1),
        "turns": turns,
        "output_tokens": dice.choice((1, 2, 300)),
        "concurrency": dice.choice((1, 2, 16)),
    }
    if dice.random() < 0.15:
        load["arrivals_per_s"] = dice.choice((0.1, 3.0))
    return load


def _parallelism(dice: random.Random) -> Json:
    attention = {"tp": dice.choice(WAYS)}
    for name in ("dp", "context_split"):
        if dice.random() < 0.15:
            attention[name] = dice.choice(WAYS)
    experts = dict(dice.sample([("tp", dice.choice(WAYS)), ("ep", dice.choice(WAYS))], 1))
    parts = [("attention", attention), ("moe", experts)]
    return dict(dice.sample(parts, dice.randint(1, 2)))


def longest_sequence(spec: Json) -> int:
    """Tokens of a conversation at its end."""
    load = spec["workload"]
    later = (load["turns"] - 1) * load["turn_tokens"] + load["turns"] * load["output_tokens"]
    return int(load["first_turn_tokens"] + later)


def faults(spec: Json, found: Candidate) -> Iterator[str]:
    """Where a deployment is not the one that was stated, by the words of the spec alone."""
    pools = [found.layout] if found.prefill is None else [found.layout, found.prefill]
    stated = spec.get("parallelism", {})
    for pool in pools:
        attention, experts = stated.get("attention", {}), stated.get("moe", {})
        groups = pool.attention_dp
        for what, want, got in (
            ("attention tp", attention.get("tp"), pool.attention_tp),
            ("attention dp", attention.get("dp"), groups),
            ("context split", attention.get("context_split"), pool.context_split),
            ("moe tp", experts.get("tp"), pool.moe_tp),
            ("moe ep", experts.get("ep"), pool.moe_ep),
        ):
            if want not in (None, got):
                yield f"{what} {got}, not {want}"
        ranks, of_experts = pool.attention_tp * groups, pool.moe_tp * pool.moe_ep
        if ranks != of_experts:
            yield f"{ranks} ranks of attention, {of_experts} of experts"
    if found.num_gpus > spec["target"]["count"]:
        yield f"{found.num_gpus} GPUs of {spec['target']['count']}"
    yield from _other_faults(spec, found)


def _other_faults(spec: Json, found: Candidate) -> Iterator[str]:
    split, drafts = spec.get("disaggregation"), spec["speculation"]
    if split == "off" and found.prefill is not None:
        yield "two pools"
    if isinstance(split, dict):
        other = found.prefill.num_ranks if found.prefill else 0
        if (other, found.layout.num_ranks) != (split["prefill"], split["decode"]):
            yield f"pools of {other} and {found.layout.num_ranks}"
    wanted = {"off": 0, "auto": None}[drafts] if isinstance(drafts, str) else drafts["depth"]
    if wanted not in (None, found.knobs.depth):
        yield f"{found.knobs.depth} drafts, not {wanted}"
    serving = spec.get("serving", {})
    chunk = found.knobs.prefill_chunk
    stated = serving.get("prefill_chunk", chunk)
    if chunk > stated or chunk < min(stated, longest_sequence(spec)):  # no more can wait
        yield f"chunks of {chunk}, not {stated}"
    if found.knobs.kv_dtype != serving.get("kv_dtype", "bf16"):
        yield f"keys in {found.knobs.kv_dtype}"


def judge(spec: Json, engine: Engine | None, config: ModelConfig) -> str:
    """`answered`, or the reason of a refusal without its numbers; raises where neither is right."""
    longest, tokens = longest_sequence(spec), spec["workload"]["output_tokens"]
    try:
        predictor, result = search(Spec.model_validate(spec), config, engine)
    except ValidationError as error:
        return f"not a spec: {error.errors()[0]['msg']}"
    except TokenspeedError as error:
        if not error.message or not error.hint:
            raise AssertionError("a refusal without a reason or without a hint") from error
        return re.sub(r"\d[\d.,]*|`[^`]*`", "#", error.message)[:100]
    if longest > config.max_positions:
        raise AssertionError(f"{longest} tokens of {config.max_positions} positions")
    if predictor.engine != engine:
        raise AssertionError("another engine")
    for each in result.predictions:
        found = "; ".join(faults(spec, each.candidate))
        if found:
            raise AssertionError(f"{each.candidate}: {found}")
        metrics = each.metrics
        steps_ms = metrics["tpot_ms"] * (tokens - 1)
        if abs(metrics["ttft_ms"] + steps_ms - metrics["turn_time_ms"]) > 1e-6 * steps_ms + 1e-6:
            raise AssertionError("a turn that is not its first token and the others")
    return "answered"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    engines = [None, None, *map(load_engine, ENGINES)]
    configs = {name: load_preset(name)[0] for name in PRESETS}
    tally, wrong, begun = Counter[str](), 0, time.monotonic()
    for number in range(options.specs):
        dice = random.Random(f"{options.seed}/{number}")
        spec, engine = random_spec(dice), dice.choice(engines)
        try:
            tally[judge(spec, engine, configs[spec["model"]["preset"]])] += 1
        except FAULTS as error:
            wrong += 1
            name = engine.title if engine else None
            fault = {"wrong": repr(error)[:300], "engine": name, "spec": spec}
            print(json.dumps(fault), flush=True)
    found = {
        "specs": options.specs,
        "wrong": wrong,
        "answered": tally.pop("answered", 0),
        "seconds": round(time.monotonic() - begun, 1),
        "refused": dict(tally.most_common()),
    }
    print(json.dumps(found, indent=2))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
