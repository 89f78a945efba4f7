"""The validator refuses what schema 6 has room for and nothing replays yet; answer digests."""

from __future__ import annotations

from typing import Any

import pytest
from plan_edits import with_kernel, with_program

from tokenspeed_plan.plans.bundle import dump_plan, parse_plan
from tokenspeed_plan.plans.canon import answer_digest
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.hazards import check_hazards
from tokenspeed_plan.plans.kernel_abi import with_launch_params
from tokenspeed_plan.plans.ops import ShapeError
from tokenspeed_plan.plans.schema import (
    SIGNALS,
    ArenaName,
    ArenaSpec,
    BufferSpec,
    CallCost,
    KernelCall,
    KernelSpec,
    Launch,
    LibraryCall,
    Param,
    Part,
    Plan,
    Program,
    Step,
    Terms,
    WaitEvent,
)
from tokenspeed_plan.plans.types import FORMATS, Format, TensorSpec
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.plans.validate.peer_rules import check_peers


@pytest.mark.parametrize(
    "roles", [("prefill",), ("decode",), ("both", "both"), ("prefill", "decode")]
)
def test_other_pools_are_refused(roles: tuple[str, ...], tiny_plan: Plan) -> None:
    pools = tuple(tiny_plan.pool.model_copy(update={"role": role}) for role in roles)
    with pytest.raises(PlanError, match="the runtime replays only one pool of role `both`"):
        validate(tiny_plan.model_copy(update={"pools": pools}))


BLOCKS = Format(dtype="bf16", block=(16,), scale="fp32")


@pytest.mark.parametrize("used", [FORMATS["fp8"], FORMATS["nvfp4"], Format(dtype="fp8"), BLOCKS])
@pytest.mark.parametrize("where", ["weights", "buffers", "program", "kernel"])
def test_formats_that_nothing_computes_in(where: str, used: Format, tiny_plan: Plan) -> None:
    if (where, used) == ("weights", FORMATS["fp8"]):
        pytest.skip("products read such weights")
    says = "kernels and bodies compute in bf16, fp32, fp64, i32, i64"
    with pytest.raises(PlanError, match=says):
        validate(with_format(tiny_plan, where, used))


def with_format(plan: Plan, where: str, used: Format) -> Plan:
    def changed(item: Any) -> Any:
        tensor = TensorSpec(shape=item.tensor.shape, format=used)
        return item.model_copy(update={"tensor": tensor})

    if where == "kernel":
        params = plan.kernels[0].params
        kernel = plan.kernels[0].model_copy(update={"params": (changed(params[0]), *params[1:])})
        return with_kernel(plan, 0, kernel)
    if where == "program":
        first, *rest = plan.pool.programs[0].buffers
        return with_program(plan, 0, buffers=(changed(first), *rest))
    first, *rest = getattr(plan.pool, where)
    return plan.with_pool(**{where: (changed(first), *rest)})


@pytest.mark.parametrize("change", ["drop", "swap", "rename", "role"])
def test_launch_parameters_are_those_of_the_abi(change: str, tiny_plan: Plan) -> None:
    at, kernel = next((i, k) for i, k in enumerate(tiny_plan.kernels) if k.launch is not None)
    *tensors, tokens, seqs = kernel.params
    assert [param.role for param in (tokens, seqs)] == ["num_tokens", "num_seqs"]
    made = {
        "drop": (tokens,),
        "swap": (seqs, tokens),
        "rename": (tokens.model_copy(update={"name": "count"}), seqs),
        "role": (tokens, seqs.model_copy(update={"role": "rank"})),
    }
    changed = kernel.model_copy(update={"params": (*tensors, *made[change])})
    with pytest.raises(PlanError, match="has other parameters than"):
        validate(with_kernel(tiny_plan, at, changed))
    first = kernel.model_copy(update={"params": (tokens, *tensors, seqs)})
    with pytest.raises(PlanError, match="has other parameters than"):
        validate(with_kernel(tiny_plan, at, first))


def library(reads: tuple[str, ...], writes: tuple[str, ...], stream: int = 0) -> LibraryCall:
    return LibraryCall(
        package="cublas",
        version="12.9",
        function="gemm",
        reads=reads,
        writes=writes,
        stream=stream,
        predicted_us=1.0,
    )


@pytest.mark.parametrize(
    ("reads", "writes", "says"),
    [
        (("token_ids", "embed"), ("logits",), "the runtime replays no library steps"),
        (("nothing",), ("logits",), "reads `nothing`"),
        (("token_ids",), ("embed",), "writes `embed`"),
    ],
)
def test_library_steps_are_refused_after_their_operands(
    reads: tuple[str, ...], writes: tuple[str, ...], says: str, tiny_plan: Plan
) -> None:
    weight = tiny_plan.pool.weights[0].name
    call = library(
        tuple(weight if name == "embed" else name for name in reads),
        tuple(weight if name == "embed" else name for name in writes),
    )
    steps = (*tiny_plan.pool.programs[0].steps, call)
    plan = parse_plan(dump_plan(with_program(tiny_plan, 0, steps=steps)), "plan")
    with pytest.raises(PlanError, match=says.replace("embed", weight)):
        validate(plan)


def small_program(steps: tuple[Step, ...], offsets: dict[str, int]) -> Program:
    tensor = TensorSpec.of(shape=("num_tokens", 64), dtype="fp32")
    buffers = tuple(
        BufferSpec(name=name, arena="activations", offset_bytes=offset, tensor=tensor)
        for name, offset in offsets.items()
    )
    return Program(
        phase="prefill",
        bucket=1,
        max_tokens=1,
        max_seqs=1,
        inputs=("x",),
        outputs=("z",),
        buffers=buffers,
        steps=steps,
        num_streams=2,
        captured=False,
        predicted_us=1.0,
    )


@pytest.mark.parametrize(
    ("steps", "overlap", "says"),
    [
        ((library(("x", "w"), ("y",)), library(("y",), ("z",))), False, None),
        ((library(("y",), ("z",)), library(("x",), ("y",))), False, "read before it is written"),
        ((library(("x",), ("y", "z")), library(("y",), ("u",))), True, "may still be in use"),
        ((library(("x",), ("z",)), library(("z",), ("y",))), False, "written and never read"),
        ((library(("x",), ("y",)), library(("y",), ("z",), 1)), False, "works before it waits"),
        ((library(("x",), ("y",)), WaitEvent(event=1, stream=1)), False, "not recorded before"),
    ],
)
def test_library_steps_are_ordered_like_others(
    steps: tuple[Step, ...], overlap: bool, says: str | None
) -> None:
    distance = 0 if overlap else 256
    program = small_program(steps, {"y": 0, "z": distance, "u": 512})
    x = BufferSpec(name="x", arena="io", offset_bytes=0, tensor=program.buffers[0].tensor)
    buffers = {buffer.name: buffer for buffer in (x, *program.buffers)}
    if says is None:
        check_hazards(program, {}, buffers)
        return
    with pytest.raises(ShapeError, match=says):
        check_hazards(program, {}, buffers)


def reducing_kernel(ranks: int) -> KernelSpec:
    rows = TensorSpec.of(shape=("num_tokens", 64), dtype="fp32")
    params = (
        Param(name="x", role="input", tensor=rows),
        Param(name="y", role="output", tensor=rows, access="write"),
    )
    part = Part(kind="all_reduce", operands=("x",), outputs=("y",), attrs={"num_ranks": ranks})
    launch = Launch(
        template="add_norm",
        constants={},
        grid=({"block": 1},),  # type: ignore[arg-type]
        num_warps=4,
        num_stages=1,
        pdl=False,
        source_sha256="",
    )
    kernel = KernelSpec(name="sum_0", params=params, parts=(part,), launch=launch)
    return with_launch_params(kernel)


def placed(arena: ArenaName, signals: str | None, width: int) -> dict[str, BufferSpec]:
    """The reduced tensor in one arena, and flags in another."""
    rows = TensorSpec.of(shape=("num_tokens", 64), dtype="fp32")
    made = {"x": BufferSpec(name="x", arena=arena, offset_bytes=0, tensor=rows)}
    if signals is not None:
        flags = TensorSpec.of(shape=("num_tokens", width), dtype="i32")
        fields = {"name": SIGNALS, "arena": signals, "offset_bytes": 0, "tensor": flags}
        made[SIGNALS] = BufferSpec.model_validate(fields)
    return made


@pytest.mark.parametrize(
    ("arena", "signals", "width", "ranks", "says"),
    [
        ("symmetric", "symmetric", 8, 4, None),
        ("activations", "symmetric", 8, 4, "peers read `x` of `sum_0`"),
        ("symmetric", None, 8, 4, "has no i32 `signals`"),
        ("symmetric", "scratch", 8, 4, "has no i32 `signals`"),
        ("symmetric", "symmetric", 7, 4, "has 28 bytes, `sum_0` needs 32"),
        ("symmetric", "symmetric", 8, 2, "adds up 4 ranks, the plan has 2"),
    ],
)
def test_peers_read_symmetric_memory_only(
    arena: ArenaName, signals: str | None, width: int, ranks: int, says: str | None
) -> None:
    step = KernelCall(kernel="sum_0", args=("x", "y"), predicted_us=1.0)
    program, kernel = small_program((step,), {}), reducing_kernel(4)
    buffers = placed(arena, signals, width)
    if says is None:
        check_peers(program, step, kernel, buffers, ranks)
        return
    with pytest.raises(PlanError, match=says):
        check_peers(program, step, kernel, buffers, ranks)


def test_one_rank_has_no_symmetric_memory(tiny_plan: Plan) -> None:
    memory = tiny_plan.pool.memory_bytes_per_rank
    more = {"symmetric": 256, "total": memory.total + 256}
    arenas = [arena for arena in tiny_plan.pool.arenas if arena.name != "symmetric"]
    plan = tiny_plan.with_pool(
        memory_bytes_per_rank=memory.model_copy(update=more),
        arenas=(*arenas, ArenaSpec(name="symmetric", size_bytes=256)),
    )
    with pytest.raises(PlanError, match="256 symmetric bytes for one rank"):
        validate(plan)


def test_the_memory_map_counts_every_arena(tiny_plan: Plan) -> None:
    memory = tiny_plan.pool.memory_bytes_per_rank
    more = {"symmetric": 256, "total": memory.total + 256}
    with pytest.raises(PlanError, match="arena `symmetric` is 0 bytes, not 256"):
        validate(tiny_plan.with_pool(memory_bytes_per_rank=memory.model_copy(update=more)))


def test_the_answer_digest_is_of_what_decides_an_answer(tiny_plan: Plan) -> None:
    own = answer_digest(tiny_plan)
    timed = tuple(
        step.model_copy(
            update={"predicted_us": 7.0, "cost": CallCost(weights=Terms(per_token=8.0))}
        )
        if isinstance(step, KernelCall)
        else step
        for step in tiny_plan.pool.programs[0].steps
    )
    memory = tiny_plan.pool.memory_bytes_per_rank
    same = [
        tiny_plan.model_copy(update={"compiler_version": "9", "kernel_compiler": "x", "spec": {}}),
        tiny_plan.model_copy(update={"decisions": (), "canary": (), "digest": "0"}),
        tiny_plan.model_copy(update={"binaries": ()}),
        with_program(tiny_plan, 0, steps=timed, predicted_us=3.0),
        tiny_plan.with_pool(memory_bytes_per_rank=memory.model_copy(update={"capacity": 1 << 40})),
        tiny_plan.model_copy(
            update={"model": tiny_plan.model.model_copy(update={"location": "elsewhere"})}
        ),
    ]
    assert [answer_digest(plan) for plan in same] == [own] * len(same)
    limits, files = tiny_plan.pool.limits, {"config.json": "0" * 64}
    other = [
        tiny_plan.model_copy(update={"kernels": tiny_plan.kernels[1:]}),
        tiny_plan.model_copy(update={"model": tiny_plan.model.model_copy(update={"files": files})}),
        tiny_plan.model_copy(update={"target": tiny_plan.target.model_copy(update={"sm": 90})}),
        tiny_plan.with_pool(limits=limits.model_copy(update={"default_max_tokens": 1})),
        with_program(tiny_plan, 0, steps=tiny_plan.pool.programs[0].steps[1:]),
    ]
    assert len({own, *map(answer_digest, other)}) == len(other) + 1


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_the_terms_of_a_cost_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match="per_token"):
        Terms(per_token=value)


def test_a_cost_is_written_without_its_zeros() -> None:
    cost = CallCost(weights=Terms(once=512.0), products=Terms(per_seq=2.5))
    assert cost.model_dump_json() == '{"products":{"per_seq":2.5},"weights":{"once":512}}'
    assert CallCost.model_validate_json(cost.model_dump_json()) == cost
