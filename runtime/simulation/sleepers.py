"""Sequences of a simulation that only get one more token each step: they sleep meanwhile.

Most sequences of a decode step need nothing but a token: no page, no end. What a step does for them
is known, so that it is done for all of them at once, by counting steps; the engine's own scheduler,
loop and commits work on those that are awake. A sequence wakes when the engine has more to do for
it: it needs a page, it ends, or it is preempted. Then it has what it would have if it had never
slept, and the step in flight has it, too.

One that could sleep stays awake while others sleep, so that the scheduler has something to decode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.in_flight import InFlightBatch
from tokenspeed_plan.runtime.output import OutputProcessor
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.scheduling.admission import Clock
from tokenspeed_plan.runtime.scheduling.batch import Batch, BatchMaker
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence, State
from tokenspeed_plan.runtime.simulation.virtual_steps import ShortBatch, VirtualLauncher
from tokenspeed_plan.runtime.step_commit import OnToken
from tokenspeed_plan.runtime.step_loop import StepLoop

ASLEEP: State = "waiting"  # it holds memory, and no step looks at it


def may_sleep(plan: Plan) -> bool:
    """Whether decode steps of a plan give each sequence one token, and nobody waits for a copy."""
    return not plan.pool.limits.max_depth and plan.pool.host_cache is None


@dataclass(slots=True)
class Sleepers:
    """All that sleep: each has what it fell asleep with, and one token for each step since.

    Attributes:
        token: that all of them get.
        steps: decode steps that were committed so far.
        last_s: when the last of them was.
        ahead: steps in flight that they are in, 0 or 1.
        since: the steps that had been committed when each fell asleep.
        woken: since this was emptied.
        known: tokens that are computed, of all of them, less the steps that there were before.
    """

    token: int
    steps: int = 0
    last_s: float = 0.0
    ahead: int = 0
    since: dict[Sequence, int] = field(default_factory=dict)
    woken: list[Sequence] = field(default_factory=list)
    known: int = 0
    _due: list[tuple[int, int, Sequence]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        return len(self.since)

    @property
    def known_tokens(self) -> int:
        """Tokens of all of them that are computed, or in flight."""
        return self.known + len(self.since) * (self.steps + self.ahead)

    @property
    def next_due(self) -> float:
        """The number of steps after which one must wake."""
        return self._due[0][0] if self._due else math.inf

    def add(self, sequence: Sequence, limit: int) -> None:
        """Let a sequence sleep until it has more than so many tokens."""
        sequence.state = ASLEEP
        self.since[sequence] = self.steps
        self.known += sequence.num_computed - self.steps
        due = self.steps + limit - len(sequence.token_ids) + 1
        heappush(self._due, (due, next(self._count), sequence))

    def wake(self, sequence: Sequence) -> Sequence:
        """Give a sequence what it has got in its sleep."""
        since = self.since.pop(sequence)
        self.known -= sequence.num_computed - since
        count = self.steps - since
        sequence.state = "decoding"
        sequence.num_ahead = sequence.steps_ahead = self.ahead
        if count:
            sequence.token_ids += [self.token] * count
            sequence.num_computed += count
            sequence.last_token_s = self.last_s
        if count % 2:
            own_slots = sequence.own_slots
            sequence.state_slot, own_slots[0] = own_slots[0], sequence.state_slot
        self.woken.append(sequence)
        return sequence

    def wake_due(self) -> list[Sequence]:
        """Wake those that the next step has more to do for."""
        found = []
        while self.next_due <= self.steps:
            _, _, sequence = heappop(self._due)
            if sequence in self.since:
                found.append(self.wake(sequence))
        return found


class ShortBatchMaker(BatchMaker):
    """Makes decode steps of those that are awake, and of all that sleep.

    Rows are kept as `keep_rows` does it, of which only the changes are looked at.

    Args:
        plan: of the programs.
        sleepers: who sleeps.
        running: all sequences that hold memory, in their order.
    """

    def __init__(self, plan: Plan, sleepers: Sleepers, running: list[Sequence]) -> None:
        super().__init__(plan)
        self._sleepers = sleepers
        self._running = running
        self._order: list[Sequence] = []  # those of the last decode step, in their rows
        self._row_of: dict[Sequence, int] = {}
        self._awake: list[Sequence] = []  # in the last decode step

    def decode(self, sequences: list[Sequence]) -> Batch:
        """One step of every sequence that is awake, and of those that sleep."""
        sleepers = self._sleepers
        size = len(sequences) + len(sleepers)
        self._place(sequences, size)
        self._awake, sleepers.woken = sequences, []
        rows = self.in_rows(sequences)
        counts = (1,) * len(rows)
        program = self.decode_program(size)
        return ShortBatch(program, rows, counts, len(sleepers), sleepers.known_tokens)

    def in_rows(self, sequences: Iterable[Sequence]) -> tuple[Sequence, ...]:
        """Sequences of the last decode step in the order of their rows."""
        return tuple(sorted(sequences, key=self._row_of.__getitem__))

    def _place(self, awake: list[Sequence], size: int) -> None:
        """Give new sequences the rows of those that have gone."""
        row_of, order, stay = self._row_of, self._order, {*awake}
        asleep = self._sleepers.since
        known = dict.fromkeys([*self._awake, *self._sleepers.woken])
        gone = [each for each in known if each not in stay and each not in asleep]
        gaps = [row_of.pop(each) for each in gone if each in row_of]
        joined = [each for each in awake if each not in row_of]
        if not gaps and not joined:
            return
        others = [each for each in order[size:] if each in row_of] + joined
        others.sort(key=self._running.index)
        gaps = [*sorted(row for row in gaps if row < size), *range(len(order), size)]
        del order[size:]
        for row, sequence in zip(gaps, others, strict=True):
            order[row : row + 1] = [sequence]
            row_of[sequence] = row


class NappingScheduler(Scheduler):
    """The engine's scheduler, of which most sequences sleep.

    Args:
        plan: its programs and limits.
        sleepers: who sleeps.
        clock: tells the time.
    """

    def __init__(self, plan: Plan, sleepers: Sleepers, clock: Clock) -> None:
        super().__init__(plan, clock=clock)
        self.rows = ShortBatchMaker(plan, sleepers, self._running)
        self._batches = self.rows
        self._sleepers = sleepers

    def _grow(self, decoding: list[Sequence]) -> list[Sequence]:
        """Where all that are awake are preempted, another one wakes, which needs no page."""
        left = super()._grow(decoding)
        if not left and self._sleepers.since:
            left = [self._sleepers.wake(next(iter(self._sleepers.since)))]
        return left

    @property
    def is_calm(self) -> bool:
        """Whether nobody can start, and all that run decode, but for one in their sleep."""
        asleep = len(self._sleepers)
        return self._admission.is_stuck and asleep == len(self._running) - 1

    def in_turn(self, sequences: list[Sequence], is_ahead: bool) -> list[Sequence]:
        """Sequences in the order in which they get pages."""
        if len(sequences) < 2:
            return sequences
        if is_ahead:
            place_of = {each: place for place, each in enumerate(self._running)}
            return sorted(sequences, key=place_of.__getitem__)
        return sorted(sequences, key=lambda each: each.number)

    def turn_page(self, sequence: Sequence, is_ahead: bool) -> bool:
        """Give a sequence a page, if its next step has nothing else to do for it.

        Where it has, or there is no page, the scheduler is left to do it all.
        """
        known, memory = len(sequence.token_ids), self._memory
        if known + 1 >= sequence.max_len:
            return False
        if is_ahead:
            is_late = len(sequence.pages) * self.limits.page_size <= known
            return not is_late and memory.add_pages_ahead(sequence) and memory.can_go_on(sequence)
        return len(sequence.pages) == memory.num_pages(sequence) or memory.add_page(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        if sequence in self._sleepers.since:
            self._sleepers.wake(sequence)
        super()._preempt(sequence)


class NappingLoop(StepLoop):
    """The engine's loop, which puts sequences to sleep and wakes them.

    Args:
        plan: its programs and limits.
        launcher: starts steps on a clock.
        scheduler: knows the same sleepers.
        outputs: adds tokens to those that are awake.
        sleepers: who sleeps.
    """

    def __init__(
        self,
        plan: Plan,
        launcher: VirtualLauncher,
        scheduler: NappingScheduler,
        outputs: OutputProcessor,
        sleepers: Sleepers,
    ) -> None:
        super().__init__(plan, launcher, scheduler, outputs)
        self._sleepers = sleepers
        self._virtual = launcher
        self._calm = scheduler
        self._rows = scheduler.rows
        self._page_size = plan.pool.limits.page_size
        self._lookout: Sequence | None = None  # stays awake

    def rest(self, until_s: float) -> None:
        """Go through steps in which nobody starts or ends, up to when the next request comes."""
        lookout, sleepers = self._lookout, self._sleepers
        if lookout is None or not self._can_rest(lookout):
            return
        flight = self.in_flight
        sleepers.ahead = _num_decoding(flight)
        sleepers.add(lookout, self._limit(lookout))
        size = len(sleepers)
        program = self._rows.decode_program(size)
        while self._scheduler.clock() < until_s and self._turn_pages():
            batch = ShortBatch(program, (), (), size, sleepers.known_tokens)
            flight = self._rest_awhile(batch, flight, until_s)
        if lookout in sleepers.since:
            sleepers.wake(lookout)
        if flight is not None and self._launches_ahead:
            self.in_flight = flight
            awake = [each for each in dict.fromkeys(sleepers.woken) if each.is_running]
            _list(flight, self._rows.in_rows(awake))

    def _can_rest(self, lookout: Sequence) -> bool:
        """Whether all decode and go on, one of them awake."""
        flight, last = self.in_flight, self.last_batch
        if self._launches_ahead:
            is_alone = flight is not None and flight.batch.sequences == (lookout,)
        else:
            is_alone = last is not None and last.program.phase == "decode"
        return is_alone and self._calm.is_calm and self._is_calm(lookout)

    def _turn_pages(self) -> bool:
        """Give pages to those who need one; False where one has to wake for more."""
        sleepers = self._sleepers
        due = sleepers.wake_due()
        for sequence in self._calm.in_turn(due, self._launches_ahead):
            if not self._calm.turn_page(sequence, self._launches_ahead):
                return False
            sleepers.add(sequence, self._limit(sequence))
        sleepers.woken.clear()
        return True

    def _rest_awhile(
        self, batch: ShortBatch, before: InFlightBatch | None, until_s: float
    ) -> InFlightBatch | None:
        """Steps of those who sleep, until one must wake; returns what is in flight after them."""
        most = max(self._sleepers.next_due - self._sleepers.steps, 1)
        count = self._virtual.repeat(batch, most, until_s, is_ahead=before is not None)
        self.metrics.steps += count
        self.metrics.decode_steps += count
        self._count_asleep(count)
        return None if before is None else self._virtual.in_flight(batch)

    def _count_asleep(self, count: int = 1) -> None:
        """Note that steps are committed, each with a token for each that sleeps."""
        sleepers, metrics = self._sleepers, self.metrics
        sleepers.steps += count
        sleepers.last_s = self._scheduler.clock()
        metrics.decode_passes += count * len(sleepers)
        metrics.decode_tokens += count * len(sleepers)

    def _launch_next(self, before: InFlightBatch | None) -> bool:
        sleepers = self._sleepers
        sleepers.ahead = _num_decoding(before)
        woken = sleepers.wake_due()
        lookout = self._lookout
        if sleepers.since and not (lookout and lookout.is_running and self._is_calm(lookout)):
            self._lookout = sleepers.wake(next(iter(sleepers.since)))
            woken.append(self._lookout)
        if before is not None and sleepers.ahead and woken:
            _list(before, self._rows.in_rows([*before.batch.sequences, *woken]))
        return super()._launch_next(before)

    def _commit(self, in_flight: InFlightBatch, on_token: OnToken | None) -> list[Completion]:
        finished = super()._commit(in_flight, on_token)
        if in_flight.batch.program.phase == "decode":
            self._count_asleep()
            self._put_to_sleep(in_flight.batch.sequences)
        return finished

    def _put_to_sleep(self, sequences: Iterable[Sequence]) -> None:
        """Of those that a step has given a token, all but one that would get but one more."""
        ahead = _num_decoding(self.in_flight)
        tired = [
            each
            for each in sequences
            if each.state == "decoding"
            and each is not self._lookout
            and each.num_ahead == ahead
            and each.is_plain
            and self._is_calm(each)
        ]
        if not (self._lookout and self._lookout.is_running) and tired:
            self._lookout = tired.pop()
        for sequence in tired:
            self._sleepers.add(sequence, self._limit(sequence))
        if self.in_flight is not None and ahead and tired:
            left = [each for each in self.in_flight.batch.sequences if each.state != ASLEEP]
            _list(self.in_flight, tuple(left))

    def _is_calm(self, sequence: Sequence) -> bool:
        """Whether its next step gives it a token, and nothing else; others need no part of it."""
        covered = len(sequence.digests) * self._page_size
        return (
            len(sequence.token_ids) <= self._limit(sequence)
            and covered <= sequence.num_computed
            and self._scheduler.is_simple(sequence)
        )

    def _limit(self, sequence: Sequence) -> int:
        """The most tokens with which that is so."""
        if self._launches_ahead:
            return sequence.ready_len
        return min(len(sequence.pages) * self._page_size, sequence.max_len - 2)


def _num_decoding(in_flight: InFlightBatch | None) -> int:
    """Decode steps in flight: one, or none."""
    return int(in_flight is not None and in_flight.batch.program.phase == "decode")


def _list(in_flight: InFlightBatch, awake: tuple[Sequence, ...]) -> None:
    """List those of a step in flight that are awake now."""
    batch, num_listed = in_flight.batch, len(awake)
    assert isinstance(batch, ShortBatch)
    asleep = batch.num_asleep + len(batch.sequences) - num_listed
    counts = (1,) * num_listed
    in_flight.batch = ShortBatch(batch.program, awake, counts, asleep, batch.known_asleep)
