"""Launches the batches of an engine on its device."""

from __future__ import annotations

import time
from typing import Protocol

from torch import Tensor

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.adjustments import Adjustments
from tokenspeed_plan.runtime.execution.bound_programs import Part
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.inputs import InputWriter
from tokenspeed_plan.runtime.grammars.token_masks import TokenMasks
from tokenspeed_plan.runtime.in_flight import InFlightBatch
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import host_outputs
from tokenspeed_plan.runtime.scheduling.batch import Batch


class BatchLauncher(Protocol):
    """Starts steps; a simulation has one without a device."""

    def start(self, batch: Batch, part: Part = "whole") -> float:
        """Start a step, or its head; returns the seconds of it that were no work of the host."""

    def in_flight(self, batch: Batch, part: Part = "whole") -> InFlightBatch:
        """The step that was started last, whose outputs come later, after its tail."""

    def finish(self, in_flight: InFlightBatch) -> float:
        """Start the tail of the step that was started last; see `start`."""


class StepLauncher:
    """Writes the inputs of a batch, replays its program, and has its outputs copied.

    Args:
        plan: what is replayed.
        executor: replays it.
        metrics: counts the bytes of copied pages.
    """

    def __init__(self, plan: Plan, executor: Executor, metrics: Metrics) -> None:
        self._executor = executor
        self._metrics = metrics
        self._page_size = plan.pool.limits.page_size
        self._inputs = InputWriter(plan, executor.buffer)
        self._masks = TokenMasks(plan, executor)
        self._adjustments = Adjustments(plan, executor)
        self._outputs: dict[tuple[str, int, int, int], tuple[Tensor, ...]] = {}

    def start(self, batch: Batch, part: Part = "whole") -> float:
        """Start a replay; returns the seconds that it took, which a GPU spends later."""
        self._copy_pages(batch)
        change = self._inputs.write(batch)
        if part == "whole":
            self._write_late(batch)
        begun = time.perf_counter()
        self._executor.run(batch.program, batch.run_tokens, batch.run_seqs, change, part)
        return time.perf_counter() - begun

    def in_flight(self, batch: Batch, part: Part = "whole") -> InFlightBatch:
        """The replay that was started last; its outputs are copied to the host from now on."""
        logits, *values = self._outputs_of(batch)
        outputs = None
        if part == "whole":
            outputs = self._executor.copy_to_host(*values)
        return InFlightBatch(batch, outputs, logits, tokens=values[0])

    def finish(self, in_flight: InFlightBatch) -> float:
        """Start the tail of a replay whose head was started last; its outputs are copied then."""
        batch = in_flight.batch
        self._write_late(batch)
        begun = time.perf_counter()
        self._executor.run(batch.program, batch.run_tokens, batch.run_seqs, part="tail")
        waited_s = time.perf_counter() - begun
        _, *values = self._outputs_of(batch)
        in_flight.outputs = self._executor.copy_to_host(*values)
        return waited_s

    def _write_late(self, batch: Batch) -> None:
        """Write what is known only when the step before is committed."""
        self._masks.write(batch)
        self._adjustments.write(batch)

    def _outputs_of(self, batch: Batch) -> tuple[Tensor, ...]:
        """The logits of a step, its tokens, and what else the host reads."""
        program = batch.program
        size = (batch.run_tokens, batch.run_seqs)
        key = (program.phase, program.bucket, *size)
        found = self._outputs.get(key)
        if found is None:
            names = (program.logits, *host_outputs(program))
            found = tuple(self._executor.buffer(name, *size) for name in names)
            if program.captured or program.phase == "decode":  # of few sizes
                self._outputs[key] = found
        return found

    def _copy_pages(self, batch: Batch) -> None:
        """Give a sequence its own copy of a shared page in the middle of which it continues."""
        for sequence in batch.sequences:
            if sequence.copy_from is not None:
                page = sequence.pages[sequence.num_computed // self._page_size]
                self._metrics.copied_bytes += self._executor.copy_page(sequence.copy_from, page)
