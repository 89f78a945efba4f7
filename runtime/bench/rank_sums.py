"""What ranks need to exchange rows, on each of them: a library's collectives, and our kernels.

Everything is launched in a CUDA graph, one after the other, so that each call waits for the one
before it as it does between the kernels of a program. T rows, H columns of bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.plans.types import aligned
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES
from tokenspeed_plan.runtime.execution.kernels import Kernels
from tokenspeed_plan.runtime.execution.rank_links import Links

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
GATHERED_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 26)
GRAPH_BYTES = 1 << 28  # that the calls of a graph add up, at most, so that none finds its inputs


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Microseconds by bytes: of the reduced tensor, or of the gathered one."""

    push: dict[int, float]
    library: dict[int, float]
    gather: dict[int, float]


class Sums:
    """Sums and concatenations over ranks; all of them do the same.

    Args:
        links: to the other ranks.
        device: of this rank.
        kernels: that push, with residual sum and norm in them.
        specs: of these kernels, by the most rows that each is for.
    """

    def __init__(
        self, links: Links, device: str, kernels: Kernels, specs: Mapping[int, KernelSpec]
    ) -> None:
        self._links, self._device = links, device
        self._kernels, self._specs = kernels.without_overlap(), specs
        self._most = max(specs)
        largest = specs[self._most]
        operands = {param.name: param.tensor for param in largest.tensors}
        self._hidden = operands[largest.reduced_operand or ""].bind(1, 1)[-1]
        symmetric = [param for param in largest.tensors if param.role == "symmetric"]
        sizes = [aligned(each.tensor.size_bytes(self._most, 1)) for each in symmetric]
        self._peers = links.peer_memory(sum(sizes), device)
        parts = self._peers.own.split(sizes)
        self._memory = [
            part[: spec.tensor.size_bytes(self._most, 1)]
            .view(TORCH_DTYPES[spec.tensor.dtype])
            .view(spec.tensor.bind(self._most, 1))
            for spec, part in zip(symmetric, parts, strict=True)
        ]

    def times(
        self, rows: Iterable[int] = ROWS, gathered_bytes: Iterable[int] = GATHERED_BYTES
    ) -> RankTimes:
        """All of them.

        Args:
            rows: of the tensors that are added up.
            gathered_bytes: of the concatenations.
        """
        found = RankTimes({}, {}, {})
        for num_rows in rows:
            size_bytes = 2 * self._hidden * num_rows
            found.push[size_bytes] = self._time(size_bytes, partial(self._push, num_rows))
            found.library[size_bytes] = self._time(size_bytes, partial(self._all_reduce, num_rows))
        for size_bytes in gathered_bytes:
            found.gather[size_bytes] = self._time(size_bytes, partial(self._gather, size_bytes))
        return found

    def _time(self, size_bytes: int, make: Callable[[], Callable[[], object]]) -> float:
        """Microseconds of one of several calls in a graph, each with tensors of its own."""
        count = max(2, min(20, GRAPH_BYTES // size_bytes))
        calls = [make() for _ in range(count)]

        def work() -> None:
            for call in calls:
                call()

        self._links.meet()
        replay = captured(work, self._device)
        self._links.meet()
        return time_us(replay, self._device) / count

    def push(self, tensors: Sequence[Tensor]) -> Callable[[], object]:
        """A launch of our kernel: x, the residual and the norm's weight, the sum and its norm."""
        num_rows = tensors[0].shape[0]
        spec = self._specs[self._size_for(num_rows)]
        run = self._kernels.launcher(spec, self._links.rank, num_rows, num_rows, self._peers)
        return partial(run, {}, *tensors, *self._memory)

    def _size_for(self, num_rows: int) -> int:
        return min(most for most in self._specs if most >= num_rows)

    def _push(self, num_rows: int) -> Callable[[], object]:
        spec = self._specs[self._size_for(num_rows)]
        operands = [param for param in spec.tensors if param.role != "symmetric"]
        return self.push([self._made(each.tensor.bind(num_rows, num_rows)) for each in operands])

    def _all_reduce(self, num_rows: int) -> Callable[[], object]:
        assert self._links.collectives is not None
        source, target = (self._made((num_rows, self._hidden)) for _ in range(2))
        return partial(self._links.collectives.all_reduce, source, target)

    def _gather(self, size_bytes: int) -> Callable[[], object]:
        assert self._links.collectives is not None and self._links.group is not None
        columns = size_bytes // 2
        source = self._made((1, columns // self._links.group.size()))
        return partial(self._links.collectives.all_gather, source, self._made((1, columns)))

    def _made(self, shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device=self._device)
