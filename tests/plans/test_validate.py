"""The validator refuses corruptions that change what a plan computes, and nothing else."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_spec
from plan_edits import refused, with_kernel, with_program
from planning import planned

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.passes.pipeline import PassOptions
from tokenspeed_plan.plans.bundle import check_digest, dump_plan, load_plan, parse_plan, seal
from tokenspeed_plan.plans.canon import kernel_name
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import BATCH_INPUTS
from tokenspeed_plan.plans.schema import ArenaSpec, KernelCall, Plan, Program
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas

PROMPTS = [[3, 4, 5], list(range(30, 100)), [7]]
Corruption = Callable[[random.Random, Plan], Plan | None]


def answers(plan: Plan, folder: Path) -> Any:
    """The answers of a plan, or its error; they show whether a corruption changes its meaning."""
    try:
        done = Engine.from_plan(plan, folder).generate(
            PROMPTS, SamplingParams(max_tokens=3, num_logprobs=1)
        )
    except Exception as error:
        return type(error)
    return [tuple((step.token_id, step.logprob) for step in item.logprobs) for item in done]


def pick(rng: random.Random, plan: Plan) -> tuple[int, Program]:
    index = rng.randrange(len(plan.pool.programs))
    return index, plan.pool.programs[index]


def swap_offsets(rng: random.Random, plan: Plan) -> Plan | None:
    index, program = pick(rng, plan)
    buffers = list(program.buffers)
    a, b = rng.sample(range(len(buffers)), 2)
    if buffers[a].offset_bytes == buffers[b].offset_bytes:
        return None
    one, two = buffers[a].offset_bytes, buffers[b].offset_bytes
    buffers[a] = buffers[a].model_copy(update={"offset_bytes": two})
    buffers[b] = buffers[b].model_copy(update={"offset_bytes": one})
    return with_program(plan, index, buffers=tuple(buffers))


def move_buffer(rng: random.Random, plan: Plan) -> Plan | None:
    index, program = pick(rng, plan)
    buffers = list(program.buffers)
    a, b = rng.sample(range(len(buffers)), 2)
    if buffers[a].offset_bytes == buffers[b].offset_bytes:
        return None
    buffers[a] = buffers[a].model_copy(update={"offset_bytes": buffers[b].offset_bytes})
    return with_program(plan, index, buffers=tuple(buffers))


def reorder_steps(rng: random.Random, plan: Plan) -> Plan | None:
    index, program = pick(rng, plan)
    steps = list(program.steps)
    a, b = rng.sample(range(len(steps)), 2)
    steps.insert(b, steps.pop(a))
    return with_program(plan, index, steps=tuple(steps))


def drop_step(rng: random.Random, plan: Plan) -> Plan | None:
    index, program = pick(rng, plan)
    gone = rng.randrange(len(program.steps))
    return with_program(plan, index, steps=program.steps[:gone] + program.steps[gone + 1 :])


def double_step(rng: random.Random, plan: Plan) -> Plan | None:
    index, program = pick(rng, plan)
    at = rng.randrange(len(program.steps))
    return with_program(
        plan, index, steps=(*program.steps[:at], program.steps[at], *program.steps[at:])
    )


def altered(rng: random.Random, spec: TensorSpec) -> TensorSpec:
    if rng.random() < 0.3:
        others = [d for d in ("fp32", "bf16", "i32", "fp64") if d != spec.dtype]
        return TensorSpec.of(spec.shape, rng.choice(others))
    shape = list(spec.shape)
    dim = rng.randrange(len(shape))
    value = shape[dim]
    shape[dim] = (
        rng.choice([value + 1, value * 2, max(value // 2, 1)]) if isinstance(value, int) else 1
    )
    return spec.model_copy(update={"shape": tuple(shape)})


def alter_buffer(rng: random.Random, plan: Plan) -> Plan | None:
    index, program = pick(rng, plan)
    buffers = list(program.buffers)
    at = rng.randrange(len(buffers))
    changed = altered(rng, buffers[at].tensor)
    if changed == buffers[at].tensor:
        return None
    buffers[at] = buffers[at].model_copy(update={"tensor": changed})
    return with_program(plan, index, buffers=tuple(buffers))


def alter_shared(rng: random.Random, plan: Plan) -> Plan | None:
    field = rng.choice(["buffers", "weights"])
    items = list(getattr(plan.pool, field))
    at = rng.randrange(len(items))
    changed = altered(rng, items[at].tensor)
    if changed == items[at].tensor:
        return None
    items[at] = items[at].model_copy(update={"tensor": changed})
    return plan.with_pool(**{field: tuple(items)})


def overlap_shared(rng: random.Random, plan: Plan) -> Plan | None:
    field = rng.choice(["buffers", "weights"])
    items = list(getattr(plan.pool, field))
    a, b = rng.sample(range(len(items)), 2)
    if field == "buffers" and items[a].arena != items[b].arena:
        return None
    items[a] = items[a].model_copy(update={"offset_bytes": items[b].offset_bytes})
    return plan.with_pool(**{field: tuple(items)})


# Numbers of a model that no shape depends on: another one makes another valid plan, which only a
# canary can tell.
FREE = ("eps", "theta", "factor", "original_max_positions", "rotary_dim", "num_valid_tokens")


def alter_kernel(rng: random.Random, plan: Plan) -> Plan | None:
    """Change a size that shapes depend on; names and digests fit the change."""
    kernels = list(plan.kernels)
    at = rng.randrange(len(kernels))
    parts = list(kernels[at].parts)
    where = rng.randrange(len(parts))
    numbers = {k: v for k, v in parts[where].attrs.items() if isinstance(v, int) and k not in FREE}
    if not numbers:
        return None
    name = rng.choice(sorted(numbers))
    attrs = dict(parts[where].attrs) | {name: numbers[name] * 2 + 1}
    parts[where] = parts[where].model_copy(update={"attrs": attrs})
    return with_kernel(plan, at, kernels[at].model_copy(update={"parts": tuple(parts)}))


def alter_piece(rng: random.Random, plan: Plan) -> Plan | None:
    weights = list(plan.pool.weights)
    at = rng.randrange(len(weights))
    pieces = list(weights[at].pieces)
    where = rng.randrange(len(pieces))
    field = rng.choice(["size", "at"])
    values = list(getattr(pieces[where], field))
    dim = rng.randrange(len(values))
    values[dim] += rng.choice([-1, 1])
    pieces[where] = pieces[where].model_copy(update={field: tuple(values)})
    weights[at] = weights[at].model_copy(update={"pieces": tuple(pieces)})
    return plan.with_pool(weights=tuple(weights))


def retarget_argument(rng: random.Random, plan: Plan) -> Plan | None:
    """Exchange an argument for a tensor of another shape, or for any other input of the batch."""
    index, program = pick(rng, plan)
    at = rng.choice([i for i, step in enumerate(program.steps) if isinstance(step, KernelCall)])
    step = program.steps[at]
    assert isinstance(step, KernelCall)
    specs = {b.name: b.tensor for b in (*program.buffers, *plan.pool.buffers)} | {
        w.name: w.tensor for w in plan.pool.weights
    }
    place = rng.randrange(len(step.args))
    was = step.args[place]
    inputs = BATCH_INPUTS if was in BATCH_INPUTS else ()
    others = sorted(
        name for name in specs if name != was and (specs[name] != specs[was] or name in inputs)
    )
    args = (*step.args[:place], rng.choice(others), *step.args[place + 1 :])
    changed = step.model_copy(update={"args": args})
    return with_program(plan, index, steps=(*program.steps[:at], changed, *program.steps[at + 1 :]))


def swap_inputs(rng: random.Random, plan: Plan) -> Plan | None:
    """Exchange two inputs of one shape in a step."""
    index, program = pick(rng, plan)
    specs = {b.name: b.tensor for b in plan.pool.buffers}
    at = rng.choice([i for i, step in enumerate(program.steps) if isinstance(step, KernelCall)])
    step = program.steps[at]
    assert isinstance(step, KernelCall)
    pairs = [
        (a, b)
        for a in step.args
        for b in sorted(BATCH_INPUTS & set(specs))
        if a in BATCH_INPUTS and a != b and specs[a] == specs[b]
    ]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    args = tuple({one: other, other: one}.get(name, name) for name in step.args)
    changed = step.model_copy(update={"args": args})
    return with_program(plan, index, steps=(*program.steps[:at], changed, *program.steps[at + 1 :]))


def alter_limit(rng: random.Random, plan: Plan) -> Plan | None:
    name = rng.choice(
        [
            "max_seqs",
            "max_tokens",
            "page_size",
            "num_pages",
            "num_state_slots",
            "state_slots_per_seq",
            "num_checkpoints",
            "filled_tokens",
        ]
    )
    if name == "filled_tokens":
        over = plan.pool.limits.max_tokens + rng.randrange(1, 9)
        return plan.with_pool(limits=plan.pool.limits.model_copy(update={name: over}))
    value = getattr(plan.pool.limits, name)
    limits = plan.pool.limits.model_copy(update={name: value + rng.choice([-1, 1, value])})
    return plan.with_pool(limits=limits)


def alter_memory(rng: random.Random, plan: Plan) -> Plan | None:
    name = rng.choice(["weights", "kv_cache", "state", "activations", "io", "total"])
    memory = plan.pool.memory_bytes_per_rank
    changed = memory.model_copy(update={name: getattr(memory, name) + rng.choice([-256, 256])})
    return plan.with_pool(memory_bytes_per_rank=changed)


# Corruptions that always change what the plan says or promises, and those whose effect the engine
# itself judges.
ALWAYS: tuple[Corruption, ...] = (
    drop_step,
    double_step,
    alter_buffer,
    alter_shared,
    overlap_shared,
    alter_kernel,
    alter_piece,
    retarget_argument,
    swap_inputs,
    alter_limit,
    alter_memory,
)
JUDGED: tuple[Corruption, ...] = (swap_offsets, move_buffer, reorder_steps)


@pytest.fixture(scope="module")
def drafting(checkpoint: Any) -> Plan:
    """A plan that speculates."""
    spec = make_spec(checkpoint("moe"), speculation={"depth": 3})
    return planned(spec)


def check_refused(corrupt: Corruption, plan: Plan, count: int) -> None:
    """The validator refuses `count` random corruptions."""
    rng, done = random.Random(corrupt.__name__), 0
    while done < count:
        bad = corrupt(rng, plan)
        if bad is not None:
            assert refused(bad), f"{corrupt.__name__} number {done} was accepted"
            done += 1


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", ALWAYS, ids=lambda c: c.__name__)
def test_corruptions_of_speculation_are_refused(corrupt: Corruption, drafting: Plan) -> None:
    validate(drafting)
    check_refused(corrupt, drafting, 60)


def test_a_valid_plan_is_accepted(tiny_plan: Plan) -> None:
    validate(tiny_plan)
    check_digest(tiny_plan.model_dump(mode="json"))


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", ALWAYS, ids=lambda c: c.__name__)
def test_corruptions_are_refused(corrupt: Corruption, tiny_plan: Plan) -> None:
    check_refused(corrupt, tiny_plan, 120)


def test_weights_are_aligned_as_the_kernels_expect(tiny_plan: Plan) -> None:
    last = max(tiny_plan.pool.weights, key=lambda weight: weight.offset_bytes)
    moved = last.model_copy(update={"offset_bytes": last.offset_bytes + 16})
    arenas = tuple(
        a.model_copy(update={"size_bytes": a.size_bytes + 256}) if a.name == "weights" else a
        for a in tiny_plan.pool.arenas
    )
    memory = tiny_plan.pool.memory_bytes_per_rank
    memory = memory.model_copy(
        update={"weights": memory.weights + 256, "total": memory.total + 256}
    )
    changes = {"arenas": arenas, "memory_bytes_per_rank": memory}
    validate(tiny_plan.with_pool(**changes))
    weights = tuple(moved if weight == last else weight for weight in tiny_plan.pool.weights)
    with pytest.raises(PlanError, match="not aligned"):
        validate(tiny_plan.with_pool(**changes | {"weights": weights}))


@pytest.mark.parametrize(
    ("kind", "attrs", "says"),
    [
        ("advance", {"page_size": 1}, "pages of 1"),
        ("linear", {"splits": "a"}, "splits 'a'"),
        ("rms_norm", {"eps": "small"}, "`eps` is 'small'"),
        ("rms_norm", {"plain": False}, "plain is False, not true"),
        ("rope", {"theta": "x"}, "`theta` is 'x'"),
        ("delta_rule", {"num_k_heads": 0}, "`num_k_heads` is 0"),
        ("attention", {"num_kv_heads": 0}, "`num_kv_heads` is 0"),
    ],
)
def test_constants_that_no_kernel_can_have(
    kind: str, attrs: dict[str, Any], says: str, tiny_plan: Plan
) -> None:
    at, kernel = next(
        (i, k) for i, k in enumerate(tiny_plan.kernels) if kind in {part.kind for part in k.parts}
    )
    parts = tuple(
        part.model_copy(update={"attrs": part.attrs | attrs}) if part.kind == kind else part
        for part in kernel.parts
    )
    with pytest.raises(PlanError, match=says):
        validate(with_kernel(tiny_plan, at, kernel.model_copy(update={"parts": parts})))


BINARY = {
    "kernel": "k",
    "sm": 90,
    "cubin_sha256": "0" * 64,
    "registers": 1,
    "spill_bytes": 0,
    "shared_bytes": 0,
}
CANARY = {"prompt_ids": [1], "token_ids": [1], "logprobs": [], "margins": []}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("kernels.0.launch.grid", []),
        ("kernels.0.launch.num_warps", -3),
        ("kernels.0.launch.num_stages", 0),
        ("kernels.0.launch.grid.0.block", -1),
        ("kernels.0.launch.source_sha256", "../../x"),
        ("kernels.0.name", "../../x_0"),
        ("kernels.0.parts.0.rank_attrs", {"start": {"div": 0, "mod": 1, "step": 1}}),
        ("kernels.0.parts.0.rank_attrs", {"start": {"div": 1, "mod": 2, "step": -1}}),
        ("binaries", [BINARY | {"kernel": "../../nope"}]),
        ("binaries", [BINARY | {"sm": -5}]),
        ("binaries", [BINARY]),
        ("binaries", [BINARY, BINARY]),
        ("pools.0.programs.0.num_streams", 50_000),
        ("pools.0.programs.0.num_streams", 0),
        ("pools.0.programs.0.captured", True),
        ("pools.0.programs.0.outputs", ["logits"]),
        ("model.vocab_size", 5000),
        ("canary", [CANARY]),
        ("pools.0.arenas.0.size_bytes", 10**30),
    ],
)
def test_fields_out_of_their_bounds(where: str, value: Any, tiny_plan: Plan) -> None:
    fields = json.loads(dump_plan(tiny_plan))
    *path, last = (int(step) if step.isdecimal() else step for step in where.split("."))
    place = reduce(lambda item, step: item[step], path, fields)
    assert last in place or isinstance(place, list)
    place[last] = value
    with pytest.raises(PlanError):
        validate(parse_plan(json.dumps(fields), "plan"))


def test_memory_that_is_not_there() -> None:
    with pytest.raises(PlanError, match="cannot allocate 1000000000000000 bytes for `kv_cache`"):
        Arenas([ArenaSpec(name="kv_cache", size_bytes=10**15)])


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", JUDGED, ids=lambda c: c.__name__)
def test_what_is_accepted_computes_the_same(
    corrupt: Corruption, tiny_plan: Plan, checkpoint: Any
) -> None:
    """The validator accepts some harmless swaps, which must not change one bit."""
    folder = checkpoint("moe")
    wanted = answers(tiny_plan, folder)
    rng, seen = random.Random(corrupt.__name__), Counter[bool]()
    while seen.total() < 150:
        changed = corrupt(rng, tiny_plan)
        if changed is not None:
            seen[refused(changed)] += 1
            if not refused(changed) and seen[False] <= 25:
                assert answers(changed, folder) == wanted
    assert seen[True] >= 60


def test_a_harmful_swap_does_change_the_answer(tiny_plan: Plan, checkpoint: Any) -> None:
    """Some refused swaps change the answer, so that the test above can fail."""
    folder = checkpoint("moe")
    wanted, rng = answers(tiny_plan, folder), random.Random(1)
    bad = (move_buffer(rng, tiny_plan) for _ in range(60))
    assert any(answers(plan, folder) != wanted for plan in bad if plan and refused(plan))


@pytest.fixture(scope="module")
def streamed(checkpoint: Any) -> Plan:
    """The plan with three streams; nothing is fused, so that there are many branches."""
    spec = make_spec(checkpoint("moe"))
    return compile_plan(spec, find_model(spec), options=PassOptions(fusions=(), num_streams=3))


def test_streams_change_no_answer(streamed: Plan, tiny_plan: Plan, checkpoint: Any) -> None:
    assert any(step.kind == "wait" for step in streamed.pool.programs[0].steps)
    assert max(step.stream for step in streamed.pool.programs[0].steps) >= 1
    assert answers(streamed, checkpoint("moe")) == answers(tiny_plan, checkpoint("moe"))


@pytest.mark.slow
def test_every_event_matters(streamed: Plan) -> None:
    """Drop each record and each wait of each program, one at a time."""
    count = 0
    for index, program in enumerate(streamed.pool.programs):
        for at, step in enumerate(program.steps):
            if step.kind in ("record", "wait"):
                count += 1
                assert refused(
                    with_program(
                        streamed, index, steps=program.steps[:at] + program.steps[at + 1 :]
                    )
                )
    assert count >= 96


def has_race(plan: Plan, program: Program) -> bool:
    """Whether two accesses to the same bytes are unordered, by brute force."""
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    places = {buffer.name: buffer for buffer in (*program.buffers, *plan.pool.buffers)}
    reach: list[int] = []  # per step: a bit for every step that is ordered before it
    last: dict[int, int] = {}
    recorded: dict[int, int] = {}
    touched: list[tuple[int, str, bool]] = []
    for index, step in enumerate(program.steps):
        before = [last[step.stream]] if step.stream in last else []
        if step.kind == "wait":
            before.append(recorded[step.event])
        elif step.kind == "record":
            recorded[step.event] = index
        elif isinstance(step, KernelCall):
            params = zip(kernels[step.kernel].tensors, step.args, strict=True)
            touched += [
                (index, a, p.role == "output" or p.access != "read")
                for p, a in params
                if p.role != "weight"
            ]
        reach.append(sum({1 << b for b in before}) | _union(reach[b] for b in before))
        last[step.stream] = index
    ends = [index for stream, index in last.items() if stream]
    if any(not reach[last[0]] >> index & 1 for index in ends):
        return True
    for i, (one, a, writes_a) in enumerate(touched):
        for two, b, writes_b in touched[:i]:
            unordered = one != two and not reach[one] >> two & 1
            if (writes_a or writes_b) and unordered and _overlap(program, places[a], places[b]):
                return True
    return False


def _union(sets: Any) -> int:
    total = 0
    for bits in sets:
        total |= bits
    return total


def _overlap(program: Program, a: Any, b: Any) -> bool:
    if a.name == b.name:
        return True
    spans = [
        (x.offset_bytes, x.offset_bytes + x.tensor.size_bytes(program.max_tokens, program.max_seqs))
        for x in (a, b)
    ]
    same_arena = a.arena == b.arena == "activations"
    return same_arena and spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


@pytest.mark.slow
def test_moving_work_to_another_stream_is_judged_as_by_brute_force(streamed: Plan) -> None:
    rng, verdicts = random.Random(0), Counter[bool]()
    for _ in range(120):
        index, program = pick(rng, streamed)
        at = rng.choice([i for i, step in enumerate(program.steps) if isinstance(step, KernelCall)])
        other = (program.steps[at].stream + 1) % program.num_streams
        moved = program.steps[at].model_copy(update={"stream": other})
        changed = with_program(
            streamed, index, steps=(*program.steps[:at], moved, *program.steps[at + 1 :])
        )
        race = has_race(changed, changed.pool.programs[index])
        assert refused(changed) == race
        verdicts[race] += 1
    assert verdicts[True] > 80
    assert verdicts[False] > 2
    assert not any(has_race(streamed, program) for program in streamed.pool.programs)


@pytest.mark.slow
def test_a_wait_that_comes_too_late_is_a_race(streamed: Plan) -> None:
    """Events are paired and streams joined; only the read right before the wait is unordered."""
    refusals = 0
    for index, program in enumerate(streamed.pool.programs):
        for at, (step, after) in enumerate(pairwise(program.steps)):
            if (
                step.kind == "wait"
                and isinstance(after, KernelCall)
                and after.stream == step.stream
            ):
                steps = (*program.steps[:at], after, step, *program.steps[at + 2 :])
                changed = with_program(streamed, index, steps=steps)
                assert refused(changed)
                refusals += has_race(changed, changed.pool.programs[index])
    assert refusals >= 24


@pytest.mark.slow
def test_reuse_across_streams_needs_an_order(streamed: Plan) -> None:
    rng, found = random.Random(2), 0
    for _ in range(100):
        bad = move_buffer(rng, streamed)
        found += bad is not None and refused(bad)
    assert found >= 30


def with_launch(plan: Plan, kind: str, **changes: Any) -> Plan:
    """The plan with other launches of a kind of kernel; names fit the change."""
    made = {}
    for kernel in plan.kernels:
        if kind_of(kernel) == kind:
            assert kernel.launch is not None
            other = kernel.model_copy(
                update={"launch": kernel.launch.model_copy(update=changes), "name": ""}
            )
            made[kernel.name] = other.model_copy(update={"name": kernel_name(kind, other)})
    names = {old: kernel.name for old, kernel in made.items()}
    text = reduce(lambda text, pair: text.replace(*pair), names.items(), plan.model_dump_json())
    return Plan.model_validate_json(text).model_copy(
        update={"kernels": tuple(made.get(kernel.name, kernel) for kernel in plan.kernels)}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("moe_up", {"trigger_after_wait": False}),
        ("moe_down_add", {"prefetch": ("topk_logits", "experts_down_h")}),
        ("norm_linear", {"prefetch": ("rms_norm_x",)}),
        ("moe_down_add", {"prefetch": ("nonsense",)}),
        ("moe_up", {"pdl": False}),
    ],
    ids=[
        "its predecessor starts it at once",
        "its predecessor makes it",
        "no predecessor waits",
        "no such input",
        "no overlap",
    ],
)
def test_what_is_read_ahead_is_older_than_the_kernel_before(
    kind: str, changes: dict[str, Any]
) -> None:
    plan = load_plan(ROOT / "plans/frozen/qwen3.5-35b-h200").model_copy(update={"binaries": ()})
    assert not refused(plan)
    assert not refused(with_launch(plan, kind))
    assert refused(with_launch(plan, kind, **changes))


def test_states_that_are_kept_must_move_on() -> None:
    """Without `commit_state_len` a captured program would recompute the same inputs each step."""
    plan = load_plan(ROOT / "plans/frozen/qwen3.5-35b-h200").model_copy(update={"binaries": ()})
    index, program = next((i, p) for i, p in enumerate(plan.pool.programs) if p.phase == "decode")
    commits = [
        step
        for step in program.steps
        if isinstance(step, KernelCall) and step.kernel.startswith("commit_state_len")
    ]
    assert len(commits) == 1
    assert refused(
        with_program(
            plan, index, steps=tuple(step for step in program.steps if step not in commits)
        )
    )


@pytest.mark.slow
def test_a_state_is_where_it_is_looked_for() -> None:
    """Only `recompute_state` leaves it in the slot to write before the step is over."""
    plan = load_plan(ROOT / "plans/frozen/qwen3.5-35b-h200").model_copy(update={"binaries": ()})
    at, kernel = next(
        (i, k) for i, k in enumerate(plan.kernels) if k.name.startswith("delta_recompute")
    )
    parts = tuple(part for part in kernel.parts if part.kind != "recompute_state")
    assert not refused(with_kernel(plan, at, kernel))
    with pytest.raises(PlanError, match="nothing brings the state"):
        validate(with_kernel(plan, at, kernel.model_copy(update={"parts": parts})))


def test_the_digest_seals_everything_else(tiny_plan: Plan) -> None:
    text = dump_plan(tiny_plan)
    assert parse_plan(text, "p") == tiny_plan
    changed = tiny_plan.model_copy(update={"compiler_version": "0.0.0"})
    with pytest.raises(PlanError, match="digest"):
        check_digest(changed.model_dump(mode="json"))
    check_digest(seal(changed).model_dump(mode="json"))


def test_offsets_are_reused(tiny_plan: Plan) -> None:
    """The arena is far smaller than all its buffers together."""
    program = max(tiny_plan.pool.programs, key=lambda p: p.max_tokens)
    total = sum(
        buffer.tensor.size_bytes(program.max_tokens, program.max_seqs) for buffer in program.buffers
    )
    assert tiny_plan.pool.memory_bytes_per_rank.activations < total / 3
