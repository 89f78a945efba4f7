"""Sharded plans, with one thread a rank, give the results of a single rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from planning import planned
from torch import Tensor

from tokenspeed_plan.planner.graph import Op, OpGraph, Source, Stage, Weight
from tokenspeed_plan.planner.graph import Tensor as GraphTensor
from tokenspeed_plan.planner.layout import ParallelLayout, Split, check_fp8_blocks
from tokenspeed_plan.planner.passes.shard import shard
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.backend import ReferenceBackend
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.loading.weights import load_weights

PROMPTS = [[5, 6, 7, 8] * 20, [9], list(range(40, 110))]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


class ThreadCollectives:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, shared: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def _exchange(self, source: Tensor) -> list[Tensor]:
        self.shared[self.rank] = source
        self.barrier.wait()
        parts = [part.clone() for part in self.shared if part is not None]
        self.barrier.wait()
        return parts

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        target.copy_(torch.stack(self._exchange(source)).sum(0))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        target.copy_(torch.cat(self._exchange(source), -1))


def run_ranks(plan: Plan, folder: Path) -> list[list[tuple[int, ...]]]:
    count = plan.target.count
    shared: list[Tensor | None] = [None] * count
    barrier = threading.Barrier(count, timeout=60)

    def rank(index: int) -> list[tuple[int, ...]]:
        arenas, weights = load_weights(plan, folder, lambda: Arenas(plan.pool.arenas), index)
        backend = ReferenceBackend(plan, index, ThreadCollectives(index, shared, barrier))
        executor = Executor(PlanMemory(plan, arenas, weights), backend)
        return [done.token_ids for done in Engine(plan, executor).generate(PROMPTS, PARAMS)]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(rank, range(count)))


def plan_of(folder: Path, **changes: Any) -> Plan:
    spec = make_spec(folder, **changes)
    return planned(spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "moe"),
    [
        ("moe", 2, {"tp": 2}),
        ("moe", 2, {"ep": 2}),
        ("deep", 4, {"tp": 2, "ep": 2}),  # 2 kv heads on 4 ranks: copied
        ("deep", 4, {"ep": 4}),
        ("dense", 2, None),
        ("ratio3", 2, None),
        ("flat", 2, {"ep": 2}),
        ("tied", 2, None),
    ],
)
@pytest.mark.parametrize("speculation", ["off", {"depth": 3}], ids=["plain", "depth 3"])
def test_ranks_agree_with_one(
    kind: str, count: int, moe: dict[str, int] | None, speculation: Any, checkpoint: Any
) -> None:
    folder = checkpoint(kind)
    plain = plan_of(folder)
    parallelism = {"attention": {"tp": count}, "moe": moe} if moe else "auto"
    plan = plan_of(
        folder, target={"count": count}, parallelism=parallelism, speculation=speculation
    )
    assert plan.pool.memory_bytes_per_rank.weights < plain.pool.memory_bytes_per_rank.weights
    for rank in run_ranks(plan, folder):
        assert rank == alone(folder)


@cache
def alone(folder: Path) -> list[tuple[int, ...]]:
    """The answers of a single rank."""
    engine = Engine.from_plan(plan_of(folder), folder)
    return [done.token_ids for done in engine.generate(PROMPTS, PARAMS)]


def test_collectives_are_two_a_layer_and_one_for_the_embedding(checkpoint: Any) -> None:
    plan = plan_of(checkpoint("moe"), target={"count": 2})
    for program in plan.pool.programs:
        plain = [step.op for step in program.steps if step.kind == "collective"]
        fused = num_fused_reduces(plan, program)
        assert plain == ["all_reduce"] * (2 * plan.num_layers + 1 - fused) + ["all_gather"]
        assert fused == 2 * plan.num_layers + 1, "two ranks push"


def num_fused_reduces(plan: Plan, program: Program) -> int:
    """Kernels that reduce over the ranks, with the residual and the norm where there are any."""
    fused = {kernel.name for kernel in plan.kernels if kernel.parts[0].kind == "all_reduce"}
    return sum(step.kind == "kernel" and step.kernel in fused for step in program.steps)


def preset(name: str, count: int, **parallelism: Any) -> Plan:
    data = {
        "version": 1,
        "model": {"preset": f"qwen3.5-{name}"},
        "target": {"gpu": "B200", "count": count},
        "speculation": "off",
    }
    spec = Spec.model_validate(data | ({"parallelism": parallelism} if parallelism else {}))
    return planned(spec)


@pytest.mark.slow
def test_the_headline_splits_as_published() -> None:
    plan = preset("397b-a17b", 16, attention={"tp": 16}, moe={"tp": 16})
    cache = next(buffer for buffer in plan.pool.buffers if buffer.arena == "kv_cache")
    assert cache.tensor.shape[3] == 1  # 2 kv heads, copied over the ranks
    reduces = [
        step
        for step in plan.pool.programs[-1].steps
        if step.kind == "collective" and step.op == "all_reduce"
    ]
    assert len(reduces) + num_fused_reduces(plan, plan.pool.programs[-1]) == 121
    table = next(weight for weight in plan.pool.weights if weight.name == "embed.table")
    assert table.tensor.shape == (248320 // 16, 4096)


@pytest.mark.parametrize(
    ("name", "count", "parallelism", "says"),
    [
        ("27b", 16, {}, "24 heads cannot be cut over 16 GPUs"),
        ("397b-a17b", 3, {}, "cannot be cut over 3 GPUs"),
        ("397b-a17b", 8, {"attention": {"tp": 4}}, "attention data parallelism is not planned yet"),
        ("397b-a17b", 8, {"moe": {"tp": 3, "ep": 2}}, "moe tp 3 x ep 2 is 6 GPUs"),
        ("9b", 2, {"moe": {"ep": 2}}, "has no experts"),
        ("35b-a3b", 64, {}, "16 heads cannot be cut over 64 GPUs"),
    ],
)
def test_illegal_layouts_say_why(
    name: str, count: int, parallelism: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        preset(name, count, **parallelism)
    assert caught.value.hint


def test_kv_heads_are_copied_where_there_are_more_ranks() -> None:
    shift = Split("kv", 2).shift(512, ParallelLayout(8, 8, 1))
    assert [shift.at(rank) for rank in range(8)] == [0, 0, 0, 0, 256, 256, 256, 256]


def test_expert_ranks_are_the_slow_axis() -> None:
    layout = ParallelLayout(4, 2, 2)
    assert [Split("experts", 8).shift(8, layout).at(rank) for rank in range(4)] == [0, 0, 4, 4]
    assert [Split("expert_inner", 64).shift(64, layout).at(rank) for rank in range(4)] == [
        0,
        32,
        0,
        32,
    ]


def test_fp8_blocks_limit_the_ways() -> None:
    check_fp8_blocks(512, 4, "experts")  # 35B: 512 / 4 = 128
    with pytest.raises(SpecError, match="128-wide FP8 blocks"):
        check_fp8_blocks(512, 8, "experts")


def packed_sources(layout: ParallelLayout) -> list[Source]:
    """One rank's sources of a weight: 4 groups of 3 rows, one out of each 10 rows from row 2 on."""
    split = ((0, Split("attention", 4)),)
    source = Source("w", (40, 6), (2, 0), (12, 6), split, run=3, every=10)
    weight = Weight("w", TensorSpec.of(shape=(12, 6), dtype="bf16"), (source,))
    graph = OpGraph("decode", Stage.BUILT, (), {}, {"w": weight}, (), ())
    return list(shard(graph, layout).weights["w"].sources)


def test_packed_rows_become_a_source_for_each_group() -> None:
    whole = packed_sources(ParallelLayout(1, 1, 1))
    assert [(source.start, source.size) for source in whole] == [
        ((first, 0), (3, 6)) for first in (2, 12, 22, 32)
    ]
    assert all(not source.ranks and not source.every for source in whole)
    half = packed_sources(ParallelLayout(2, 2, 1))
    assert [source.start[0] for source in half] == [2, 12]
    assert all(shift.at(1) == 20 for source in half for _, shift in source.ranks)


def test_a_partial_sum_over_two_axes_is_reduced_over_both() -> None:
    """Experts without a shared expert: their weight is cut by expert and by inner channel."""
    splits = ((0, Split("experts", 4)), (2, Split("expert_inner", 4)))
    source = Source("down", (4, 8, 4), (0, 0, 0), (4, 8, 4), splits)
    weight = Weight("down", TensorSpec.of(shape=(4, 8, 4), dtype="bf16"), (source,))
    op = Op("down", "experts_down", ("h",), ("y",), ("down",), partial=True)
    tensors = {
        name: GraphTensor(name, TensorSpec.of(shape=("num_tokens", 8), dtype="bf16"))
        for name in ("h", "y")
    }
    graph = OpGraph("decode", Stage.BUILT, (op,), tensors, {"down": weight}, ("h",), ("y",))
    reduce = shard(graph, ParallelLayout(4, 2, 2)).ops[-1]
    assert (reduce.kind, reduce.attrs) == ("all_reduce", {"num_ranks": 4})
