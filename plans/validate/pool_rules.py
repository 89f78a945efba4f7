"""Pools that the runtime knows: one that does everything, or two of which one prefills."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.plans.validate.refusal import refuse

# What a pool hands over lies in these arenas; the first dimension of a buffer counts its slots.
CACHE_ARENAS = ("kv_cache", "state")


def check_pools(plan: Plan) -> None:
    """One pool of role `both`, or one of role `decode` and then one of role `prefill`.

    Raises:
        PlanError: the plan has other pools, or two that cannot hand over to each other.
    """
    roles = [pool.role for pool in plan.pools]
    if roles == ["both"]:
        return
    if roles != ["decode", "prefill"]:
        found = ", ".join(roles)
        raise refuse(
            f"pools ({found}): the runtime replays one of role `both`, or `decode` and `prefill`"
        )
    decode, prefill = plan.pools
    _check_ranks(plan)
    _check_phases(prefill)
    _check_cached(decode, prefill)


def cached_tensors(pool: Pool) -> dict[str, TensorSpec]:
    """The buffers of a pool that outlive a step, by name."""
    return {buffer.name: buffer.tensor for buffer in pool.buffers if buffer.arena in CACHE_ARENAS}


def _check_ranks(plan: Plan) -> None:
    ranks = [pool.layout.num_ranks for pool in plan.pools]
    if ranks != [1, 1]:
        raise refuse(f"pools of {ranks[0]} and {ranks[1]} ranks: each of two has one today")
    if plan.target.count != sum(ranks):
        raise refuse(f"pools of {sum(ranks)} ranks, the target has {plan.target.count}")


def _check_phases(prefill: Pool) -> None:
    others = [program.name for program in prefill.programs if program.phase != "prefill"]
    if others:
        raise refuse(f"the pool of role `prefill` has the program {others[0]}")


def _check_cached(decode: Pool, prefill: Pool) -> None:
    """A slot of each buffer of the prefill pool fits the decode pool's buffer of that name."""
    if decode.limits.page_size != prefill.limits.page_size:
        raise refuse(
            f"pages of {prefill.limits.page_size} tokens are handed over to pages of "
            f"{decode.limits.page_size}"
        )
    kept, made = cached_tensors(decode), cached_tensors(prefill)
    for name, tensor in made.items():
        other = kept.get(name)
        if other is None or _slot(other) != _slot(tensor):
            raise refuse(f"`{name}` is not alike in both pools")
    has_state = any(buffer.arena == "state" for buffer in prefill.buffers)
    if has_state and not decode.limits.num_checkpoints:
        raise refuse("the decode pool has no checkpoint that a state could be handed over to")


def _slot(tensor: TensorSpec) -> tuple[object, ...]:
    """What one slot of a buffer holds."""
    return tensor.format, *tensor.shape[1:]
