"""Which waiting requests start: first come, first served, while there are pages for them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from tokenspeed_plan.runtime.cache.prefix_cache import Hit
from tokenspeed_plan.runtime.cache.prefix_tree import path_to
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.scheduling.sequence_memory import SequenceMemory

Clock = Callable[[], float]  # seconds since some beginning


class Admission:
    """The queue of waiting sequences.

    Attributes:
        waiting: in order of arrival.
        running: sequences that were started; the scheduler removes them.
        blocked_head: the first waiting sequence, once it was found not to fit; None again when
            memory is freed.
    """

    def __init__(self, memory: SequenceMemory, clock: Clock) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.blocked_head: Sequence | None = None
        self._memory = memory
        self._clock = clock
        self._cache = memory.cache
        self._reserved = memory.reservations
        self._limits = memory.limits
        self._num_added = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._num_added += 1
        sequence.number = self._num_added
        self.waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence where it was, before all that came later."""
        num_earlier = 0
        for other in self.waiting:
            if other.number < sequence.number:
                num_earlier += 1
        self.waiting.insert(num_earlier, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting sequence."""
        self.waiting.remove(sequence)
        self.blocked_head = None

    @property
    def is_stuck(self) -> bool:
        """Whether nobody can start before a running sequence ends or grows."""
        if self.blocked_head is not None or not self.waiting:
            return True
        return len(self.running) == self._limits.max_seqs

    def admit(self) -> None:
        """Start all sequences that fit now."""
        if self._memory.host.poll(is_idle=not self.running):
            self.blocked_head = None
        later: list[Sequence] = []
        self._admit_ready()
        while self.waiting and len(self.running) < self._limits.max_seqs:
            sequence = self.waiting.popleft()
            if sequence.is_elsewhere:
                later.append(sequence)
                continue
            if sequence is self.blocked_head:
                later.append(sequence)
                break
            hit = self._match(sequence)
            if self._is_coming(sequence, hit):
                later.append(sequence)
            elif self._fits(sequence, hit):
                if self._memory.host.fetch(sequence, hit, self.running):
                    later.append(sequence)
                else:
                    self._start(sequence, hit)
            elif not self.running and self._reserved.can_start(sequence):
                # It fits only without the prefix: the pages of its hit are in the way of its own.
                self._start(sequence, Hit(self._cache.root, 0))
            else:
                later.append(sequence)
                self.blocked_head = sequence
                break
        self.waiting.extendleft(reversed(later))

    def _admit_ready(self) -> None:
        """Start the sequences whose prompts have come from elsewhere, whoever waits before them.

        What is reserved for them is given back only as they start.
        """
        if not self._reserved.held:
            return
        for sequence in list(self.waiting):
            is_ready = sequence.request.request_id in self._reserved.held
            if is_ready and not sequence.is_elsewhere and len(self.running) < self._limits.max_seqs:
                hit = self._match(sequence)
                if self._fits(sequence, hit):
                    self.waiting.remove(sequence)
                    self._start(sequence, hit)

    def _match(self, sequence: Sequence) -> Hit:
        """What the cache has of it, less its last token, which must be computed in any case."""
        token_ids = sequence.token_ids
        num_tokens = len(token_ids)
        self._cache.extend(sequence.digests, token_ids, num_tokens)
        if sequence.is_scored:
            return Hit(self._cache.root, 0)
        return self._cache.match(sequence.digests, token_ids, num_tokens - 1)

    def _is_coming(self, sequence: Sequence, hit: Hit) -> bool:
        """Whether a running sequence is about to compute much more of the same prefix.

        If so, it is asked for a checkpoint there, and this sequence waits for it.
        """
        if not self._cache.enabled or sequence.is_scored:
            return False
        size = self._limits.page_size
        last_page_start = (len(sequence.token_ids) - 1) // size * size
        first = sequence.digests[:1]
        for other in self.running:
            # Most are past that already, or have nothing in common.
            if other.num_computed >= last_page_start or other.digests[:1] != first:
                continue
            shared_pages = num_common(sequence.digests, other.digests)
            position = min(shared_pages * size, last_page_start)
            is_ahead = other.number < sequence.number and other.num_computed < position
            if is_ahead and position - hit.num_tokens >= self._limits.min_checkpoint_tokens:
                other.checkpoint_requests.add(position)
                return True
        return False

    def _fits(self, sequence: Sequence, hit: Hit) -> bool:
        """Whether a state slot is left, and pages for it and one more for each running sequence."""
        if not self._memory.has_slot(hit) or not self._reserved.can_start(sequence):
            return False
        shared_pages = hit.num_tokens // self._limits.page_size
        new_pages = self._memory.num_pages(sequence) - shared_pages
        pages = self._cache.pages
        num_left = len(pages) - new_pages - len(self.running)
        if len(pages) - pages.num_free <= num_left:
            return True  # even if all that the cache has is in use
        taken = self._reserved.pages() | {node.page for node in path_to(hit.checkpoint)}
        copied = {other.copy_from for other in self.running if other.copy_from is not None}
        held = [other.pages for other in self.running]
        if len(taken) + len(copied) + sum(map(len, held)) <= num_left:
            return True  # even if no two have a page in common
        return len(taken.union(copied, *held)) <= num_left

    def _start(self, sequence: Sequence, hit: Hit) -> None:
        sequence.started_s = sequence.started_s or self._clock()
        self._memory.start(sequence, hit)
        sequence.move_to(self._memory.phase_of(sequence))
        self.running.append(sequence)


def num_common(digests: list[bytes], others: list[bytes]) -> int:
    """Whole pages that two sequences share.

    Digests are chained: where two are equal, all before them are, so that bisection finds the end.
    """

    def differs(index: int) -> bool:
        return digests[index] != others[index]

    shorter = min(len(digests), len(others))
    return bisect_left(range(shorter), True, key=differs)
