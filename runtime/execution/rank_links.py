"""Joins the ranks of a plan: processes of one host, each with its device.

They meet over torch.distributed (gloo) on the loopback device. Orders and heartbeats then go
through shared memory, collectives over gloo on a CPU and NCCL on GPUs.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tokenspeed_plan.plans.errors import PlanError, RankError
from tokenspeed_plan.plans.ops import LATE_INPUTS
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.collectives import (
    Collectives,
    ProcessCollectives,
    translate_dist_errors,
)
from tokenspeed_plan.runtime.execution.heartbeat import RECORD_BYTES, Heartbeat
from tokenspeed_plan.runtime.execution.input_block import NUMBER_BYTES, InputLayout
from tokenspeed_plan.runtime.execution.nccl import NcclCollectives
from tokenspeed_plan.runtime.execution.order_ring import OrderRing, ring_bytes
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory, map_symmetric, try_peers
from tokenspeed_plan.runtime.execution.rank_loss import LOSS
from tokenspeed_plan.runtime.execution.rank_place import (
    find_store,
    local_rank,
    own_rank,
    world_size,
)
from tokenspeed_plan.runtime.execution.shared_bytes import share

DEFAULT_TIMEOUT_S = 30.0
_FOREVER = timedelta(days=365)
_SILENCE_S = 5.0  # ranks are heard four times a second
_START = timedelta(minutes=5)  # from the first rank's start to the last one's
_MIN_MESSAGE_BYTES = 1 << 16
# NVLink multicast is used nowhere; the libraries would set it up and fail where it is broken.
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass(frozen=True, slots=True)
class Links:
    """This rank, and what joins it to the others; alone it has nothing of that.

    Attributes:
        rank: of this process.
        collectives: of the plan's steps.
        orders: rank 0 says what comes next.
        group: meetings of all ranks, without a deadline, as one may load for longer than others.
        heartbeat: says that the others live.
    """

    rank: int = 0
    collectives: Collectives | None = None
    orders: OrderRing | None = None
    group: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    def meet(self, what: str = "") -> None:
        """Wait for all ranks.

        Args:
            what: each of them has; it must be the same.

        Raises:
            RankError: one is lost, or has something else.
        """
        found = self.exchange(what)
        if len(set(found)) > 1:
            other = next(rank for rank, text in enumerate(found) if text != found[0])
            raise RankError(
                f"rank {other} replays another plan than rank 0",
                "start all ranks with one bundle and the same options",
            )

    def exchange(self, text: str) -> list[str]:
        """A text of each rank, in their order; every rank calls it.

        Raises:
            RankError: one is lost.
        """
        return [text] if self.group is None else _exchange(text, self.group)

    def peer_memory(self, size_bytes: int, device: str) -> PeerMemory:
        """The symmetric arena of all ranks, zero and tried; every rank calls it.

        Raises:
            NoPeerMemory: ranks cannot write to each other.
            RankError: one is lost.
        """
        assert self.group is not None, "the validator refuses peer memory for one rank"
        if device == "cuda":
            return map_symmetric(size_bytes, self.group, self.exchange)
        maps = share(size_bytes, self.exchange)
        arenas = [torch.frombuffer(memory, dtype=torch.uint8) for memory in maps]
        try_peers(self.rank, arenas, self.exchange)
        arenas[self.rank].zero_()
        self.exchange("")
        addresses = [arena.data_ptr() for arena in arenas]
        return PeerMemory(arenas[self.rank], addresses, arenas)


_ALONE = Links()


@dataclass(slots=True)
class _Joined:
    """The links of this process, once they are made."""

    links: Links = _ALONE


_joined = _Joined()


def joined() -> Links:
    """The links of this process; none before it has joined others."""
    return _joined.links


def rank_fault() -> str | None:
    """What is wrong with another rank, if anything."""
    heartbeat = _joined.links.heartbeat
    if LOSS.is_known:
        return LOSS.reason
    if heartbeat is not None and heartbeat.silent_s > _SILENCE_S:
        return f"a rank has not been heard for {heartbeat.silent_s:.0f} s"
    return None


def join(plan: Plan, timeout_s: float = DEFAULT_TIMEOUT_S) -> Links:
    """Join the other ranks of a plan, unless that is done.

    Args:
        plan: says how many ranks there are.
        timeout_s: seconds that a rank waits for another one in a replay.

    Returns:
        This process's rank, and its links to the others; none where the plan has one rank.

    Raises:
        PlanError: there are not as many processes as the plan has ranks.
        RankError: the environment does not say how to reach them, or one is lost.
    """
    world = world_size()
    count = plan.target.count
    if world != count:
        command = f"torchrun --no-python --nproc-per-node {count} tokenspeed run ..."
        raise PlanError(
            f"the plan has {count} ranks, this is one of {world} processes",
            f"run it without torchrun, or start as many: `{command}`",
        )
    if world > 1 and _joined.links is _ALONE:
        use_own_device(plan)
        _joined.links = _link(plan, own_rank(), world, timeout_s)
        atexit.register(leave)
    return _joined.links


def use_own_device(plan: Plan) -> None:
    """Each rank of a host computes on a GPU of its own.

    Raises:
        PlanError: there are not enough.
    """
    if plan.target.device != "cuda" or not torch.cuda.is_available():
        return  # `check_target` refuses a machine without a GPU
    seen, index = torch.cuda.device_count(), local_rank()
    if seen == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        index = 0  # whoever started the ranks shows each its own
    if index >= seen:
        raise PlanError(
            f"the plan is for {plan.target.count} GPUs, this machine shows {seen}",
            "plan it for fewer, `target: {count: 1}`, or check `CUDA_VISIBLE_DEVICES`",
        )
    torch.cuda.set_device(index)


def _link(plan: Plan, rank: int, world: int, timeout_s: float) -> Links:
    """Make the groups of the ranks, and begin to watch them."""
    LOSS.begin()
    group, replays = _groups(rank, world, timeout_s)
    payload_bytes = _message_bytes(plan)
    # Rank 0 gives the memory; all ranks map it.
    sizes = (world * RECORD_BYTES, ring_bytes(world, payload_bytes))
    beats, ring = (
        share(size_bytes if rank == 0 else 0, lambda path: _exchange(path, group))[0]
        for size_bytes in sizes
    )
    heartbeat = Heartbeat(beats, rank, world, timeout_s, LOSS)

    def check() -> None:
        LOSS.check()
        for other in range(1, world) if rank == 0 else (0,):
            if heartbeat.has_ended(other):
                raise LOSS.error(f"rank {other} has ended", wait_s=0.0)

    orders = OrderRing(ring, rank, world, payload_bytes, check)
    collectives = _collectives(plan.target.device, group, replays)
    if plan.target.device == "cuda" and rank == 0:
        # On a CPU a step may take longer, and collectives have the deadline.
        heartbeat.watch = lambda: orders.stalled(timeout_s)
    return Links(rank, collectives, orders, group, heartbeat)


def join_to_measure(device: str) -> Links:
    """Join ranks that replay no plan: collectives and meetings alone, and nobody is watched.

    Args:
        device: `cuda`, where each rank takes the GPU of its number, or `cpu`.

    Raises:
        RankError: the environment does not say how to reach them.
    """
    if device == "cuda":
        torch.cuda.set_device(local_rank())
    group, replays = _groups(own_rank(), world_size(), DEFAULT_TIMEOUT_S)
    atexit.register(leave)
    return Links(own_rank(), _collectives(device, group, replays), None, group)


def _groups(rank: int, world: int, timeout_s: float) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """All ranks, without a deadline and with one for replays."""
    os.environ |= _NO_MULTICAST
    with translate_dist_errors():
        dist.init_process_group(
            "gloo", store=find_store(rank, world), rank=rank, world_size=world, timeout=_START
        )
        group = dist.new_group(backend="gloo", timeout=_FOREVER)
        replays = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert group is not None and replays is not None
    return group, replays


def _collectives(device: str, group: dist.ProcessGroup, replays: dist.ProcessGroup) -> Collectives:
    """Of a device: NCCL's on GPUs, those of gloo, with the deadline of replays, on a CPU."""
    if device == "cuda":
        return NcclCollectives(group.rank(), group.size(), lambda own: _of_first(own, group))
    return ProcessCollectives(replays)


def _message_bytes(plan: Plan) -> int:
    """The largest message: a patch of all inputs, a late row, or what pools tell their ranks.

    The pages of one sequence, here and on the host, need no more: its page table is an input.
    """
    late = [b.tensor.size_bytes(0, 1) for b in plan.pool.buffers if b.name in LATE_INPUTS]
    return max(2 * NUMBER_BYTES * (InputLayout(plan).num_words + 1), *late, _MIN_MESSAGE_BYTES)


def _exchange(text: str, group: dist.ProcessGroup) -> list[str]:
    """A text of each rank, in their order."""
    own = text.encode()
    with translate_dist_errors():
        sizes = torch.zeros(group.size(), dtype=torch.int64)
        sizes[group.rank()] = len(own)
        dist.all_reduce(sizes, group=group)
        texts = torch.zeros(group.size(), max(int(sizes.max()), 1), dtype=torch.uint8)
        texts[group.rank(), : len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        dist.all_reduce(texts, group=group)
    return [
        bytes(row[:size].tolist()).decode() for row, size in zip(texts, sizes.tolist(), strict=True)
    ]


def _of_first(own: bytes, group: dist.ProcessGroup) -> bytes:
    """The bytes that rank 0 has."""
    values = torch.tensor(list(own), dtype=torch.uint8)
    with translate_dist_errors():
        dist.broadcast(values, 0, group=group)
    return bytes(values.tolist())


def leave() -> None:
    """Tell the other ranks that this one ends, and end gloo's threads.

    A process that ends before them is sometimes aborted.
    """
    LOSS.finish()
    if _joined.links.heartbeat is not None:
        _joined.links.heartbeat.stop()
    _joined.links = _ALONE
    if dist.is_initialized():
        dist.destroy_process_group()
