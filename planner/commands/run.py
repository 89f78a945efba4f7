"""`tokenspeed run`: replay a bundle on a prompt or a batch file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from pydantic import ValidationError

from tokenspeed_plan.planner.commands.engines import (
    EngineOptions,
    ReplayCommand,
    alike_on_all_ranks,
    engine_options,
    load_tokenizer,
    on_all_ranks,
    rank_timeout_option,
    ready_engine,
    work_of_rank_0,
)
from tokenspeed_plan.planner.commands.jobs import (
    JobOptions,
    job_options,
    only_local,
    path_or_url,
    ray_job,
    worker_options,
)
from tokenspeed_plan.planner.commands.note_run import noted
from tokenspeed_plan.planner.commands.option_types import Number
from tokenspeed_plan.planner.commands.pools import PoolOptions, other_pools
from tokenspeed_plan.planner.commands.ray_driver import RayJob, run_on_ray
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.canon import answer_digest
from tokenspeed_plan.plans.errors import RequestError, SpecError
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.request import Completion
    from tokenspeed_plan.runtime.serving.batch import BatchOptions, BatchPlan, Selection
    from tokenspeed_plan.runtime.serving.batch.summary import Load
    from tokenspeed_plan.runtime.serving.leases.lease_worker import WorkerOptions
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

Folder = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """A prompt and how to continue it; `max_tokens` None is the plan's default."""

    prompt: str
    max_tokens: int | None
    temperature: float
    seed: int
    quiet: bool


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of `tokenspeed run`: an engine, and a batch file, a share of one, or a prompt."""

    engine: EngineOptions
    work: BatchOptions | SharedBatch | PromptOptions


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """A batch that other workers answer, too.

    `lease` is where they agree on who does what. `others` are the bundles of workers on other kinds
    of machines. With `ray`, this process starts the workers.
    """

    lease: str
    worker: WorkerOptions
    others: tuple[Path, ...] = ()
    ray: RayJob | None = None


@click.command(cls=ReplayCommand)
@click.argument("bundle", type=Folder, required=False)
@click.option(
    "--input",
    "source",
    type=path_or_url,
    metavar="PATH",
    help="OpenAI batch file (.jsonl, .jsonl.gz), or - for stdin.",
)
@click.option(
    "--output",
    type=path_or_url,
    metavar="PATH",
    help="Where the answers go, or - for stdout. To resume takes its size again on the disk.",
)
@click.option("--prompt", help="Answer one prompt, without a batch file.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="With --prompt: tokens to generate.")
@click.option("--temperature", type=Number(0, 2), default=0.0, help="With --prompt.")
@click.option("--seed", type=int, default=0, help="With --prompt.")
@click.option("--errors", type=Folder, help="Where failed rows go (default: into the output).")
@click.option("--summary", type=Folder, help="Write the summary as JSON.")
@click.option(
    "--order",
    type=click.Choice(["input", "completion"]),
    default="input",
    help="Order of the output.",
)
@click.option(
    "--max-errors",
    type=click.IntRange(min=0),
    default=0,
    help="Bad lines with which the rest still runs.",
)
@click.option("--limit", type=click.IntRange(min=0), help="Only the first N rows.")
@click.option("--shard", help="Only every n-th row from the i-th: i/n.")
@job_options
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Rows in flight.")
@engine_options
@click.option("--no-cache", is_flag=True, help="Compute every prompt from its beginning.")
@click.option(
    "--check",
    is_flag=True,
    help="Compare the two backends step by step; name the first step that differs.",
)
@rank_timeout_option
@click.option("--quiet", is_flag=True, help="No progress, no summary text.")
def run(
    bundle: Path | None,
    source: Path | str | None,
    output: Path | str | None,
    prompt: str | None,
    max_tokens: int | None,
    temperature: float,
    seed: int,
    errors: Path | None,
    summary: Path | None,
    order: Literal["input", "completion"],
    max_errors: int,
    limit: int | None,
    shard: str | None,
    max_concurrency: int | None,
    no_cache: bool,
    check: bool,
    quiet: bool,
    job: JobOptions,
    engine: EngineOptions,
) -> None:
    """Replay BUNDLE: answer a batch file, or one --prompt."""
    own = _own_bundle(bundle, job)
    engine = replace(engine, cache=not no_cache)
    if check:
        if not (prompt is None and source is None and output is None):
            raise click.UsageError("--check takes no prompt and no batch")
        alike_on_all_ranks(own, engine, lambda: _run_check(own, engine))
        return
    work: BatchOptions | SharedBatch | PromptOptions
    if prompt is not None and source is None and output is None:
        work = PromptOptions(prompt, max_tokens, temperature, seed, quiet)
    elif prompt is None and source is not None and output is not None:
        rest = (summary, max_errors, max_concurrency, limit, quiet)
        work = _batch(job, source, output, errors, order, shard, *rest)
    else:
        raise click.UsageError("give either --input and --output, or --prompt, or --check alone")
    if isinstance(work, SharedBatch) and work.ray is not None:
        code: int | None = run_on_ray(own, engine, work.ray)
    else:
        options = RunOptions(engine, work)
        code = on_all_ranks(own, engine, lambda: _run(own, options))
    raise click.exceptions.Exit(code or 0)


def _own_bundle(bundle: Path | None, job: JobOptions) -> Path:
    """The plan of this process; with Ray, any of several."""
    if job.ray is not None and job.plans:
        if bundle is not None:
            raise click.UsageError("with --ray, give BUNDLE or a --plan for each kind of node")
        return job.plans[0][1]
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    return bundle


def _batch(
    job: JobOptions,
    source: Path | str,
    output: Path | str,
    errors: Path | None,
    order: Literal["input", "completion"],
    shard: str | None,
    summary: Path | None,
    max_errors: int,
    max_concurrency: int | None,
    limit: int | None,
    quiet: bool,
) -> BatchOptions | SharedBatch:
    """A batch, or this worker's share of one."""
    from tokenspeed_plan.runtime.serving.batch import BatchOptions

    if job.lease is None:
        rows, answers = only_local(source, output)
        selection = _selection(limit, shard)
        return BatchOptions(
            rows, answers, errors, summary, order, max_errors, max_concurrency, selection, quiet
        )
    if errors is not None or shard is not None or order != "input":
        raise click.UsageError("--lease goes with neither --errors, --shard nor --order completion")
    worker = worker_options(job, source, output, limit, max_errors, max_concurrency, summary, quiet)
    others = tuple(folder for _, folder in job.plans)
    if job.ray is None:
        return SharedBatch(job.lease, worker, others)
    return SharedBatch(job.lease, worker, others, ray_job(job, worker, job.ray, job.lease))


def _run(bundle: Path, options: RunOptions) -> int:
    """Returns the exit code."""
    if isinstance(options.work, PromptOptions):
        _run_prompt(bundle, options.engine, options.work)
        return 0
    if isinstance(options.work, SharedBatch):
        return _run_shared(bundle, options.engine, options.work)
    return _run_batch(bundle, options.engine, options.work)


def _run_check(bundle: Path, options: EngineOptions) -> None:
    from tokenspeed_plan.runtime.compare import check_steps
    from tokenspeed_plan.runtime.engine import Engine

    with work_of_rank_0() as report:
        engine = Engine.load(
            bundle,
            options.weights,
            backend="compare",
            depth=options.depth,
            signers=options.signers,
            report=report,
        )
        tally = check_steps(engine, report=report)
    skipped = ""
    if tally.skipped:
        skipped = f", {tally.skipped} have no kernel"
    click.echo(
        f"{tally.steps} steps: kernels and references agree{skipped}; "
        f"the largest difference is {tally.worst:.1e} ({tally.worst_kernel})"
    )


def _run_prompt(bundle: Path, engine_options: EngineOptions, options: PromptOptions) -> None:
    with other_pools(bundle, engine_options, PoolOptions()) as attach:
        engine = ready_engine(bundle, engine_options)
        attach(engine)
        with noted("run", bundle, engine):
            _answer(engine, options)


def _answer(engine: Engine, options: PromptOptions) -> None:
    from tokenspeed_plan.runtime.request import SamplingParams

    if engine.tokenizer is None:
        raise RequestError("the model has no tokenizer", "give token ids in a batch file")
    ids = engine.tokenizer.encode(options.prompt)
    room = max(engine.max_seq_len - len(ids), 1)
    max_tokens = options.max_tokens or min(engine.default_max_tokens, room)
    params = SamplingParams(max_tokens, options.temperature, seed=options.seed)
    (completion,) = engine.generate([ids], params)
    completion.check()
    click.echo(completion.text)
    if not options.quiet:
        click.echo(_figures(completion), err=True)


def _figures(completion: Completion) -> str:
    num_tokens = len(completion.token_ids)
    rate = 0.0
    if completion.decode_s:
        rate = (num_tokens - 1) / completion.decode_s
    return (
        f"{num_tokens} tokens ({completion.finish_reason}), "
        f"first after {completion.ttft_s * 1e3:.1f} ms, then {rate:.0f} tokens/s"
    )


def _run_batch(bundle: Path, engine_options: EngineOptions, options: BatchOptions) -> int:
    from tokenspeed_plan.runtime.serving.batch import run_batch
    from tokenspeed_plan.runtime.serving.batch.other_plan import refuse_other_plan

    facts, tokenizer = _facts(bundle, engine_options)
    refuse_other_plan(options.input, options.output, facts.digest)
    with other_pools(bundle, engine_options, PoolOptions()) as attach, ExitStack() as noting:

        def make_engine() -> Engine:
            engine = ready_engine(bundle, engine_options, tokenizer.without_chat())
            attach(engine)
            noting.enter_context(noted("run", bundle, engine))
            return engine

        return run_batch(options, facts, tokenizer, make_engine)


def _run_shared(bundle: Path, engine_options: EngineOptions, batch: SharedBatch) -> int:
    from tokenspeed_plan.runtime.serving.leases.job_store import open_store
    from tokenspeed_plan.runtime.serving.leases.lease_worker import Worker

    store = open_store(batch.lease)
    facts, tokenizer = _facts(bundle, engine_options)
    worker = batch.worker
    if batch.others:
        own = load_plan(bundle, engine_options.signers)
        worker = replace(worker, plans=_plans_of_job(own, batch.others, engine_options))
    with ExitStack() as noting:

        def load() -> Engine:
            engine = ready_engine(bundle, engine_options, tokenizer.without_chat())
            noting.enter_context(noted("run", bundle, engine))
            return engine

        return Worker(store, worker, facts, tokenizer, load).run()


def _plans_of_job(own: Plan, others: Sequence[Path], options: EngineOptions) -> tuple[str, ...]:
    """The digests of all plans with which a job may be answered.

    Raises:
        RequestError: what one of them takes, another one refuses.
    """
    plans = [own, *(load_plan(folder, options.signers) for folder in others)]
    for frozen in plans:
        if _what_it_takes(frozen) != _what_it_takes(own):
            raise RequestError(
                f"the plans for {own.target.gpu} and {frozen.target.gpu} take other rows: "
                f"{_what_it_takes(own)}, {_what_it_takes(frozen)}",
                "plan both for the same model, with the same lengths and features",
            )
    return tuple(sorted({answer_digest(frozen) for frozen in plans}))


def _what_it_takes(frozen: Plan) -> dict[str, object]:
    """What decides whether a row is refused."""
    limits, model = frozen.pool.limits, frozen.model
    return {
        "model": model.name,
        "vocab_size": model.vocab_size,
        "max_seq_len": limits.max_seq_len,
        "default_max_tokens": limits.default_max_tokens,
        "grammar": frozen.takes_grammars,
        "penalties": frozen.takes_penalties,
    }


def _facts(bundle: Path, options: EngineOptions) -> tuple[BatchPlan, Tokenizer]:
    """What a batch needs of a plan and its model, once both are checked."""
    from tokenspeed_plan.runtime.loading.preflight import check_target

    frozen = load_plan(bundle, options.signers)
    check_target(frozen)
    tokenizer = load_tokenizer(bundle, options)
    return _batch_plan(frozen, tokenizer), tokenizer


def _batch_plan(frozen: Plan, tokenizer: Tokenizer) -> BatchPlan:
    """Facts of a plan for a batch run; predictions are of the plan's own workload."""
    from tokenspeed_plan.runtime.grammars.grammar_compiler import grammar_compiler
    from tokenspeed_plan.runtime.serving.batch import BatchPlan, RequestLimits

    limits = frozen.pool.limits
    request_limits = RequestLimits(
        limits.max_seq_len,
        limits.default_max_tokens,
        frozen.model.vocab_size,
        frozen.model.name,
        grammars=grammar_compiler(frozen, tokenizer),
        takes_penalties=frozen.takes_penalties,
    )
    predicted: dict[str, float] = {}
    load = _predicted_load(frozen)
    if load is not None:
        predicted = {name: frozen.predicted.values[name] for name in ("tpot_ms", "ttft_ms")}
    name = frozen.model.name
    return BatchPlan(answer_digest(frozen), name, limits.max_seqs, request_limits, predicted, load)


def _predicted_load(frozen: Plan) -> Load | None:
    """The load that a plan predicts, where it is one of single turns as a batch has them."""
    from tokenspeed_plan.planner.spec import WorkloadSpec
    from tokenspeed_plan.runtime.serving.batch.summary import Load

    with suppress(ValidationError, SpecError):
        workload = WorkloadSpec.model_validate(frozen.spec.get("workload", {}))
        if workload.turns == 1:
            prompts, outputs = workload.prompts, workload.outputs
            num_seqs = frozen.pool.limits.max_seqs
            return Load(round(prompts.mean), round(outputs.mean), num_seqs)
    return None


def _selection(limit: int | None, shard: str | None) -> Selection:
    """The rows of `--limit` and `--shard`.

    Raises:
        RequestError: the shard is not `i/n`.
    """
    from tokenspeed_plan.runtime.serving.batch import Selection

    if shard is None:
        return Selection(limit)
    index, _, count = shard.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return Selection(limit, int(index), int(count))
    raise RequestError(
        f"`--shard {shard}` is not i/n with i from 1 to n", "the second of four: `--shard 2/4`"
    )
