"""The steps of an engine: schedule a batch, launch it, and commit what it computed.

A captured program is launched ahead: while one step is in flight, the next is launched, and only
then are the outputs of the first read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.inputs import fill_inputs, input_values
from tokenspeed_plan.runtime.execution.launch import HostValues
from tokenspeed_plan.runtime.isolation import alone
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import OutputProcessor, StepOutput, host_outputs, step_output
from tokenspeed_plan.runtime.request import Completion, NewToken, failed
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

OnToken = Callable[[NewToken], object]


@dataclass(frozen=True, slots=True)
class InFlightBatch:
    """A batch that was launched.

    `outputs` waits for its tokens, how many drafts were accepted, and new drafts. It is None in the
    middle of a prompt, so that the next step is prepared while this one is computed.
    """

    batch: Batch
    outputs: HostValues | None
    logits: Tensor


class StepLoop:
    """Launches and commits the batches of a scheduler.

    Attributes:
        sequences: the requests that are not finished, by their id.
        in_flight: the batch that was launched and is not committed.
        last_batch: the batch that was launched last.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, outputs: OutputProcessor) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.in_flight: InFlightBatch | None = None
        self.last_batch: Batch | None = None
        self._executor = executor
        self._scheduler = scheduler
        self._outputs = outputs
        self._limits = scheduler.limits
        self._waited_s = 0.0

    @property
    def metrics(self) -> Metrics:
        """The counters of the scheduler."""
        return self._scheduler.metrics

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.sequences[sequence.request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs; False where there is none."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return False
        sequence.finish_reason = "cancelled"  # what is in flight for it is thrown away
        self._scheduler.cancel(sequence)
        return True

    def step(self, on_token: OnToken | None) -> list[Completion]:
        """Launch a batch, and commit the one before it; returns the requests that finished."""
        begun = time.perf_counter()
        self._waited_s = 0.0
        finished = self._step(on_token)
        self.metrics.host_s += time.perf_counter() - begun - self._waited_s
        return finished

    def _step(self, on_token: OnToken | None) -> list[Completion]:
        finished: list[Completion] = []
        if self.in_flight is not None:
            in_flight = self.in_flight
            overlapped = self._scheduler.next_overlapped_batch(in_flight.batch)
            self.in_flight = self._launch(overlapped) if overlapped else None
            finished = self._commit(in_flight, on_token)
            if finished or overlapped:
                return finished
        batch = self._scheduler.schedule()
        if batch is not None:
            launched = self._launch(batch)
            if batch.program.captured:
                self.in_flight = launched
            else:
                finished = self._commit(launched, on_token)
        return finished

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Measure time in a replay, or waiting for its tokens, which is not host work."""
        begun = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begun

    def _launch(self, batch: Batch) -> InFlightBatch:
        """Start a replay; if it follows the last one, its inputs are already on the device."""

        def buffer(name: str) -> Tensor:
            return self._executor.buffer(name, batch.run_tokens, batch.run_seqs)

        self._copy_pages(batch)
        if not batch.follows(self.last_batch):
            values = input_values(batch, self._limits)
            inputs = self._executor.inputs_of(batch.program, batch.run_tokens, batch.run_seqs)
            with self._waiting():
                fill_inputs(batch, values, inputs, self._limits)
        self.last_batch = batch
        with self._waiting():
            self._executor.run(batch.program, batch.run_tokens, batch.run_seqs)
        outputs = None
        if not batch.has_no_output:
            outputs = self._executor.copy_to_host(*map(buffer, host_outputs(batch.program)))
        return InFlightBatch(batch, outputs, buffer(batch.program.logits))

    def _copy_pages(self, batch: Batch) -> None:
        """Give a sequence its own copy of a shared page in the middle of which it continues."""
        for sequence in batch.sequences:
            if sequence.copy_from is not None:
                page = sequence.pages[sequence.num_computed // self._limits.page_size]
                self.metrics.copied_bytes += self._executor.copy_page(sequence.copy_from, page)

    def _commit(self, in_flight: InFlightBatch, on_token: OnToken | None) -> list[Completion]:
        """Add what a step computed to its sequences, and finish those that have ended."""
        batch, finished = in_flight.batch, list[Completion]()
        self.metrics.steps += 1
        self.metrics.decode_steps += batch.program.phase == "decode"
        if in_flight.outputs is None:
            self._advance(batch)
            return finished
        with self._waiting():
            outputs = in_flight.outputs()
        now = time.perf_counter()
        parts = []
        for index, sequence in enumerate(batch.sequences):
            if sequence.is_running:  # others had ended before this step was launched
                parts.append((index, sequence, step_output(batch.program, outputs, index)))
        new = [(owner, part) for index, owner, part in parts if batch.makes_token(index)]
        self._outputs.check_numbers(new, in_flight.logits)
        for index, sequence, output in parts:
            if not sequence.is_running:
                continue  # a callback has cancelled it meanwhile
            completion = self._commit_sequence(sequence, output, in_flight, index, now, on_token)
            if completion is not None:
                finished.append(completion)
        return finished

    def _advance(self, batch: Batch) -> None:
        """Advance all sequences of a batch within their prompts."""
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            if sequence.is_running:
                sequence.drafts = []
                self._scheduler.advance(sequence, count)

    def _commit_sequence(
        self,
        sequence: Sequence,
        output: StepOutput,
        in_flight: InFlightBatch,
        index: int,
        now_s: float,
        on_token: OnToken | None,
    ) -> Completion | None:
        """Commit the part of one sequence; returns its completion, if it ends.

        An error in it ends this sequence, and none of the others.
        """
        new_tokens = self._take_tokens(sequence, output, in_flight, index)
        if new_tokens:
            sequence.note_token(now_s)
        completion = None
        if sequence.finish_reason and not sequence.error:
            all_taken = len(new_tokens) == len(output.token_ids)
            completion = self._finish(sequence, in_flight.batch, all_taken)
        if on_token is not None:
            alone(sequence, partial(self._emit, sequence, new_tokens, on_token), None)
        if sequence.error:
            return self._fail(sequence)
        return completion

    def _take_tokens(
        self, sequence: Sequence, output: StepOutput, in_flight: InFlightBatch, index: int
    ) -> list[NewToken]:
        """Add the new tokens of a replay to a sequence, up to the one that ends it."""
        sequence.drafts = output.drafts
        batch = in_flight.batch
        append = partial(self._outputs.append_tokens, sequence, output, in_flight.logits)
        if batch.program.phase == "prefill":
            self._scheduler.advance(sequence, batch.counts[index])
            if sequence.num_left or sequence.error:
                return []
            return alone(sequence, append, [])
        new_tokens: list[NewToken] = []
        if not sequence.error:
            new_tokens = alone(sequence, append, [])
        if sequence.error:
            return []
        self._scheduler.advance(sequence, len(new_tokens))
        self.metrics.decode_passes += 1
        self.metrics.decode_tokens += len(new_tokens)
        return new_tokens

    def _fail(self, sequence: Sequence) -> Completion | None:
        """End a sequence with its error; none where its caller has cancelled it meanwhile."""
        name = sequence.request.request_id
        if sequence.finish_reason == "cancelled":
            return None
        self.metrics.failed_requests += 1
        if sequence.is_running:
            del self.sequences[name]
            self._scheduler.fail(sequence)
        return failed(sequence.request, str(sequence.error))

    def _finish(self, sequence: Sequence, batch: Batch, all_taken: bool) -> Completion | None:
        """End a sequence; `all_taken`: all tokens that the step computed for it belong to it.

        If it ends before the step's last token, a step that was launched since has written over the
        state at its end; the inputs that a plan keeps are still there.
        """
        has_state = all_taken or bool(self._limits.kept_inputs) or self.last_batch is batch
        self._scheduler.finish(sequence, has_state)
        del self.sequences[sequence.request.request_id]
        return alone(sequence, partial(self._outputs.completion, sequence), None)

    def _emit(self, sequence: Sequence, new_tokens: list[NewToken], on_token: OnToken) -> None:
        """Pass on each token but the last, which comes with the completion.

        The callback may cancel the request.
        """
        has_ended = sequence.state == "finished"
        emitted = new_tokens[:-1] if has_ended else new_tokens
        for new_token in emitted:
            if has_ended or sequence.is_running:
                on_token(new_token)
