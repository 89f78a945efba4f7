"""The steps of an engine: schedule a batch, launch it, and commit what it computed.

Where programs are captured, a step is launched ahead: while one is in flight the next is chosen and
launched, and only then are the outputs of the first read. Sequences come, go, grow by pages and
report logprobs meanwhile; an end that only the host sees comes late, and what was computed after it
is thrown away. Everything is launched on one stream, so that memory can be given away as soon as
the last step that uses it is launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.bound_programs import Part
from tokenspeed_plan.runtime.in_flight import InFlightBatch
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import OutputProcessor, needs_look
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.step_commit import OnToken, StepCommit
from tokenspeed_plan.runtime.step_launcher import BatchLauncher


class Elsewhere(Protocol):
    """Lets another pool compute the prompts of an engine; see `runtime/pools`."""

    def offer(self, sequence: Sequence) -> None:
        """Look at a sequence that was just queued; it starts once its prompt is computed."""

    def poll(self, is_busy: bool) -> None:
        """Look what has come; where there is nothing else to do, wait a moment for it."""

    def close(self) -> None:
        """Compute all prompts here from now on."""

    @property
    def is_open(self) -> bool:
        """Whether it has something to do although nobody waits."""

    @property
    def num_heard(self) -> int:
        """Rises while peers compute."""

    def gauges(self) -> list[tuple[str, str, Callable[[], float]]]:
        """What can be measured: a name, a text, and what reads it."""


# Told each turn of a loop: when it began and ended, its seconds that were no work of the host, and
# the requests that finished.
Watch = Callable[[float, float, float, list[Completion]], object]


class StepLoop:
    """Launches and commits the batches of a scheduler.

    Attributes:
        in_flight: the batch that was launched and is not committed.
        last_batch: the batch that was launched last.
        elsewhere: lets another pool compute prompts; None where they are computed here.
        watch: is told each turn; None where nobody looks.
    """

    def __init__(
        self, plan: Plan, launcher: BatchLauncher, scheduler: Scheduler, outputs: OutputProcessor
    ) -> None:
        self.in_flight: InFlightBatch | None = None
        self.last_batch: Batch | None = None
        self.elsewhere: Elsewhere | None = None
        self.watch: Watch | None = None
        self._launcher = launcher
        self._scheduler = scheduler
        self._commits = StepCommit(scheduler, outputs)
        self._launches_ahead = any(program.captured for program in plan.pool.programs)
        self._waited_s = 0.0

    @property
    def sequences(self) -> dict[str, Sequence]:
        """The requests that are not finished, by their id."""
        return self._commits.sequences

    @property
    def num_moves(self) -> int:
        """Rises while it gets on, or those that compute prompts for it do."""
        if self.elsewhere is None:
            return self.metrics.steps
        return self.metrics.steps + self.elsewhere.num_heard

    @property
    def metrics(self) -> Metrics:
        """The counters of the scheduler."""
        return self._scheduler.metrics

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.sequences[sequence.request.request_id] = sequence
        self._scheduler.add(sequence)
        if self.elsewhere is not None:
            self.elsewhere.offer(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs; False where there is none."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return False
        sequence.finish_reason = "cancelled"  # what is in flight for it is thrown away
        self._scheduler.cancel(sequence)
        return True

    def close(self) -> None:
        """Ask nobody else for anything any more."""
        self._scheduler.close()
        if self.elsewhere is not None:
            self.elsewhere.close()
            self.elsewhere = None

    def step(self, on_token: OnToken | None) -> list[Completion]:
        """Launch a batch, and commit the one before it; returns the requests that finished."""
        begun = time.perf_counter()
        self._waited_s = 0.0
        finished = self._step(on_token)
        ended = time.perf_counter()
        self.metrics.host_s += ended - begun - self._waited_s
        if self.watch is not None:
            self.watch(begun, ended, self._waited_s, finished)
        return finished

    def _step(self, on_token: OnToken | None) -> list[Completion]:
        before = self.in_flight
        was_launched = self._launch_next(before)
        self._poll_elsewhere(is_busy=was_launched or before is not None)
        finished: list[Completion] = []
        if before is not None:
            finished = self._commit(before, on_token)
            if not was_launched:
                self._launch_next(None)
            elif self.in_flight is not None:
                self._launch_rest(self.in_flight)
        if self.in_flight is not None and not self._launches_ahead:
            in_flight, self.in_flight = self.in_flight, None
            finished += self._commit(in_flight, on_token)
        return finished

    def _poll_elsewhere(self, is_busy: bool) -> None:
        """Look at other pools while the device is busy with what was just launched."""
        if self.elsewhere is not None:
            begun = time.perf_counter()
            self.elsewhere.poll(is_busy)
            self._waited_s += time.perf_counter() - begun

    def _launch_next(self, before: InFlightBatch | None) -> bool:
        """Launch the next step, if there is one, while `before` is in flight."""
        batch = self._scheduler.schedule(before.batch if before else None)
        self.in_flight = None
        if batch is None:
            return False
        if before is not None:
            self._look_at(before, batch)
        self.in_flight = self._launch(batch, is_ahead=before is not None)
        return True

    def _look_at(self, before: InFlightBatch, batch: Batch) -> None:
        """Take what the host will want of the logits of a step, before another one is launched.

        A sequence that goes on is looked at when its tokens give a reason, in the logits that come
        after them: see `_check_late`.
        """
        before.is_followed = True
        going_on = frozenset(batch.sequences)
        queries = before.batch.program.query_len
        before.take_look(
            [
                index
                for index, sequence in enumerate(before.batch.sequences)
                if index not in before.advanced
                and (needs_look(sequence, queries) or sequence not in going_on)
            ]
        )

    def _commit(self, in_flight: InFlightBatch, on_token: OnToken | None) -> list[Completion]:
        assert in_flight.outputs is not None, "its tail is not launched"
        begun = time.perf_counter()
        outputs = in_flight.outputs()
        self._waited_s += time.perf_counter() - begun  # which is not host work
        return self._commits.commit(in_flight, outputs, self.in_flight, on_token)

    def _launch(self, batch: Batch, is_ahead: bool) -> InFlightBatch | None:
        """Start a step; None where the host needs nothing of it, so that it is committed.

        Sequences that stay inside their prompts go on at once: who waited for the others of its
        step would lose its turn to a later prompt.

        What a grammar allows next, or a penalty changes, is known when the step in flight is
        committed: ahead of that only the head of the program is launched.
        """
        self.last_batch = batch
        part: Part = "whole"
        if is_ahead and batch.must_be_read and not batch.has_no_output:
            part = "head"
        self._waited_s += self._launcher.start(batch, part)
        inside = frozenset[int]()
        if part == "whole":
            inside = self._commits.advance(batch)
        if len(inside) == len(batch.sequences):
            self._commits.count_step(batch)
            return None
        in_flight = self._launcher.in_flight(batch, part)
        in_flight.advanced = inside
        for index, sequence in enumerate(batch.sequences):
            if index not in inside:
                sequence.launch(batch.counts[index])
        return in_flight

    def _launch_rest(self, in_flight: InFlightBatch) -> None:
        """Launch the tail of a program whose head is launched."""
        if in_flight.outputs is None:
            self._waited_s += self._launcher.finish(in_flight)
