"""The file of a plan and its differences can be read."""

from __future__ import annotations

import json

from plan_edits import with_program

from tokenspeed_plan.plans.bundle import dump_plan, parse_plan
from tokenspeed_plan.plans.canon import canonical
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.schema import Plan, Pool


def test_each_weight_buffer_kernel_and_step_has_a_line(tiny_plan: Plan) -> None:
    text = dump_plan(tiny_plan)
    assert json.loads(text) == tiny_plan.model_dump(mode="json")
    assert parse_plan(text, "plan") == tiny_plan
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    pool = tiny_plan.pool
    items = [*tiny_plan.kernels, *pool.weights, *pool.buffers, *pool.arenas]
    for program in pool.programs:
        items += [*program.buffers, *program.steps]
    assert set(lines) >= {canonical(item.model_dump(mode="json")) for item in items}
    assert len(lines) < 2 * len(items)


def changes(old: Plan, new: Plan) -> list[str]:
    return [" ".join(str(change).split()) for change in diff(old, new)]


def with_pools(plan: Plan, *pools: Pool) -> Plan:
    return plan.model_copy(update={"pools": pools})


def test_changes_of_the_only_pool_have_no_prefix(tiny_plan: Plan) -> None:
    limits = tiny_plan.pool.limits.model_copy(update={"max_seqs": 3})
    seqs = tiny_plan.pool.limits.max_seqs
    assert changes(tiny_plan, tiny_plan) == []
    assert changes(tiny_plan, tiny_plan.with_pool(limits=limits)) == [
        f"~ limits.max_seqs {seqs} -> 3"
    ]
    first = tiny_plan.pool.programs[0]
    steps = with_program(tiny_plan, 0, steps=first.steps[1:])
    count = first.launches
    assert changes(tiny_plan, steps)[0].startswith(
        f"~ program {first.name} launches {count} -> {count - 1}"
    )


def test_pools_are_compared_by_role(tiny_plan: Plan) -> None:
    both = tiny_plan.pool
    prefill, decode = (both.model_copy(update={"role": role}) for role in ("prefill", "decode"))
    split = with_pools(tiny_plan, prefill, decode)
    count = len(both.programs)
    assert changes(tiny_plan, split) == [
        "- pool both",
        f"+ pool decode {count} programs",
        f"+ pool prefill {count} programs",
    ]
    memory = both.memory_bytes_per_rank.model_copy(update={"io": 0})
    fewer = decode.model_copy(
        update={"programs": both.programs[1:], "memory_bytes_per_rank": memory}
    )
    found = changes(split, with_pools(tiny_plan, prefill, fewer))
    assert found == [
        f"~ decode.memory.io {both.memory_bytes_per_rank.io} -> 0 bytes (-100.0%)",
        f"- decode.program {both.programs[0].name}",
    ]
