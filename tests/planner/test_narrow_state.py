"""Recurrent state in bf16: half of its bytes, in memory and in time, and the same answers alone."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_spec
from planning import planned

from tokenspeed_plan.planner.advisor.candidate import Knobs
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.runtime import Engine, SamplingParams

ONE = ParallelLayout(1, 1, 1)


@pytest.mark.parametrize("speculation", ["off", {"depth": 2, "rollback": "snapshot"}, {"depth": 2}])
def test_state_in_bf16_takes_half_and_answers_alike_in_any_batch(
    speculation: Any, checkpoint: Any
) -> None:
    folder = checkpoint("moe")
    plans = {}
    for state in ("fp32", "bf16"):
        spec = make_spec(folder, serving={"state": state}, speculation=speculation)
        plans[state] = planned(spec)
    whole, narrow = plans["fp32"], plans["bf16"]
    sizes = {
        state: sum(
            buffer.tensor.size_bytes()
            for buffer in plan.pool.buffers
            if buffer.name.endswith("ssm_state")
        )
        for state, plan in plans.items()
    }
    slots = narrow.pool.limits.num_state_slots / whole.pool.limits.num_state_slots
    assert sizes["bf16"] == pytest.approx(sizes["fp32"] * slots / 2)
    assert "state_dtype" in {each.name for each in narrow.decisions if each.value == "bf16"}
    engine = Engine.from_plan(narrow, folder, cache=False)
    prompts = [tuple((7 * row + 3 * place) % 90 for place in range(5 + row)) for row in range(5)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    together = [done.token_ids for done in engine.generate(prompts, params)]
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == alone


def test_bf16_state_is_cheaper_and_leaves_room() -> None:
    """For 35B-A3B more sequences fit, and a step of many takes less; other memory stays."""
    found = {}
    for state in ("fp32", "bf16"):
        data = {
            "version": 1,
            "model": {"preset": "qwen3.5-35b-a3b"},
            "target": {"gpu": "H200"},
            "workload": {"first_turn_tokens": 1024, "output_tokens": 256, "concurrency": 256},
            "serving": {"state": state},
        }
        spec = Spec.model_validate(data)
        predictor = Predictor(spec, load_preset("qwen3.5-35b-a3b")[0], find_hardware("H200"))
        memory = predictor.memory(ONE).map(Knobs(2048, 64, 0), 256, 1280)
        found[state] = (memory, predictor.steps.decode(ONE, 256, 1152).memory)
    (whole, whole_us), (narrow, narrow_us) = found["fp32"], found["bf16"]
    assert narrow.state == pytest.approx(whole.state / 2, rel=0.05)
    assert narrow.kv_cache == whole.kv_cache and narrow.weights == whole.weights
    assert narrow_us < 0.9 * whole_us
