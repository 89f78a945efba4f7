"""What `tokenspeed calibrate` launches on ranks, with doubles in place of GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenspeed_plan.planner.advisor.sum_probe import push_kernels
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.bench.rank_sums import Sums
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.execution.rank_links import Links

HIDDEN = 64


@dataclass
class Noted:
    """Collectives and kernels that note the shapes that they are given."""

    sums: set[tuple[int, ...]] = field(default_factory=set)
    gathered: set[tuple[int, ...]] = field(default_factory=set)
    pushed: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        assert source.shape == target.shape
        self.sums.add(tuple(source.shape))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        assert target.shape[-1] == 2 * source.shape[-1]
        self.gathered.add(tuple(target.shape))

    def without_overlap(self) -> Noted:
        return self

    def launcher(
        self, kernel: KernelSpec, rank: int, rows: int, seqs: int, peers: PeerMemory
    ) -> Any:
        def run(attrs: object, *tensors: Tensor) -> tuple[()]:
            for param, tensor in zip(kernel.tensors, tensors, strict=True):
                most = len(tensor) if param.role == "symmetric" else rows
                assert tuple(tensor.shape) == param.tensor.bind(most, most)
            self.pushed.setdefault(kernel.name, set()).add(tuple(tensors[0].shape))
            return ()

        return run


class TwoRanks:
    """A group of two, as far as its size is asked for."""

    def size(self) -> int:
        return 2


@dataclass(frozen=True, slots=True)
class LoneLinks(Links):
    """Rank 0 of two, alone."""

    def meet(self, what: str = "") -> None:
        """Nobody to meet."""

    def peer_memory(self, size_bytes: int, device: str) -> PeerMemory:
        own = torch.zeros(size_bytes, dtype=torch.uint8)
        return PeerMemory(own, [own.data_ptr()] * 2)


def test_each_size_is_measured_with_the_kernel_for_it() -> None:
    built = push_kernels(HIDDEN, 2, (256, 1024), find_hardware("H200"))
    specs = {most: each.kernel for most, each in zip((256, 1024), built, strict=True)}
    noted = Noted()
    links = LoneLinks(collectives=noted, group=TwoRanks())  # type: ignore[arg-type]
    times = Sums(links, "cpu", noted, specs).times((1, 256, 257), (256,))  # type: ignore[arg-type]
    sizes = [2 * HIDDEN * rows for rows in (1, 256, 257)]
    assert list(times.push) == list(times.library) == sizes and list(times.gather) == [256]
    assert noted.pushed == {
        specs[256].name: {(1, HIDDEN), (256, HIDDEN)},
        specs[1024].name: {(257, HIDDEN)},
    }
    assert noted.sums == {(rows, HIDDEN) for rows in (1, 256, 257)}
    assert noted.gathered == {(1, 128)}
