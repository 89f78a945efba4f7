"""Notes what an engine's steps and requests are like while it runs.

A step costs a few microseconds of it: all are counted, and of each program some, evenly spread, are
looked at.

The device's part of a step is not timed by itself. Where steps are launched ahead, the device
begins one when the one before it ends; so it is the time from one commit to the next, if the host
waited in it. Elsewhere it is the time in which the host waited.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from copy import copy
from typing import NamedTuple

from tokenspeed_plan.plans.schema import Program
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.history.run_record import (
    LoadFacts,
    Measured,
    Spread,
    StepRow,
    digits,
)
from tokenspeed_plan.runtime.history.sparse_sample import SparseSample
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.scheduling.batch import Batch

LOOKS = 256  # of each program
ANSWERS = 4096
MIN_WAIT = 0.05  # share of a step that the host waits, where the device decides how long it takes


class _DeviceLook(NamedTuple):
    """A step that is over; `device_us` is None where it is not known, `known` are tokens before."""

    device_us: float | None
    seqs: int
    tokens: int
    known: int


class _HostLook(NamedTuple):
    """A turn of the loop: the step that it launched, and the sequences whose step it committed."""

    host_us: float
    seqs: int
    committed: int
    prompts: int


class _Answer(NamedTuple):
    """A finished request."""

    prompt_len: int
    output_len: int
    ttft_s: float
    queue_s: float
    tpot_s: float | None


class _Steps:
    """The steps of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.wall_s = 0.0
        self.device = SparseSample[_DeviceLook](LOOKS)
        self.host = SparseSample[_HostLook](LOOKS)

    def row(self) -> StepRow:
        """They in a row of the history."""
        program, looks = self.program, self.device.values
        times_us = [look.device_us for look in looks if look.device_us is not None]
        seqs = _mean(look.seqs for look in looks)
        turns = self._turns()
        return StepRow(
            phase=program.phase,
            bucket=program.bucket,
            depth=program.depth,
            steps=self.device.count,
            wall_s=digits(self.wall_s),
            seqs=seqs,
            tokens=_mean(look.tokens for look in looks),
            context=digits(sum(look.known for look in looks) / max(seqs * len(looks), 1)),
            committed=_mean(turn.committed for turn in turns),
            prompts=_mean(turn.prompts for turn in turns),
            timed=len(times_us),
            device_us=_median(times_us),
            host_us=_median([turn.host_us for turn in turns]),
        )

    def _turns(self) -> list[_HostLook]:
        """Turns that say what a step costs the host: of decode those of one batch all the time."""
        turns = self.host.values
        if self.program.phase == "prefill":
            return turns
        return [turn for turn in turns if turn.seqs == turn.committed]


class LoadWatch:
    """Watches the loop of an engine from now on.

    Args:
        engine: does the work.
    """

    def __init__(self, engine: Engine) -> None:
        self._loop = engine.loop
        self._launches_ahead = any(program.captured for program in engine.plan.pool.programs)
        self._metrics = engine.metrics
        self._before = copy(engine.metrics)
        self._programs: dict[str, _Steps] = {}
        self._answers = SparseSample[_Answer](ANSWERS)
        self._failed = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._begun_s = self._ended_s = time.perf_counter()
        self._busy_s = self._request_s = 0.0
        self._most = 0
        self._last: Batch | None = None
        self._pending: Batch | None = None
        self._is_clear = True  # nothing but the pending step is on the device
        engine.loop.watch = self.note

    def note(
        self, begun_s: float, ended_s: float, waited_s: float, finished: Sequence[Completion]
    ) -> None:
        """Note a turn of the loop."""
        wall_s = ended_s - begun_s
        at_once = len(self._loop.sequences) + len(finished)
        self._busy_s += wall_s
        self._request_s += at_once * wall_s
        self._most = max(self._most, at_once)
        self._note_step(ended_s, wall_s, waited_s)
        self._ended_s = ended_s
        if finished:
            self._note_answers(finished)

    def _note_step(self, ended_s: float, wall_s: float, waited_s: float) -> None:
        """Note the step that a turn launched, and those that are over after it."""
        loop, host_us = self._loop, (wall_s - waited_s) * 1e6
        launched = loop.last_batch if loop.last_batch is not self._last else None
        self._last = loop.last_batch
        before, self._pending = self._pending, loop.in_flight.batch if loop.in_flight else None
        is_over = launched is not None and launched is not self._pending
        if launched is not None:
            other = launched if is_over and not self._launches_ahead else before
            committed = len(other.sequences) if other else 0
            self._count_host(launched, committed, is_over, host_us)
        if before is not None:
            self._count_over(before, wall_s, self._period_s(ended_s, waited_s))
            self._is_clear = True
        if launched is not None and is_over:
            device_s = None if self._launches_ahead else waited_s
            self._count_over(launched, 0.0 if before else wall_s, device_s)
            # A part of a prompt that has no outputs may still be on its way.
            self._is_clear = False

    def _period_s(self, ended_s: float, waited_s: float) -> float | None:
        """The time since the last commit, if the device needed all of it for one step."""
        period_s = ended_s - self._ended_s
        is_alone = self._is_clear and self._loop.elsewhere is None
        if is_alone and waited_s > MIN_WAIT * period_s:
            return period_s
        return None

    def _steps_of(self, batch: Batch) -> _Steps:
        name = batch.program.name
        steps = self._programs.get(name)
        if steps is None:
            steps = self._programs[name] = _Steps(batch.program)
        return steps

    def _count_over(self, batch: Batch, wall_s: float, device_s: float | None) -> None:
        """Count a step whose tokens are committed."""
        steps = self._steps_of(batch)
        steps.wall_s += wall_s
        if steps.device.is_due():
            device_us = None if device_s is None else device_s * 1e6
            pairs = zip(batch.sequences, batch.counts, strict=True)
            known = sum(max(sequence.num_computed - count, 0) for sequence, count in pairs)
            seqs = len(batch.sequences)
            steps.device.keep(_DeviceLook(device_us, seqs, batch.num_tokens, known))

    def _count_host(self, batch: Batch, committed: int, is_over: bool, host_us: float) -> None:
        """Count a turn that has launched a step, which may be over."""
        host = self._steps_of(batch).host
        if host.is_due():
            seqs, prompts = len(batch.sequences), 0
            if batch.program.phase == "prefill":
                prompts = _num_new(batch, is_over)
            host.keep(_HostLook(host_us, seqs, committed, prompts))

    def _note_answers(self, finished: Iterable[Completion]) -> None:
        for done in finished:
            if done.error is not None:
                self._failed += 1
                continue
            output_len = len(done.token_ids)
            self._prompt_tokens += done.num_prompt_tokens
            self._cached_tokens += done.num_cached_tokens
            self._output_tokens += output_len
            tpot_s = done.decode_s / (output_len - 1) if output_len > 1 else None
            self._answers.add(
                _Answer(done.num_prompt_tokens, output_len, done.ttft_s, done.queue_s, tpot_s)
            )

    def rows(self) -> tuple[StepRow, ...]:
        """The steps so far, by program."""
        some = [steps for steps in self._programs.values() if steps.device.count]
        some.sort(key=lambda steps: (steps.program.phase, steps.program.bucket))
        return tuple(steps.row() for steps in some)

    def load(self) -> LoadFacts:
        """What was asked so far."""
        answers = self._answers.values
        return LoadFacts(
            requests=self._answers.count,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            concurrency_mean=digits(self._request_s / max(self._busy_s, 1e-9)),
            concurrency_max=self._most,
            prompt_len=Spread.of([answer.prompt_len for answer in answers]),
            output_len=Spread.of([answer.output_len for answer in answers]),
        )

    def measured(self) -> Measured:
        """What it was like so far."""
        answers, now, before = self._answers.values, self._metrics, self._before
        total_s = max(time.perf_counter() - self._begun_s, 1e-9)
        host_s, steps = now.host_s - before.host_s, now.steps - before.steps
        return Measured(
            total_s=digits(total_s),
            busy_s=digits(self._busy_s),
            tokens_per_s_out=digits(self._output_tokens / total_s),
            ttft_ms=Spread.of([answer.ttft_s * 1e3 for answer in answers]),
            tpot_ms=Spread.of([each.tpot_s * 1e3 for each in answers if each.tpot_s is not None]),
            queue_ms=Spread.of([answer.queue_s * 1e3 for answer in answers]),
            host_us_per_step=digits(host_s / max(steps, 1) * 1e6),
            preemptions=now.preemptions - before.preemptions,
        )


def _num_new(batch: Batch, is_over: bool) -> int:
    """Prompts that a step begins, or has begun."""
    new = 0
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        before = sequence.num_computed - count * is_over
        new += before <= (sequence.num_cached_tokens or 0)
    return new


def _mean(numbers: Iterable[float]) -> float:
    """To four digits; 0 of none."""
    every = list(numbers)
    return digits(sum(every) / max(len(every), 1))


def _median(numbers: Sequence[float]) -> float | None:
    """To four digits; None of none."""
    if not numbers:
        return None
    return digits(statistics.median(numbers))
