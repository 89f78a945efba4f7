"""What a pool of prompts takes beside the one that answers, and how the two reach each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenspeed_plan.planner.advisor.plan_steps import PlanSteps
from tokenspeed_plan.planner.advisor.transfer import HANDSHAKE_US, rate_of, transport_of
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.plans.schema import Plan, Pool

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes

Layers = Iterable[tuple[int, int]]  # bytes of a page and of a state on a rank, of each layer


@dataclass(frozen=True, slots=True)
class PoolBytes:
    """What two pools hand over.

    Attributes:
        prompts: by layer of a rank that computes prompts, in the order of their computation.
        page_bytes, state_bytes: of a rank that answers, in all layers.
    """

    prompts: Layers
    page_bytes: int
    state_bytes: int


def pair_times(
    times: PlanSteps,
    layout: ParallelLayout,
    sizes: PoolBytes,
    hardware: HardwareSpec,
    num_gpus: int,
) -> PairTimes:
    """The times of a pool of prompts.

    Args:
        times: of the pool that answers.
        layout: of the pool of prompts.
        sizes: of what they hand over.
        hardware: of both.
        num_gpus: of both together.
    """
    from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes
    from tokenspeed_plan.runtime.simulation.virtual_link import LayerBytes, Link

    transport = transport_of(hardware, num_gpus)
    rate, handshake_us = rate_of(hardware, transport), HANDSHAKE_US[transport]
    there = tuple(LayerBytes(*each) for each in sizes.prompts)
    back = (LayerBytes(sizes.page_bytes, sizes.state_bytes),)
    links = [Link(layers, rate, handshake_us) for layers in (there, back)]
    return PairTimes(times.on(layout), *links)


def plan_sizes(plan: Plan) -> PoolBytes:
    """What the pools of a plan hand over."""
    decode, prefill = plan.pools
    sent = _layers(prefill)
    return PoolBytes(sent, decode.slot_bytes("kv_cache"), decode.slot_bytes("state"))


def _layers(pool: Pool) -> list[tuple[int, int]]:
    """Bytes of a page and of a state, of what leaves together."""
    buffers = {each.name: each for each in pool.buffers}
    found = []
    for push in pool.programs[0].pushes:
        sizes = {"kv_cache": 0, "state": 0}
        for buffer in map(buffers.__getitem__, push.buffers):
            sizes[buffer.arena] += buffer.tensor.size_bytes() // int(buffer.tensor.shape[0])
        found.append((sizes["kv_cache"], sizes["state"]))
    return found
