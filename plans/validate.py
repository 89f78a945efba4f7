"""The static validator: run on every plan when it is written and when it is loaded.

It proves, without running anything: names resolve, everything lies inside its arena, nothing that
lives at once overlaps, every argument has the shape and dtype that its kernel was made for, the
pieces of each weight tile it exactly, the memory map adds up, and (in `hazards`) each program
computes what its steps say, on all its streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

from tokenspeed_plan.plans.canon import kernel_name
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.hazards import check_hazards
from tokenspeed_plan.plans.ops import (
    BATCH_INPUTS,
    DRAFT_INPUTS,
    OPS,
    RECOMPUTED,
    OpDef,
    ShapeError,
    check_numbers,
)
from tokenspeed_plan.plans.schema import (
    BufferSpec,
    CollectiveCall,
    KernelCall,
    KernelSpec,
    Part,
    Piece,
    Plan,
    Program,
    WeightSpec,
    shared_bytes,
)
from tokenspeed_plan.plans.types import ALIGNMENT_BYTES, Dim, TensorSpec

_HINT = "make the plan again with `tokenspeed plan SPEC -o DIR`"


def refuse(message: str) -> PlanError:
    """The error of a plan that breaks a rule."""
    return PlanError(f"invalid plan: {message}", _HINT)


def check(condition: bool, message: Callable[[], str]) -> None:
    """Refuse unless the condition holds; the message is only built when needed."""
    if not condition:
        raise refuse(message())


def validate(plan: Plan) -> None:
    """Check every rule of a plan.

    Raises:
        PlanError: the first rule that is broken, naming what breaks it.
    """
    for rule in (
        _names,
        _limits,
        _arenas,
        _memory_map,
        _weights,
        _kernels,
        _binaries,
        _model,
        _programs,
        _canary,
    ):
        rule(plan)


def _names(plan: Plan) -> None:
    _unique("arena", (arena.name for arena in plan.pool.arenas))
    _unique("kernel", (kernel.name for kernel in plan.kernels))
    _unique("program", (f"{program.phase}/{program.bucket}" for program in plan.pool.programs))
    shared = [weight.name for weight in plan.pool.weights] + [
        buffer.name for buffer in plan.pool.buffers
    ]
    for program in plan.pool.programs:
        _unique("tensor", shared + [buffer.name for buffer in program.buffers])


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        check(name not in seen, lambda name=name: f"two {what}s are called `{name}`")  # type: ignore[misc]
        seen.add(name)


def _limits(plan: Plan) -> None:
    limits = plan.pool.limits
    may_be_zero = {"num_checkpoints", "kept_inputs"}
    check(
        all(value > -(name in may_be_zero) for name, value in limits.model_dump().items()),
        lambda: "a limit is not positive",
    )
    check(
        limits.num_state_slots
        == 2 + limits.max_seqs * limits.state_slots_per_seq + limits.num_checkpoints,
        lambda: (
            f"{limits.num_state_slots} rows for {limits.max_seqs} sequences and {limits.num_checkpoints} checkpoints"
        ),
    )
    check(
        limits.checkpoint_interval % limits.page_size == 0,
        lambda: "checkpoints are not at the ends of pages",
    )
    check(
        limits.interleaved_tokens <= limits.max_tokens, lambda: "interleaved_tokens over max_tokens"
    )
    check(
        limits.state_slots_per_seq >= 2,
        lambda: "a sequence needs a row to read and another to write",
    )
    check(
        limits.num_pages * limits.page_size >= limits.max_seq_len,
        lambda: "one longest sequence has no pages",
    )
    check(
        limits.default_max_tokens < limits.max_seq_len,
        lambda: "default_max_tokens over max_seq_len",
    )
    deepest = max((program.depth for program in plan.pool.programs), default=0)
    held = f"{limits.state_slots_per_seq} rows a slot and {limits.kept_inputs} kept inputs"
    check(deepest == limits.max_depth, lambda: f"{held} for {deepest} drafts")
    check(
        not limits.kept_inputs or limits.state_slots_per_seq == 2,
        lambda: f"{held}: two rows are enough",
    )
    sizes = {"prefill": limits.max_tokens, "decode": limits.max_seqs}
    for phase, size in sizes.items():
        largest = max(
            (program.bucket for program in plan.pool.programs if program.phase == phase), default=0
        )
        check(largest == size, lambda: f"the largest {phase} bucket is {largest}, the limit {size}")  # noqa: B023
    for program in plan.pool.programs:
        most = limits.max_tokens if program.phase == "prefill" else limits.max_seqs
        check(0 < program.bucket <= most and 0 < program.max_seqs <= limits.max_seqs,
              lambda: f"program {program.phase}/{program.bucket} is over the limits")  # noqa: B023 # fmt: skip
        tokens = program.bucket * program.query_len
        check(tokens == program.max_tokens and program.max_seqs == min(program.bucket, limits.max_seqs),
              lambda: f"bucket {program.bucket} of {program.max_tokens} tokens")  # noqa: B023 # fmt: skip


def _arenas(plan: Plan) -> None:
    sizes: dict[str, int] = {arena.name: arena.size_bytes for arena in plan.pool.arenas}
    for program in plan.pool.programs:
        for buffer in program.buffers:
            check(
                buffer.arena == "activations",
                lambda b=buffer: f"`{b.name}` is not in the activations",
            )  # type: ignore[misc]
            _inside(buffer, buffer.tensor.size_bytes(program.max_tokens, program.max_seqs), sizes)
    needed = shared_bytes(
        {buffer.name: buffer.tensor for buffer in plan.pool.buffers}, plan.pool.programs
    )
    held: dict[str, list[tuple[int, int, str]]] = {}
    for buffer in plan.pool.buffers:
        check(
            buffer.arena in ("kv_cache", "state", "io", "scratch"),
            lambda b=buffer: f"`{b.name}` is in `{b.arena}`",
        )  # type: ignore[misc]
        _state_shape(plan, buffer)
        size = needed[buffer.name]
        check(size > 0, lambda b=buffer: f"no program touches `{b.name}`")  # type: ignore[misc]
        _inside(buffer, size, sizes)
        held.setdefault(buffer.arena, []).append(
            (buffer.offset_bytes, buffer.offset_bytes + size, buffer.name)
        )
    weights = held.setdefault("weights", [])
    for weight in plan.pool.weights:
        size = weight.tensor.size_bytes()
        check(
            0 <= weight.offset_bytes <= sizes["weights"] - size,
            lambda w=weight: f"`{w.name}` leaves its arena",
        )  # type: ignore[misc]
        check(
            weight.offset_bytes % ALIGNMENT_BYTES == 0,
            lambda w=weight: f"`{w.name}` starts at {w.offset_bytes}, not aligned",  # type: ignore[misc]
        )
        weights.append((weight.offset_bytes, weight.offset_bytes + size, weight.name))
    for spans in held.values():
        _disjoint(sorted(spans))


def _inside(buffer: BufferSpec, size: int, sizes: Mapping[str, int]) -> None:
    offset = buffer.offset_bytes
    check(buffer.arena in sizes, lambda: f"there is no arena `{buffer.arena}`")
    check(0 <= offset <= sizes[buffer.arena] - size, lambda: f"`{buffer.name}` leaves its arena")
    check(offset % ALIGNMENT_BYTES == 0, lambda: f"`{buffer.name}` starts at {offset}, not aligned")


def _state_shape(plan: Plan, buffer: BufferSpec) -> None:
    """Pages, rows and page tables must be as many and as large as the limits say."""
    shape, limits = buffer.tensor.shape, plan.pool.limits
    expected: dict[str, tuple[Dim, ...]] = {
        "kv_cache": (limits.num_pages + 1, 2, limits.page_size, *shape[3:]),
        "state": (limits.num_state_slots, *shape[1:]),
    }
    if buffer.name == "page_table":
        expected["io"] = (*shape[:-1], limits.table_pages)
    wanted = expected.get(buffer.arena, shape)
    check(
        shape == wanted, lambda: f"`{buffer.name}` is {list(shape)}, the limits say {list(wanted)}"
    )


def _disjoint(spans: list[tuple[int, int, str]]) -> None:
    for (_, end, name), (start, _, other) in pairwise(spans):
        check(end <= start, lambda: f"`{name}` and `{other}` overlap")  # noqa: B023


def _memory_map(plan: Plan) -> None:
    memory = plan.pool.memory_bytes_per_rank
    for arena in plan.pool.arenas:
        counted = getattr(memory, arena.name)
        check(
            counted == arena.size_bytes,
            lambda a=arena: f"arena `{a.name}` is {a.size_bytes} bytes, not {counted}",
        )  # type: ignore[misc]
    parts = (
        memory.weights,
        memory.kv_cache,
        memory.state,
        memory.activations,
        memory.io,
        memory.scratch,
        memory.symmetric,
        memory.reserved,
    )
    check(min(parts) >= 0 and sum(parts) == memory.total, lambda: "the memory map does not add up")
    check(
        memory.total <= memory.capacity,
        lambda: f"needs {memory.total} bytes, a rank has {memory.capacity}",
    )


def _weights(plan: Plan) -> None:
    for weight in plan.pool.weights:
        shape = weight.tensor.bind(0, 0)
        for piece in weight.pieces:
            _piece_fits(weight, piece, shape)
        covered = sum(math.prod(piece.size) for piece in weight.pieces)
        check(
            covered == math.prod(shape), lambda w=weight: f"the pieces of `{w.name}` do not tile it"
        )  # type: ignore[misc]
        for index, piece in enumerate(weight.pieces):
            for other in weight.pieces[:index]:
                check(
                    not _boxes_meet(piece, other), lambda w=weight: f"pieces of `{w.name}` overlap"
                )  # type: ignore[misc]


def _piece_fits(weight: WeightSpec, piece: Piece, shape: tuple[int, ...]) -> None:
    rank = len(shape)
    fits = (
        len(piece.start) == len(piece.size) == len(piece.at) == rank
        and all(
            at >= 0 and size > 0 and at + size <= dim
            for at, size, dim in zip(piece.at, piece.size, shape, strict=True)
        )
        and all(start >= 0 for start in piece.start)
        and all(
            0 <= shift.dim < rank and shift.by.div > 0 and shift.by.mod > 0
            for shift in piece.shifts
        )
    )
    check(
        fits, lambda: f"a piece of `{weight.name}` from `{piece.source}` does not fit {list(shape)}"
    )


def _boxes_meet(one: Piece, two: Piece) -> bool:
    spans = zip(one.at, one.size, two.at, two.size, strict=True)
    return all(a < b + n and b < a + m for a, m, b, n in spans)


def _kernels(plan: Plan) -> None:
    for kernel in plan.kernels:
        check(kernel.name == kernel_name(kernel.name.rpartition("_")[0], kernel),
              lambda k=kernel: f"kernel `{k.name}` does not match its digest")  # type: ignore[misc] # fmt: skip
        for part in kernel.parts:
            size = part.attrs.get("page_size", plan.pool.limits.page_size)
            check(size == plan.pool.limits.page_size,
                  lambda k=kernel, n=size: f"kernel `{k.name}` has pages of {n}, the limits of {plan.pool.limits.page_size}")  # type: ignore[misc] # fmt: skip
        try:
            _kernel_body(kernel)
        except ShapeError as error:
            raise refuse(f"kernel `{kernel.name}`: {error}") from error
        _early(kernel)
        kept = {_kept(kernel, part) for part in kernel.parts} - {None}
        check(kept <= {plan.pool.limits.kept_inputs},
              lambda k=kernel: f"kernel `{k.name}` does not keep {plan.pool.limits.kept_inputs} inputs")  # type: ignore[misc] # fmt: skip


def _early(kernel: KernelSpec) -> None:
    """What is read early is an input, and means something only where kernels overlap."""
    if kernel.launch is None:
        return
    launch, inputs = kernel.launch, {param.name for param in kernel.params if param.role == "input"}
    check(
        set(launch.prefetch) <= inputs,
        lambda: f"kernel `{kernel.name}` reads early what is no input of it",
    )
    check(
        launch.pdl or not (launch.prefetch or launch.trigger_after_wait),
        lambda: f"kernel `{kernel.name}` does not overlap",
    )


def _kept(kernel: KernelSpec, part: Part) -> Dim | None:
    """Inputs that a decode step keeps of its rows, 0 where they leave states; None of other operators."""
    if part.kind == "recompute_state":
        place = OPS["recompute_state"].operands.index("kept_inputs")
        return next(
            param.tensor.shape[1] for param in kernel.params if param.name == part.operands[place]
        )
    return 0 if part.attrs.get("mode") in ("update", "recurrent") else None


def _kernel_body(kernel: KernelSpec) -> None:
    _unique("parameter", (param.name for param in kernel.params))
    known = {param.name: param.tensor for param in kernel.tensors if param.role != "output"}
    for part in kernel.parts:
        known |= _part_outputs(kernel, part, known)
    for param in kernel.tensors:
        check(
            known.get(param.name) == param.tensor,
            lambda p=param: f"kernel `{kernel.name}`: output `{p.name}`",
        )  # type: ignore[misc]


def _part_outputs(
    kernel: KernelSpec, part: Part, known: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    op = OPS.get(part.kind)
    if op is None:
        raise refuse(f"kernel `{kernel.name}` has unknown operator `{part.kind}`")
    check(
        len(part.operands) == len(op.operands)
        and set(part.attrs) - set(op.optional) == set(op.attrs),
        lambda: f"kernel `{kernel.name}`: `{part.kind}` has the wrong operands or constants",
    )
    missing = [name for name in part.operands if name not in known]
    check(not missing, lambda: f"kernel `{kernel.name}` reads `{missing[0]}` before it is made")
    _accesses(kernel, part, op)
    check_numbers(part.attrs)
    specs = op.infer(
        part.attrs,
        {role: known[name] for role, name in zip(op.operands, part.operands, strict=True)},
    )
    check(
        len(part.outputs) == len(specs) and not set(part.outputs) & set(known),
        lambda: f"kernel `{kernel.name}`: outputs of `{part.kind}`",
    )
    return dict(zip(part.outputs, specs.values(), strict=True))


def _states(part: Part) -> tuple[str, ...]:
    """The last operands of an operator."""
    return part.operands[len(part.operands) - len(OPS[part.kind].states) :]


def _accesses(kernel: KernelSpec, part: Part, op: OpDef) -> None:
    params = {param.name: param for param in kernel.params}
    for name, access in zip(_states(part), op.states, strict=True):
        param = params.get(name)
        check(param is not None and param.role == "state" and param.access == access[1],
              lambda: f"kernel `{kernel.name}`: state `{name}` is not {access[1]}")  # noqa: B023 # fmt: skip


def _binaries(plan: Plan) -> None:
    """One for each kernel with a launch, or none at all."""
    _unique("binary", (binary.kernel for binary in plan.binaries))
    built = {kernel.name for kernel in plan.kernels if kernel.launch is not None}
    strange = (
        built.symmetric_difference(binary.kernel for binary in plan.binaries)
        if plan.binaries
        else ()
    )
    check(not strange, lambda: f"there is no pair of kernel and binary called `{min(strange)}`")
    for binary in plan.binaries:
        check(binary.sm == plan.target.sm,
              lambda b=binary: f"the binary of `{b.kernel}` is for sm_{b.sm}, the plan for sm_{plan.target.sm}")  # type: ignore[misc] # fmt: skip


def _model(plan: Plan) -> None:
    """Token ids are below `vocab_size`: each of them must have a logit."""
    for buffer in plan.pool.buffers:
        width = buffer.tensor.shape[-1]
        check(buffer.name not in ("logits", "verify_logits") or width == plan.model.vocab_size,
              lambda n=width: f"{n} logits for a vocabulary of {plan.model.vocab_size}")  # type: ignore[misc] # fmt: skip


def _canary(plan: Plan) -> None:
    for prompt in plan.canary:
        lengths = {len(prompt.token_ids), len(prompt.logprobs), len(prompt.margins)}
        check(
            len(lengths) == 1 and 0 not in lengths,
            lambda: "a canary has not as many tokens as logprobs and margins",
        )


def _programs(plan: Plan) -> None:
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    weights = {weight.name: weight.tensor for weight in plan.pool.weights}
    shared = {buffer.name: buffer for buffer in plan.pool.buffers}
    for program in plan.pool.programs:
        buffers = shared | {buffer.name: buffer for buffer in program.buffers}
        missing = _promised(program) - set(program.outputs)
        check(not missing, lambda p=program: f"{p.phase}/{p.bucket} does not give `{min(missing)}`")  # type: ignore[misc]  # noqa: B023
        check(
            program.phase == "decode" or not program.captured,
            lambda p=program: f"{p.phase} is captured",
        )  # type: ignore[misc]
        made: dict[str, tuple[str, str]] = {}
        for step in program.steps:
            check(
                0 <= step.stream < program.num_streams,
                lambda s=step: f"there is no stream {s.stream}",
            )  # type: ignore[misc]
            if isinstance(step, KernelCall):
                _call_fits(program, step, kernels, weights, buffers)
                _batch_fits(program, step, kernels[step.kernel], made)
            elif isinstance(step, CollectiveCall):
                _collective_fits(plan, step, buffers)
        _passes(program, kernels)
        _brought(program, kernels)
        try:
            check_hazards(program, kernels, buffers)
        except ShapeError as error:
            raise refuse(f"program {program.phase}/{program.bucket}: {error}") from error


def _passes(program: Program, kernels: Mapping[str, KernelSpec]) -> None:
    """Each pass over a draft is one position further than the one before it."""
    calls = (kernels[step.kernel] for step in program.steps if isinstance(step, KernelCall))
    steps = [
        part.attrs["step"]
        for kernel in calls
        for part in kernel.parts
        if part.kind == "draft_place"
    ]
    check(
        sorted(steps) == list(range(1, program.depth)),
        lambda: (
            f"{program.phase}/{program.bucket} drafts at steps {steps} for depth {program.depth}"
        ),
    )


def _brought(program: Program, kernels: Mapping[str, KernelSpec]) -> None:
    """Whoever finds a state where `replay` leaves it comes after one that has left it."""
    brought: set[str] = set()
    for step in program.steps:
        if not isinstance(step, KernelCall):
            continue
        kernel = kernels[step.kernel]
        places = step.places(kernel)
        for part in kernel.parts:
            states = {places[name] for name in _states(part)}
            brought |= states if part.kind == "recompute_state" else set()
            check(part.attrs.get("mode") != RECOMPUTED or states <= brought,
                  lambda k=kernel: f"{program.phase}/{program.bucket}: nothing brings the state of `{k.name}`")  # type: ignore[misc] # fmt: skip


def _promised(program: Program) -> set[str]:
    """What the runtime reads after a replay."""
    drafts = {program.drafts} if program.depth else set()
    return (
        {program.logits, program.tokens}
        | drafts
        | ({"accepted"} if program.query_len > 1 else set())
    )


_ARENAS_OF_ROLE: dict[str, tuple[str, ...]] = {
    "input": ("io", "activations"),
    "output": ("io", "activations"),
    "state": ("kv_cache", "state", "io"),
    "scratch": ("scratch",),
}


def _call_fits(
    program: Program,
    step: KernelCall,
    kernels: Mapping[str, KernelSpec],
    weights: Mapping[str, TensorSpec],
    buffers: Mapping[str, BufferSpec],
) -> None:
    kernel = kernels.get(step.kernel)
    if kernel is None or len(kernel.tensors) != len(step.args):
        raise refuse(
            f"a step of {program.phase}/{program.bucket} does not fit kernel `{step.kernel}`"
        )
    for param, name in zip(kernel.tensors, step.args, strict=True):
        if param.role == "weight":
            actual = weights.get(name)
        else:
            buffer = buffers.get(name)
            actual = (
                buffer.tensor if buffer and buffer.arena in _ARENAS_OF_ROLE[param.role] else None
            )
        check(actual == param.tensor,
              lambda n=name, p=param: f"`{n}` does not fit parameter `{p.name}` of `{step.kernel}`")  # type: ignore[misc] # fmt: skip


def _batch_fits(
    program: Program, step: KernelCall, kernel: KernelSpec, made: dict[str, tuple[str, str]]
) -> None:
    """What a kernel takes for the batch is the batch's own, or what a pass that drafts has `made` for that role.

    `made` says of each buffer which operator wrote it, and as what. Each part must count as many
    rows a sequence as the program has.
    """
    args = step.places(kernel)
    inside: dict[str, tuple[str, str]] = {}
    for part in kernel.parts:
        op = OPS[part.kind]
        for role, operand in zip(op.operands, part.operands, strict=True):
            name = args.get(operand, operand)
            maker = inside.get(operand) or made.get(name)
            fits = role not in BATCH_INPUTS or name == role or maker in DRAFT_INPUTS.get(role, ())
            check(fits, lambda r=role, n=name: f"`{n}` is given to `{step.kernel}` as `{r}`")  # type: ignore[misc]
            if (part.kind, role) == ("draft_place", "lens"):
                own = "context_lens" if program.phase == "prefill" else None
                check(
                    name == own or maker == ("accept", "lens"),
                    lambda n=name: f"`{n}` is where drafts go on",
                )  # type: ignore[misc]
        inside |= {
            name: (part.kind, role) for role, name in zip(op.outputs, part.outputs, strict=False)
        }
        _rows_fit(program, kernel, part)
    made |= {args[name]: maker for name, maker in inside.items() if name in args}


def _rows_fit(program: Program, kernel: KernelSpec, part: Part) -> None:
    op = OPS[part.kind]
    if "query_len" not in (*op.attrs, *op.optional) or program.phase != "decode":
        check("query_len" not in part.attrs, lambda: f"`{kernel.name}` has rows of a decode step")
        return
    shape = {param.name: param.tensor.shape for param in kernel.params}.get(
        part.operands[0], ("num_tokens",)
    )
    wanted = 1 if part.kind == "attention" and shape[0] == "num_seqs" else program.query_len
    found = part.attrs.get("query_len", 1)
    check(
        found == wanted,
        lambda: f"`{kernel.name}` counts {found} rows a sequence, its program has {wanted}",
    )


def _collective_fits(plan: Plan, step: CollectiveCall, buffers: Mapping[str, BufferSpec]) -> None:
    source, target = buffers.get(step.source), buffers.get(step.target)
    if source is None or target is None or step.source == step.target:
        raise refuse(f"collective from `{step.source}` to `{step.target}`")
    factor = plan.target.count if step.op == "all_gather" else 1
    last = source.tensor.shape[-1]
    check(
        isinstance(last, int) and plan.target.count > 1, lambda: f"`{step.op}` of `{step.source}`"
    )
    shape = (*source.tensor.shape[:-1], last * factor if isinstance(last, int) else last)
    check(
        target.tensor == source.tensor.reshaped(shape),
        lambda: f"`{step.target}` cannot hold the {step.op} of `{step.source}`",
    )
