"""The inputs of a step as one block of bytes, in host memory, for all ranks.

Rank 0 fills it, every rank copies it to its device in one piece, and spreads it there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.execution.inputs import DEVICE_ONLY
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory

_ALIGNMENT = 16  # bytes
_IN_FLIGHT = 4  # blocks whose copy to a GPU may not have ended


def largest_block_bytes(plan: Plan) -> int:
    """Bytes that the inputs of any program fit in."""
    specs = {buffer.name: buffer.tensor for buffer in plan.pool.buffers}
    sizes = []
    for program in plan.pool.programs:
        inputs = (specs[name] for name in program.inputs)
        size = (program.max_tokens, program.max_seqs)
        sizes.append(sum(spec.size_bytes(*size) + _ALIGNMENT for spec in inputs))
    return max(sizes)


class InputBlocks:
    """Blocks that take turns.

    Args:
        memory: whose input buffers are written.
    """

    def __init__(self, memory: PlanMemory) -> None:
        size_bytes = largest_block_bytes(memory.plan)
        self._memory = memory
        self._on_gpu = memory.plan.target.device == "cuda"
        self._host: list[Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._device: Tensor | None = None
        for _ in range(_IN_FLIGHT if self._on_gpu else 1):
            block = torch.zeros(size_bytes, dtype=torch.uint8)
            self._host.append(block.pin_memory() if self._on_gpu else block)
            if self._on_gpu:
                self._sent.append(torch.cuda.Event())
        if self._on_gpu:
            self._device = torch.zeros(size_bytes, dtype=torch.uint8, device="cuda")
        self._turn = 0

    def take(self, program: Program, num_tokens: int, num_seqs: int) -> dict[str, Tensor]:
        """The input buffers of a program in the next block, to be filled."""
        self._turn = (self._turn + 1) % len(self._host)
        if self._on_gpu:
            self._sent[self._turn].synchronize()
        block = self._host[self._turn].zero_()  # what is not filled names page 0
        return {name: view for name, view, _ in self._views(block, program, num_tokens, num_seqs)}

    def bytes_of(self, program: Program, num_tokens: int, num_seqs: int) -> bytes:
        """What the block that was taken last holds."""
        block = self._host[self._turn]
        end = max(end for *_, end in self._views(block, program, num_tokens, num_seqs))
        return block[:end].numpy().tobytes()

    def receive(self, content: bytes) -> None:
        """Fill the next block with the bytes of another rank's."""
        self._turn = (self._turn + 1) % len(self._host)
        if self._on_gpu:
            self._sent[self._turn].synchronize()
        block = self._host[self._turn]
        block[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def copy_to_buffers(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """Copy the block that was filled last to the input buffers."""
        block = self._host[self._turn]
        views = list(self._views(block, program, num_tokens, num_seqs))
        if self._device is not None:
            end = max(end for *_, end in views)
            self._device[:end].copy_(block[:end], non_blocking=True)
            self._sent[self._turn].record()
            views = list(self._views(self._device, program, num_tokens, num_seqs))
        for name, view, _ in views:
            self._memory.buffer(name, num_tokens, num_seqs).copy_(view)

    def _views(
        self, block: Tensor, program: Program, num_tokens: int, num_seqs: int
    ) -> Iterator[tuple[str, Tensor, int]]:
        """Name, place in the block, and end of each input, one after the other."""
        start = 0
        for name in program.inputs:
            if name in DEVICE_ONLY:
                continue
            buffer = self._memory.buffer(name, num_tokens, num_seqs)
            end = start + buffer.nbytes
            yield name, block[start:end].view(buffer.dtype).view(buffer.shape), end
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
