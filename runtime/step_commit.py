"""Commits a step: its tokens go to their sequences, and those that have ended are answered.

Most sequences of a decode step get one more token and nothing else. They are told by a look at it
and at their length, and take it in one pass; all that costs time is done for the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tokenspeed_plan.runtime.in_flight import InFlightBatch
from tokenspeed_plan.runtime.isolation import alone
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import (
    FIRST_TOKEN,
    NO_NUMBERS,
    Look,
    OutputProcessor,
    StepOutput,
    needs_look,
    step_output,
)
from tokenspeed_plan.runtime.request import Completion, NewToken, failed
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

OnToken = Callable[[NewToken], object]


class StepCommit:
    """Commits the steps of an engine.

    Attributes:
        sequences: the requests that are not finished, by their id.
    """

    def __init__(self, scheduler: Scheduler, outputs: OutputProcessor) -> None:
        self.sequences: dict[str, Sequence] = {}
        self._scheduler = scheduler
        self._outputs = outputs
        self._limits = scheduler.limits

    @property
    def metrics(self) -> Metrics:
        """The counters of the scheduler."""
        return self._scheduler.metrics

    def commit(
        self,
        in_flight: InFlightBatch,
        outputs: tuple[list[int], ...],
        later: InFlightBatch | None,
        on_token: OnToken | None,
    ) -> list[Completion]:
        """Add what a step computed to its sequences, and finish those that have ended.

        Args:
            in_flight: the step.
            outputs: what it has given to the host.
            later: the step that was launched since, if there is one.
            on_token: is told each token of those that go on.
        """
        batch, finished = in_flight.batch, list[Completion]()
        program = batch.program
        self.count_step(batch)
        now = self._scheduler.clock()
        others = [i for i in range(len(batch.sequences)) if i not in in_flight.advanced]
        if program.phase == "decode" and program.query_len == 1 and not self._limits.kept_inputs:
            others = self._commit_plain(batch, outputs[0], now, on_token, finished)
        parts = []
        for index in others:
            sequence = batch.sequences[index]
            if sequence.is_running:  # others had ended before this step was launched
                parts.append((index, sequence, step_output(program, outputs, index)))
        self._check(in_flight, later, parts)
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

    def count_step(self, batch: Batch) -> None:
        """Note that a step is over, or will be without anybody looking."""
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
        self,
        in_flight: InFlightBatch,
        later: InFlightBatch | None,
        parts: list[tuple[int, Sequence, StepOutput]],
    ) -> None:
        """Find the sequences whose logits are not numbers, before anything is told of them."""
        batch = in_flight.batch
        queries = batch.program.query_len
        new = [p for p in parts if batch.makes_token(p[0]) or in_flight.scores(p[0])]
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
            assert later is not None, "nothing has overwritten their logits"
            self._check_late(late, later)

    def _check_late(self, suspects: list[Sequence], later: InFlightBatch) -> None:
        """Check sequences by their next logits, as these are overwritten: NaN stays in the caches.

        This waits for the step that was launched since; it has all of them.
        """
        queries = later.batch.program.query_len
        rows = [later.batch.sequences.index(sequence) * queries for sequence in suspects]
        look = Look(later.logits, later.tokens, rows, {}, {})
        for sequence, row in zip(suspects, rows, strict=True):
            if not look.is_finite(row):
                sequence.error = NO_NUMBERS

    def advance(self, batch: Batch) -> frozenset[int]:
        """Advance the sequences of a batch that stay inside their prompts; returns their places."""
        inside = frozenset(i for i in range(len(batch.sequences)) if batch.stays_inside(i))
        for index in sorted(inside):
            batch.sequences[index].drafts = []
            self._scheduler.advance(batch.sequences[index], batch.counts[index])
        return inside

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
            if in_flight.scores(index) and in_flight.look is not None:
                token = sequence.token_ids[sequence.num_computed + 1]
                score = in_flight.look.logprobs(output.first_row, token)
                sequence.prompt_logprobs += [score] if score is not None else []
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
        self._scheduler.finish(sequence, has_state, all_taken and not is_last)
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
