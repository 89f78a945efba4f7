"""A plan explained: as JSON for programs, as a table for people."""

from __future__ import annotations

from typing import Any

from tokenspeed_plan.plans.schema import KernelCall, Plan, Program

MIB, GIB = 1 << 20, 1 << 30


def as_dict(plan: Plan) -> dict[str, Any]:
    """The stable summary that `tokenspeed show --json` prints."""
    return {
        "digest": plan.digest,
        "schema_version": plan.schema_version,
        "compiler_version": plan.compiler_version,
        "model": plan.model.model_dump(mode="json"),
        "num_layers": plan.num_layers,
        "target": plan.target.model_dump(mode="json"),
        "layout": plan.layout.model_dump(mode="json"),
        "limits": plan.limits.model_dump(mode="json"),
        "decisions": [decision.model_dump(mode="json") for decision in plan.decisions],
        "programs": [_program(plan, program) for program in plan.programs],
        "kernels": [kernel.name for kernel in plan.kernels],
        "kernel_compiler": plan.kernel_compiler,
        "binaries": [binary.model_dump(mode="json") for binary in plan.binaries],
        "memory_bytes_per_rank": plan.memory_bytes_per_rank.model_dump(mode="json"),
        "canary_prompts": len(plan.canary),
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
    inside = {kernel.name for kernel in plan.kernels if any(part.kind == "all_reduce" for part in kernel.parts)}
    return sum(
        step.kind == "collective" or (isinstance(step, KernelCall) and step.kernel in inside) for step in program.steps
    )


def as_text(plan: Plan, kernels: bool = False) -> str:
    """The summary for a person."""
    target, limits = plan.target, plan.limits
    lines = [
        f"{plan.model.name} ({plan.model.dtype}, {plan.num_layers} layers) on {target.count} x {target.gpu}",
        f"digest {plan.digest[:16]}, planned by tokenspeed-plan {plan.compiler_version}",
        f"serves {limits.max_seqs} sequences at once, each up to {limits.max_seq_len} tokens",
        "",
        "decisions",
        *(
            f"  {d.name:<16} {d.value}: {d.reason}" + (f" (next: {d.runner_up})" if d.runner_up else "")
            for d in plan.decisions
        ),
        "",
        "memory on each rank",
        *(f"  {name:<16} {_size(size)}" for name, size in plan.memory_bytes_per_rank.model_dump().items()),
        "",
        "  phase     bucket  drafts  launches  per layer  collectives  predicted",
    ]
    for row in as_dict(plan)["programs"]:
        lines.append(
            f"  {row['phase']:<9} {row['bucket']:>6} {row['depth']:>7} {row['launches']:>9} "
            f"{row['launches_per_layer']:>10.2f} {row['collectives']:>12}  {row['predicted_us'] / 1e3:.2f} ms"
        )
    return "\n".join([*lines, *_kernel_lines(plan)] if kernels else lines)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:>9.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:>9.2f} MiB"


def _kernel_lines(plan: Plan) -> list[str]:
    """Each kernel: calls in the smallest decode program, what the compiler made of it, and its parts."""
    program = min((p for p in plan.programs if p.phase == "decode"), key=lambda p: p.bucket)
    calls = [step.kernel for step in program.steps if isinstance(step, KernelCall)]
    built = {binary.kernel: binary for binary in plan.binaries}
    lines = ["", f"  {'calls':>5}  {'kernel':<40} {'registers':>9} {'spills':>6} {'shared':>9}  parts"]
    for kernel in plan.kernels:
        parts = " + ".join(part.kind for part in kernel.parts)
        binary = built.get(kernel.name)
        made = (
            f"{binary.registers:>9} {binary.spill_bytes:>6} {binary.shared_bytes / 1024:>5.1f} KiB"
            if binary
            else " " * 26
        )
        lines.append(f"  {calls.count(kernel.name):>5}  {kernel.name:<40} {made}  {parts}")
    return lines
