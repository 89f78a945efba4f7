"""Launch on a GPU: each captured program is one CUDA graph; outputs come through pinned memory."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import LATE_INPUTS
from tokenspeed_plan.plans.peer_memory import NUM_SIGNALS
from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.inputs import write_inputs
from tokenspeed_plan.runtime.execution.launch import HostValues
from tokenspeed_plan.runtime.scheduling.batch import Batch

GraphKey = tuple[str, int, Part]  # phase and bucket of a program, and the part that is run

MAX_IN_FLIGHT = 4  # replays whose outputs may be on the way to the host at once


class GraphLaunch:
    """Launches CUDA graphs; only the reader of the outputs waits for the GPU."""

    def __init__(self) -> None:
        self._graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._pinned: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._turn = 0
        self._has_late_rows = False

    # A launch is made before its rank has chosen a device, and where there may be none.
    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @cached_property
    def _has_read(self) -> torch.cuda.Event:
        """Recorded when a step has read its late rows."""
        return torch.cuda.Event()

    def prepare(self, programs: BoundPrograms) -> None:
        """Capture all programs that the plan wants captured, and load the kernels of the others."""
        pool = programs.plan.pool
        self._has_late_rows = any(buffer.name in LATE_INPUTS for buffer in pool.buffers)
        limits = pool.limits
        values_per_seq = 2 * limits.max_depth + 3  # tokens, the number accepted, and drafts
        num_values = limits.max_seqs * values_per_seq + NUM_SIGNALS
        for _ in range(MAX_IN_FLIGHT):
            host = torch.empty(num_values, dtype=torch.int32)
            self._pinned.append(host.pin_memory())
            self._events.append(torch.cuda.Event())
        for program in pool.programs:
            if program.captured:
                for part in parts_of(programs, program):
                    key = (program.phase, program.bucket, part)
                    self._graphs[key] = capture(programs, program, part)
            else:
                programs.instructions(program, program.max_tokens, program.max_seqs)

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        """One replay: as a graph where the program is captured, else kernel by kernel."""
        if program.captured:
            graph = self._graphs[program.phase, program.bucket, part]
            graph.replay()
        else:
            programs.run(program, num_tokens, num_seqs, part)
        if self._has_late_rows and part != "head":
            self._has_read.record()

    def copy_beside(self, target: Tensor, source: Tensor) -> None:
        """Copy on a stream of its own; a rank may be behind the one that has read its outputs."""
        self._copies.wait_event(self._has_read)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._copies)

    def copy_to_host(self, *values: Tensor) -> HostValues:
        """The values are copied after the replay; reading them waits for that copy alone."""
        self._turn = (self._turn + 1) % MAX_IN_FLIGHT
        event = self._events[self._turn]
        sizes = [value.numel() for value in values]
        host = self._pinned[self._turn]
        targets = host[: sum(sizes)].split(sizes)
        for target, value in zip(targets, values, strict=True):
            target.copy_(value.flatten(), non_blocking=True)
        event.record()

        def wait() -> tuple[list[int], ...]:
            event.synchronize()
            return tuple(target.tolist() for target in targets)

        return wait


def parts_of(programs: BoundPrograms, program: Program) -> tuple[Part, ...]:
    """What is run of a program: all of it, and its two parts where it has them."""
    if programs.tail_start(program) == len(program.steps):
        return ("whole",)
    return ("whole", "head", "tail")


@torch.inference_mode()
def capture(
    programs: BoundPrograms, program: Program, part: Part = "whole"
) -> torch.cuda.CUDAGraph:
    """A program at its full size, or a part of it, as a CUDA graph.

    It runs once on padding before it is captured, which loads its kernels.
    """
    size = (program.max_tokens, program.max_seqs)
    padding = Batch.of(program, (), ())
    memory = programs.memory
    limits = programs.plan.pool.limits
    write_inputs(padding, lambda name: memory.buffer(name, *size), limits)
    programs.run(program, *size)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        programs.run(program, *size, part)
    return graph
