"""`tokenspeed run`: replay a bundle on a prompt or a batch file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from pydantic import ValidationError

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.planner.commands.engines import (
    VERIFY_HELP,
    Backend,
    EngineOptions,
    ReplayCommand,
    alike_on_all_ranks,
    on_all_ranks,
    rank_timeout_option,
    ready_engine,
)
from tokenspeed_plan.planner.commands.pools import PoolOptions, other_pools
from tokenspeed_plan.planner.commands.sign import signature_options, wanted_signers
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.canon import answer_digest
from tokenspeed_plan.plans.errors import RequestError, SpecError
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.request import Completion
    from tokenspeed_plan.runtime.serving.batch import BatchOptions, BatchPlan, Selection
    from tokenspeed_plan.runtime.serving.batch.summary import Load

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
    """Options of `tokenspeed run`: an engine, and either a batch file or a prompt."""

    engine: EngineOptions
    work: BatchOptions | PromptOptions


@click.command(cls=ReplayCommand)
@click.argument("bundle", type=Folder)
@click.option(
    "--input", "source", type=Folder, help="OpenAI batch file (.jsonl, .jsonl.gz), or - for stdin."
)
@click.option(
    "--output",
    type=Folder,
    help="Where the answers go, or - for stdout. To resume takes its size again on the disk.",
)
@click.option("--prompt", help="Answer one prompt, without a batch file.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="With --prompt: tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="With --prompt.")
@click.option("--seed", type=int, default=0, help="With --prompt.")
@click.option("--weights", type=Folder, help="Checkpoint folder, where it is not the spec's.")
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
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Rows in flight.")
@click.option("--no-canary", is_flag=True, help="Do not replay the golden prompts first.")
@click.option("--verify-weights", is_flag=True, help=VERIFY_HELP)
@signature_options
@click.option("--no-cache", is_flag=True, help="Compute every prompt from its beginning.")
@click.option(
    "--backend",
    type=click.Choice(["reference", "kernels"]),
    help="PyTorch references (a CPU's default), or the bundle's kernels (interpreted on a CPU).",
)
@click.option(
    "--check",
    is_flag=True,
    help="Compare the two backends step by step; name the first step that differs.",
)
@rank_timeout_option
@click.option("--quiet", is_flag=True, help="No progress, no summary text.")
def run(
    bundle: Path,
    source: Path | None,
    output: Path | None,
    prompt: str | None,
    max_tokens: int | None,
    temperature: float,
    seed: int,
    weights: Path | None,
    errors: Path | None,
    summary: Path | None,
    order: Literal["input", "completion"],
    max_errors: int,
    limit: int | None,
    shard: str | None,
    max_concurrency: int | None,
    no_canary: bool,
    verify_weights: bool,
    allowed_signers: Path | None,
    signer: str | None,
    no_cache: bool,
    backend: Backend | None,
    check: bool,
    rank_timeout_s: float,
    quiet: bool,
) -> None:
    """Replay BUNDLE: answer a batch file, or one --prompt."""
    from tokenspeed_plan.runtime.serving.batch import BatchOptions

    signers = wanted_signers(allowed_signers, signer)
    engine = EngineOptions(
        weights,
        backend,
        cache=not no_cache,
        canary=not no_canary,
        verify_weights=verify_weights,
        signers=signers,
        rank_timeout_s=rank_timeout_s,
    )
    if check:
        if not (prompt is None and source is None and output is None):
            raise click.UsageError("--check takes no prompt and no batch")
        alike_on_all_ranks(bundle, engine, lambda: _run_check(bundle, engine))
        return
    work: BatchOptions | PromptOptions
    if prompt is not None and source is None and output is None:
        work = PromptOptions(prompt, max_tokens, temperature, seed, quiet)
    elif prompt is None and source is not None and output is not None:
        selection = _selection(limit, shard)
        work = BatchOptions(
            source, output, errors, summary, order, max_errors, max_concurrency, selection, quiet
        )
    else:
        raise click.UsageError("give either --input and --output, or --prompt, or --check alone")
    options = RunOptions(engine, work)
    code = on_all_ranks(bundle, engine, lambda: _run(bundle, options))
    raise click.exceptions.Exit(code or 0)


def _run(bundle: Path, options: RunOptions) -> int:
    """Returns the exit code."""
    if isinstance(options.work, PromptOptions):
        _run_prompt(bundle, options.engine, options.work)
        return 0
    return _run_batch(bundle, options.engine, options.work)


def _run_check(bundle: Path, options: EngineOptions) -> None:
    from tokenspeed_plan.runtime.compare import check_steps
    from tokenspeed_plan.runtime.engine import Engine

    engine = Engine.load(
        bundle, options.weights, backend="compare", depth=options.depth, signers=options.signers
    )
    tally = check_steps(engine)
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
    from tokenspeed_plan.runtime.loading.preflight import check_files, check_target, find_weights
    from tokenspeed_plan.runtime.serving.batch import run_batch
    from tokenspeed_plan.runtime.serving.batch.other_plan import refuse_other_plan
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    frozen = load_plan(bundle, engine_options.signers)
    check_target(frozen)
    folder = find_weights(frozen, bundle, engine_options.weights)
    check_files(frozen, folder)
    tokenizer = Tokenizer.load(folder, ChatTemplate.load(folder))
    facts = _batch_plan(frozen)
    refuse_other_plan(options.input, options.output, facts.digest)
    with other_pools(bundle, engine_options, PoolOptions()) as attach:

        def make_engine() -> Engine:
            engine = ready_engine(bundle, engine_options)
            attach(engine)
            return engine

        return run_batch(options, facts, tokenizer, make_engine)


def _batch_plan(frozen: Plan) -> BatchPlan:
    """Facts of a plan for a batch run; predictions are of the plan's own workload."""
    from tokenspeed_plan.runtime.serving.batch import BatchPlan, RequestLimits

    limits = frozen.pool.limits
    request_limits = RequestLimits(
        limits.max_seq_len,
        limits.default_max_tokens,
        frozen.model.vocab_size,
        frozen.model.name,
    )
    predicted: dict[str, float] = {}
    load = _predicted_load(frozen)
    if load is not None:
        predicted = {name: frozen.predicted.values[name] for name in ("tpot_ms", "ttft_ms")}
    name = frozen.model.name
    return BatchPlan(answer_digest(frozen), name, limits.max_seqs, request_limits, predicted, load)


def _predicted_load(frozen: Plan) -> Load | None:
    """The load that a plan predicts, where it is one of single turns as a batch has them."""
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
