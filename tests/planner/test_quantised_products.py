"""FP8 by FP8 or converted weights: by price, once for all products, and only where one reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kernel_lab import Case, built_graph

from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, find_hardware
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS

H200 = find_hardware("H200")
PRODUCTS = ("linear", "grouped_up", "grouped_down")


def expanded(
    num_tokens: int,
    hardware: HardwareSpec = H200,
    quantises: bool | None = None,
    kind: str = "blocks",
) -> OpGraph:
    case = Case("prefill", (num_tokens,), (0,), "bf16", kind=kind, gpu="H200", fp8=True)
    context = PassContext(
        ParallelLayout(1, 1, 1),
        hardware,
        num_tokens,
        1,
        Load(num_tokens, 1, num_tokens),
        options=PassOptions(quantises=quantises),
    )
    return run(built_graph(case), context, Stage.EXPANDED)


def quantised(graph: OpGraph) -> list[str]:
    return [op.inputs[0] for op in graph.ops if op.kind == "quantise"]


def with_price(name: str, residual: float) -> HardwareSpec:
    waits = {**H200.waits_us, name: 0.0}
    return replace(H200, waits_us=waits, residuals={**H200.residuals, name: residual})


def test_few_rows_are_never_quantised() -> None:
    assert quantised(expanded(63)) == []


def test_the_profile_decides() -> None:
    """Dear conversions make quantising pay, dear products of FP8 do not."""
    cheap = expanded(256, with_price("product_quantised", 1e-3), kind="dense blocks")
    assert quantised(cheap)
    dear = expanded(8192, with_price("product_quantised", 1e3), kind="dense blocks")
    assert quantised(dear) == []
    no_rate = replace(H200, matrix_flops_per_s={"bf16": 1e15})
    assert quantised(expanded(8192, no_rate)) == []


@pytest.mark.parametrize("kind", ["blocks", "dense blocks"])
def test_each_activation_is_quantised_once_for_all_its_products(kind: str) -> None:
    graph = expanded(256, quantises=True, kind=kind)
    names = quantised(graph)
    assert len(names) == len(set(names))
    made = {op.outputs[0]: op.inputs[0] for op in graph.ops if op.kind == "quantise"}
    for op in graph.ops:
        if op.kind not in PRODUCTS:
            assert not set(made).intersection(op.inputs), op.name
            continue
        is_fp8 = graph.weights[op.weights[0]].spec.format == FP8
        assert (op.inputs[0] in made) == is_fp8, op.name
        assert ("dtype" in op.attrs) == is_fp8
    for name in made:
        assert graph.tensors[name].spec.format == FP8_ROWS
        assert any(name in op.inputs for op in graph.ops)


def test_nothing_is_quantised_without_weights_in_fp8() -> None:
    case = Case("prefill", (256,), (0,), "bf16", kind="blocks", gpu="H200")
    context = PassContext(
        ParallelLayout(1, 1, 1), H200, 256, 1, options=PassOptions(quantises=True)
    )
    assert quantised(run(built_graph(case), context, Stage.EXPANDED)) == []
