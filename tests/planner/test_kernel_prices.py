"""Prices of kernels follow the tiles and the rows that kernels have."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tokenspeed_plan.codegen.dense.dense_tiling import (
    NARROW_TILE,
    _few_tiles,
    filling_tile,
    is_narrow,
)
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.passes.cost import Load, costed_op, roof_of

H200, ALONE = find_hardware("H200"), ParallelLayout(1, 1, 1)
MIXTURE = load_preset("qwen3.5-35b-a3b")[0]


@pytest.mark.parametrize("rows", [40, 64, 128, 256, 500])
@pytest.mark.parametrize("columns", [257, 1024, 2048, 9216, 12_352])
def test_the_price_has_the_tile_of_the_rule(rows: int, columns: int) -> None:
    work = SimpleNamespace(hardware=H200, dtype="bf16", has=lambda kind: False)
    first = _few_tiles(cast(Any, work), rows, columns)[0]
    if is_narrow(rows, columns):
        assert (first.m, first.n, first.splits) == NARROW_TILE
    else:
        assert (first.m, first.n) == filling_tile(rows, columns, H200.num_sms)
    assert is_narrow(rows, columns) == (columns <= 1024)
    assert not is_narrow(32, columns)  # it has a tile of 16 rows


def test_products_of_few_columns_leave_no_multiprocessor_idle() -> None:
    """128 rows of 2,048 columns are 16 tiles of 128, on 132 multiprocessors."""
    by_rule = StepModel(MIXTURE, H200).decode(ALONE, 128, 1024)
    whole = StepModel(MIXTURE, replace(H200, whole_tiles=True)).decode(ALONE, 128, 1024)
    assert by_rule.matrix < 0.1 * whole.matrix
    assert by_rule.total_us < 0.95 * whole.total_us


def test_columns_that_pad_the_last_tile_are_computed() -> None:
    """A router of 257 columns multiplies 384 with many rows."""
    graph = StepModel(MIXTURE, H200).graph(ALONE, "prefill", 8192)
    router = next(op for op in graph.ops if any(part.role == "router" for part in op.members))
    costed, load = costed_op(graph, router), Load(8192, 1, 4096)
    roof = roof_of(costed, costed.work(load), load, H200)
    flops_per_s = H200.matrix_flops_per_s["bf16"] * H200.matrix_share
    useful_us = 2.0 * 8192 * 257 * MIXTURE.hidden_size / flops_per_s * 1e6
    assert roof.matrix_us >= useful_us * 384 / 257


def test_only_the_rows_that_are_picked_are_read() -> None:
    model = StepModel(MIXTURE, H200)
    graph = model.graph(ALONE, "prefill", 8192, depth=3)
    (picking,) = (op for op in graph.ops if op.kind == "last_rows")
    read = costed_op(graph, picking).amounts.activations
    assert read.per_token == 0.0 and read.per_seq > 0.0


def test_a_class_may_have_a_factor_where_products_bound_it() -> None:
    slow = replace(H200, matrix_residuals={"product": 3.0 * H200.residuals["product"]})
    model, slower = StepModel(MIXTURE, H200), StepModel(MIXTURE, slow)
    assert slower.decode(ALONE, 8, 1024) == model.decode(ALONE, 8, 1024)
    assert slower.prefill(ALONE, 512, 0).matrix > model.prefill(ALONE, 512, 0).matrix
    assert H200.matrix_residual("grouped") > H200.residuals["grouped"]
