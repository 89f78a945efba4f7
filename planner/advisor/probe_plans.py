"""The plans of `tokenspeed calibrate`'s probes, and what their steps take by the roofline alone.

Each plan has the tiles, formats and library calls that a plan of today has for such steps. Plans
need no GPU: they may be made before one is held, and are kept in a folder.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.advisor.calibration import bare, dump, functions_of, probe, probe_spec
from tokenspeed_plan.planner.compile import Model, plan_parts, prove
from tokenspeed_plan.planner.freeze import Parts
from tokenspeed_plan.planner.graph import LoweredCall, OpGraph, ScheduledOp
from tokenspeed_plan.planner.machines.hardware import (
    HardwareSpec,
    Profile,
    prices_digest,
    to_hardware,
)
from tokenspeed_plan.planner.passes.cost import Load, costed_op, roof_of
from tokenspeed_plan.planner.passes.lower import LoweredProgram
from tokenspeed_plan.planner.passes.pipeline import PassOptions
from tokenspeed_plan.plans.bundle import load_plan, save_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import Phase

FEW = (1, 2, 4, 16, 32)
MANY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DECODE_TOKENS, LONG_TOKENS = 1024, 16_384  # of context
CHUNK = {"cuda": 8192, "cpu": 128}
DRAFTS = 3  # of each sequence, where the tokens of a delta rule are timed
DRAFTING = (1, 4, 16)  # sequences at once that draft
ROOFS = "roofs.json"


class Batch(NamedTuple):
    """What a step computes: its sequences, and of each the new tokens and the context."""

    phase: Phase
    num_seqs: int
    new_tokens: int
    context: int

    @property
    def load(self) -> Load:
        """As the cost model takes it: a prompt attends to its middle on average."""
        context = self.context
        if self.phase == "prefill":
            context -= self.new_tokens // 2
        return Load(self.num_seqs * self.new_tokens, self.num_seqs, context)


@dataclass(frozen=True, slots=True)
class Work:
    """Batches that one plan of a probe runs.

    Attributes:
        name: of the plan.
        tokens: of a sequence, at most.
        batches: that are measured.
        takes: which kernels are samples: `kernels`, `drafts`, `libraries`, `fp8`, or of none of
            them `host`, the host's part of a step.
        prompts: whether rows of a batch, which share a prefill step, are planned for.
        depth: drafts of a decode step.
        weights: their format.
        quantises: whether products of FP8 multiply its elements as they are.
    """

    name: str
    tokens: int
    batches: tuple[Batch, ...]
    takes: str = "kernels"
    prompts: bool = False
    depth: int = 0
    weights: str = "bf16"
    quantises: bool | None = None

    @property
    def max_seqs(self) -> int:
        """Sequences at once."""
        return max(batch.num_seqs for batch in self.batches)


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """A plan that is ready to be measured.

    Attributes:
        work: its batches.
        plan: of the work.
        folder: of the bundle.
        roofs: for each batch, microseconds of the memory and of the tensor cores of each kernel,
            or of the function that is called in its place, at the rates of the profile.
    """

    work: Work
    plan: Plan
    folder: Path
    roofs: Sequence[Mapping[str, tuple[float, float]]]


def works(profile: Profile) -> tuple[Work, ...]:
    """What a probe is measured at on such a machine."""
    if profile.sm == 0:
        return _cpu_works()
    found = _plain_works()
    if functions_of(profile):
        found += (_library_work(),)
    if "fp8" in profile.matrix_flops_per_s and profile.sm >= 89:
        found += _fp8_works(bool(functions_of(profile)))
    return found


def _cpu_works() -> tuple[Work, ...]:
    chunk = CHUNK["cpu"]
    part = chunk // 4
    lone = (*_prompts((part,), (chunk + part) // 2), *_prompts((chunk,)))
    several = (Batch("prefill", 4, part, part),)
    return (
        Work("decode", 256, _decode(FEW, 128), weights="fp32"),
        Work("prefill", chunk, lone, prompts=True, weights="fp32"),
        Work("prompts", part, several, prompts=True, weights="fp32"),
    )


def _plain_works() -> tuple[Work, ...]:
    chunk = CHUNK["cuda"]
    several = (Batch("prefill", 4, chunk // 4, chunk // 4), Batch("prefill", 16, 512, 512))
    drafts = tuple(Batch("decode", seqs, DRAFTS + 1, DECODE_TOKENS) for seqs in DRAFTING)
    tokens = 2 * DECODE_TOKENS
    return (
        Work("decode", tokens, _decode(MANY, DECODE_TOKENS)),
        Work("prefill", chunk, _prompts((256, 1024, 2048, 4096, 8192)), prompts=True),
        Work("decode-long", 2 * LONG_TOKENS, _decode(FEW, LONG_TOKENS)),
        Work("prompts", chunk // 4, several, prompts=True),
        Work("drafts", tokens, drafts, "drafts", depth=DRAFTS),
    )


def _library_work() -> Work:
    """A lone prompt, a chunk and a few tokens behind a long context, and several prompts."""
    chunk = CHUNK["cuda"]
    batches = (
        *_prompts((1024, 2048, 4096, 8192)),
        *_prompts((1024, chunk), LONG_TOKENS),
        Batch("prefill", 8, 1024, 1024),
    )
    return Work("libraries", 2 * LONG_TOKENS, batches, "libraries")


def _fp8_works(has_libraries: bool) -> tuple[Work, ...]:
    """Weights that are converted, and elements that are multiplied as they are from 64 rows on."""
    tokens, chunk = 2 * DECODE_TOKENS, CHUNK["cuda"]
    converted = _decode(tuple(seqs for seqs in MANY if seqs <= 256), DECODE_TOKENS)
    quantised = _decode((64, 128, 256, 512), DECODE_TOKENS)
    prompts = _prompts((1024, 2048, 4096, 8192))
    found: tuple[Work, ...] = (
        Work("fp8-decode", tokens, converted, "fp8", weights="fp8", quantises=False),
        Work("fp8-rows", tokens, quantised, "fp8", weights="fp8", quantises=True),
        Work("fp8-prefill", chunk, prompts, "fp8", weights="fp8", quantises=True),
    )
    if has_libraries:
        called = Work("fp8-libraries", chunk, prompts, "libraries", weights="fp8", quantises=True)
        found += (called,)
    return found


def host_work(device: str) -> Work:
    """Rows with which the host's part of a step is measured."""
    if device == "cpu":
        return Work("host", 256, _decode(FEW, 128), "host", weights="fp32")
    return Work("host", 2 * DECODE_TOKENS, _decode(MANY[:-1], DECODE_TOKENS), "host")


def _decode(sizes: Sequence[int], context: int) -> tuple[Batch, ...]:
    return tuple(Batch("decode", num_seqs, 1, context) for num_seqs in sizes)


def _prompts(sizes: Sequence[int], context: int = 0) -> tuple[Batch, ...]:
    return tuple(Batch("prefill", 1, size, max(size, context)) for size in sizes)


def planned(name: str, work: Work, base: Profile, folder: Path) -> ProbePlan:
    """The plan of a probe's work; one that is in the folder is taken, else it is made there.

    Args:
        name: of the probe, a published model.
        work: what is measured.
        base: the profile by whose rates plans are made, without waits and residuals.
        folder: of all plans.
    """
    # The host calls a library from Python, which takes it longer than a launch.
    calls_libraries = work.takes in ("libraries", "host")
    roofline = bare(base, calls_libraries)
    key = f"{name} {work!r} {prices_digest(to_hardware(roofline))}"
    target = folder / name / work.name
    if _read_roofs(target).get("made_for") != key:
        profile = folder / f"bare{'-libraries' * calls_libraries}.yaml"
        _write_once(profile, dump(roofline, "A roofline without waiting."))
        _make(name, work, profile, target, key)
    roofs = _read_roofs(target)["roofs"]
    return ProbePlan(work, load_plan(target), target, roofs)


def _write_once(path: Path, text: str) -> None:
    """Write a file whole, since others may make plans in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(text, encoding="utf-8")
    own.replace(path)


def _read_roofs(target: Path) -> dict[str, Any]:
    path = target / ROOFS
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _make(name: str, work: Work, profile: Path, target: Path, key: str) -> None:
    spec = probe_spec(
        str(profile),
        work.weights,
        work.tokens,
        CHUNK["cpu" if work.weights == "fp32" else "cuda"],
        work.max_seqs,
        work.prompts,
        work.depth,
    )
    model = Model(probe(name), None, None, {}, {}, weights=work.weights)
    parts = plan_parts(spec, model, options=PassOptions(quantises=work.quantises))
    bundle, chosen = prove(parts, default_cache())
    save_plan(bundle.plan, target, bundle.sources, bundle.cubins)
    found = [_roofs(parts, chosen, batch) for batch in work.batches]
    text = json.dumps({"made_for": key, "roofs": found}, indent=1, allow_nan=False)
    (target / ROOFS).write_text(text, encoding="utf-8")


def _roofs(
    parts: Parts, chosen: Mapping[str, Built], batch: Batch
) -> dict[str, tuple[float, float]]:
    """The roofline of each kernel that a batch runs, the mean of its calls."""
    program = _program_of(parts.programs, batch)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step, call in zip(program.graph.steps, program.graph.calls, strict=True):
        if not isinstance(step, ScheduledOp) or not isinstance(call, LoweredCall):
            continue
        roof = _roof(program.graph, step.op_name, batch, parts.hardware)
        found[chosen[call.key].kernel.name].append(roof)
        if call.library is not None:
            found[call.library.function].append(roof)
    return {name: _mean(roofs) for name, roofs in sorted(found.items())}


def _mean(roofs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    memory_us, matrix_us = (sum(column) / len(roofs) for column in zip(*roofs, strict=True))
    return memory_us, matrix_us


def _roof(
    graph: OpGraph, op_name: str, batch: Batch, hardware: HardwareSpec
) -> tuple[float, float]:
    costed = costed_op(graph, graph.by_name[op_name])
    roof = roof_of(costed, costed.work(batch.load), batch.load, hardware)
    return roof.memory_us, roof.matrix_us


def _program_of(programs: Sequence[LoweredProgram], batch: Batch) -> LoweredProgram:
    """The smallest program that takes a batch."""
    tokens = batch.num_seqs * batch.new_tokens
    fitting = [
        program
        for program in programs
        if program.graph.phase == batch.phase
        and program.bucket * program.graph.num_queries >= tokens
        and program.max_seqs >= batch.num_seqs
    ]
    return min(fitting, key=lambda program: program.bucket)
