"""Plans that call FlashAttention-3 and cuBLAS, made with neither here."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.spec import Library, Spec
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS, library_of
from tokenspeed_plan.plans.schema import LibraryCall, Plan

FP8_PRODUCT = {"bf16", "fp8[128x128]:fp32", "fp8[1x128]:fp32"}
AGENT = {
    "kind": "agentic",
    "first_turn_tokens": 20000,
    "turn_tokens": 800,
    "turns": 4,
    "output_tokens": 64,
    "concurrency": 1,
}


def plan_for(**target: Any) -> Plan:
    data = {
        "version": 1,
        "model": {"preset": "qwen3.5-0.8b", "weights": "bf16"},
        "target": {"gpu": "H200", **target},
        "workload": AGENT,
        "speculation": "off",
        "disaggregation": "off",
    }
    spec = Spec.model_validate(data)
    return compile_plan(spec, find_model(spec))


def functions_of(plan: Plan, phase: str) -> set[str]:
    return {
        step.function
        for program in plan.pool.programs
        if program.phase == phase
        for step in program.steps
        if isinstance(step, LibraryCall)
    }


def test_prompts_call_what_is_faster_on_hopper() -> None:
    plan = plan_for()
    assert functions_of(plan, "prefill") == {"cublas.linear", "fa3.attention_prefill"}
    assert not functions_of(plan, "decode")
    memory = plan.pool.memory_bytes_per_rank
    assert memory.reserved > find_hardware("H200").reserved_bytes
    largest = max(p.max_tokens for p in plan.pool.programs if p.phase == "prefill")
    for program in plan.pool.programs:
        kinds = [step.kernel.rpartition("_")[0] for step in program.steps if step.kind == "kernel"]
        if program.max_tokens == largest:
            assert "attention_gate" not in kinds


@pytest.mark.parametrize("target", [{"gpu": "B200"}, {"libraries": "none"}])
def test_elsewhere_all_steps_are_kernels(target: dict[str, Any]) -> None:
    plan = plan_for(**target)
    assert not functions_of(plan, "prefill")
    assert all(decision.name != "libraries" for decision in plan.decisions)


def test_flashinfer_is_called_where_the_spec_asks_for_it() -> None:
    plan = plan_for(libraries=["flashinfer"])
    assert functions_of(plan, "prefill") == {"flashinfer.attention_prefill"}
    assert not functions_of(plan, "decode")
    both = plan_for(libraries=["flashinfer", "cublas"])
    assert functions_of(both, "prefill") == {"cublas.linear", "flashinfer.attention_prefill"}


def test_the_spec_knows_all_libraries() -> None:
    assert set(get_args(Library)) == {library_of(key) for key in LIBRARY_FUNCTIONS}


def test_a_plan_may_insist() -> None:
    for word, fallback in (("required", False), ("auto", True)):
        steps = [step for p in plan_for(libraries=word).pool.programs for step in p.steps]
        calls = [step for step in steps if isinstance(step, LibraryCall)]
        assert calls and all(call.fallback == fallback for call in calls)


@pytest.mark.parametrize(
    ("key", "kinds", "attrs", "dtypes"),
    [
        ("fa3.attention_prefill", ("attention",), {"head_dim": 256}, {"bf16"}),  # of decode
        ("fa3.attention_prefill", ("attention",), {"head_dim": 80}, {"bf16"}),
        ("fa3.attention_prefill", ("attention",), {}, {"bf16", "fp8", "i32"}),
        ("fa3.attention_prefill", ("sigmoid_gate",), {}, {"bf16"}),
        ("cublas.linear", ("linear", "add"), {}, {"bf16"}),
        ("cublas.linear", ("linear",), {}, {"bf16", "fp8[128x128]:fp32"}),
        ("cublas.linear", ("linear",), {}, {"fp32"}),
        ("cublas.linear_fp8", ("linear",), {}, {"bf16"}),
        ("cublas.linear_fp8", ("linear",), {}, {"bf16", "fp8[128x128]:fp32"}),
        ("cublas.linear_fp8", ("linear",), {"splits": (256, 64)}, FP8_PRODUCT),
    ],
)
def test_a_function_computes_no_more_than_it_can(
    key: str, kinds: tuple[str, ...], attrs: dict[str, Any], dtypes: set[str]
) -> None:
    """Another mode, head, run of operators, or format of keys and weights is no match."""
    function = LIBRARY_FUNCTIONS[key]
    given = {"mode": "prefill", "head_dim": 256, **attrs}
    if attrs == {"head_dim": 256}:
        given["mode"] = "decode"
    assert not function.computes(kinds, given, dtypes)
    right = {"mode": "prefill", "head_dim": 256, "splits": (256, 128)}
    assert function.computes(function.runs[0], right, {"bf16", "i32", *function.needs})
