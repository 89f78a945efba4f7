"""Which waiting requests start: first come, first served, while pages for their tokens are left."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from tokenspeed_plan.runtime.cache.prefix_cache import Hit
from tokenspeed_plan.runtime.cache.prefix_tree import path_to
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.scheduling.sequence_memory import SequenceMemory


class Admission:
    """The queue.

    Attributes:
        waiting: in order of arrival.
        running: those that were started; the scheduler removes them.
        blocked_head: the first that was found not to fit; nothing was freed since.
    """

    def __init__(self, memory: SequenceMemory) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.blocked_head: Sequence | None = None
        self._memory = memory
        self._cache = memory.cache
        self._limits = memory.limits
        self._num_added = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._num_added += 1
        sequence.number = self._num_added
        self.waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence where it was, before all that came later."""
        earlier = sum(other.number < sequence.number for other in self.waiting)
        self.waiting.insert(earlier, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget one that waits."""
        self.waiting.remove(sequence)
        self.blocked_head = None

    @property
    def is_stuck(self) -> bool:
        """Whether nobody can start before a running sequence ends or grows."""
        full = len(self.running) == self._limits.max_seqs
        return self.blocked_head is not None or not self.waiting or full

    def admit(self) -> None:
        """Start all that fit now."""
        later: list[Sequence] = []
        while self.waiting and len(self.running) < self._limits.max_seqs:
            sequence = self.waiting.popleft()
            if sequence is self.blocked_head:
                later.append(sequence)
                break
            hit = self._match(sequence)
            if self._is_coming(sequence, hit):
                later.append(sequence)
            elif self._fits(sequence, hit):
                self._start(sequence, hit)
            elif not self.running:
                # What it would share is in the way of what it needs.
                self._start(sequence, Hit(self._cache.root, 0))
            else:
                later.append(sequence)
                self.blocked_head = sequence
                break
        self.waiting.extendleft(reversed(later))

    def _match(self, sequence: Sequence) -> Hit:
        """What the cache has of it; its last token must be computed in any case."""
        num_tokens = len(sequence.token_ids)
        self._cache.extend(sequence.digests, sequence.token_ids, num_tokens)
        return self._cache.match(sequence.digests, sequence.token_ids, num_tokens - 1)

    def _is_coming(self, sequence: Sequence, hit: Hit) -> bool:
        """Whether an older one is about to compute much more of the prefix, and is asked for a checkpoint."""
        if not self._cache.enabled:
            return False
        size = self._limits.page_size
        last_page_start = (len(sequence.token_ids) - 1) // size * size
        for other in self.running:
            shared_pages = num_common(sequence.digests, other.digests)
            position = min(shared_pages * size, last_page_start)
            is_ahead = other.number < sequence.number and other.num_computed < position
            if is_ahead and position - hit.num_tokens >= self._limits.min_checkpoint_tokens:
                other.checkpoint_requests.add(position)
                return True
        return False

    def _fits(self, sequence: Sequence, hit: Hit) -> bool:
        """Whether its pages can be taken, and one more for each that runs."""
        taken = {node.page for node in path_to(hit.checkpoint)}
        for other in self.running:
            taken.update(other.pages)
            if other.copy_from is not None:
                taken.add(other.copy_from)
        new_pages = self._memory.num_pages(sequence) - hit.num_tokens // self._limits.page_size
        return new_pages + len(self.running) <= len(self._cache.pages) - len(taken)

    def _start(self, sequence: Sequence, hit: Hit) -> None:
        self._memory.start(sequence, hit)
        sequence.move_to(sequence.next_phase)
        self.running.append(sequence)


def num_common(digests: list[bytes], others: list[bytes]) -> int:
    """Whole pages that two sequences share; digests are chained, so those before equal ones are equal."""
    shorter = min(len(digests), len(others))
    return bisect_left(range(shorter), True, key=lambda i: digests[i] != others[i])
