"""The `symmetric` arena of every rank, mapped into this one: peers write to it inside kernels.

R ranks. On GPUs it is NVLink's peer memory; on a CPU it is shared memory, so that kernels run in
Triton's interpreter as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import RankError

_TEST_S = 5.0  # for a copy of a few bytes; the first one sets up the link
_MARK = 0x51  # plus the rank that wrote it
_HINT = (
    "see `nvidia-smi topo -m`; in a container, allow peer access between its GPUs (IOMMU and ACS "
    "off)"
)


class NoPeerMemory(RankError):
    """Ranks cannot write to each other; a plan replays without, if more slowly."""


class PeerMemory:
    """The arenas of all ranks.

    Args:
        own: of this rank, u8[bytes].
        addresses: where each rank's arena begins in this process.
        owner: keeps the mappings alive.

    Attributes:
        table: the addresses, i64[R] on the device.
    """

    def __init__(self, own: Tensor, addresses: Sequence[int], owner: object = None) -> None:
        self.own = own
        self.table = torch.tensor(list(addresses), dtype=torch.int64, device=own.device)
        self._owner = owner


def launch_tables(peers: PeerMemory | None, program: int) -> dict[str, int | Tensor]:
    """What a kernel needs to reach its peers, by the role of its parameters.

    Args:
        peers: the memory of the other ranks; without it there is nothing.
        program: index of the program that calls the kernel.
    """
    if peers is None:
        return {}
    return {"peer_table": peers.table, "program": program}


def map_symmetric(size_bytes: int, group: Any, exchange: Callable[[str], list[str]]) -> PeerMemory:
    """Peer memory of GPUs; all ranks call it at once. It is zero, and was tried.

    Args:
        size_bytes: of the arena.
        group: the ranks.
        exchange: gathers a text of each rank.

    Raises:
        NoPeerMemory: this machine has none, or it does not work; on all ranks, whoever found out.
    """
    import torch.distributed._symmetric_memory as symmetric
    from torch._C._distributed_c10d import _SymmetricMemory

    device = torch.device("cuda", torch.cuda.current_device())
    fault = ""
    try:
        # `symmetric.empty` does the same after it has imported sympy, which takes 2 s.
        own = _SymmetricMemory.empty_strided_p2p((size_bytes,), (1,), torch.uint8, device)
        handle = symmetric.rendezvous(own, group)
        peers = [
            handle.get_buffer(rank, (size_bytes,), torch.uint8) for rank in range(handle.world_size)
        ]
    except RuntimeError as error:
        fault = str(error).partition("\n")[0]
    _agree(fault, exchange)
    try_peers(handle.rank, peers, exchange)
    own.zero_()
    torch.cuda.synchronize()
    exchange("")  # all are zero
    return PeerMemory(own, [int(address) for address in handle.buffer_ptrs], handle)


def try_peers(rank: int, peers: Sequence[Tensor], exchange: Callable[[str], list[str]]) -> None:
    """Write to each peer, and read back what each peer wrote; all ranks call it at once.

    Args:
        rank: of this process.
        peers: the arenas of all ranks, as this process sees them.
        exchange: gathers a text of each rank.

    Raises:
        NoPeerMemory: on all ranks, with what the first of them found.
    """
    mark = torch.full((1,), _MARK + rank, dtype=torch.uint8, device=peers[rank].device)
    places = [peer[rank : rank + 1] for peer in peers]
    faults = [_fault_of_copy(place, mark, other) for other, place in enumerate(places)]
    _agree(next(filter(None, faults), ""), exchange)
    found = (_fault_of_marks(peer, rank, other, len(peers)) for other, peer in enumerate(peers))
    _agree(next(filter(None, found), ""), exchange)


def _agree(fault: str, exchange: Callable[[str], list[str]]) -> None:
    """Where one rank has found a fault, all of them have."""
    for rank, found in enumerate(exchange(fault)):
        if found:
            raise NoPeerMemory(
                f"the memory of other ranks cannot be used here: {found} (rank {rank})", _HINT
            )


def _fault_of_marks(peer: Tensor, rank: int, other: int, world: int) -> str:
    """What is wrong with the marks that all ranks have left with one of them."""
    seen = torch.zeros(world, dtype=torch.uint8)
    if peer.is_cuda:
        seen = seen.pin_memory()
    fault = _fault_of_copy(seen, peer[:world], other)
    if not fault and seen.tolist() != [_MARK + writer for writer in range(world)]:
        fault = f"rank {rank} read {seen.tolist()} from rank {other}"
    return fault


def _fault_of_copy(target: Tensor, source: Tensor, other: int) -> str:
    """Start a copy and wait for it, but not for ever."""
    try:
        target.copy_(source, non_blocking=True)
        if not (target.is_cuda or source.is_cuda):
            return ""
        done = torch.cuda.Event()
        done.record()
        until = time.monotonic() + _TEST_S
        while not done.query():
            if time.monotonic() > until:
                return f"a copy of a few bytes with rank {other} takes more than {_TEST_S:.0f} s"
            time.sleep(1e-4)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""
