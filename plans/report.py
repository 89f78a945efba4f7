"""A plan explained: as JSON for programs, as one screen for people, and one decision in full."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.figures import plain, without_exponents
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import (
    Binary,
    Call,
    CollectiveCall,
    Decision,
    KernelCall,
    LibraryCall,
    Option,
    Plan,
    Program,
)
from tokenspeed_plan.plans.text import printable_line
from tokenspeed_plan.plans.types import FORMATS, GIB, Format

MIB = 1 << 20
TOP_COSTS = 5
WIDTH = 118
DEFINITIONS = {
    "ttft_ms": "request to first token, mean over the turns of a conversation",
    "tpot_ms": "time of a token after the first; TTFT is not in it",
    "turn_time_ms": "request to last token",
    "tokens_per_s_user": "output tokens over turn time",
    "tokens_per_s_gpu": "output tokens of all users, for each GPU",
    "cost_per_million_tokens_usd": "of output tokens, at the profile's on-demand price",
    "cache_hit_rate": "share of prompt tokens that need no computing",
}

_DETAIL = "a detail of the contract numbers"


def as_dict(plan: Plan) -> dict[str, Any]:
    """The stable summary that `tokenspeed show --json` prints."""
    return {
        "digest": plan.digest,
        "schema_version": plan.schema_version,
        "compiler_version": plan.compiler_version,
        "model": plan.model.model_dump(mode="json"),
        "num_layers": plan.num_layers,
        "target": plan.target.model_dump(mode="json"),
        "layout": plan.pool.layout.model_dump(mode="json"),
        "limits": plan.pool.limits.model_dump(mode="json") | _largest(plan),
        "workload": plan.spec.get("workload", {}),
        "predicted": _predicted(plan),
        "decisions": [decision.model_dump(mode="json") for decision in plan.decisions],
        "programs": [_program(plan, program) for program in plan.pool.programs],
        "top_costs": top_costs(plan),
        "kernels": [kernel.name for kernel in plan.kernels],
        "kernel_compiler": plan.kernel_compiler,
        "binaries": [binary.model_dump(mode="json") for binary in plan.binaries],
        "memory_bytes_per_rank": plan.pool.memory_bytes_per_rank.model_dump(mode="json"),
        "canary_prompts": len(plan.canary),
    }


def _largest(plan: Plan) -> dict[str, int]:
    """The largest sizes that would fit this memory, with another plan."""
    predicted = plan.predicted
    return {
        "largest_concurrency": predicted.largest_concurrency,
        "largest_context_tokens": predicted.largest_context_tokens,
    }


def _predicted(plan: Plan) -> dict[str, Any]:
    predicted = plan.predicted
    return {
        **predicted.values,
        "interval": {
            name: [predicted.low[name], predicted.high[name]] for name in predicted.values
        },
        "decode_batch": predicted.decode_batch,
        "decode_step_us": predicted.decode_step_us,
        "decode_floor_us": predicted.decode_floor_us,
        "limited_by": predicted.limited_by,
        "slo_missed": predicted.slo_missed,
        "definitions": DEFINITIONS,
    }


def _program(plan: Plan, program: Program) -> dict[str, Any]:
    return {
        "phase": program.phase,
        "bucket": program.bucket,
        "max_tokens": program.max_tokens,
        "max_seqs": program.max_seqs,
        "depth": program.depth,
        "launches": program.launches,
        "collectives": _collectives(plan, program),
        "launches_per_layer": round(program.launches / plan.num_layers, 2),
        "streams": program.num_streams,
        "predicted_us": program.predicted_us,
    }


def _collectives(plan: Plan, program: Program) -> int:
    """Steps in which ranks meet, alone or inside a kernel."""
    inside = {kernel.name for kernel in plan.kernels if kernel.reduced_operand is not None}
    count = 0
    for step in program.steps:
        meets = isinstance(step, Call) and step.kernel in inside
        if meets or isinstance(step, CollectiveCall):
            count += 1
    return count


def smallest_decode(plan: Plan) -> Program:
    """The decode program of the smallest bucket: a lone user's step."""
    return min((p for p in plan.pool.programs if p.phase == "decode"), key=lambda p: p.bucket)


def top_costs(plan: Plan) -> list[dict[str, Any]]:
    """Where a lone user's step goes: kinds of steps by predicted time, the largest first."""
    program = smallest_decode(plan)
    return [_cost(program, kind, times) for kind, times in _heaviest(plan, program)[:TOP_COSTS]]


def _heaviest(plan: Plan, program: Program) -> list[tuple[str, list[float]]]:
    """Kinds of steps with the predicted microseconds of each, the largest sum first."""
    kinds = {kernel.name: kind_of(kernel) for kernel in plan.kernels}
    times: dict[str, list[float]] = defaultdict(list)
    for step in program.steps:
        if isinstance(step, LibraryCall):
            times[step.function].append(step.predicted_us)
        elif isinstance(step, KernelCall):
            times[kinds[step.kernel]].append(step.predicted_us)
        elif isinstance(step, CollectiveCall):
            times[step.op].append(step.predicted_us)
    return sorted(times.items(), key=lambda item: (-sum(item[1]), item[0]))


def _cost(program: Program, kind: str, times: list[float]) -> dict[str, Any]:
    total_us = sum(times)
    share = 0.0
    if program.predicted_us:
        share = total_us / program.predicted_us
    return {
        "kind": kind,
        "calls": len(times),
        "total_us": round(total_us, 2),
        "share": round(share, 4),
    }


def as_text(plan: Plan, kernels: bool = False, width: int | None = WIDTH) -> str:
    """The summary for a person, in lines of a width; None cuts nothing."""
    costs = [f"{r['kind']} {r['share']:.0%} ({r['calls']})" for r in top_costs(plan)]
    lines = [
        *_title_lines(plan),
        "",
        *_predicted_lines(plan),
        "",
        *_memory_lines(plan, width),
        "",
        *_program_lines(plan),
        "",
        f"a lone user's step: {', '.join(costs)}",
        f"limited by {_limit(plan)}",
        "",
        "decisions (`--why NAME` says more)",
        *(_clip(_decision_line(each), width) for each in plan.decisions),
    ]
    if kernels:
        lines += _kernel_lines(plan)
    return _joined(lines)


def _joined(lines: Iterable[str]) -> str:
    """The lines, without what a terminal would obey: a plan's texts may be anybody's."""
    return "\n".join(map(printable_line, lines))


def _title_lines(plan: Plan) -> Iterator[str]:
    model, target, limits = plan.model, plan.target, plan.pool.limits
    facts = f"{_stored_as(plan)}, {plan.num_layers} layers"
    yield f"{model.name} ({facts}) on {target.count} x {target.gpu}"
    yield f"digest {plan.digest[:16]}, planned by tokenspeed-plan {plan.compiler_version}"
    predicted = plan.predicted
    yield (
        f"layout {_value(plan, 'parallelism')}; serves {limits.max_seqs} sequences at once,"
        f" each up to {limits.max_seq_len} tokens (would fit: {predicted.largest_concurrency},"
        f" or {predicted.largest_context_tokens} tokens)"
    )
    yield _workload_line(plan)


def _stored_as(plan: Plan) -> str:
    """How weights are stored: quantised formats, the one of most bytes first, and all others."""
    sizes = Counter[Format]()
    for weight in plan.pool.weights:
        sizes[weight.tensor.format] += weight.tensor.size_bytes()
    names = {format: name for name, format in FORMATS.items()}
    words = [names.get(each, str(each)) for each, _ in sizes.most_common() if each.block]
    if not words:
        return plan.model.dtype
    return f"{', '.join(words)} and {plan.model.dtype}"


def _workload_line(plan: Plan) -> str:
    """What the plan was made for."""
    stated = plan.spec.get("workload")
    facts = dict(stated) if isinstance(stated, dict) else {}
    kind = facts.pop("kind", "batch")
    parts = [f"{name} {value}" for name, value in facts.items()]
    return f"workload {kind}: {', '.join(parts)}"


def _decision_line(decision: Decision) -> str:
    return without_exponents(f"  {decision.name:<16} {decision.value}: {decision.reason}")


def _clip(line: str, width: int | None) -> str:
    if width is None or len(line) <= width:
        return line
    return f"{line[: width - 3]}..."


def _value(plan: Plan, name: str) -> str:
    return next((d.value for d in plan.decisions if d.name == name), "?")


def _predicted_lines(plan: Plan) -> Iterator[str]:
    """The contract's numbers, two a line, each with its interval."""
    predicted = plan.predicted
    cells = []
    for name in DEFINITIONS:
        interval = f"({plain(predicted.low[name])} to {plain(predicted.high[name])})"
        cells.append(f"{name:<27} {plain(predicted.values[name]):>9} {interval}")
    yield "predicted for the spec's workload (TPOT without TTFT)"
    for left, right in zip(cells[::2], [*cells[1::2], ""], strict=False):
        yield f"  {left:<58} {right}".rstrip()


def _limit(plan: Plan) -> str:
    """What limits a step, by share, and the part of it that moving its bytes takes at peak rate."""
    parts = plan.predicted.decode_step_us
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{kind} {part / total:.0%}" for kind, part in largest if part)
    floor = plan.predicted.decode_floor_us / total
    limited_by = plan.predicted.limited_by
    return f"{limited_by}: {shares}; its bytes at peak rate are {floor:.0%} of a step"


def _memory_lines(plan: Plan, width: int | None) -> list[str]:
    memory = plan.pool.memory_bytes_per_rank.model_dump()
    capacity, total = memory.pop("capacity"), memory.pop("total")
    cells = [f"{name} {_size(size).strip()}" for name, size in memory.items() if size]
    return [
        f"memory on each rank: {_size(total).strip()} of {_size(capacity).strip()}",
        _clip(f"  {', '.join(cells)}", width),
    ]


def _program_lines(plan: Plan) -> list[str]:
    lines = ["  phase     bucket  drafts  launches  per layer  collectives  predicted"]
    for program in plan.pool.programs:
        row = _program(plan, program)
        lines.append(
            f"  {row['phase']:<9} {row['bucket']:>6} {row['depth']:>7} {row['launches']:>9} "
            f"{row['launches_per_layer']:>10.2f} {row['collectives']:>12}"
            f"  {row['predicted_us'] / 1e3:.2f} ms"
        )
    return lines


def _size(size_bytes: int) -> str:
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:>9.2f} GiB"
    return f"{size_bytes / MIB:>9.2f} MiB"


def why(plan: Plan, name: str) -> str:
    """One decision or predicted number: what it is, why, and the options with their numbers.

    Raises:
        PlanError: the plan has no such decision.
    """
    found = _find(plan, name)
    if isinstance(found, Decision):
        return without_exponents(_joined(_decision_lines(found)))
    return _joined(_number_lines(plan, name))


def why_as_dict(plan: Plan, name: str) -> dict[str, Any]:
    """The same for programs; raises as `why` does."""
    found = _find(plan, name)
    if isinstance(found, Decision):
        return found.model_dump(mode="json")
    predicted = plan.predicted
    return {
        "name": name,
        "value": found,
        "interval": [predicted.low[name], predicted.high[name]],
        "definition": DEFINITIONS.get(name, _DETAIL),
        "decode_batch": predicted.decode_batch,
        "decode_step_us": predicted.decode_step_us,
        "limited_by": predicted.limited_by,
    }


def _find(plan: Plan, name: str) -> Decision | float:
    """The decision, or the predicted number, of a name."""
    decision = next((d for d in plan.decisions if d.name == name), None)
    if decision is not None:
        return decision
    if name in plan.predicted.values:
        return plan.predicted.values[name]
    known = [*(d.name for d in plan.decisions), *plan.predicted.values]
    hint = f"decisions: {', '.join(known)}"
    for near in difflib.get_close_matches(name, known, 1):
        hint = f"did you mean `{near}`?"
    raise PlanError(f"the plan has no decision called `{name}`", hint)


def _decision_lines(decision: Decision) -> Iterator[str]:
    yield f"{decision.name}: {decision.value}"
    yield f"  because  {decision.reason}"
    if decision.runner_up:
        yield f"  next     {decision.runner_up}"
    if decision.options:
        yield "  looked at"
        yield from (f"    {line}" for one in decision.options for line in option_lines(one))


def option_lines(one: Option) -> Iterator[str]:
    """A deployment and its numbers, or why it is impossible."""
    if one.reason:
        yield f"{one.what}: {one.reason}"
    else:
        yield one.what
    if one.numbers:
        yield "  " + ", ".join(f"{name} {plain(value)}" for name, value in one.numbers.items())


def _number_lines(plan: Plan, name: str) -> Iterator[str]:
    predicted = plan.predicted
    low, high = predicted.low[name], predicted.high[name]
    yield f"{name}: {plain(predicted.values[name])}, between {plain(low)} and {plain(high)}"
    yield f"  means    {DEFINITIONS.get(name, _DETAIL)}"
    if name in OF_PROMPTS:
        yield from _prefill_lines(plan)
    if name == "ttft_ms":
        return
    batch = plain(predicted.decode_batch)
    yield f"  step     at an average batch of {batch}, limited by {_limit(plan)}"
    for kind, part in sorted(predicted.decode_step_us.items(), key=lambda item: -item[1]):
        if part:
            yield f"    {kind:<11} {part:>9.1f} us"


OF_PROMPTS = ("ttft_ms", "turn_time_ms")  # predicted numbers with the time of a prompt in them


def _prefill_lines(plan: Plan) -> Iterator[str]:
    """Steps of a prompt by their tokens, each with the kinds of kernels that take the most."""
    for program in plan.pool.programs:
        if program.phase == "prefill":
            most = [
                f"{kind} {sum(times) / program.predicted_us:.0%}"
                for kind, times in _heaviest(plan, program)[:TOP_COSTS]
            ]
            us = program.predicted_us
            yield f"  prompt   {program.bucket} tokens in {us / 1e3:.4g} ms: {', '.join(most)}"


def _kernel_lines(plan: Plan) -> list[str]:
    """Each kernel: its calls in the smallest decode program, its binary, and its parts."""
    program = smallest_decode(plan)
    calls = [step.kernel for step in program.steps if isinstance(step, Call)]
    built = {binary.kernel: binary for binary in plan.binaries}
    columns = f"{'registers':>9} {'spills':>6} {'shared':>9}"
    lines = ["", f"  {'calls':>5}  {'kernel':<40} {columns}  parts"]
    for kernel in plan.kernels:
        parts = " + ".join(part.kind for part in kernel.parts)
        count = calls.count(kernel.name)
        resources = _resources(built.get(kernel.name))
        lines.append(f"  {count:>5}  {kernel.name:<40} {resources}  {parts}")
    return lines


def _resources(binary: Binary | None) -> str:
    if binary is None:
        return " " * 26
    shared_kib = binary.shared_bytes / 1024
    return f"{binary.registers:>9} {binary.spill_bytes:>6} {shared_kib:>5.1f} KiB"
