"""Whether kernels push or the library adds up ranks: by price, by program, and said in the plan."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_spec

from tokenspeed_plan.codegen.dense.dense_tiling import most_pushed_at_once
from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.graph import Op, OpGraph, Stage, Tensor
from tokenspeed_plan.planner.machines.hardware import (
    HardwareSpec,
    find_hardware,
    gather_us,
    known_profiles,
    library_us,
    push_us,
)
from tokenspeed_plan.planner.passes.reduction import largest_reduction, peer_bytes
from tokenspeed_plan.plans.peer_memory import PEER_SLOTS
from tokenspeed_plan.plans.schema import CollectiveCall, Plan, Program
from tokenspeed_plan.plans.types import TensorSpec

H200 = find_hardware("H200")
NO_WAITS = dict.fromkeys(H200.waits_us, 0.0)
CHEAP = replace(H200, library_us={2: {8192: 0.5}}, waits_us=NO_WAITS)


def one_sum(ranks: int, hidden: int = 4096) -> OpGraph:
    rows = TensorSpec.of(("num_tokens", hidden), "bf16")
    tensors = {name: Tensor(name, rows) for name in ("x", "y")}
    op = Op("sum", "all_reduce", ("x",), ("y",), attrs={"num_ranks": ranks})
    return OpGraph("decode", Stage.SHARDED, (op,), tensors, {}, ("x",), ("y",))


@pytest.mark.parametrize(
    ("machine", "rows", "pushes"),
    [
        (H200, 1, True),
        (H200, 256, True),
        (H200, 8192, True),  # two ranks send as much as the library does
        (CHEAP, 1, False),
        (replace(H200, push_us={2: {8192: 90.0}}), 1, False),
    ],
)
def test_the_cheaper_way_is_taken(machine: HardwareSpec, rows: int, pushes: bool) -> None:
    found = largest_reduction(one_sum(2), machine, rows, 1)
    assert found is not None and found.pushes == pushes
    words = 3 * 2 * (4096 // 2 + 4)  # generations, ranks, words of a slot
    wanted = 4 * rows * (words + 1) + 256 if pushes else 0  # a count a row, and the signals
    assert peer_bytes(found, rows, 1) == pytest.approx(wanted, abs=600)


def test_prices_are_those_that_were_measured() -> None:
    """Two H200; more GPUs cost what others' tables say that they cost more."""
    assert [push_us(H200, rows * 8192, 2) for rows in (1, 4, 16)] == [3.4, 3.6, 3.7]
    assert [library_us(H200, rows * 8192, 2) for rows in (1, 64, 8192)] == [10.1, 12.8, 248]
    assert push_us(H200, 8192, 8) == pytest.approx(3.4 + 3.6 - 2.5)
    assert gather_us(H200, 65536, 2) == 9.6
    assert push_us(H200, 8192, 1) == library_us(H200, 8192, 1) == 0.0


@cache
def planned(folder: Path, gpu: str, concurrency: int) -> Plan:
    changes: dict[str, Any] = {
        "model": {"weights": "bf16"},
        "target": {"gpu": gpu, "count": 2},
        "workload": {"concurrency": concurrency},
    }
    spec = make_spec(folder, **changes)
    return compile_plan(spec, find_model(spec))


def num_sums(program: Program) -> int:
    """Sums over ranks that are steps of their own."""
    return sum(
        isinstance(step, CollectiveCall) and step.op == "all_reduce" for step in program.steps
    )


def test_of_eight_ranks_many_rows_are_left_to_the_library() -> None:
    """Each sends its part seven times, where the library sends each byte twice."""
    chosen = []
    for rows in (64, 8192):
        found = largest_reduction(one_sum(8), H200, rows, 1)
        assert found is not None
        chosen.append(found.pushes)
    assert chosen == [True, False]


def test_a_plan_says_which_programs_push(checkpoint: Any, tmp_path: Path) -> None:
    """On a machine whose kernels are slow with many rows, chunks of a prompt are left to it."""
    profile = yaml.safe_load(known_profiles()["h200"])
    profile["all_reduce"]["push"]["us"] = {2: {8192: 3.0, 65536: 3.0, 65792: 500.0}}
    machine = tmp_path / "mine.yaml"
    machine.write_text(yaml.safe_dump(profile))
    plan = planned(checkpoint("moe"), str(machine), 512)
    by_library = {program.name for program in plan.pool.programs if num_sums(program)}
    assert 0 < len(by_library) < len(plan.pool.programs)
    decision = next(each for each in plan.decisions if each.name == "all_reduce")
    assert decision.value.endswith("; the library adds up in the others")
    for option in decision.options:
        name = option.what.split()[0]
        assert option.what.endswith("the library") == (name in by_library), option.what
    slots = next(buffer for buffer in plan.pool.buffers if buffer.name == PEER_SLOTS)
    symmetric = next(arena for arena in plan.pool.arenas if arena.name == "symmetric")
    most = max(p.max_tokens for p in plan.pool.programs if p.name not in by_library)
    others_bytes = symmetric.size_bytes - slots.tensor.size_bytes(most, most)
    assert others_bytes in range(4 * most, 4 * most + 2048), "a count for each row, and signals"


def test_wide_rows_run_alone_on_a_multiprocessor() -> None:
    """256 threads with many registers each leave no room for another row."""
    for hidden, most in ((4096, 256), (8192, 132)):
        rows = TensorSpec.of(("num_tokens", hidden), "bf16")
        assert most_pushed_at_once(rows, H200.num_sms) == most
    assert most_pushed_at_once(rows, 0) == 256, "an interpreter runs them one after the other"


@pytest.mark.parametrize("experts", [{"tp": 2}, {"ep": 2}])
def test_every_step_of_ranks_that_draft_has_a_kernel(
    experts: dict[str, int], checkpoint: Any
) -> None:
    """A GPU replays nothing else: no operator may be left over beside a fused one."""
    spec = make_spec(
        checkpoint("moe"),
        model={"weights": "bf16"},
        target={"gpu": "H200", "count": 2},
        parallelism={"attention": {"tp": 2}, "moe": experts},
        speculation={"depth": 2},
    )
    plan = compile_plan(spec, find_model(spec))
    assert plan.pool.limits.max_depth == 2
    assert [kernel.name for kernel in plan.kernels if kernel.launch is None] == []
