"""Continuous batching: which sequences run in the next step.

A request is admitted when pages for its known tokens can be taken and one more for each that runs;
pages for what it generates are added as it grows. When none is left the youngest is preempted: its
state and its pages go to the prefix cache, from where it goes on later. The oldest always goes on,
and fits, so every request ends. While some sequences prefill and others decode, the two kinds of
step take turns; where the plan says so, prompts first wait until a step has enough of them.

A step can be chosen while the one before it is in flight. Then the next decode step has all
sequences that certainly go on, and those that were in no step in flight; the others sit it out.
Nothing is preempted before all steps are committed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache
from tokenspeed_plan.runtime.cache.slot_copies import SlotMover
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.scheduling.admission import Admission, Clock
from tokenspeed_plan.runtime.scheduling.batch import Batch, BatchMaker
from tokenspeed_plan.runtime.scheduling.host_tier import HostTier
from tokenspeed_plan.runtime.scheduling.reservations import Reservations
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.scheduling.sequence_memory import NoteEnd, SequenceMemory
from tokenspeed_plan.runtime.scheduling.state_turns import take_recomputed


@dataclass(frozen=True, slots=True)
class Usage:
    """Waiting and running requests; the state slots and pages that they and copies hold."""

    waiting: int
    running: int
    state_slots: int
    pages: int


class Scheduler:
    """The queue, the running sequences, and through the prefix cache all pages and state slots.

    Args:
        plan: its programs and limits.
        chunk: lowers the prefill chunk below the planned one, in tokens.
        cache: whether sequences may share prefixes.
        clock: tells the time, which a simulation makes.
        mover: copies between the cache and its second tier, where the plan has one.
    """

    def __init__(
        self,
        plan: Plan,
        chunk: int | None = None,
        cache: bool = True,
        clock: Clock = time.perf_counter,
        mover: SlotMover | None = None,
    ) -> None:
        self.clock = clock
        self.limits = plan.pool.limits
        self.chunk = min(chunk or self.limits.max_tokens, self.limits.max_tokens)
        self.metrics = Metrics()
        self._memory = SequenceMemory(plan, self.metrics, cache, mover)
        self._admission = Admission(self._memory, clock)
        self._batches = BatchMaker(plan)
        self._last_phase: Phase = "decode"

    @property
    def cache(self) -> PrefixCache:
        """The cache, which owns all pages and state slots."""
        return self._memory.cache

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The sequences that are not admitted, in their order."""
        return tuple(self._admission.waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold memory."""
        return tuple(self._running)

    @property
    def _running(self) -> list[Sequence]:
        return self._admission.running

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._admission.waiting) + len(self._running)

    @property
    def usage(self) -> Usage:
        """What is in use now; other threads may ask, too."""
        return Usage(
            waiting=len(self._admission.waiting),
            running=len(self._running),
            state_slots=self.cache.state_slots_in_use,
            pages=self.cache.pages_in_use,
        )

    @property
    def reservations(self) -> Reservations:
        """What is held for prompts that come from elsewhere."""
        return self._memory.reservations

    @property
    def host_tier(self) -> HostTier:
        """The second tier of the cache."""
        return self._memory.host

    def tell_ends(self, note_end: NoteEnd) -> None:
        """Tell somebody of each checkpoint where an answer has ended."""
        self._memory.note_end = note_end

    def close(self) -> None:
        """Let what others launch from now on wait for all copies that are on their way."""
        self._memory.host.close()

    @property
    def is_blocked(self) -> bool:
        """Whether the first of the waiting sequences waits for memory."""
        return self._admission.blocked_head is not None

    def unblock(self) -> None:
        """Look at the waiting sequences again: memory was given back."""
        self._admission.blocked_head = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._admission.add(sequence)

    def schedule(self, in_flight: Batch | None = None) -> Batch | None:
        """The next step; None when nothing can be launched, or not before `in_flight` is committed.

        Args:
            in_flight: the step that was launched last, if it is not committed. All steps before it
                must be.
        """
        self._admission.admit()
        decoding = [s for s in self._running if s.state == "decoding"]
        ready: list[Sequence] | None
        if in_flight is None:
            ready = decoding = self._grow(decoding)
        else:
            ready = self._ready(decoding, in_flight.program)
        prefilling = [s for s in self._running if s.state == "prefilling" and not s.num_ahead]
        if ready is None or not (ready or prefilling):
            return None
        comes_later = self._last_phase == "prefill" or self._gathers(prefilling)
        if not prefilling or (ready and comes_later):
            self._last_phase = "decode"
            return self._batches.decode(ready)
        self._last_phase = "prefill"
        max_tokens = self.chunk
        if decoding:
            max_tokens = min(max_tokens, self.limits.interleaved_tokens)
        return self._batches.prefill(prefilling, max_tokens)

    def _gathers(self, prefilling: list[Sequence]) -> bool:
        """Whether prompts wait for others: all sequences are taken, so some will end and begin."""
        if len(self._running) < self.limits.max_seqs:
            return False
        return sum(sequence.num_left for sequence in prefilling) < self.limits.gathered_tokens

    def _ready(self, decoding: list[Sequence], in_flight: Program) -> list[Sequence] | None:
        """Those that a decode step can have before the step in flight is committed.

        One of them may turn out to have ended: then its part of the step is for nothing, and harms
        nobody.

        Returns:
            None where a page is missing, or where the rows of the next program are laid out in
            another way than those that the device makes now.
        """
        ready = []
        for sequence in decoding:
            if len(sequence.token_ids) > sequence.ready_len:
                version = sequence.pages_version
                if not self._memory.add_pages_ahead(sequence):
                    return None
                is_late = sequence.num_ahead and sequence.pages_version != version
                if is_late or not self._memory.can_go_on(sequence):
                    continue
            ready.append(sequence)
        if ready and any(sequence.num_ahead for sequence in ready):
            program = self._batches.decode_program(len(ready))
            if program.query_len != in_flight.query_len:
                return None
        return ready

    def advance(self, sequence: Sequence, count: int) -> None:
        """Note that a step has computed `count` more tokens of a sequence.

        Behind its prompt it leaves a state that the cache holds, too, and may now give up.
        """
        slot = sequence.state_slot
        leaves_state = slot and self.cache.state_slots.holders(slot) > 1
        self._memory.advance(sequence, count)
        if leaves_state:
            self.unblock()
        if sequence.state == "prefilling" and sequence.num_left <= self._memory.decodes:
            sequence.move_to("decoding")

    def is_simple(self, sequence: Sequence) -> bool:
        """Whether `Sequence.take_plain` is all that a decode step without drafts has to do."""
        return self._memory.is_simple(sequence)

    def finish(self, sequence: Sequence, has_state: bool = True, is_followed: bool = False) -> None:
        """End a sequence; the cache keeps its pages, and its state if that still exists.

        Args:
            sequence: has all its tokens.
            has_state: whether it exists.
            is_followed: whether a step in flight begins with the state after all these tokens.
        """
        self.metrics.lost_checkpoints += not has_state
        sequence.move_to("finished")
        self._memory.prove(sequence)
        self._stop(sequence, has_state, is_followed=is_followed)

    def fail(self, sequence: Sequence) -> None:
        """End a running sequence with an error; the cache keeps what others got answers from."""
        sequence.move_to("cancelled")
        self._stop(sequence, has_state=False, is_wrong=True)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request in any state; the cache keeps what it computed.

        A step in flight may still compute it; a second one has written over its state.
        """
        if sequence.state in ("finished", "cancelled"):
            return
        was_running = sequence.is_running
        sequence.move_to("cancelled")
        if was_running:
            steps = sequence.steps_ahead
            self._stop(sequence, has_state=steps < 2, is_followed=steps == 1)
        else:
            self._admission.remove(sequence)
            if not sequence.is_elsewhere:
                self.reservations.drop(sequence.request.request_id)

    def _grow(self, decoding: list[Sequence]) -> list[Sequence]:
        """Give each decoding sequence a page for its next token.

        Where there is none, the youngest running sequence is preempted.

        Returns:
            The sequences that still run.
        """
        for sequence in sorted(decoding, key=lambda s: s.number):
            while sequence.is_running and len(sequence.pages) < self._memory.num_pages(sequence):
                if not self._memory.add_page(sequence):
                    self._preempt(max(self._running, key=lambda s: s.number))
        left = [sequence for sequence in decoding if sequence.is_running]
        if self.limits.max_depth:
            for sequence in left:
                self._memory.add_draft_pages(sequence)
        return left

    def _preempt(self, sequence: Sequence) -> None:
        """Put a sequence back into the queue; its checkpoint is after its last computed token."""
        self.metrics.preemptions += 1
        sequence.move_to("preempted")
        self._stop(sequence)
        self._admission.put_back(sequence)

    def _stop(
        self,
        sequence: Sequence,
        has_state: bool = True,
        is_wrong: bool = False,
        is_followed: bool = False,
    ) -> None:
        """Release the memory of a running sequence."""
        self._running.remove(sequence)
        if is_followed:
            take_recomputed(sequence)
        self._memory.release(sequence, has_state, is_wrong)
        self._admission.blocked_head = None
