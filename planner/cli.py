"""The command line: the composition root, the only place where planner, codegen and runtime meet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.codegen.chat import ChatTemplate
from tokenspeed_plan.planner.canary import with_canary
from tokenspeed_plan.planner.compile import Compiled, build_bundle, compile_bundle, find_model
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.bundle import PLAN_FILE, check_sources, dump_plan, load_plan, read_plan, save_plan, seal
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.errors import PlanError, RequestError, StalePlanError, TokenspeedError
from tokenspeed_plan.plans.report import as_dict, as_text
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.batch import BatchOptions, Selection
    from tokenspeed_plan.runtime.engine import Engine

Folder = click.Path(path_type=Path)
SHOWN_CHANGES = 20


class _Group(click.Group):
    """Errors of ours become `error:` and `hint:` on stderr, with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TokenspeedError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(1)
        except OSError as error:
            name = f"`{error.filename}`: " if error.filename else ""
            click.echo(
                f"error: {name}{error.strerror or error}\n\nhint: check the path, its permissions and the space left",
                err=True,
            )
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tokenspeed-plan")
def main() -> None:
    """Compile a language model's deployment into a frozen plan, and replay it."""


@main.command()
@click.argument("spec", type=Folder)
@click.option("-o", "--out", type=Folder, required=True, help="Folder of the plan bundle.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if the bundle is not what SPEC compiles to.")
@click.option("--no-compile", is_flag=True, help="Skip compiling the kernels for the target's GPU.")
def plan(spec: Path, out: Path, check: bool, no_compile: bool) -> None:
    """Compile SPEC into a plan."""
    made = _compile(spec, no_compile)
    if check:
        _refuse_stale(made, out, spec, no_compile)
        click.echo(f"{out} is up to date", err=True)
        return
    old = _old_plan(out)
    save_plan(made.plan, out, made.sources, made.cubins)
    _echo_changes(old, made.plan)
    _echo_written(made, out)


def _compile(spec_path: Path, no_compile: bool) -> Compiled:
    spec = load_spec(spec_path)
    model = find_model(spec, spec_path)
    made = compile_bundle(spec, model) if no_compile else build_bundle(spec, model, default_cache())
    return replace(made, plan=with_canary(made.plan, spec, model))


def _echo_written(made: Compiled, out: Path) -> None:
    plan, binaries = made.plan, made.plan.binaries
    click.echo(
        f"wrote {out / PLAN_FILE} ({plan.digest[:16]}): {plan.model.name} on {plan.target.count} x {plan.target.gpu}",
        err=True,
    )
    compiled = f"compiled for sm_{plan.target.sm} by {plan.kernel_compiler}" if binaries else "not compiled"
    click.echo(f"{len(made.sources)} kernels, {compiled}", err=True)


def _refuse_stale(made: Compiled, out: Path, spec: Path, no_compile: bool) -> None:
    """The frozen bundle must be what was just made; without compiling, what the compiler said of it is not compared."""
    fresh, frozen = dump_plan(made.plan), read_plan(out)
    if no_compile and frozen != fresh:
        kept = load_plan(out)
        frozen = dump_plan(seal(kept.model_copy(update={"binaries": (), "kernel_compiler": ""})))
    if frozen != fresh:
        raise StalePlanError(
            f"`{out}` is not what `{spec}` compiles to", f"run `tokenspeed plan {spec} -o {out}` and look at the diff"
        )
    check_sources(made.plan, out)


def _old_plan(out: Path) -> Plan | None:
    try:
        return load_plan(out) if (out / PLAN_FILE).is_file() else None
    except PlanError:
        return None  # a damaged or older plan is simply replaced


def _echo_changes(old: Plan | None, new: Plan) -> None:
    changes = diff(old, new) if old else ()
    for change in changes[:SHOWN_CHANGES]:
        click.echo(str(change), err=True)
    if len(changes) > SHOWN_CHANGES:
        click.echo(f"  and {len(changes) - SHOWN_CHANGES} more changes", err=True)


@main.command()
@click.argument("bundle", type=Folder)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--kernels", is_flag=True, help="List the kernels too.")
def show(bundle: Path, as_json: bool, kernels: bool) -> None:
    """Show what a plan decided: layout, memory, programs, launches, predicted times."""
    frozen = load_plan(bundle)
    click.echo(json.dumps(as_dict(frozen), indent=1) if as_json else as_text(frozen, kernels))


@main.command("diff")
@click.argument("old", type=Folder)
@click.argument("new", type=Folder)
def diff_command(old: Path, new: Path) -> None:
    """Show what changed between two plans; exit 1 if anything did."""
    changes = diff(load_plan(old), load_plan(new))
    for change in changes:
        click.echo(str(change))
    if changes:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("bundle", type=Folder)
@click.option("--weights", type=Folder, help="Check that this checkpoint is the plan's.")
@click.option("--canary", is_flag=True, help="Replay the golden prompts.")
def check(bundle: Path, weights: Path | None, canary: bool) -> None:
    """Check a plan's schema, rules and digests, and on request its weights and golden tokens."""
    frozen = load_plan(bundle)
    click.echo(f"{bundle}: schema {frozen.schema_version}, {len(frozen.programs)} programs, rules and digest hold")
    click.echo(f"kernels: {check_sources(frozen, bundle)} texts have their digests")
    if weights is None and not canary:
        return
    options = {"weights": weights, "bodies": "reference"}
    _on_all_ranks(bundle, options, lambda: _check_weights(bundle, options, canary))


def _check_weights(bundle: Path, options: dict[str, Any], canary: bool) -> None:
    engine = _load_engine(bundle, options)
    click.echo("weights: names, shapes and dtypes fit")
    if canary:
        click.echo(f"canary: {_check_canary(engine.plan, engine)} tokens agree")


def _check_canary(frozen: Plan, engine: Engine) -> int:
    from tokenspeed_plan.runtime.canary import check_canary

    return check_canary(frozen, engine)


@main.command()
@click.argument("bundle", type=Folder)
@click.option("--input", "source", type=Folder, help="OpenAI batch file (.jsonl, .jsonl.gz), or - for stdin.")
@click.option("--output", type=Folder, help="Where the answers go, or - for stdout.")
@click.option("--prompt", help="Answer one prompt, without a batch file.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="With --prompt: tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="With --prompt.")
@click.option("--seed", type=int, default=0, help="With --prompt.")
@click.option("--weights", type=Folder, help="Checkpoint folder, where it is not the spec's.")
@click.option("--errors", type=Folder, help="Where failed rows go (default: into the output).")
@click.option("--summary", type=Folder, help="Write the summary as JSON.")
@click.option("--order", type=click.Choice(["input", "completion"]), default="input", help="Order of the output.")
@click.option("--max-errors", type=click.IntRange(min=0), default=0, help="Bad lines with which the rest still runs.")
@click.option("--limit", type=click.IntRange(min=0), help="Only the first N rows.")
@click.option("--shard", help="Only every n-th row from the i-th: i/n.")
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Rows in flight.")
@click.option("--no-canary", is_flag=True, help="Do not replay the golden prompts first.")
@click.option("--bodies", type=click.Choice(["reference", "kernels"]),
              help="PyTorch references (a CPU's default), or the bundle's kernels (interpreted on a CPU).")  # fmt: skip
@click.option("--check", is_flag=True, help="Compare the two bodies step by step; name the first step that differs.")
@click.option("--quiet", is_flag=True, help="No progress, no summary text.")
def run(bundle: Path, source: Path | None, output: Path | None, prompt: str | None, **options: Any) -> None:
    """Replay BUNDLE: answer a batch file, or one --prompt."""
    given = (prompt is not None, source is not None, output is not None)
    if options["check"] and not any(given):
        _run_check(bundle, options)
    elif given == (True, False, False):
        _on_all_ranks(bundle, options, lambda: _run_prompt(bundle, str(prompt), options))
    elif source is not None and output is not None and prompt is None:
        code = _on_all_ranks(bundle, options, lambda: _run_batch(bundle, source, output, options))
        raise click.exceptions.Exit(code or 0)
    else:
        raise click.UsageError("give either --input and --output, or --prompt, or --check alone")


def _on_all_ranks(bundle: Path, options: dict[str, Any], work: Callable[[], int | None]) -> int | None:
    """Do the work on rank 0; other processes of a sharded plan repeat its replays."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return work()
    from tokenspeed_plan.runtime.collectives import join, own_rank, world_size
    from tokenspeed_plan.runtime.ranks import follow, leading

    frozen = load_plan(bundle)
    if own_rank() and frozen.target.count != world_size():
        return 0  # rank 0 says so
    join(frozen)
    if own_rank():
        follow(_load_engine(bundle, options).executor)
        return 0
    with leading():
        return work()


def _run_check(bundle: Path, options: dict[str, Any]) -> None:
    from tokenspeed_plan.runtime.compare import ComparingExecutor, check_steps
    from tokenspeed_plan.runtime.engine import Engine

    engine = Engine.load(bundle, options["weights"], bodies="kernels", executor=ComparingExecutor)
    tally = check_steps(engine)
    skipped = f", {tally.skipped} have no kernel" if tally.skipped else ""
    click.echo(
        f"{tally.steps} steps: kernels and references agree{skipped}; "
        f"the largest difference is {tally.worst:.1e} ({tally.worst_kernel})"
    )


def _load_engine(bundle: Path, options: dict[str, Any]) -> Engine:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.executor import Executor

    executor: type[Executor] | None = None
    if os.environ.get("RANK", "0") == "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        from tokenspeed_plan.runtime.ranks import LeadingExecutor

        executor = LeadingExecutor
    return Engine.load(bundle, options["weights"], bodies=options["bodies"], executor=executor)


def _ready_engine(bundle: Path, options: dict[str, Any]) -> Engine:
    """An engine that has proved itself."""
    engine = _load_engine(bundle, options)
    if not options["no_canary"]:
        engine.time_startup("canary_s", lambda: _check_canary(engine.plan, engine))
    return engine


def _run_prompt(bundle: Path, prompt: str, options: dict[str, Any]) -> None:
    from tokenspeed_plan.runtime.request import SamplingParams

    engine = _ready_engine(bundle, options)
    if engine.codec is None:
        raise RequestError("the model has no tokenizer", "give token ids in a batch file")
    ids = engine.codec.encode(prompt)
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
    from tokenspeed_plan.runtime.batch import BatchPlan, RowLimits, run_batch
    from tokenspeed_plan.runtime.checks import check_files, check_target, find_weights
    from tokenspeed_plan.runtime.tokenizer import Codec

    frozen = load_plan(bundle)
    check_target(frozen)
    folder = find_weights(frozen, bundle, options["weights"])
    check_files(frozen, folder)
    codec = Codec.load(folder, ChatTemplate.load(folder))
    limits = RowLimits(frozen.limits.max_seq_len, frozen.limits.default_max_tokens, frozen.model.vocab_size)
    plan_facts = BatchPlan(frozen.digest, frozen.model.name, frozen.limits.max_seqs, limits, _predicted(frozen))
    return run_batch(_batch_options(source, output, options), plan_facts, codec, lambda: _ready_engine(bundle, options))


def _batch_options(source: Path, output: Path, options: dict[str, Any]) -> BatchOptions:
    from tokenspeed_plan.runtime.batch import BatchOptions

    names = ("errors", "summary", "order", "max_errors", "max_concurrency", "quiet")
    return BatchOptions(source, output, selection=_selection(options), **{name: options[name] for name in names})


def _selection(options: dict[str, Any]) -> Selection:
    from tokenspeed_plan.runtime.batch import Selection

    index, _, count = (options["shard"] or "1/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise RequestError(
            f"`--shard {options['shard']}` is not i/n with i from 1 to n", "the second of four: `--shard 2/4`"
        )
    return Selection(options["limit"], int(index), int(count))


def _predicted(frozen: Plan) -> dict[str, float]:
    """What the plan promises at full concurrency: one decode step, and one prefill chunk."""
    decode = max((p for p in frozen.programs if p.phase == "decode"), key=lambda p: p.bucket)
    prefill = max((p for p in frozen.programs if p.phase == "prefill"), key=lambda p: p.bucket)
    return {"tpot_ms": round(decode.predicted_us / 1e3, 3), "ttft_ms": round(prefill.predicted_us / 1e3, 3)}


@main.command(name="bench")
@click.argument("bundle", type=Folder)
@click.option("--weights", default="random", help="A checkpoint folder, or `random` (the default).")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences that decode.")
@click.option("--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens that each has.")
@click.option("--prefill", type=click.IntRange(min=0), default=0, help="Also prefill so many tokens of one prompt.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def bench_command(bundle: Path, weights: str, as_json: bool, **options: int) -> None:
    """Measure BUNDLE on this machine: each program and kernel beside the floor and beside the prediction."""
    from tokenspeed_plan.runtime import bench

    frozen = load_plan(bundle)
    executor = bench.prepare(frozen, bundle, None if weights == "random" else Path(weights))
    chosen = bench.Options(options["batch"], options["context"], options["prefill"])
    found = bench.bench(frozen, executor, chosen)
    click.echo(json.dumps(found, indent=2) if as_json else bench.as_text(found))
