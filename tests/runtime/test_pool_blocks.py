"""Index lists between pools of other sizes: each rank gets the heads that it holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from planning import planned
from torch import Tensor

from tokenspeed_plan.plans.schema import Pool
from tokenspeed_plan.plans.validate.pool_rules import CACHE_ARENAS, cached_tensors
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.pools.blocks import Copy, copies, handed_bytes, routes

SLOTS = [3, 1, 2, 6, 7]
TARGETS = [5, 6, 7, 1, 2]


@cache
def pool_of(folder: Path, ranks: int) -> Pool:
    spec = make_spec(folder, target={"count": ranks})
    pool = planned(spec).pool
    assert pool.layout.num_ranks == ranks
    return pool


class Rank:
    """The caches of one rank, without an engine."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.arenas = Arenas(pool.arenas)

    def view(self, name: str) -> Tensor:
        buffer = next(each for each in self.pool.buffers if each.name == name)
        shape = tuple(map(int, buffer.tensor.shape))
        return self.arenas.view(buffer.arena, buffer.offset_bytes, shape, buffer.tensor.dtype)

    def take(self, parts: list[Copy], source: Rank) -> None:
        for part in parts:
            here, there = self.arenas.whole(part.arena), source.arenas.whole(part.arena)
            for row in range(part.rows):
                begin = part.source + row * part.source_pitch
                end = part.target + row * part.target_pitch
                here[end : end + part.width] = there[begin : begin + part.width]


def shard(name: str, whole: Tensor, key_heads: int, rank: int, ranks: int) -> Tensor:
    """What a rank holds of a buffer of all heads, cut by hand.

    Heads of keys and values are shared by several ranks where there are fewer of them.
    """
    if name.endswith("kv_cache"):
        heads = whole.shape[3]
        first = rank * heads // ranks
        return whole[:, :, :, first : first + max(heads // ranks, 1)]
    if name.endswith("ssm_state"):
        return whole.chunk(ranks, 1)[rank]
    keys = key_heads * 32  # the size of a key head in the tests' models
    values = whole.shape[-1] - 2 * keys
    parts = whole.split([keys, keys, values], -1)
    return torch.cat([part.chunk(ranks, -1)[rank] for part in parts], -1)


@pytest.mark.slow
@pytest.mark.parametrize(("senders", "receivers"), [(1, 2), (2, 1), (1, 1), (2, 4), (4, 1)])
def test_ranks_get_their_heads(senders: int, receivers: int, checkpoint: Any) -> None:
    folder = checkpoint("wide")
    whole = Rank(pool_of(folder, 1))
    names = sorted(cached_tensors(whole.pool))
    for name in names:
        whole.view(name).normal_()
    sources = [Rank(pool_of(folder, senders)) for _ in range(senders)]
    for rank, source in enumerate(sources):
        for name in names:
            source.view(name).copy_(shard(name, whole.view(name), 8, rank, senders))
    for other in range(receivers):
        target = Rank(pool_of(folder, receivers))
        for rank, source in enumerate(sources):
            pairs = routes(source.pool, target.pool, rank, other)
            for arena in CACHE_ARENAS:
                target.take(copies(pairs, arena, SLOTS, TARGETS), source)
        for name in names:
            wanted = shard(name, whole.view(name), 8, other, receivers)[SLOTS]
            assert torch.equal(target.view(name)[TARGETS], wanted), (name, other)
            untouched = [s for s in range(8) if s not in TARGETS]
            assert not target.view(name)[untouched].any()


def test_neighbours_are_joined(checkpoint: Any) -> None:
    """A run of pages is one copy of a buffer; nothing is copied twice."""
    pool = pool_of(checkpoint("wide"), 1)
    parts = copies(routes(pool, pool), "kv_cache", [4, 5, 6, 9], [0, 1, 2, 3])
    buffers = [each for each in pool.buffers if each.arena == "kv_cache"]
    assert len(parts) == 2 * len(buffers)
    page_bytes = sum(each.tensor.size_bytes() // int(each.tensor.shape[0]) for each in buffers)
    assert sum(part.width * part.rows for part in parts) == 4 * page_bytes
    assert handed_bytes(pool, pool)["kv_cache"] == page_bytes
    assert copies(routes(pool, pool), "state", [], []) == []


def test_all_ranks_hand_over_each_head_once(checkpoint: Any) -> None:
    """As many bytes as the receivers hold, of which copies of heads are sent again."""
    pools = {ranks: pool_of(checkpoint("wide"), ranks) for ranks in (1, 2, 4)}
    for source in pools.values():
        for ranks, target in pools.items():
            held = [each for each in target.buffers if each.arena == "kv_cache"]
            page_bytes = sum(each.tensor.size_bytes() // int(each.tensor.shape[0]) for each in held)
            assert handed_bytes(source, target)["kv_cache"] == ranks * page_bytes
