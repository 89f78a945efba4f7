"""The validator refuses what the schema has room for and nothing replays yet; answer digests."""

from __future__ import annotations

from typing import Any

import pytest
from drafting import plan_with_two_slots
from plan_edits import with_kernel, with_program

from tokenspeed_plan.planner.passes.handover import with_pushes
from tokenspeed_plan.plans.canon import answer_digest, kernel_name
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.hazards import check_hazards
from tokenspeed_plan.plans.kernel_abi import with_launch_params
from tokenspeed_plan.plans.ops import ShapeError
from tokenspeed_plan.plans.peer_memory import PEER_COUNTS, PEER_SLOTS
from tokenspeed_plan.plans.schema import (
    ArenaName,
    ArenaSpec,
    AttentionLayout,
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
from tokenspeed_plan.plans.validate.peer_rules import check_peer_order, check_peers
from tokenspeed_plan.plans.validate.pool_rules import cached_tensors


@pytest.mark.parametrize(
    "roles", [("prefill",), ("decode",), ("both", "both"), ("prefill", "decode")]
)
def test_other_pools_are_refused(roles: tuple[str, ...], tiny_plan: Plan) -> None:
    pools = tuple(tiny_plan.pool.model_copy(update={"role": role}) for role in roles)
    with pytest.raises(PlanError, match="one of role `both`, or `decode` and `prefill`"):
        validate(tiny_plan.model_copy(update={"pools": pools}))


def two_pools(plan: Plan, count: int = 2, **changes: Any) -> Plan:
    """The plan with a prefill pool beside it; `changes` are of that pool."""
    cached = cached_tensors(plan.pool).keys()
    prompts = tuple(
        with_pushes(each, cached) for each in plan.pool.programs if each.phase == "prefill"
    )
    prefill = plan.pool.model_copy(update={"role": "prefill", "programs": prompts} | changes)
    decode = plan.pool.model_copy(update={"role": "decode"})
    target = plan.target.model_copy(update={"count": count})
    return plan.model_copy(update={"pools": (decode, prefill), "target": target})


def test_an_operator_that_does_not_exist_is_refused(tiny_plan: Plan) -> None:
    """Whatever the kernel reads: rules of formats look operators up, too."""
    for index, kernel in enumerate(tiny_plan.kernels):
        parts = tuple(part.model_copy(update={"kind": f"{part.kind}x"}) for part in kernel.parts)
        changed = kernel.model_copy(update={"parts": parts})
        with pytest.raises(PlanError, match="has unknown operator"):
            validate(with_kernel(tiny_plan, index, changed))


def test_two_pools_that_fit_each_other(tiny_plan: Plan) -> None:
    validate(two_pools(tiny_plan))


def test_two_pools_that_cannot_hand_over(tiny_plan: Plan) -> None:
    pool = tiny_plan.pool
    with pytest.raises(PlanError, match="pools of 2 ranks, the target has 3"):
        validate(two_pools(tiny_plan, count=3))
    with pytest.raises(PlanError, match="the pool of role `prefill` has the program decode"):
        validate(two_pools(tiny_plan, programs=pool.programs))
    limits = pool.limits.model_copy(update={"page_size": 2 * pool.limits.page_size})
    with pytest.raises(PlanError, match="are handed over to pages of"):
        validate(two_pools(tiny_plan, limits=limits))
    layout = pool.layout.model_copy(update={"attention": AttentionLayout(tp=2)})
    with pytest.raises(PlanError, match="is not alike in both pools"):  # twice as many heads
        validate(two_pools(tiny_plan, count=3, layout=layout))
    at = next(i for i, each in enumerate(pool.buffers) if each.arena == "state")
    tensor = TensorSpec.of((4, 2, 2), "fp32")
    other = pool.buffers[at].model_copy(update={"tensor": tensor})
    buffers = (*pool.buffers[:at], other, *pool.buffers[at + 1 :])
    with pytest.raises(PlanError, match=f"`{other.name}` is not alike in both pools"):
        validate(two_pools(tiny_plan, buffers=buffers))
    none = pool.limits.model_copy(update={"num_checkpoints": 0})
    plan = two_pools(tiny_plan).with_pool(limits=none)
    with pytest.raises(PlanError, match="no checkpoint that a state could be handed over to"):
        validate(plan)


def test_caches_leave_once_and_not_too_early(tiny_plan: Plan) -> None:
    whole = two_pools(tiny_plan)
    (program, *others), pushes = whole.pools[1].programs, whole.pools[1].programs[0].pushes
    assert [push.step for push in pushes] == sorted({push.step for push in pushes})
    last = pushes[-1].model_copy(update={"step": len(program.steps)})
    early = pushes[0].model_copy(update={"step": 0})
    for changed, says in (
        (pushes[1:], "does not push each of the caches once"),
        ((*pushes, pushes[-1]), "does not push each of the caches once"),
        (pushes[::-1], "does not push in the order of its steps"),
        ((*pushes[:-1], last), "does not push in the order of its steps"),
        ((early, *pushes[1:]), "before it is done"),
    ):
        broken = program.model_copy(update={"pushes": tuple(changed)})
        with pytest.raises(PlanError, match=says):
            validate(two_pools(tiny_plan, programs=(broken, *others)))
    answering = (program, *tiny_plan.pool.programs[1:])
    with pytest.raises(PlanError, match="of the pool that answers pushes"):
        validate(tiny_plan.with_pool(programs=answering))


BLOCKS = Format(dtype="bf16", block=(16,), scale="fp32")


@pytest.mark.parametrize("used", [FORMATS["fp8"], FORMATS["nvfp4"], Format(dtype="fp8"), BLOCKS])
@pytest.mark.parametrize("where", ["weights", "buffers", "program", "kernel"])
def test_formats_that_nothing_computes_in(where: str, used: Format, tiny_plan: Plan) -> None:
    if where == "weights" and used in (FORMATS["fp8"], FORMATS["nvfp4"]):
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


WIDE = TensorSpec.of(shape=("num_tokens", 64), dtype="fp32")


def kernel_of(reads: tuple[str, ...], writes: tuple[str, ...]) -> KernelSpec:
    """A kernel of no operators, with the tensors that a step reads and writes."""
    params = [Param(name=name, role="input", tensor=WIDE) for name in reads]
    params += [Param(name=name, role="output", tensor=WIDE, access="write") for name in writes]
    return KernelSpec(name="_".join((*reads, *writes)), params=tuple(params), parts=())


def library(reads: tuple[str, ...], writes: tuple[str, ...], stream: int = 0) -> LibraryCall:
    return LibraryCall(
        kernel=kernel_of(reads, writes).name,
        args=(*reads, *writes),
        package="cublas",
        versions=">=12.9",
        function="gemm",
        stream=stream,
        predicted_us=1.0,
    )


KERNELS = {
    kernel.name: kernel
    for kernel in (
        kernel_of(reads, writes)
        for reads in (("x",), ("y",), ("z",))
        for writes in (("y",), ("z",), ("y", "z"), ("u",))
    )
}


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
        ((library(("x",), ("y",)), library(("y",), ("z",))), False, None),
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
        check_hazards(program, KERNELS, buffers)
        return
    with pytest.raises(ShapeError, match=says):
        check_hazards(program, KERNELS, buffers)


def reducing_kernel(ranks: int, words: int = 68, generations: int = 3, **baked: int) -> KernelSpec:
    """A kernel that adds up rows of 64 fp32, with slots of so many words."""
    rows = TensorSpec.of(shape=("num_tokens", 64), dtype="fp32")
    params = (
        Param(name="x", role="input", tensor=rows),
        Param(name="y", role="output", tensor=rows, access="write"),
    )
    part = Part(kind="all_reduce", operands=("x",), outputs=("y",), attrs={"num_ranks": ranks})
    constants = {"GENERATIONS": generations, "WORLD": ranks, "SLOT": words}
    launch = Launch(
        template="all_reduce",
        constants={**constants, "ROW": generations * ranks * words, **baked},
        grid=({"block": 1},),  # type: ignore[arg-type]
        num_warps=4,
        num_stages=1,
        pdl=False,
        source_sha256="",
    )
    kernel = KernelSpec(name="sum_0", params=params, parts=(part,), launch=launch)
    return with_slots(with_launch_params(kernel), generations, ranks, words)


def with_slots(kernel: KernelSpec, *shape: int) -> KernelSpec:
    tensor = TensorSpec.of(shape=("num_tokens", *shape), dtype="i32")
    params = tuple(
        param.model_copy(update={"tensor": tensor}) if param.name == PEER_SLOTS else param
        for param in kernel.params
    )
    return kernel.model_copy(update={"params": params})


def peer_buffers(kernel: KernelSpec, arena: ArenaName = "symmetric") -> dict[str, BufferSpec]:
    return {
        param.name: BufferSpec(name=param.name, arena=arena, offset_bytes=0, tensor=param.tensor)
        for param in kernel.tensors
        if param.role == "symmetric"
    }


def reducing_call(kernel: KernelSpec, **args: str) -> KernelCall:
    names = tuple(args.get(param.name, param.name) for param in kernel.tensors)
    return KernelCall(kernel=kernel.name, args=names, predicted_us=1.0)


@pytest.mark.parametrize(
    ("kernel", "arena", "ranks", "rows", "says"),
    [
        (reducing_kernel(4), "symmetric", 4, 256, None),
        (reducing_kernel(4), "activations", 4, 1, "peers write `peer_slots`, which is not in the"),
        (reducing_kernel(4), "symmetric", 2, 1, "adds up 4 ranks, the plan has 2"),
        (
            reducing_kernel(4),
            "symmetric",
            4,
            257,
            "has 257 programs that wait for peers, at most 256",
        ),
        (reducing_kernel(4, words=64), "symmetric", 4, 1, "the slots of `sum_0` are"),
        (reducing_kernel(4, SLOT=64), "symmetric", 4, 1, "has SLOT 64, its slots 68"),
        (reducing_kernel(4, ROW=68), "symmetric", 4, 1, "has ROW 68, its slots 816"),
        (reducing_kernel(4, GENERATIONS=2), "symmetric", 4, 1, "has GENERATIONS 2, its slots 3"),
        (reducing_kernel(4, WORLD=2), "symmetric", 4, 1, "has WORLD 2, its slots 4"),
    ],
)
def test_slots_lie_in_peer_memory_and_apart(
    kernel: KernelSpec, arena: ArenaName, ranks: int, rows: int, says: str | None
) -> None:
    step = reducing_call(kernel)
    program = small_program((step,), {}).model_copy(update={"max_tokens": rows})
    buffers = peer_buffers(kernel, arena)
    if says is None:
        check_peers(program, step, kernel, buffers, ranks)
        return
    with pytest.raises(PlanError, match=says):
        check_peers(program, step, kernel, buffers, ranks)


def test_a_kernel_that_adds_up_nothing_has_no_peer_memory() -> None:
    kernel = reducing_kernel(4)
    part = Part(kind="add", operands=("x", "x"), outputs=("y",), attrs={})
    alone = kernel.model_copy(update={"parts": (part,)})
    step = reducing_call(alone)
    with pytest.raises(PlanError, match="adds up no ranks, and has peer memory"):
        check_peers(small_program((step,), {}), step, alone, peer_buffers(alone), 4)
    bare = kernel.model_copy(update={"params": kernel.params[:2]})
    step = reducing_call(bare)
    with pytest.raises(PlanError, match="has not the peer memory peer_slots, peer_counts"):
        check_peers(small_program((step,), {}), step, bare, {}, 4)


@pytest.mark.parametrize(
    ("generations", "args", "says"),
    [
        (3, {}, None),
        (4, {}, None),
        (2, {}, "written while a peer may still empty it"),
        (1, {}, "written"),
        (3, {PEER_COUNTS: "own_counts"}, "is written again before it is emptied"),
        (3, {PEER_SLOTS: "own_slots"}, "is written again before it is emptied"),
    ],
)
def test_ranks_that_push_do_not_race(
    generations: int, args: dict[str, str], says: str | None, tiny_plan: Plan
) -> None:
    """Two generations, or a kernel that counts or pushes elsewhere than the others."""
    kernel = reducing_kernel(2, generations=generations)
    steps = tuple(reducing_call(kernel, **(args if turn == 1 else {})) for turn in range(3))
    programs = tuple(small_program(steps[:count], {}) for count in (1, 3, 2))
    pool = tiny_plan.pool.model_copy(update={"programs": programs})
    if says is None:
        check_peer_order(pool, {kernel.name: kernel}, 2)
        return
    with pytest.raises(PlanError, match=says):
        check_peer_order(pool, {kernel.name: kernel}, 2)


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


def with_state_slots(plan: Plan, slots: int) -> Plan:
    """The plan with as many state slots in all, but others for each sequence."""
    limits = plan.pool.limits
    more = (limits.state_slots_per_seq - slots) * limits.max_seqs
    changed = {
        "state_slots_per_seq": slots,
        "num_checkpoints": limits.num_checkpoints + more,
    }
    return plan.with_pool(limits=limits.model_copy(update=changed))


def test_states_are_written_in_place_by_kernels_that_are_made_for_it(
    tiny_plan: Plan, checkpoint: Any
) -> None:
    validate(tiny_plan)
    with pytest.raises(PlanError, match=r"its plan has 2 state slots a sequence"):
        validate(with_state_slots(tiny_plan, 2))
    two = plan_with_two_slots(checkpoint("moe"))
    validate(two)
    with pytest.raises(PlanError, match=r"its plan has 1 state slots a sequence"):
        validate(with_state_slots(two, 1))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_slots_of_the_next_step_are_those_of_the_plan(
    in_place: bool, tiny_plan: Plan, checkpoint: Any
) -> None:
    """A step that exchanges the slots of a plan that has one would write another sequence's."""
    plan = tiny_plan if in_place else plan_with_two_slots(checkpoint("moe"))
    places = [
        at
        for at, kernel in enumerate(plan.kernels)
        if any(part.kind == "advance" for part in kernel.parts)
    ]
    assert places
    kernel = plan.kernels[places[0]]
    (part,) = kernel.parts
    attrs = {"page_size": part.attrs["page_size"]} | ({} if in_place else {"in_place": True})
    other = kernel.model_copy(update={"parts": (part.model_copy(update={"attrs": attrs}),)})
    renamed = other.model_copy(update={"name": kernel_name("advance", other)})
    with pytest.raises(PlanError, match="exchanges other state slots"):
        validate(with_kernel(plan, places[0], renamed))
