"""Pools that the runtime knows: one that does everything, or two of which one prefills."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from tokenspeed_plan.plans.schema import Plan, Pool, Program
from tokenspeed_plan.plans.schema.program_specs import named_by
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.plans.validate.refusal import refuse

# What a pool hands over lies in these arenas; the first dimension of a buffer counts its slots.
CACHE_ARENAS = ("kv_cache", "state")
# The dimension of heads by the number of dimensions: of keys and values [S, 2, T, H, size], of a
# delta rule's state [S, H, size, size], and of a convolution's window [S, K, channels].
_HEADS = {5: 3, 4: 1, 3: 2}


def check_pools(plan: Plan) -> None:
    """One pool of role `both`, or one of role `decode` and then one of role `prefill`.

    Raises:
        PlanError: the plan has other pools, or two that cannot hand over to each other.
    """
    roles = [pool.role for pool in plan.pools]
    for program in plan.pool.programs:
        if program.pushes:
            raise refuse(f"{program.name} of the pool that answers pushes")
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
    for program in prefill.programs:
        _check_pushes(program, cached_tensors(prefill).keys())


def cached_tensors(pool: Pool) -> dict[str, TensorSpec]:
    """The buffers of a pool that outlive a step, by name."""
    return {buffer.name: buffer.tensor for buffer in pool.buffers if buffer.arena in CACHE_ARENAS}


def _check_ranks(plan: Plan) -> None:
    total = sum(pool.layout.num_ranks for pool in plan.pools)
    if plan.target.count != total:
        raise refuse(f"pools of {total} ranks, the target has {plan.target.count}")


def _check_phases(prefill: Pool) -> None:
    others = [program.name for program in prefill.programs if program.phase != "prefill"]
    if others:
        raise refuse(f"the pool of role `prefill` has the program {others[0]}")


def _check_cached(decode: Pool, prefill: Pool) -> None:
    """A slot of each buffer of the prefill pool fits the decode pool's buffer of that name.

    Each of their ranks may have another part of its heads.
    """
    if decode.limits.page_size != prefill.limits.page_size:
        raise refuse(
            f"pages of {prefill.limits.page_size} tokens are handed over to pages of "
            f"{decode.limits.page_size}"
        )
    ranks = (prefill.layout.num_ranks, decode.layout.num_ranks)
    kept, made = cached_tensors(decode), cached_tensors(prefill)
    for name, tensor in made.items():
        if name not in kept or not _are_alike(tensor, kept[name], ranks):
            raise refuse(f"`{name}` is not alike in both pools")
    has_state = any(buffer.arena == "state" for buffer in prefill.buffers)
    if has_state and not decode.limits.num_checkpoints:
        raise refuse("the decode pool has no checkpoint that a state could be handed over to")


def _are_alike(one: TensorSpec, two: TensorSpec, ranks: tuple[int, int]) -> bool:
    """Whether slots of two pools hold the same heads: all ranks together, or copies of one head.

    Args:
        one: [S, ...], of a rank of the first pool.
        two: the same of the second.
        ranks: of each pool.
    """
    axis = _HEADS.get(len(one.shape))
    if axis is None or len(one.shape) != len(two.shape) or one.format != two.format:
        return False
    if one.shape[1:axis] != two.shape[1:axis] or one.shape[axis + 1 :] != two.shape[axis + 1 :]:
        return False
    counts = [int(each.shape[axis]) for each in (one, two)]
    totals = [count * num_ranks for count, num_ranks in zip(counts, ranks, strict=True)]
    has_copies = counts[totals.index(max(totals))] == 1 and max(totals) % min(totals) == 0
    return totals[0] == totals[1] or has_copies


def _check_pushes(program: Program, cached: AbstractSet[str]) -> None:
    """Each cached buffer leaves once, after the last step that names it, in the order of steps."""
    pushed = [name for push in program.pushes for name in push.buffers]
    if sorted(pushed) != sorted(cached):
        raise refuse(f"{program.name} does not push each of the caches once")
    places = [push.step for push in program.pushes]
    if places != sorted(places) or max(places, default=0) >= len(program.steps):
        raise refuse(f"{program.name} does not push in the order of its steps")
    for push in program.pushes:
        for step in program.steps[push.step + 1 :]:
            if set(push.buffers) & set(named_by(step)):
                raise refuse(f"{program.name} pushes `{push.buffers[0]}` before it is done")
