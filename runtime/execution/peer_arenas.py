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
    "see `nvidia-smi topo -m`: GPUs without NVLink or PCIe peer access run a plan of one GPU; "
    "in a container, allow peer access (IOMMU and ACS off)"
)


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


def map_symmetric(size_bytes: int, group: Any) -> PeerMemory:
    """Peer memory of GPUs; all ranks call it at once. It is zero, and was tried.

    Args:
        size_bytes: of the arena.
        group: the ranks.

    Raises:
        RankError: this machine has none, or it does not work.
    """
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        own = symmetric.empty(size_bytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(own, group)
        peers = [
            handle.get_buffer(rank, (size_bytes,), torch.uint8) for rank in range(handle.world_size)
        ]
        fault = _try(handle.rank, peers, lambda: dist.barrier(group=group))
    except RuntimeError as error:
        fault = str(error).partition("\n")[0]
    if fault:
        raise RankError(f"the memory of other GPUs cannot be used here: {fault}", _HINT)
    own.zero_()
    torch.cuda.synchronize()
    dist.barrier(group=group)
    return PeerMemory(own, [int(address) for address in handle.buffer_ptrs], handle)


def _try(rank: int, peers: Sequence[Tensor], meet: Callable[[], object]) -> str:
    """Write to each peer, and read back what each peer wrote; what is wrong, or nothing."""
    world = len(peers)
    mark = torch.full((1,), _MARK + rank, dtype=torch.uint8, device=peers[rank].device)
    places = [peer[rank : rank + 1] for peer in peers]
    written = [_fault_of_copy(place, mark, other) for other, place in enumerate(places)]
    meet()
    faults = list(filter(None, written))
    seen = torch.zeros(world, dtype=torch.uint8).pin_memory()
    for other, peer in enumerate(peers):
        fault = faults or [_fault_of_copy(seen, peer[:world], other)]
        if not fault[0] and seen.tolist() != [_MARK + writer for writer in range(world)]:
            fault = [f"rank {rank} read {seen.tolist()} from rank {other}"]
        faults = list(filter(None, fault))
    meet()
    return next(iter(faults), "")


def _fault_of_copy(target: Tensor, source: Tensor, other: int) -> str:
    """Start a copy and wait for it, but not for ever."""
    target.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    until = time.monotonic() + _TEST_S
    while not done.query():
        if time.monotonic() > until:
            return f"a copy of a few bytes with rank {other} takes more than {_TEST_S:.0f} s"
        time.sleep(1e-4)
    return ""
