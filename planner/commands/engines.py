"""Shared by the commands that replay a plan: engine options, engines, ranks."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.signature import Signers
from tokenspeed_plan.plans.weight_digests import Depth

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine


Backend = Literal["reference", "kernels"]
VERIFY_HELP = "Compare all bytes of the weights with the plan's digests (small ones always are)."
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
    """

    weights: Path | None = None
    backend: Backend | None = None
    cache: bool = True
    canary: bool = True
    verify_weights: bool = False
    signers: Signers | None = None
    rank_timeout_s: float = 30.0

    @property
    def depth(self) -> Depth:
        """How far the weights are compared with those that were planned."""
        if self.verify_weights:
            return "all"
        if self.canary:
            return "small"
        return "headers"


def seconds_option(flag: str, name: str, default: float, text: str) -> Callable[[Any], Any]:
    """An option of so many seconds, more than none."""
    return click.option(
        flag,
        name,
        type=click.FloatRange(min=0, min_open=True),
        default=default,
        show_default=True,
        help=text,
    )


rank_timeout_option = seconds_option(
    "--rank-timeout",
    "rank_timeout_s",
    30.0,
    "Of several ranks: seconds that one waits for another in a replay.",
)


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
) -> int | None:
    """Do the work on rank 0, while the other ranks of a sharded plan repeat its replays.

    The other ranks ignore the signals `ignored`: rank 0 handles them and tells them when to stop.

    Returns:
        What the work returns on rank 0, else 0.
    """
    if not {"WORLD_SIZE", "RANK"} & os.environ.keys():
        return work()
    from tokenspeed_plan.runtime.execution.collectives import join, own_rank, world_size
    from tokenspeed_plan.runtime.execution.ranks import follow, leading

    if world_size() == 1:
        return work()
    frozen = load_plan(bundle, options.signers)
    if own_rank() and frozen.target.count != world_size():
        return 0  # rank 0 reports the error
    join(frozen, options.rank_timeout_s)
    if own_rank():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        engine = load_engine(bundle, options)
        freeze_gc()
        follow(engine.executor)
        return 0
    with leading():
        return work()


def load_chat_template(bundle: Path, options: EngineOptions) -> ChatTemplate | None:
    """The chat template of a bundle's model; None if it has none.

    A template is a program: it must be the planned one before it is compiled.
    """
    from tokenspeed_plan.runtime.loading.preflight import check_files, find_weights

    frozen = load_plan(bundle, options.signers)
    folder = find_weights(frozen, bundle, options.weights)
    check_files(frozen, folder)
    return ChatTemplate.load(folder)


def load_engine(bundle: Path, options: EngineOptions, chat: ChatTemplate | None = None) -> Engine:
    """Load an engine. Of several ranks, rank 0 leads the others."""
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.execution.cpu_threads import limit_threads
    from tokenspeed_plan.runtime.execution.executor import Lead

    lead: Lead | None = None
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from tokenspeed_plan.runtime.execution.ranks import Follower, Leader

        lead = Leader() if os.environ.get("RANK", "0") == "0" else Follower()
    engine = Engine.load(
        bundle,
        options.weights,
        chat,
        backend=options.backend,
        lead=lead,
        cache=options.cache,
        depth=options.depth,
        signers=options.signers,
    )
    if lead is not None:
        from tokenspeed_plan.runtime.execution.ranks import meet

        meet()
    limit_threads(engine.plan)
    return engine


def ready_engine(bundle: Path, options: EngineOptions, chat: ChatTemplate | None = None) -> Engine:
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
