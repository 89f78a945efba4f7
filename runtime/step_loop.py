"""The steps of an engine: schedule a batch, launch it, and commit what it computed.

Where programs are captured, a step is launched ahead: while one is in flight the next is chosen and
launched, and only then are the outputs of the first read. Sequences come, go, grow by pages and
report logprobs meanwhile; an end that only the host sees comes late, and what was computed after it
is thrown away. Everything is launched on one stream, so that memory can be given away as soon as
the last step that uses it is launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.inputs import InputWriter
from tokenspeed_plan.runtime.execution.launch import HostValues
from tokenspeed_plan.runtime.isolation import alone
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import (
    FIRST_TOKEN,
    NO_NUMBERS,
    Look,
    OutputProcessor,
    StepOutput,
    host_outputs,
    needs_look,
    step_output,
)
from tokenspeed_plan.runtime.request import Completion, NewToken, failed
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

OnToken = Callable[[NewToken], object]


@dataclass(slots=True)
class InFlightBatch:
    """A batch that was launched.

    `outputs` waits for its tokens, how many drafts were accepted, and new drafts. `look` is what is
    wanted of its logits; it is taken before another step `is_followed` by overwrites them.
    """

    batch: Batch
    outputs: HostValues
    logits: Tensor
    tokens: Tensor
    look: Look | None = None
    is_followed: bool = False

    def take_look(self, indices: list[int]) -> None:
        """Look at the logits of some of its sequences."""
        queries = self.batch.program.query_len
        rows, num_logprobs = list[int](), dict[int, int]()
        for index in indices:
            mine = range(index * queries, (index + 1) * queries)
            rows += mine
            count = self.batch.sequences[index].request.params.num_logprobs
            if count is not None:
                num_logprobs |= dict.fromkeys(mine, count)
        if rows:
            self.look = Look(self.logits, self.tokens, rows, num_logprobs)


class StepLoop:
    """Launches and commits the batches of a scheduler.

    Attributes:
        sequences: the requests that are not finished, by their id.
        in_flight: the batch that was launched and is not committed.
        last_batch: the batch that was launched last.
    """

    def __init__(
        self, plan: Plan, executor: Executor, scheduler: Scheduler, outputs: OutputProcessor
    ) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.in_flight: InFlightBatch | None = None
        self.last_batch: Batch | None = None
        self._executor = executor
        self._scheduler = scheduler
        self._outputs = outputs
        self._limits = scheduler.limits
        self._inputs = InputWriter(plan, executor.buffer)
        self._launches_ahead = any(program.captured for program in plan.pool.programs)
        self._captured_outputs: dict[tuple[str, int], tuple[Tensor, ...]] = {}
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
        before = self.in_flight
        was_launched = self._launch_next(before)
        finished: list[Completion] = []
        if before is not None:
            finished = self._commit(before, on_token)
            if not was_launched:
                self._launch_next(None)
        if self.in_flight is not None and not self._launches_ahead:
            in_flight, self.in_flight = self.in_flight, None
            finished += self._commit(in_flight, on_token)
        return finished

    def _launch_next(self, before: InFlightBatch | None) -> bool:
        """Launch the next step, if there is one, while `before` is in flight."""
        batch = self._scheduler.schedule(before.batch if before else None)
        self.in_flight = None
        if batch is None:
            return False
        if before is not None:
            self._look_at(before, batch)
        self.in_flight = self._launch(batch)
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
                if needs_look(sequence, queries) or sequence not in going_on
            ]
        )

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Measure time in a replay, or waiting for its tokens, which is not host work."""
        begun = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begun

    def _launch(self, batch: Batch) -> InFlightBatch | None:
        """Start a replay; None where the host needs nothing of it, so that it is committed."""

        self._copy_pages(batch)
        change = self._inputs.write(batch)
        self.last_batch = batch
        with self._waiting():
            self._executor.run(batch.program, batch.run_tokens, batch.run_seqs, change)
        if batch.has_no_output:
            self._advance(batch)
            return None
        logits, *values = self._outputs_of(batch)
        outputs = self._executor.copy_to_host(*values)
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.launch(count)
        return InFlightBatch(batch, outputs, logits, tokens=values[0])

    def _outputs_of(self, batch: Batch) -> tuple[Tensor, ...]:
        """The logits of a step, its tokens, and what else the host reads."""
        program = batch.program
        key = (program.phase, program.bucket)
        found = self._captured_outputs.get(key)
        if found is None:
            names = (program.logits, *host_outputs(program))
            size = (batch.run_tokens, batch.run_seqs)
            found = tuple(self._executor.buffer(name, *size) for name in names)
            if program.captured:  # always at the same size
                self._captured_outputs[key] = found
        return found

    def _copy_pages(self, batch: Batch) -> None:
        """Give a sequence its own copy of a shared page in the middle of which it continues."""
        for sequence in batch.sequences:
            if sequence.copy_from is not None:
                page = sequence.pages[sequence.num_computed // self._limits.page_size]
                self.metrics.copied_bytes += self._executor.copy_page(sequence.copy_from, page)

    def _commit(self, in_flight: InFlightBatch, on_token: OnToken | None) -> list[Completion]:
        """Add what a step computed to its sequences, and finish those that have ended."""
        batch, finished = in_flight.batch, list[Completion]()
        program = batch.program
        self._count_step(batch)
        with self._waiting():
            outputs = in_flight.outputs()
        now = time.perf_counter()
        others = list(range(len(batch.sequences)))
        if program.phase == "decode" and program.query_len == 1 and not self._limits.kept_inputs:
            others = self._commit_plain(batch, outputs[0], now, on_token, finished)
        parts = []
        for index in others:
            sequence = batch.sequences[index]
            if sequence.is_running:  # others had ended before this step was launched
                parts.append((index, sequence, step_output(program, outputs, index)))
        self._check(in_flight, parts)
        for index in others:
            if not batch.sequences[index].is_running:
                batch.sequences[index].land(batch.counts[index])
        for index, sequence, output in parts:
            if not sequence.is_running:
                continue  # a callback has cancelled it meanwhile
            sequence.land(batch.counts[index])
            completion = self._commit_sequence(sequence, output, in_flight, index, now, on_token)
            if completion is not None:
                finished.append(completion)
        return finished

    def _count_step(self, batch: Batch) -> None:
        self.metrics.steps += 1
        self.metrics.decode_steps += batch.program.phase == "decode"

    def _commit_plain(
        self,
        batch: Batch,
        tokens: list[int],
        now_s: float,
        on_token: OnToken | None,
        finished: list[Completion],
    ) -> list[int]:
        """Commit the sequences that have one more token and nothing else.

        Returns:
            The places of the others.
        """
        plain: list[Sequence] = []
        others: list[int] = []
        is_simple = self._scheduler.is_simple
        for index, (sequence, token) in enumerate(zip(batch.sequences, tokens, strict=False)):
            known = sequence.token_ids
            if (
                sequence.is_plain
                and token != FIRST_TOKEN
                and token not in sequence.stop_ids
                and len(known) + 1 < sequence.max_len
                and sequence.state == "decoding"
                and (sequence.ready_len >= 0 or is_simple(sequence))
            ):
                sequence.take_plain(token, now_s)
                plain.append(sequence)
            else:
                others.append(index)
        self.metrics.decode_passes += len(plain)
        self.metrics.decode_tokens += len(plain)
        if on_token is not None:
            finished += self._tell(plain, on_token)
        return others

    def _tell(self, sequences: list[Sequence], on_token: OnToken) -> list[Completion]:
        """Pass on the last token of each; returns what has failed by that."""
        found = []
        for sequence in sequences:
            if sequence.is_running:  # else a callback has cancelled it meanwhile
                token = NewToken(sequence.request.request_id, sequence.token_ids[-1])
                alone(sequence, partial(on_token, token), None)
                if sequence.error:
                    found.append(self._fail(sequence))
        return [completion for completion in found if completion is not None]

    def _check(
        self, in_flight: InFlightBatch, parts: list[tuple[int, Sequence, StepOutput]]
    ) -> None:
        """Find the sequences whose logits are not numbers, before anything is told of them."""
        batch = in_flight.batch
        queries = batch.program.query_len
        new = [part for part in parts if batch.makes_token(part[0])]
        if not in_flight.is_followed:
            in_flight.take_look(
                [
                    index
                    for index, sequence, output in new
                    if needs_look(sequence, queries) or FIRST_TOKEN in output.token_ids
                ]
            )
        look = in_flight.look
        if look is not None:
            self._outputs.check_numbers([part[1:] for part in new], look)
        late = [
            sequence
            for _, sequence, output in new
            if FIRST_TOKEN in output.token_ids
            and not (look is not None and look.has(output.first_row))
        ]
        if late:
            self._check_late(late)

    def _check_late(self, suspects: list[Sequence]) -> None:
        """Check sequences by their next logits, as these are overwritten: NaN stays in the caches.

        This waits for the step that was launched since; it has all of them.
        """
        later = self.in_flight
        assert later is not None, "nothing has overwritten their logits"
        queries = later.batch.program.query_len
        rows = [later.batch.sequences.index(sequence) * queries for sequence in suspects]
        look = Look(later.logits, later.tokens, rows, {})
        for sequence, row in zip(suspects, rows, strict=True):
            if not look.is_finite(row):
                sequence.error = NO_NUMBERS

    def _advance(self, batch: Batch) -> None:
        """Advance all sequences of a batch within their prompts."""
        self._count_step(batch)
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
            completion = self._finish(sequence, all_taken)
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
        append = partial(self._outputs.append_tokens, sequence, output, in_flight.look)
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

    def _finish(self, sequence: Sequence, all_taken: bool) -> Completion | None:
        """End a sequence; `all_taken`: all tokens that the step computed for it belong to it.

        If it ends before the step's last token, a step that was launched since has written over the
        state at its end; the inputs that a plan keeps are still there.
        """
        is_last = not sequence.steps_ahead
        has_state = all_taken or bool(self._limits.kept_inputs) or is_last
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
