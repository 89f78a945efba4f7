"""From a spec to a plan: the pipeline on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path

from tokenspeed_plan.planner.advisor import resolve as decide
from tokenspeed_plan.planner.advisor.candidate import SUPPORTED
from tokenspeed_plan.planner.advisor.hardware import HardwareSpec, find_hardware
from tokenspeed_plan.planner.freeze import LoweredProgram, Parts, freeze
from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.models import checkpoint
from tokenspeed_plan.planner.models.config import ModelConfig, load_model_config, load_preset
from tokenspeed_plan.planner.models.qwen3_5 import BuildContext, build
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.expand import expand
from tokenspeed_plan.planner.passes.fuse import fuse
from tokenspeed_plan.planner.passes.grammar import check
from tokenspeed_plan.planner.passes.limits import (
    cache_decisions,
    interleaved_tokens,
    plan_limits,
    prefill_buckets,
)
from tokenspeed_plan.planner.passes.lower import Choose, lower
from tokenspeed_plan.planner.passes.place import place
from tokenspeed_plan.planner.passes.recompute_topk import recompute_topk
from tokenspeed_plan.planner.passes.select import KernelChoice
from tokenspeed_plan.planner.passes.shard import shard
from tokenspeed_plan.planner.passes.simulate import schedule_best
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.bundle import seal
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Limits, ModelFacts, Plan
from tokenspeed_plan.plans.types import DType, Phase
from tokenspeed_plan.plans.validate import validate


@dataclass(frozen=True, slots=True)
class Model:
    """A model as planning sees it: its config, and where there is a checkpoint, its headers."""

    config: ModelConfig
    location: str | None
    folder: Path | None
    files: Mapping[str, str]
    headers: Mapping[str, checkpoint.TensorHeader]

    @property
    def num_valid_tokens(self) -> int:
        """Vocabulary rows that stand for a token."""
        rows = self.config.vocab_size
        return checkpoint.num_valid_tokens(self.folder, rows) if self.folder else rows

    def fused_experts(self, prefix: str) -> bool:
        """Whether the experts under a name are one tensor; published BF16 files split only those of the MTP layer."""
        return (
            f"{prefix}gate_up_proj" in self.headers
            if self.headers
            else not prefix.startswith("mtp.")
        )


def find_model(spec: Spec, near: Path | None = None) -> Model:
    """The model of a spec. A relative path is looked up from here, then from the folders above `near`.

    Raises:
        SpecError: no such preset or folder, or not a model that can be planned.
    """
    if spec.model.preset is not None:
        config, _ = load_preset(spec.model.preset)
        return Model(config, None, None, {}, {})
    assert spec.model.path is not None
    roots = [Path(), *(near.resolve().parents if near else ())]
    folder = next(
        (root / spec.model.path for root in roots if (root / spec.model.path).is_dir()), None
    )
    if folder is None:
        raise SpecError(
            f"there is no folder `{spec.model.path}`",
            "`model.path` names a Hugging Face model folder",
        )
    headers = checkpoint.read_headers(folder)
    config = load_model_config(folder)
    return Model(config, spec.model.path, folder, checkpoint.file_digests(folder), headers)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan, the text of its kernels by name, and their binaries by file name."""

    plan: Plan
    sources: Mapping[str, str]
    cubins: Mapping[str, bytes] = field(default_factory=dict)


def compile_plan(spec: Spec, model: Model, dtype: DType | None = None) -> Plan:
    """The plan of `compile_bundle` alone, its kernels not compiled.

    Raises:
        SpecError: the spec cannot be planned: says what does not fit, and what would.
    """
    return compile_bundle(spec, model, dtype).plan


def build_bundle(spec: Spec, model: Model, cache: Path) -> Compiled:
    """`compile_bundle`, with kernels that are compiled for the target and proved to fit it.

    Raises:
        SpecError: the spec cannot be planned, or a kernel fits the target in no tiling.
    """
    hardware = find_hardware(spec.target.gpu)
    if hardware.sm == 0:
        return compile_bundle(spec, model)
    choice = KernelChoice(hardware, cache)
    decided = decide.resolve(spec, model.config, hardware)
    compile_bundle(spec, model, choose=choice.ask, decided=decided)
    choice.compile()
    made = compile_bundle(spec, model, choose=choice.answer, decided=decided)
    return Compiled(choice.sign(made.plan), made.sources, choice.cubins(made.plan))


def compile_bundle(
    spec: Spec,
    model: Model,
    dtype: DType | None = None,
    choose: Choose = itemgetter(0),
    decided: decide.Decided | None = None,
) -> Compiled:
    """Plan a spec; the canary is added by the caller. `dtype` overrides the spec's (fp64 makes the reference).

    `choose` picks among the tilings of a kernel, best first; `decided` is what was resolved before,
    if it was.

    Raises:
        SpecError: the spec cannot be planned: says what does not fit, and what would.
    """
    hardware = find_hardware(spec.target.gpu)
    decided = decided or decide.resolve(spec, model.config, hardware)
    dtype = dtype or decide.weight_dtype(spec)
    layout, knobs = decided.layout, decided.knobs
    depth = knobs.depth
    limits = plan_limits(
        spec.workload,
        model.config,
        hardware,
        knobs.prefill_chunk,
        knobs.checkpoint_tokens,
        depth,
        decided.recomputes,
    )
    context = BuildContext(
        model.config, dtype, limits, model.num_valid_tokens, model.fused_experts, spec.draft_vocab
    )
    graphs: dict[tuple[Phase, int], OpGraph] = {}
    wanted: list[tuple[Phase, int]] = [
        ("prefill", depth),
        *(("decode", each) for each in set(decided.depths.values())),
    ]
    for phase, drafts in wanted:
        built = check(build(context, phase, drafts))
        if model.headers:
            checkpoint.check_sources(built.weights, model.headers)
        graphs[phase, drafts] = check(shard(built, layout))
    sized = [
        *(
            (graphs["prefill", depth], bucket)
            for bucket in prefill_buckets(limits, spec.workload.turn_tokens)
        ),
        *((graphs["decode", drafts], bucket) for bucket, drafts in decided.depths.items()),
    ]
    programs = _programs(sized, limits, hardware, spec, choose)
    limits = limits.model_copy(update={"interleaved_tokens": _interleaved(programs, limits, spec)})
    facts = _facts(model, dtype)
    streams = decide.streams([graph for _, _, graph, _ in programs])
    decisions = (*decided.decisions, streams, *cache_decisions(limits, _tpot_ms(spec)))
    parts = Parts(
        spec,
        facts,
        hardware,
        layout,
        limits,
        decisions,
        decided.predicted,
        programs,
        version("tokenspeed-plan"),
    )
    plan = seal(freeze(parts))
    validate(plan)
    texts = {name: kernel.source for *_, kernels in programs for name, kernel in kernels.items()}
    return Compiled(plan, {name: text for name, text in sorted(texts.items()) if text is not None})


def _programs(
    sized: Sequence[tuple[OpGraph, int]],
    limits: Limits,
    hardware: HardwareSpec,
    spec: Spec,
    choose: Choose,
) -> list[LoweredProgram]:
    """(bucket, sequences, lowered graph, kernels) of every program, from its graph and its bucket."""
    made = []
    for graph, bucket in sized:
        seqs = min(bucket, limits.max_seqs)
        tokens = bucket * (graph.depth + 1 if graph.phase == "decode" else 1)
        expanded = check(expand(graph, tokens, seqs))
        load = _load(graph.phase, tokens, seqs, spec)
        fused = check(recompute_topk(fuse(expanded, tokens, seqs), tokens, seqs))
        placed = check(
            place(check(schedule_best(fused, load, hardware, SUPPORTED.max_streams)), tokens, seqs)
        )
        lowered, kernels = lower(placed, hardware, load, (tokens, seqs), choose)
        made.append((bucket, seqs, check(lowered), kernels))
    return made


def _interleaved(programs: Sequence[LoweredProgram], limits: Limits, spec: Spec) -> int:
    predicted_us = {(graph.phase, bucket): graph.time_us for bucket, _, graph, _ in programs}
    return interleaved_tokens(limits, _tpot_ms(spec), predicted_us)


def _tpot_ms(spec: Spec) -> float | None:
    slo = spec.slo or spec.objective.slo
    return slo.tpot_ms if slo else None


def _load(phase: Phase, tokens: int, seqs: int, spec: Spec) -> Load:
    """What a program is priced for: decode in the middle of the conversation, prefill of one sequence."""
    middle = spec.workload.max_conversation_tokens // 2
    return Load(tokens, seqs, middle) if phase == "decode" else Load(tokens, 1, min(middle, tokens))


def _facts(model: Model, dtype: DType) -> ModelFacts:
    config = model.config
    return ModelFacts(
        name=config.name,
        location=model.location,
        dtype=dtype,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        files=dict(model.files),
    )
