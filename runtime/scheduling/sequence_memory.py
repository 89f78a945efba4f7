"""Pages and state slots of the running sequences, taken from the prefix cache and given back."""

from __future__ import annotations

from collections.abc import Callable

from tokenspeed_plan.plans.schema import Limits, Plan
from tokenspeed_plan.runtime.cache.prefix_cache import Hit, PrefixCache
from tokenspeed_plan.runtime.cache.prefix_tree import Node, path_to
from tokenspeed_plan.runtime.cache.slot_copies import SlotMover
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.scheduling.host_tier import HostTier
from tokenspeed_plan.runtime.scheduling.reservations import Reservations
from tokenspeed_plan.runtime.scheduling.sequence import Sequence, State
from tokenspeed_plan.runtime.scheduling.state_turns import (
    exchange_state_slot,
    go_on_in_place,
    part_from_cache,
)

NoteEnd = Callable[[Node, Sequence], None]


class SequenceMemory:
    """The memory that running sequences hold.

    Attributes:
        cache: all pages and state slots.
        reservations: what is held of them for prompts that come from elsewhere.
        host: the second tier of the cache.
        decodes: whether the pool has programs for answers; else every token is prefilled.
        note_end: is told where an answer has ended, and of its sequence.
    """

    def __init__(
        self, plan: Plan, metrics: Metrics, cache: bool, mover: SlotMover | None = None
    ) -> None:
        self.limits: Limits = plan.pool.limits
        self._max_depth = self.limits.max_depth
        self._in_place = self.limits.in_place
        self.note_end: NoteEnd = lambda checkpoint, sequence: None
        self.decodes = any(program.phase == "decode" for program in plan.pool.programs)
        self.cache = PrefixCache(
            plan.pool.limits,
            bytes.fromhex(plan.digest[:64]),
            plan.pool.slot_bytes("kv_cache"),
            plan.pool.slot_bytes("state"),
            metrics,
            cache,
        )
        has_state = plan.pool.slot_bytes("state") > 0
        self.reservations = Reservations(self.cache, self.limits, has_state)
        self.host = HostTier(plan, self.cache, self.reservations, metrics, mover)
        self._metrics = metrics

    def phase_of(self, sequence: Sequence) -> State:
        """What comes next for a sequence that holds memory."""
        return sequence.next_phase if self.decodes else "prefilling"

    def num_pages(self, sequence: Sequence) -> int:
        """Pages for its known tokens."""
        return -(-len(sequence.token_ids) // self.limits.page_size)

    def has_slot(self, hit: Hit) -> bool:
        """Whether a sequence that starts from a hit gets a state slot to write.

        Each has its share of them, unless it has one in all: others may hold those of their hits.
        """
        return not self._in_place or self.cache.has_spare_state_slot(hit)

    def start(self, sequence: Sequence, hit: Hit) -> None:
        """Give a sequence the pages of its hit, pages for other tokens, and its own state slots."""
        sequence.node, sequence.pages = self.cache.use(hit)
        self.host.keep(hit.checkpoint, sequence)
        sequence.state_slot = hit.checkpoint.state_slot
        sequence.num_computed = hit.num_tokens
        if hit.num_tokens % self.limits.page_size:
            sequence.copy_from = hit.checkpoint.page
        if hit.known_tokens - hit.num_tokens >= self.limits.min_checkpoint_tokens:
            # Others had this prefix too, and may come again.
            sequence.checkpoint_requests.add(hit.known_tokens)
        num_new = self.num_pages(sequence) - len(sequence.pages)
        new = self.cache.take_pages(num_new)
        assert len(new) == num_new, "it was admitted for pages that somebody holds"
        sequence.pages += sorted(new)  # runs are pushed as one
        num_own_slots = self.limits.written_slots_per_seq
        sequence.own_slots = [self.cache.take_state_slot() for _ in range(num_own_slots)]
        sequence.pages_version += 1
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = hit.num_tokens
            self._metrics.hit_tokens += hit.num_tokens
        self.reservations.drop(sequence.request.request_id)  # what it holds it has found

    def add_page(self, sequence: Sequence) -> bool:
        """Add one page; False where there is none left.

        The device finds the slots of the next step at the end of the one before it. A page that
        comes too late for that has to be written into the rows of the host.
        """
        page = self.cache.take_page()
        if page is None:
            return False
        reach = len(sequence.token_ids) + sequence.num_ahead + self._max_depth
        num_slots = len(sequence.pages) * self.limits.page_size
        sequence.pages_version += num_slots < min(reach, sequence.max_len)
        sequence.pages.append(page)
        return True

    def add_draft_pages(self, sequence: Sequence) -> None:
        """Add pages for the drafts of two steps, while there are any.

        A draft without a page is not accepted.
        """
        length = len(sequence.token_ids) + 2 * self._max_depth + 1
        length = min(length, sequence.max_len)
        while len(sequence.pages) * self.limits.page_size < length:
            if not self.add_page(sequence):
                return

    def add_pages_ahead(self, sequence: Sequence) -> bool:
        """Add pages for the next step, and where there are some for the one after it.

        What a step in flight computes is not known: pages for most of it are taken.

        Returns:
            Whether there are pages for the next step's first token.
        """
        known = len(sequence.token_ids) + sequence.num_ahead
        needed = min(known, sequence.max_len)
        wanted = min(known + 2 * self._max_depth + 1, sequence.max_len)
        while len(sequence.pages) * self.limits.page_size < wanted:
            if not self.add_page(sequence):
                return len(sequence.pages) * self.limits.page_size >= needed
        return True

    def can_go_on(self, sequence: Sequence) -> bool:
        """Whether another step can be launched for a sequence that has pages for it.

        If one is in flight, it must not be the last, and the device must find the state slots of
        the next one: it writes next what it reads now, so that nobody else may hold that. Notes up
        to which length the answer stays yes.
        """
        owns_state = self._turns_own_slots(sequence)
        is_last = len(sequence.token_ids) + 2 > sequence.max_len
        if sequence.num_ahead and (is_last or not owns_state):
            return False
        if owns_state:
            room = len(sequence.pages) * self.limits.page_size
            if room < sequence.max_len:
                room -= 3 * self._max_depth + 2
            sequence.ready_len = min(sequence.max_len - 2, room)
        return True

    def is_simple(self, sequence: Sequence) -> bool:
        """Whether a step without drafts changes nothing of its memory but the turn of its slots."""
        return (
            sequence.copy_from is None
            and not self.limits.kept_inputs
            and self._turns_own_slots(sequence)
        )

    def _turns_own_slots(self, sequence: Sequence) -> bool:
        """Whether host and device turn its slots alike: it alone holds the one that it reads.

        Where states are written in place, that is also the one that it writes.
        """
        if self._in_place and sequence.own_slots != [sequence.state_slot]:
            return False
        return self.cache.state_slots.holders(sequence.state_slot) == 1

    def advance(self, sequence: Sequence, count: int) -> None:
        """Note that `count` more tokens are computed."""
        sequence.copy_from = None
        is_prefill = sequence.state == "prefilling"
        in_prompt = max(sequence.num_prompt_tokens - sequence.num_computed, 0)
        self._metrics.computed_tokens += count if is_prefill else min(count, in_prompt)
        sequence.num_computed += count
        column = 0
        sequence.num_kept = 0
        if not is_prefill and self.limits.kept_inputs:
            sequence.num_kept = count
        elif not is_prefill:
            column = count - 1  # a decode step has written a state slot for each token
        if self._in_place:
            go_on_in_place(self.cache, sequence)
            if is_prefill:
                self._keep_prefix(sequence)
                part_from_cache(self.cache, sequence)
            return
        is_own = exchange_state_slot(self.cache, sequence, column)
        if is_prefill:
            self._keep_prefix(sequence)
        if not is_own:
            sequence.own_slots.insert(column, self.cache.take_state_slot())
            sequence.pages_version += 1

    def _catch_up(self, sequence: Sequence) -> None:
        """Advance to the end of what was launched: the state before it has been written over."""
        assert sequence.num_ahead <= sequence.num_left, "a state of tokens that are not known"
        go_on_in_place(self.cache, sequence)
        sequence.num_computed += sequence.num_ahead
        sequence.copy_from = None

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Cache what a chunk computed.

        It ends with a checkpoint where the plan or another sequence wants one, or the prompt ends.
        """
        self._add_pages_to_cache(sequence)
        position = sequence.num_computed
        if (
            position % self.limits.checkpoint_interval == 0
            or position in sequence.checkpoint_requests
            or not sequence.num_left
        ):
            self._add_checkpoint(sequence)

    def _add_pages_to_cache(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        self.cache.extend(sequence.digests, sequence.token_ids, sequence.num_computed)
        sequence.node = self.cache.add_pages(
            sequence.node,
            sequence.digests,
            sequence.token_ids,
            sequence.num_computed,
            sequence.pages,
        )
        sequence.pages_version += 1

    def _add_checkpoint(self, sequence: Sequence) -> Node:
        assert sequence.node is not None
        return self.cache.add_checkpoint(
            sequence.node,
            sequence.token_ids,
            sequence.num_computed,
            sequence.state_slot,
            sequence.pages,
        )

    def release(self, sequence: Sequence, has_state: bool = True, is_wrong: bool = False) -> None:
        """Give back all memory of a sequence; the cache keeps its prefix up to its state.

        Where its numbers are wrong, the cache keeps only what others got answers from.
        """
        if sequence.num_ahead and has_state and self._in_place:
            self._catch_up(sequence)
        sequence.num_computed = sequence.state_len
        sequence.num_kept = 0
        if sequence.num_computed and sequence.copy_from is None and has_state:
            self._add_pages_to_cache(sequence)
            checkpoint = self._add_checkpoint(sequence)
            if sequence.state != "preempted":  # whose memory others need at once
                self.host.keep(checkpoint, sequence)
            if sequence.state == "finished":
                self.note_end(checkpoint, sequence)
        path = self._path(sequence)
        self.cache.drop_pages(sequence.pages)
        for slot in {*sequence.own_slots, sequence.state_slot} - {0}:
            self.cache.state_slots.drop(slot)
        if is_wrong:
            self.cache.forget_unproven(path, sequence.token_ids)
            self.host.forget_unproven(sequence)
        sequence.forget_memory()

    def prove(self, sequence: Sequence) -> None:
        """Note that a sequence got its answer from what the cache has of it."""
        self.cache.prove(self._path(sequence), sequence.token_ids)
        self.host.prove(sequence)

    def _path(self, sequence: Sequence) -> list[Node]:
        """The root of the cache, and the sequence's pages that the cache knows."""
        assert sequence.node is not None
        return [self.cache.root, *path_to(sequence.node)]
