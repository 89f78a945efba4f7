"""`tokenspeed run`: replay a bundle on a prompt or a batch file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.planner.commands.engines import on_all_ranks, ready_engine
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.serving.batch import BatchOptions, Selection

Folder = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=Folder)
@click.option(
    "--input", "source", type=Folder, help="OpenAI batch file (.jsonl, .jsonl.gz), or - for stdin."
)
@click.option("--output", type=Folder, help="Where the answers go, or - for stdout.")
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
@click.option("--no-cache", is_flag=True, help="Compute every prompt from its beginning.")
@click.option(
    "--backend",
    type=click.Choice(["reference", "kernels"]),
    help="PyTorch references (a CPU's default), or the bundle's kernels (interpreted on a CPU).",
)
@click.option(
    "--check",
    is_flag=True,
    help="Compare the two bodies step by step; name the first step that differs.",
)
@click.option("--quiet", is_flag=True, help="No progress, no summary text.")
def run(
    bundle: Path, source: Path | None, output: Path | None, prompt: str | None, **options: Any
) -> None:
    """Replay BUNDLE: answer a batch file, or one --prompt."""
    given = (prompt is not None, source is not None, output is not None)
    if options["check"] and any(given):
        raise click.UsageError("--check takes no prompt and no batch")
    if options["check"]:
        _run_check(bundle, options)
    elif given == (True, False, False):
        on_all_ranks(bundle, options, lambda: _run_prompt(bundle, str(prompt), options))
    elif source is not None and output is not None and prompt is None:
        code = on_all_ranks(bundle, options, lambda: _run_batch(bundle, source, output, options))
        raise click.exceptions.Exit(code or 0)
    else:
        raise click.UsageError("give either --input and --output, or --prompt, or --check alone")


def _run_check(bundle: Path, options: dict[str, Any]) -> None:
    from tokenspeed_plan.runtime.compare import check_steps
    from tokenspeed_plan.runtime.engine import Engine

    engine = Engine.load(bundle, options["weights"], backend="compare")
    tally = check_steps(engine)
    skipped = f", {tally.skipped} have no kernel" if tally.skipped else ""
    click.echo(
        f"{tally.steps} steps: kernels and references agree{skipped}; "
        f"the largest difference is {tally.worst:.1e} ({tally.worst_kernel})"
    )


def _run_prompt(bundle: Path, prompt: str, options: dict[str, Any]) -> None:
    from tokenspeed_plan.runtime.request import SamplingParams

    engine = ready_engine(bundle, options)
    if engine.tokenizer is None:
        raise RequestError("the model has no tokenizer", "give token ids in a batch file")
    ids = engine.tokenizer.encode(prompt)
    room = max(engine.max_seq_len - len(ids), 1)
    params = SamplingParams(
        max_tokens=options["max_tokens"] or min(engine.default_max_tokens, room),
        temperature=options["temperature"],
        seed=options["seed"],
    )
    (done,) = engine.generate([ids], params)
    click.echo(done.text)
    if not options["quiet"]:
        rate = (len(done.token_ids) - 1) / done.decode_s if done.decode_s else 0.0
        click.echo(
            f"{len(done.token_ids)} tokens ({done.finish_reason}), first after {done.ttft_s * 1e3:.1f} ms, "
            f"then {rate:.0f} tokens/s",
            err=True,
        )


def _run_batch(bundle: Path, source: Path, output: Path, options: dict[str, Any]) -> int:
    from tokenspeed_plan.runtime.preflight import check_files, check_target, find_weights
    from tokenspeed_plan.runtime.serving.batch import BatchPlan, RowLimits, run_batch
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    frozen = load_plan(bundle)
    check_target(frozen)
    folder = find_weights(frozen, bundle, options["weights"])
    check_files(frozen, folder)
    tokenizer = Tokenizer.load(folder, ChatTemplate.load(folder))
    limits = RowLimits(
        frozen.pool.limits.max_seq_len,
        frozen.pool.limits.default_max_tokens,
        frozen.model.vocab_size,
    )
    plan_facts = BatchPlan(
        frozen.digest, frozen.model.name, frozen.pool.limits.max_seqs, limits, _predicted(frozen)
    )
    return run_batch(
        _batch_options(source, output, options),
        plan_facts,
        tokenizer,
        lambda: ready_engine(bundle, options),
    )


def _batch_options(source: Path, output: Path, options: dict[str, Any]) -> BatchOptions:
    from tokenspeed_plan.runtime.serving.batch import BatchOptions

    names = ("errors", "summary", "order", "max_errors", "max_concurrency", "quiet")
    return BatchOptions(
        source, output, selection=_selection(options), **{name: options[name] for name in names}
    )


def _selection(options: dict[str, Any]) -> Selection:
    from tokenspeed_plan.runtime.serving.batch import Selection

    index, _, count = (options["shard"] or "1/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise RequestError(
            f"`--shard {options['shard']}` is not i/n with i from 1 to n",
            "the second of four: `--shard 2/4`",
        )
    return Selection(options["limit"], int(index), int(count))


def _predicted(frozen: Plan) -> dict[str, float]:
    """What the plan promises for its workload: a token after the first (no TTFT in it), and the first."""
    values = frozen.predicted.values
    return {"tpot_ms": values["tpot_ms"], "ttft_ms": values["ttft_ms"]}
