"""The second tier of the prefix cache: its slots are those of the caches, and can be copied."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.validate.refusal import refuse

WORD_BYTES = 8  # pages of a layer are copied in words


def check_host_cache(plan: Plan, pool: Pool) -> None:
    """A page and a state of the host are those of a rank, and its copies have room on the GPU.

    Raises:
        PlanError: naming what is wrong.
    """
    cache = pool.host_cache
    if cache is None:
        return
    if pool.role != "both":
        raise refuse(f"a host cache of a pool of role `{pool.role}`")
    held = {"page": pool.slot_bytes("kv_cache"), "state": pool.slot_bytes("state")}
    said = {"page": cache.page_bytes, "state": cache.state_bytes}
    if held != said:
        raise refuse(f"the host has slots of {said} bytes, the caches of {held}")
    if bool(cache.state_bytes) != bool(cache.num_states):
        raise refuse(f"{cache.num_states} states of {cache.state_bytes} bytes on the host")
    if cache.state_bytes and not pool.limits.num_checkpoints:
        raise refuse("there is no checkpoint that the host could have or give back")
    if cache.least_tokens < pool.limits.page_size:
        raise refuse(f"{cache.least_tokens} tokens are copied from the host, less than a page")
    reserved = pool.memory_bytes_per_rank.reserved
    if plan.target.sm and reserved < cache.staging_bytes:
        raise refuse(
            f"{reserved} bytes are reserved, copies to the host take {cache.staging_bytes}"
        )
    _check_words(pool)


def _check_words(pool: Pool) -> None:
    for buffer in pool.buffers:
        if buffer.arena != "kv_cache":
            continue
        page_bytes = buffer.tensor.size_bytes() // int(buffer.tensor.shape[0])
        if page_bytes % WORD_BYTES:
            raise refuse(f"a page of `{buffer.name}` is not whole words of {WORD_BYTES} bytes")
