"""Runs a load through a plan's scheduler, cache and commits, event by event."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from tokenspeed_plan.plans.collector import no_garbage_collection
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.simulation.load import Load
from tokenspeed_plan.runtime.simulation.load_results import Simulated
from tokenspeed_plan.runtime.simulation.one_pool import Look, OnePool, Progress
from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes, PoolPair
from tokenspeed_plan.runtime.simulation.virtual_steps import StepTimes


def simulate(
    plan: Plan,
    times: StepTimes,
    load: Load,
    acceptance: Seq[float] = (),
    seed: int = 0,
    every_step: bool = False,
    progress: Progress | None = None,
    look: Look | None = None,
    pair: PairTimes | None = None,
) -> Simulated:
    """Run a load to its end.

    Args:
        plan: what would be replayed.
        times: what the steps of the pool that answers take.
        load: the requests.
        acceptance: see `VirtualLauncher`.
        seed: of the drafts that are accepted.
        every_step: go through each step for each sequence, which takes longer and finds the same.
        progress: is told how many requests are answered.
        look: is shown the scheduler of the pool that answers now and then, with the clock's time.
        pair: of the pool of prompts beside it; None where it computes all prompts itself.

    Raises:
        RequestError: the plan cannot hold a request.
    """
    asked = (plan, times, load, acceptance, seed, every_step)
    with no_garbage_collection():
        simulation = OnePool(*asked) if pair is None else PoolPair(*asked, pair)
        return simulation.run(progress, look)
