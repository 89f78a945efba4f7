"""What the commands that replay a plan share: engines, and the processes of a sharded plan."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine


def on_all_ranks(
    bundle: Path,
    options: dict[str, Any],
    work: Callable[[], int | None],
    ignored: tuple[signal.Signals, ...] = (),
) -> int | None:
    """Do the work on rank 0; other processes of a sharded plan repeat its replays.

    They ignore some signals, where rank 0 is the one to say when it is over.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return work()
    from tokenspeed_plan.runtime.collectives import join, own_rank, world_size
    from tokenspeed_plan.runtime.ranks import follow, leading

    frozen = load_plan(bundle)
    if own_rank() and frozen.target.count != world_size():
        return 0  # rank 0 says so
    join(frozen)
    if own_rank():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        engine = load_engine(bundle, options)
        freeze_gc()
        follow(engine.executor)
        return 0
    with leading():
        return work()


def load_chat_template(bundle: Path, options: dict[str, Any]) -> ChatTemplate | None:
    """How the model of a bundle wants chats; None where it does not say."""
    from tokenspeed_plan.runtime.preflight import find_weights

    return ChatTemplate.load(find_weights(load_plan(bundle), bundle, options["weights"]))


def load_engine(bundle: Path, options: dict[str, Any], chat: ChatTemplate | None = None) -> Engine:
    """An engine with the weights and backend of a command's options; rank 0 of several leads the others."""
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.executor import Lead

    lead: Lead | None = None
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from tokenspeed_plan.runtime.ranks import Follower, Leader

        lead = Leader() if os.environ.get("RANK", "0") == "0" else Follower()
    cache = not options.get("no_cache", False)
    return Engine.load(
        bundle, options["weights"], chat, backend=options["backend"], lead=lead, cache=cache
    )


def ready_engine(bundle: Path, options: dict[str, Any], chat: ChatTemplate | None = None) -> Engine:
    """An engine that has proved itself."""
    engine = load_engine(bundle, options, chat)
    if not options["no_canary"]:
        engine.time_startup("canary_s", lambda: replay_canary(engine.plan, engine))
    freeze_gc()
    return engine


def freeze_gc() -> None:
    """Take what stands from Python's garbage collector: looking through all of a plan holds the loop up for 0.1 s."""
    gc.collect()
    gc.freeze()


def replay_canary(frozen: Plan, engine: Engine) -> int:
    """Tokens that agree; an error names the first that does not."""
    from tokenspeed_plan.runtime.canary import check_canary

    return check_canary(frozen, engine)
