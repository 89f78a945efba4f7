"""Shared by the commands that replay a plan: engine options, engines, ranks."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.planner.commands.long_work import LongWork
from tokenspeed_plan.planner.commands.option_types import seconds_option
from tokenspeed_plan.planner.commands.sign import signature_options, wanted_signers
from tokenspeed_plan.plans.bundle import PLAN_FILE, load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan, PoolRole
from tokenspeed_plan.plans.signature import Signers
from tokenspeed_plan.plans.weight_digests import Depth

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.execution.executor import Executor
    from tokenspeed_plan.runtime.execution.rank_links import Links
    from tokenspeed_plan.runtime.execution.ranks import Beside
    from tokenspeed_plan.runtime.loading.loading_report import Report
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

Backend = Literal["reference", "kernels"]
ARGS = "tokenspeed_plan.args"  # in a context's `meta`: the words of the command
MOST_UNCHECKED = 16  # ranks that are started before their plan is checked
_RENAMED_OPTIONS = {"--bodies": "--backend"}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine.

    Attributes:
        weights: checkpoint folder; the one that the plan names by default.
        backend: what runs the kernels; the references on a CPU and the kernels on a GPU by default.
        cache: whether prompts are looked up in the prefix cache.
        canary: whether the golden prompts are replayed before the engine is used.
        verify_weights: whether all bytes of the weights are compared with those that were planned.
            Those of small models are, where there is a canary.
        signers: one of them must have signed the plan; None takes any plan.
        rank_timeout_s: seconds that a rank of several waits for another one in a replay.
        role: of the pool; by default the one that answers.
    """

    weights: Path | None = None
    backend: Backend | None = None
    cache: bool = True
    canary: bool = True
    verify_weights: bool = False
    signers: Signers | None = None
    rank_timeout_s: float = 30.0
    role: PoolRole | None = None

    @property
    def depth(self) -> Depth:
        """How far the weights are compared with those that were planned."""
        if self.verify_weights:
            return "all"
        if self.canary:
            return "small"
        return "headers"


rank_timeout_option = seconds_option(
    "--rank-timeout",
    "rank_timeout_s",
    30.0,
    "Of several ranks: seconds that one waits for another in a replay.",
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an engine that all commands have; the command gets all of them as one.

    It gets them as `engine`, those of `EngineOptions` among its other options included.
    """

    @functools.wraps(command)
    def with_engine(
        *args: Any,
        no_canary: bool,
        allowed_signers: Path | None,
        signer: str | None,
        **others: Any,
    ) -> None:
        signers = wanted_signers(allowed_signers, signer)
        own = taken_from(others, EngineOptions)
        command(*args, engine=EngineOptions(canary=not no_canary, signers=signers, **own), **others)

    options = (
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            help="Checkpoint folder, where it is not the spec's.",
        ),
        click.option(
            "--backend",
            type=click.Choice(["reference", "kernels"]),
            help="PyTorch references (a CPU's default), or the bundle's kernels (interpreted on a"
            " CPU).",
        ),
        click.option("--no-canary", is_flag=True, help="Do not replay the golden prompts first."),
        click.option(
            "--verify-weights",
            is_flag=True,
            help="Compare all bytes of the weights with the plan's digests (small ones always"
            " are).",
        ),
        signature_options,
    )
    for option in reversed(options):
        with_engine = option(with_engine)
    return with_engine


def taken_from(options: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Take those of the options of a command that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: options.pop(name) for name in names & options.keys()}


class ReplayCommand(click.Command):
    """A command that names the new option where an old one is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            RequestError: an option was renamed.
        """
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            new_name = _RENAMED_OPTIONS.get(error.option_name)
            if new_name is None:
                raise
            raise RequestError(
                f"the option `{error.option_name}` was renamed", f"use `{new_name}`"
            ) from error


def on_all_ranks(
    bundle: Path,
    options: EngineOptions,
    work: Callable[[], int | None],
    ignored: tuple[signal.Signals, ...] = (),
    follower: Callable[[], Executor] | None = None,
) -> int | None:
    """Do the work on rank 0, while the other ranks of a sharded plan repeat its replays.

    Args:
        bundle: its plan says how many ranks there are.
        options: of the engines.
        work: of rank 0.
        ignored: signals that the other ranks ignore: rank 0 handles them and tells them to stop.
        follower: what loads the executor of another rank; an engine's by default.

    Returns:
        What the work returns on rank 0, else 0.
    """

    def obey(links: Links) -> None:
        from tokenspeed_plan.runtime.execution.ranks import follow

        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        executor = follower() if follower else load_engine(bundle, options).executor
        beside = _beside(bundle, options, executor)
        freeze_gc()
        assert links.orders is not None
        follow(executor, links.orders, beside)

    def lead(links: Links) -> int | None:
        from tokenspeed_plan.runtime.execution.ranks import leading

        with leading(links):
            return work()

    return _on_ranks(bundle, options, work, lead, obey)


def _beside(bundle: Path, options: EngineOptions, executor: Executor) -> Beside | None:
    """What a rank of one of two pools does beside its replays."""
    if written_pools(bundle) == 1:
        return None
    from tokenspeed_plan.runtime.pools.pool_ranks import PoolFollower

    return PoolFollower(load_plan(bundle, options.signers), executor)


def alike_on_all_ranks(bundle: Path, options: EngineOptions, work: Callable[[], None]) -> None:
    """Do the same work on all ranks of a plan, which meet in its collectives."""

    def repeat(links: Links) -> None:
        work()

    _on_ranks(bundle, options, work, repeat, repeat)


def _on_ranks(
    bundle: Path,
    options: EngineOptions,
    alone: Callable[[], int | None],
    lead: Callable[[Links], int | None],
    obey: Callable[[Links], None],
) -> int | None:
    """Start the ranks of a plan, unless they are started, and join them."""
    is_started = bool({"WORLD_SIZE", "RANK"} & os.environ.keys())
    if not is_started and _written_count(bundle, options.role) == 1:
        return alone()
    if not is_started:
        return _start_ranks(bundle, options, lead)
    from tokenspeed_plan.runtime.execution.rank_links import join
    from tokenspeed_plan.runtime.execution.rank_place import own_rank, world_size

    if world_size() == 1:
        return alone()
    frozen = _own_pool(bundle, options)
    if own_rank() == 0:
        return lead(join(frozen, options.rank_timeout_s))
    if frozen.target.count == world_size():  # else rank 0 reports the error
        obey(join(frozen, options.rank_timeout_s))
    return 0


def _own_pool(bundle: Path, options: EngineOptions) -> Plan:
    """The plan as the ranks of this pool see it."""
    from tokenspeed_plan.runtime.loading.engine_loader import pool_of

    plan = load_plan(bundle, options.signers)
    return plan.view(pool_of(plan, options.role))


def _written_count(bundle: Path, role: PoolRole | None) -> int:
    """The ranks of a pool of a plan that is not checked; by default of the one that answers."""
    counts = _written(bundle)
    return counts.get(role or "", next(iter(counts.values())))


def written_pools(bundle: Path) -> int:
    """The pools of a plan that is not checked."""
    return len(_written(bundle))


def _written(bundle: Path) -> dict[str, int]:
    """The ranks of each pool by its role; one where it cannot be read, as others say why."""
    try:
        pools = json.loads((bundle / PLAN_FILE).read_text(encoding="utf-8"))["pools"]
        counts = {str(pool["role"]): int(pool["layout"]["attention"]["tp"]) for pool in pools}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        counts = {}
    return counts or {"both": 1}


def _start_ranks(
    bundle: Path, options: EngineOptions, lead: Callable[[Links], int | None]
) -> int | None:
    """Start the other ranks with the command of this process, and lead them.

    They start at once, and check the plan while this process does.
    """
    from tokenspeed_plan.planner.commands.rank_processes import started_ranks

    args: tuple[str, ...] = click.get_current_context().meta[ARGS]
    count = _written_count(bundle, options.role)
    if count > MOST_UNCHECKED:
        count = _own_pool(bundle, options).target.count
    with started_ranks(count, args):
        frozen = _own_pool(bundle, options)
        from tokenspeed_plan.runtime.execution.rank_links import join
        from tokenspeed_plan.runtime.loading.preflight import check_target

        check_target(frozen)
        return lead(join(frozen, options.rank_timeout_s))


def load_chat_template(bundle: Path, options: EngineOptions) -> ChatTemplate | None:
    """The chat template of a bundle's model; None if it has none.

    A template is a program: it must be the planned one before it is compiled.
    """
    return ChatTemplate.load(_checked_folder(bundle, options))


def load_tokenizer(bundle: Path, options: EngineOptions) -> Tokenizer:
    """The tokenizer of a bundle's model, with its chat template.

    Raises:
        PlanError: it is not the planned one, or there is none.
    """
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    folder = _checked_folder(bundle, options)
    return Tokenizer.load(folder, ChatTemplate.load(folder))


def _checked_folder(bundle: Path, options: EngineOptions) -> Path:
    """The folder of a bundle's model, whose small files are the planned ones."""
    from tokenspeed_plan.runtime.loading.preflight import check_files, find_weights

    frozen = load_plan(bundle, options.signers)
    folder = find_weights(frozen, bundle, options.weights)
    check_files(frozen, folder)
    return folder


def work_of_rank_0() -> LongWork:
    """What shows on a terminal how far the work of this process is; other ranks do the same."""
    from tokenspeed_plan.runtime.execution.rank_place import own_rank

    return LongWork(is_shown=own_rank() == 0 and sys.stderr.isatty())


def load_engine(
    bundle: Path,
    options: EngineOptions,
    chat: ChatTemplate | Tokenizer | None = None,
    report: Report | None = None,
) -> Engine:
    """Load an engine. Of several ranks, rank 0 leads the others."""
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.execution.rank_links import joined
    from tokenspeed_plan.runtime.execution.ranks import lead_of
    from tokenspeed_plan.runtime.loading.loading_report import nobody

    links = joined()
    engine = Engine.load(
        bundle,
        options.weights,
        chat,
        backend=options.backend,
        lead=lead_of(links),
        cache=options.cache,
        depth="headers" if links.rank else options.depth,  # rank 0 has compared all of them
        signers=options.signers,
        role=options.role,
        report=report or nobody,
    )
    links.meet(f"{engine.plan.digest} {options.backend}")
    limit_cpu(engine.plan)
    return engine


def limit_cpu(plan: Plan) -> None:
    """Take the threads and keep the memory that a plan for a CPU is fastest with."""
    from tokenspeed_plan.runtime.execution.cpu_memory import keep_freed_memory
    from tokenspeed_plan.runtime.execution.cpu_threads import limit_threads

    limit_threads(plan)
    keep_freed_memory(plan)


def ready_engine(
    bundle: Path, options: EngineOptions, chat: ChatTemplate | Tokenizer | None = None
) -> Engine:
    """Load an engine, and replay the golden prompts unless the options say otherwise."""
    engine = load_engine(bundle, options, chat)
    if options.canary:
        engine.time_startup("canary_s", lambda: replay_canary(engine.plan, engine))
    freeze_gc()
    return engine


def freeze_gc() -> None:
    """Exempt all live objects from garbage collection.

    A full collection over the objects of a plan stops the loop for 0.1 s.
    """
    gc.collect()
    gc.freeze()


def replay_canary(frozen: Plan, engine: Engine) -> int:
    """Number of golden tokens that agree.

    Raises:
        CanaryError: with the first token that does not.
    """
    from tokenspeed_plan.runtime.canary import check_canary

    return check_canary(frozen, engine)
