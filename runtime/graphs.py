"""Replay on a GPU: programs of a fixed size as one CUDA graph each, tokens back through pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tokenspeed_plan.plans.schema import KernelCall, Program, Step
from tokenspeed_plan.runtime.executor import Executor, Instruction
from tokenspeed_plan.runtime.inputs import write_inputs
from tokenspeed_plan.runtime.scheduler import Batch
from tokenspeed_plan.runtime.triton_kernels import Launcher

FLIGHTS = 4  # replays whose tokens may be on their way at once


class GraphExecutor(Executor):
    """Captured programs are replayed by one launch; nothing here waits for the GPU, except who calls for tokens."""

    def prepare(self) -> None:
        """Capture every program that wants it, on a batch of padding; load the kernels of the others."""
        self._full: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        most = self.plan.pool.limits.max_seqs * (
            2 * self.plan.pool.limits.max_depth + 3
        )  # tokens, how many of them, and drafts
        self._pinned = [torch.empty(most, dtype=torch.int32).pin_memory() for _ in range(FLIGHTS)]
        self._events = [torch.cuda.Event() for _ in range(FLIGHTS)]
        self._turn = 0
        for program in self.plan.pool.programs:
            if program.captured:
                self._capture(program)
            else:
                self._bind(program, program.max_tokens, program.max_seqs)

    @torch.inference_mode()
    def _capture(self, program: Program) -> None:
        rows = (program.max_tokens, program.max_seqs)
        write_inputs(
            Batch.of(program, (), ()), lambda name: self.buffer(name, *rows), self.plan.pool.limits
        )
        super().run(program, *rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            super().run(program, *rows)
        self._graphs[program.phase, program.bucket] = graph

    def run(self, program: Program, num_tokens: int, num_seqs: int) -> None:
        """One replay: a graph where there is one, else kernel after kernel."""
        if program.captured:
            self._graphs[program.phase, program.bucket].replay()
        else:
            super().run(program, num_tokens, num_seqs)

    def steps(
        self, program: Program, num_tokens: int, num_seqs: int
    ) -> Iterator[tuple[Step, Iterable[Instruction]]]:
        """Kernels take addresses, so tensors are made once, at the program's size: a new size is ready in no time."""
        if self.backend is None:
            yield from super().steps(program, num_tokens, num_seqs)
            return
        key = (program.phase, program.bucket)
        if key not in self._full:
            places = self.places(program, program.max_tokens, program.max_seqs)
            self._full[key] = [self.tensors(step, places) for step in program.steps]
        launchers: dict[str, Launcher] = {}
        for step, tensors in zip(program.steps, self._full[key], strict=True):
            if not isinstance(step, KernelCall):
                yield step, self.reference(step, tensors)
                continue
            if step.kernel not in launchers:
                kernel = self.kernels[step.kernel]
                launchers[step.kernel] = self.backend.launcher(
                    kernel, self.rank, num_tokens, num_seqs, self.collectives
                )
            yield step, ((launchers[step.kernel], {}, tensors, ()),)

    def fetch(self, *values: Tensor) -> Callable[[], tuple[list[int], ...]]:
        """The values are copied behind the replay; asking for them waits for that copy alone."""
        self._turn = (self._turn + 1) % FLIGHTS
        sizes, event = [value.numel() for value in values], self._events[self._turn]
        places = self._pinned[self._turn][: sum(sizes)].split(sizes)
        for place, value in zip(places, values, strict=True):
            place.copy_(value.flatten(), non_blocking=True)
        event.record()

        def wait() -> tuple[list[int], ...]:
            event.synchronize()
            return tuple(place.tolist() for place in places)

        return wait
