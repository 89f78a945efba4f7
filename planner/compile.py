"""The compiler: from a spec to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tokenspeed_plan.codegen.build import Compiled as CompiledKernel
from tokenspeed_plan.codegen.build import Job, compile_all, compiler_name
from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.advisor import resolve as decide
from tokenspeed_plan.planner.advisor.answer_returns import (
    ReturnPrices,
    choose_answer_returns,
)
from tokenspeed_plan.planner.advisor.candidate import SUPPORTED
from tokenspeed_plan.planner.advisor.legality import check_kernels
from tokenspeed_plan.planner.freeze import Parts, freeze
from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import FP8_CLASSES, HardwareSpec, find_hardware
from tokenspeed_plan.planner.machines.target import target_hardware
from tokenspeed_plan.planner.models import checkpoint
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.config import ModelConfig, load_model_config, load_preset
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.models.fit import fit_to_tensors, stored_encoding
from tokenspeed_plan.planner.models.folder import find_folder
from tokenspeed_plan.planner.models.key_scales import read_key_scales, scales_of
from tokenspeed_plan.planner.models.quantization import (
    QUANTISED,
    check_word,
    published_encoding,
    stored_word,
)
from tokenspeed_plan.planner.models.stop_tokens import tokenizer_stop_tokens
from tokenspeed_plan.planner.models.tensor_header import TensorHeader
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.grammar import check
from tokenspeed_plan.planner.passes.host_cache import HostPrices, choose_host_cache
from tokenspeed_plan.planner.passes.library import record_libraries
from tokenspeed_plan.planner.passes.limits import (
    CapacityOptions,
    plan_capacity,
    plan_limits,
    prefill_buckets,
    record_cache,
)
from tokenspeed_plan.planner.passes.lower import LoweredProgram
from tokenspeed_plan.planner.passes.pipeline import DEFAULT_OPTIONS, PassContext, PassOptions, run
from tokenspeed_plan.planner.passes.quantised_products import record_quantised
from tokenspeed_plan.planner.passes.reduction import record_reductions
from tokenspeed_plan.planner.passes.select import Candidates, select, select_unproved, unreported
from tokenspeed_plan.planner.passes.simulate import record_streams
from tokenspeed_plan.planner.spec import Spec, WorkloadSpec
from tokenspeed_plan.plans.bundle import seal
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import (
    AnswerReturns,
    Binary,
    Capacity,
    Limits,
    ModelFacts,
    Plan,
    Shard,
)
from tokenspeed_plan.plans.types import DType, Phase
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.plans.weight_digests import header_digests

Report = Callable[[str, int, int], None]  # a stage, and how many of its parts are done


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as planning sees it: its config and, where there is a checkpoint, its headers.

    `stop_reason` says where the stop tokens are from if no config names them; `weights` is their
    format, a word of the spec; `key_scales` are those of keys and values, by the names of tensors.
    """

    config: ModelConfig
    location: str | None
    folder: Path | None
    files: Mapping[str, str]
    headers: Mapping[str, TensorHeader]
    stop_reason: str = ""
    shards: Mapping[str, Shard] = field(default_factory=dict)
    weights: str = "bf16"
    key_scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_valid_tokens(self) -> int:
        """Rows of the vocabulary that stand for a token."""
        if self.folder is None:
            return self.config.vocab_size
        return checkpoint.num_valid_tokens(self.folder, self.config.vocab_size)

    def fused_experts(self, prefix: str) -> bool:
        """Whether the experts under a prefix are one tensor.

        Published files always split those of the MTP layer.
        """
        if self.headers:
            return _are_fused(prefix, self.headers)
        moe = self.config.moe
        fused = moe is not None and moe.fused and not prefix.startswith("mtp.")
        return fused and self.weights not in QUANTISED

    def encoding(self, name: str) -> Encoding | None:
        """How a matrix is encoded; without a checkpoint, as published ones do."""
        if self.headers:
            return stored_encoding(self.headers, name)
        return published_encoding(self.weights, self.config, name)


def _are_fused(prefix: str, headers: Mapping[str, TensorHeader]) -> bool:
    fused, single = f"{prefix}gate_up_proj", f"{prefix}0.gate_proj.weight"
    if fused in headers and single in headers:
        raise SpecError(
            f"the checkpoint has both `{fused}` and `{single}`", "keep the experts in one form"
        )
    return fused in headers


def find_model(spec: Spec, near: Path | None = None) -> Model:
    """The model of a spec. A relative path is looked up from folders above `near`, then from here.

    Raises:
        SpecError: no such preset or folder, or not a model that can be planned.
    """
    if spec.model.preset is not None:
        config, _ = load_preset(spec.model.preset)
        word = stored_word(spec.model.weights, config.quantization)
        return Model(config, None, None, {}, {}, weights=word)
    assert spec.model.path is not None
    folder = find_folder(spec.model.path, near)
    if folder is None:
        raise SpecError(
            f"there is no folder `{spec.model.path}`",
            "`model.path` names a Hugging Face model folder",
        )
    config = load_model_config(folder)
    headers = checkpoint.read_headers(folder)
    files, shards = checkpoint.file_digests(folder), header_digests(folder)
    word = stored_word(spec.model.weights, config.quantization)
    scales = read_key_scales(folder)
    model = Model(
        config, spec.model.path, folder, files, headers, "", shards, word, key_scales=scales
    )
    if headers:
        config = fit_to_tensors(config, headers, model.fused_experts)
    model = replace(model, config=config)
    if config.eos_token_ids:
        return model
    ids = tokenizer_stop_tokens(folder, config.vocab_size)
    reason = "no config of the model names any, its tokenizer does"
    if not ids:
        reason = "neither a config of the model nor its tokenizer names any"
    return replace(model, config=replace(config, eos_token_ids=ids), stop_reason=reason)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan, the text of its kernels by name, and their binaries by file name."""

    plan: Plan
    sources: Mapping[str, str]
    cubins: Mapping[str, bytes] = field(default_factory=dict)


def compile_plan(
    spec: Spec,
    model: Model,
    dtype: DType | None = None,
    options: PassOptions = DEFAULT_OPTIONS,
) -> Plan:
    """The plan of `compile_bundle` alone.

    Raises:
        SpecError: the spec cannot be planned; it says what does not fit, and what would.
    """
    return compile_bundle(spec, model, dtype, options).plan


def compile_bundle(
    spec: Spec,
    model: Model,
    dtype: DType | None = None,
    options: PassOptions = DEFAULT_OPTIONS,
    report: Report = _silent,
    kept: Collection[str] = (),
) -> Compiled:
    """Plan a spec with the best tiling of each kernel, not compiled; the caller adds the canary.

    Args:
        spec: what to plan.
        model: of the spec.
        dtype: overrides the spec's; fp64 makes the reference.
        options: of the passes.
        report: is told of the progress.
        kept: names of kernels that are taken before better ones: an older bundle's, which were
            proved to fit.

    Raises:
        SpecError: the spec cannot be planned; it says what does not fit, and what would.
    """
    parts = plan_parts(spec, model, dtype, options, report)
    return _bundle(parts, select_unproved(parts.candidates, kept))


def build_bundle(
    spec: Spec,
    model: Model,
    cache: Path,
    report: Report = _silent,
    options: PassOptions = DEFAULT_OPTIONS,
) -> Compiled:
    """Plan a spec with kernels that are compiled for the target and proved to fit it.

    Raises:
        SpecError: the spec cannot be planned, or a kernel fits the target in no tiling.
    """
    check_kernels(model.weights, model.config, find_hardware(spec.target.gpu, spec.folder))
    parts = plan_parts(spec, model, options=options, report=report)
    return prove(parts, cache, report)[0]


def prove(
    parts: Parts, cache: Path, report: Report = _silent
) -> tuple[Compiled, Mapping[str, Built]]:
    """The bundle of what was decided, with the tiling of each kernel by its key.

    Raises:
        SpecError: a kernel fits the target in no tiling.
    """
    if parts.hardware.sm == 0:
        chosen = select_unproved(parts.candidates)
        return _bundle(parts, chosen), chosen
    report("compiling kernels", 0, len(parts.candidates))
    reports = compile_candidates(parts.candidates, parts.hardware, cache)
    chosen = select(parts.candidates, reports, parts.hardware)
    return _signed(_bundle(parts, chosen), reports, parts.hardware), chosen


def compile_candidates(
    candidates: Candidates, hardware: HardwareSpec, cache: Path
) -> dict[str, CompiledKernel]:
    """Compile the best tiling of each kernel, then the next of those that do not fit, and so on.

    Returns:
        What the compiler made of each tiling that was tried, by its kernel's name.

    Raises:
        SpecError: no tiling of a kernel fits.
    """
    reports: dict[str, CompiledKernel] = {}
    while tilings := unreported(candidates, reports, hardware):
        jobs = {tiling.kernel.name: _job(tiling, hardware) for tiling in tilings}
        results = compile_all(jobs.values(), cache)
        reports |= {name: results[job.key] for name, job in jobs.items()}
    return reports


def _job(tiling: Built, hardware: HardwareSpec) -> Job:
    assert tiling.source is not None
    return Job(tiling.kernel, tiling.source, hardware.sm)


def _bundle(parts: Parts, chosen: Mapping[str, Built]) -> Compiled:
    plan = seal(freeze(parts, chosen))
    validate(plan)
    texts = {built.kernel.name: built.source for built in chosen.values()}
    return Compiled(plan, {name: text for name, text in sorted(texts.items()) if text is not None})


def _signed(
    bundle: Compiled, reports: Mapping[str, CompiledKernel], hardware: HardwareSpec
) -> Compiled:
    """The bundle with what the compiler made of its kernels."""
    binaries, cubins = [], {}
    for kernel in bundle.plan.kernels:
        report = reports.get(kernel.name)
        if report is None:
            continue
        cubins[f"{kernel.name}.sm{hardware.sm}.cubin"] = report.cubin
        binaries.append(
            Binary(
                kernel=kernel.name,
                sm=hardware.sm,
                cubin_sha256=sha256(report.cubin),
                registers=report.registers,
                spill_bytes=report.spill_bytes,
                shared_bytes=report.shared_bytes,
            )
        )
    changes = {"binaries": tuple(binaries), "kernel_compiler": compiler_name()}
    return Compiled(seal(bundle.plan.model_copy(update=changes)), bundle.sources, cubins)


def plan_parts(
    spec: Spec,
    model: Model,
    dtype: DType | None = None,
    options: PassOptions = DEFAULT_OPTIONS,
    report: Report = _silent,
) -> Parts:
    """Decide everything but the tilings of the kernels.

    Raises:
        SpecError: the spec cannot be planned; it says what does not fit, and what would.
    """
    ledger = Ledger()
    hardware = target_hardware(spec)
    config = model.config
    check_word(spec.model.weights, config.quantization, bool(model.headers), config.name)
    dtype = dtype or decide.weight_dtype(model.weights, hardware)
    decided = decide.resolve(
        spec, config, hardware, ledger, partial(report, "searching deployments")
    )
    knobs = decided.knobs
    chosen = CapacityOptions(
        knobs.prefill_chunk, knobs.checkpoint_tokens, knobs.depth, decided.rollback
    )
    workload = spec.with_concurrency(decided.num_seqs).workload
    capacity = plan_capacity(workload, model.config, hardware, chosen)
    work = _Programs(spec, model, hardware, decided, capacity, dtype, options, decided.layout)
    programs = tuple(work.lowered(report))
    limits = plan_limits(
        capacity, decided.interleaving.tokens, decided.gathered_tokens, decided.filled_tokens
    )
    _record_programs(ledger, programs, hardware)
    record_cache(
        ledger, limits, decided.interleaving.reason, config.has_state, workload.is_batch_of_rows
    )
    prices = HostPrices.of(programs, capacity, hardware)
    host_cache = choose_host_cache(ledger, spec, workload, prices, decided.prefill is not None)
    prefill_programs = work.of_prefill_pool(programs, report)
    answer_returns = _choose_returns(ledger, work, workload, limits, programs, prefill_programs)
    if model.weights in QUANTISED or spec.model.head == "fp8":
        _record_weights(ledger, programs, dtype, spec, hardware)
    if model.stop_reason:
        _record_stop_tokens(ledger, model)
    return Parts(
        spec,
        _facts(model, dtype),
        hardware,
        decided.layout,
        limits,
        ledger.decisions,
        decided.predicted,
        programs,
        version("tokenspeed-plan"),
        decided.prefill,
        prefill_programs,
        host_cache,
        answer_returns,
    )


def _choose_returns(
    ledger: Ledger,
    work: _Programs,
    workload: WorkloadSpec,
    limits: Limits,
    programs: tuple[LoweredProgram, ...],
    prefill_programs: tuple[LoweredProgram, ...],
) -> AnswerReturns | None:
    """Whether and how answers go back to a pool that computes prompts; None where there is none."""
    layout, prefill = work.decided.layout, work.decided.prefill
    if prefill is None:
        return None
    num_ranks = layout.num_ranks + prefill.num_ranks
    prices = ReturnPrices.of(programs, prefill_programs, work.capacity, work.hardware, num_ranks)
    return choose_answer_returns(ledger, work.spec, workload, limits, prices)


def _record_programs(
    ledger: Ledger, programs: tuple[LoweredProgram, ...], hardware: HardwareSpec
) -> None:
    """Keep why the steps of all programs are what they are."""
    record_streams(ledger, [program.graph for program in programs])
    record_reductions(ledger, programs, hardware)
    named = [(f"{each.graph.phase}/{each.bucket}", each.graph) for each in programs]
    record_libraries(ledger, named)
    record_quantised(ledger, programs, hardware)


def _record_weights(
    ledger: Ledger,
    programs: tuple[LoweredProgram, ...],
    dtype: DType,
    spec: Spec,
    hardware: HardwareSpec,
) -> None:
    """Write down how weights are quantised, and whether prices of FP8 were measured."""
    graphs = [program.graph for program in programs]
    specs = [weight.spec for graph in graphs for weight in graph.weights.values()]
    formats = sorted({str(spec.format) for spec in specs if spec.format.block})
    kept, head = "tables, head,", ""
    if spec.model.head == "fp8":
        kept, head = "tables,", ", the head rounded when it is loaded"
    prices = "their bytes at the rates of bf16 kernels: the profile has no classes of FP8"
    if any(name in hardware.residuals for name in FP8_CLASSES):
        prices = "those of FP8 calibrated, with classes of their own; those of NVFP4 bytes"
    ledger.record(
        "weights",
        f"{', '.join(formats)}{head}, activations {dtype}",
        f"matrices of products are stored in blocks; {kept} norms, routers and gates stay as they "
        f"are. `fp8_products` says what the tensor cores multiply. Prices: {prices}",
        "bf16, twice the bytes of FP8 and 3.6 times those of NVFP4",
    )


def _record_stop_tokens(ledger: Ledger, model: Model) -> None:
    """Write down the stop tokens where no config names them."""
    ids = ", ".join(map(str, model.config.eos_token_ids))
    value = ids or "none: an answer ends at `max_tokens` or at a request's own stop"
    ledger.record("stop_tokens", value, model.stop_reason)


@dataclass(frozen=True)
class _Programs:
    """Builds the graph of each phase and depth once, and lowers it for each bucket.

    `layout` is how the model is cut over the ranks of the pool.
    """

    spec: Spec
    model: Model
    hardware: HardwareSpec
    decided: decide.Decided
    capacity: Capacity
    dtype: DType
    options: PassOptions
    layout: ParallelLayout

    def lowered(self, report: Report) -> Iterator[LoweredProgram]:
        """The programs of a pool that answers: prefill, then decode, each by bucket."""
        decode = {
            depth: self._sharded("decode", depth) for depth in set(self.decided.depths.values())
        }
        waiting = self._prompts()
        waiting += [(decode[depth], bucket) for bucket, depth in self.decided.depths.items()]
        for done, (graph, bucket) in enumerate(waiting):
            report("making programs", done, len(waiting))
            yield self._lower(graph, bucket)

    def of_prefill_pool(
        self, programs: Sequence[LoweredProgram], report: Report
    ) -> tuple[LoweredProgram, ...]:
        """Those of a pool for prompts: of `programs`, unless it is cut in another way."""
        prefill = self.decided.prefill
        if prefill is None:
            return ()
        if prefill == self.layout:
            return tuple(each for each in programs if each.graph.phase == "prefill")
        report("making programs", 0, 1)
        own = replace(self, layout=prefill)
        return tuple(own._lower(graph, bucket) for graph, bucket in own._prompts())

    def _prompts(self) -> list[tuple[OpGraph, int]]:
        """The graph of a prompt, with each bucket."""
        graph = self._sharded("prefill", self.decided.knobs.depth)
        chunks = prefill_buckets(self.capacity, self.spec.workload.turn_tokens)
        return [(graph, bucket) for bucket in chunks]

    def _sharded(self, phase: Phase, depth: int) -> OpGraph:
        context = BuildContext(
            self.model.config,
            self.dtype,
            self.capacity,
            self.model.num_valid_tokens,
            self.model.fused_experts,
            self.spec.draft_vocab,
            self.model.encoding,
            self.spec.model.head == "fp8",
            self.kv_dtype,
            partial(scales_of, scales=self.model.key_scales),
            self.spec.grammar,
            self.spec.penalties,
            self.stored_state,
        )
        graph = check(build(context, phase, depth))
        return run(graph, PassContext(self.layout, self.hardware), until=Stage.SHARDED)

    def _lower(self, graph: OpGraph, bucket: int) -> LoweredProgram:
        num_seqs = min(bucket, self.capacity.max_seqs)
        num_tokens = bucket * graph.num_queries
        context = PassContext(
            self.layout,
            self.hardware,
            num_tokens,
            num_seqs,
            program_load(graph.phase, num_tokens, num_seqs, self.spec),
            round(self.spec.workload.mean_conversation_tokens) // 2,
            SUPPORTED.max_streams,
            self.options,
        )
        return LoweredProgram(bucket, num_seqs, run(graph, context))

    @property
    def kv_dtype(self) -> DType | None:
        """Of keys and values, where it is not that of the activations."""
        if self.decided.knobs.kv_dtype == "fp8":
            return "fp8"
        return None

    @property
    def stored_state(self) -> DType | None:
        """How recurrent state is stored; the golden tokens' plan keeps it whole."""
        if self.dtype == "fp64":
            return None
        return self.spec.stored_state


def program_load(phase: Phase, tokens: int, seqs: int, spec: Spec) -> Load:
    """What a program is priced for.

    Decode halfway through a mean conversation; prefill with one prompt, or where rows come from a
    file with as many as a step holds, each in its middle.
    """
    workload = spec.workload
    middle = round(workload.mean_conversation_tokens) // 2
    if phase == "decode":
        return Load(tokens, seqs, middle)
    if not workload.is_batch_of_rows:
        return Load(tokens, 1, min(middle, tokens))
    own = workload.own_prompt_tokens
    context = round(workload.shared_tokens + own / 2)
    return Load(tokens, min(max(round(tokens / own), 1), seqs), context)


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
        shards=dict(model.shards),
    )
