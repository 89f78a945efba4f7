"""Continuous batching: who runs in the next step, with which program, and in which memory.

A request is admitted when pages for its known tokens can be drawn and one more for each that runs;
what it says is given pages as it grows. When none is left the youngest is preempted: its state and
its pages go to the prefix cache, from where it goes on later. The oldest always goes on, and fits,
so every request ends.

While some sequences prefill and others decode, the two kinds of step take turns. Prefill steps
serve by turns the oldest first, so that no prompt starves, and the one with the least to do first,
so that a short one need not wait for long ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.prefix_cache import Hit, PrefixCache, path_to
from tokenspeed_plan.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: for each sequence, how many rows to compute, and which rows of state to read and to write.

    One that was launched ahead of the results before it knows its rows of state on the device
    alone.
    """

    program: Program
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    src_state_slots: tuple[int, ...]
    dst_state_slots: tuple[tuple[int, ...], ...]
    pages_versions: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, sequences: Iterable[Sequence], counts: Iterable[int]) -> Batch:
        """The next step of sequences as they are."""
        held = tuple(sequences)
        return cls(
            program,
            held,
            tuple(counts),
            tuple(s.row for s in held),
            tuple(tuple(s.dst_state_slots) for s in held),
            tuple(s.pages_version for s in held),
        )

    @property
    def num_tokens(self) -> int:
        """Rows of its sequences: tokens, and drafts."""
        return sum(self.counts)

    @property
    def run_tokens(self) -> int:
        """Tokens that the program runs on: with padding, where it is captured."""
        return self.program.max_tokens if self.program.captured else self.num_tokens

    @property
    def run_seqs(self) -> int:
        """Sequences that the program runs on."""
        return self.program.max_seqs if self.program.captured else len(self.sequences)

    @property
    def has_no_output(self) -> bool:
        """Whether no sequence comes to its prompt's last token, where it decodes: nobody waits for tokens or drafts."""
        pairs = zip(self.sequences, self.counts, strict=True)
        return self.program.phase == "prefill" and all(
            count + 1 < sequence.num_left for sequence, count in pairs
        )

    def follows(self, other: Batch | None) -> bool:
        """Whether it is the decode step right after another one, whose program has prepared all inputs already."""
        return (
            other is not None
            and self.program is other.program
            and self.program.phase == "decode"
            and self.sequences == other.sequences
            and self.pages_versions == other.pages_versions
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What is taken: requests that wait and run, rows and pages that they hold, the cache's own left out."""

    waiting: int
    running: int
    rows: int
    pages: int


class Scheduler:
    """The queue, the running sequences, and through the prefix cache all pages and rows."""

    def __init__(self, plan: Plan, chunk: int | None = None, cache: bool = True) -> None:
        self.limits = plan.pool.limits
        self.chunk = min(chunk or plan.pool.limits.max_tokens, plan.pool.limits.max_tokens)
        self.metrics = Metrics()
        self.cache = PrefixCache(
            plan.pool.limits,
            bytes.fromhex(plan.digest[:64]),
            place_bytes(plan, "kv_cache"),
            place_bytes(plan, "state"),
            self.metrics,
            cache,
        )
        self._programs = {
            phase: sorted(
                (p for p in plan.pool.programs if p.phase == phase), key=lambda p: p.bucket
            )
            for phase in ("prefill", "decode")
        }
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._last: Phase = "decode"
        self._oldest_first = False
        self._num_added = 0
        # the first that was found not to fit; nothing was freed since
        self._blocked_head: Sequence | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    @property
    def usage(self) -> Usage:
        """What is taken now; another thread may ask too."""
        return Usage(
            len(self._waiting), len(self._running), self.cache.rows_in_use, self.cache.pages_in_use
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._num_added += 1
        sequence.number = self._num_added
        self._waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next step, None when there is nothing to do. All steps before it must be committed."""
        self._admit()
        decoding = self._grow([s for s in self._running if s.state == "decoding"])
        prefilling = [s for s in self._running if s.state == "prefilling"]
        if not self._running:
            return None
        self._last = (
            "prefill" if prefilling and (self._last == "decode" or not decoding) else "decode"
        )
        if self._last == "decode":
            return self._decode(decoding)
        return self._prefill(
            prefilling, min(self.chunk, self.limits.interleaved_tokens) if decoding else self.chunk
        )

    def next_overlapped_batch(self, batch: Batch) -> Batch | None:
        """The decode step after one that is not committed yet; None where something else may come first.

        A sequence may turn out to have ended: then its part of the step is for nothing, and harms
        nobody.
        """
        goes_on = (
            batch.program.captured
            and (
                self._blocked_head
                or not self._waiting
                or len(self._running) == self.limits.max_seqs
            )
            and len(batch.sequences) == len(self._running)
            and all(map(self._can_go_on, batch.sequences, batch.counts))
        )
        return replace(batch) if goes_on else None

    def _can_go_on(self, sequence: Sequence, count: int) -> bool:
        """Whether it does not end with the step before, and wherever that leaves it has a page for what is next."""
        known = len(sequence.token_ids)
        return (
            sequence.state == "decoding"
            and known + 2 <= sequence.max_len
            and min(known + count, sequence.max_len) <= len(sequence.pages) * self.limits.page_size
            and sequence.request.params.num_logprobs is None
            and self.cache.rows.holders(sequence.row) == 1
        )

    def finish(self, sequence: Sequence, has_state: bool = True) -> None:
        """It has said all: its state and pages go to the cache, where the state at its end is still there."""
        self.metrics.lost_checkpoints += not has_state
        sequence.move_to("finished")
        self._running.remove(sequence)
        self._release(sequence, has_state)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request in any state; what it has computed stays in the cache. A step in flight harms nobody."""
        if sequence.state in ("finished", "cancelled"):
            return
        running = sequence.is_running
        sequence.move_to("cancelled")
        if running:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
            self._blocked_head = None

    # Admission.

    def _admit(self) -> None:
        later: list[Sequence] = []
        while self._waiting and len(self._running) < self.limits.max_seqs:
            sequence = self._waiting.popleft()
            if sequence is self._blocked_head:
                later.append(sequence)
                break
            self.cache.extend(sequence.digests, sequence.token_ids, len(sequence.token_ids))
            hit = self.cache.match(
                sequence.digests, sequence.token_ids, len(sequence.token_ids) - 1
            )
            if self._is_coming(sequence, hit):
                later.append(sequence)
            elif self._fits(sequence, hit):
                self._start(sequence, hit)
            elif not self._running:
                self._start(
                    sequence, Hit(self.cache.root, 0)
                )  # what it would share is in the way of what it needs
            else:
                later.append(sequence)
                self._blocked_head = sequence
                break
        self._waiting.extendleft(reversed(later))

    def _is_coming(self, sequence: Sequence, hit: Hit) -> bool:
        """Whether an older one is about to compute much more of the same prefix: then it leaves a checkpoint there."""
        size = self.limits.page_size
        most = (len(sequence.token_ids) - 1) // size * size
        for other in self._running if self.cache.enabled else ():
            place = min(num_common(sequence.digests, other.digests) * size, most)
            ahead = other.number < sequence.number and other.num_computed < place
            if ahead and place - hit.num_tokens >= self.limits.min_checkpoint_tokens:
                other.checkpoint_requests.add(place)
                return True
        return False

    def _fits(self, sequence: Sequence, hit: Hit) -> bool:
        """Whether its pages can be drawn, and one more for each that runs."""
        held = {page for other in self._running for page in self._held_pages(other)}
        found = {node.page for node in path_to(hit.checkpoint)}
        needed = (
            self._num_pages(sequence) - hit.num_tokens // self.limits.page_size + len(self._running)
        )
        return needed <= len(self.cache.pages) - len(held | found)

    def _held_pages(self, sequence: Sequence) -> list[int]:
        return sequence.pages + ([] if sequence.copy_from is None else [sequence.copy_from])

    def _num_pages(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self.limits.page_size)

    def _start(self, sequence: Sequence, hit: Hit) -> None:
        sequence.node, sequence.pages = self.cache.use(hit)
        sequence.row, sequence.num_computed = hit.checkpoint.row, hit.num_tokens
        if hit.num_tokens % self.limits.page_size:
            sequence.copy_from = hit.checkpoint.page
        if hit.known_tokens - hit.num_tokens >= self.limits.min_checkpoint_tokens:
            sequence.checkpoint_requests.add(
                hit.known_tokens
            )  # others had this prefix too, and may come again
        while len(sequence.pages) < self._num_pages(sequence):
            self._add_page(sequence)
        sequence.dst_state_slots = [
            self.cache.take_row() for _ in range(self.limits.state_slots_per_seq - 1)
        ]
        sequence.pages_version += 1
        sequence.move_to(sequence.next_phase)
        self._running.append(sequence)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = hit.num_tokens
            self.metrics.hit_tokens += hit.num_tokens

    # Memory of those that run.

    def _grow(self, decoding: list[Sequence]) -> list[Sequence]:
        """Those that decode, each with a page for its next token; the youngest are preempted where there is none."""
        for sequence in sorted(decoding, key=lambda s: s.number):
            while sequence.is_running and len(sequence.pages) < self._num_pages(sequence):
                if not self._add_page(sequence):
                    self._preempt(max(self._running, key=lambda s: s.number))
        left = [sequence for sequence in decoding if sequence.is_running]
        for sequence in left if self.limits.max_depth else ():
            self._add_room(sequence)
        return left

    def _add_room(self, sequence: Sequence) -> None:
        """Pages for drafts of this step and the next, while there are any: what has no page is not accepted."""
        most = min(len(sequence.token_ids) + 2 * self.limits.max_depth + 1, sequence.max_len)
        while len(sequence.pages) * self.limits.page_size < most:
            if not self._add_page(sequence):
                return

    def _add_page(self, sequence: Sequence) -> bool:
        page = self.cache.take_page()
        if page is not None:
            sequence.pages.append(page)
            sequence.pages_version += 1
        return page is not None

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue, before all that came later; its checkpoint is where it stands."""
        self.metrics.preemptions += 1
        sequence.move_to("preempted")
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.insert(
            sum(other.number < sequence.number for other in self._waiting), sequence
        )

    def advance(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are computed. A decode step has written a row of state for each, or kept their inputs."""
        sequence.copy_from = None
        stepped, keeps = sequence.state == "decoding", bool(self.limits.kept_inputs)
        column, sequence.num_kept = (
            count - 1 if stepped and not keeps else 0,
            count if stepped and keeps else 0,
        )
        in_prompt = max(sequence.num_prompt_tokens - sequence.num_computed, 0)
        self.metrics.computed_tokens += (
            count if sequence.state == "prefilling" else min(count, in_prompt)
        )
        sequence.num_computed += count
        before, sequence.row = sequence.row, sequence.dst_state_slots[column]
        is_own = before and self.cache.rows.holders(before) == 1
        sequence.dst_state_slots[column : column + 1] = [before] if is_own else []
        if before and not is_own:
            self.cache.rows.drop(before)
        if sequence.state == "prefilling":
            self._keep_prefix(sequence)
        if not is_own:
            sequence.dst_state_slots.insert(column, self.cache.take_row())
            sequence.pages_version += 1
        if sequence.state == "prefilling" and sequence.num_left <= 1:
            sequence.move_to("decoding")

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Let others have what a chunk has computed; a checkpoint where the plan or another wants it, or it ends."""
        self._add_pages(sequence)
        place = sequence.num_computed
        if (
            place % self.limits.checkpoint_interval == 0
            or place in sequence.checkpoint_requests
            or not sequence.num_left
        ):
            self._add_checkpoint(sequence)

    def _add_pages(self, sequence: Sequence) -> None:
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

    def _add_checkpoint(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        self.cache.add_checkpoint(
            sequence.node, sequence.token_ids, sequence.num_computed, sequence.row, sequence.pages
        )

    def _release(self, sequence: Sequence, has_state: bool = True) -> None:
        """Give back all that it holds; the cache keeps what is of use, up to where the state is."""
        sequence.num_computed, sequence.num_kept = sequence.state_len, 0
        if sequence.num_computed and sequence.copy_from is None and has_state:
            self._add_pages(sequence)
            self._add_checkpoint(sequence)
        for page in sequence.pages:
            self.cache.pages.drop(page)
        for row in (*sequence.dst_state_slots, *filter(None, [sequence.row])):
            self.cache.rows.drop(row)
        self.cache.prune(sequence.node)
        sequence.pages, sequence.dst_state_slots, sequence.row, sequence.node = [], [], 0, None
        sequence.num_computed, sequence.copy_from, sequence.drafts = 0, None, []
        sequence.checkpoint_requests.clear()
        self._blocked_head = None

    # Batches.

    def _prefill(self, prefilling: list[Sequence], room: int) -> Batch:
        self._oldest_first = not self._oldest_first
        order = sorted(
            prefilling, key=lambda s: (0 if self._oldest_first else s.num_left, s.number)
        )
        counts: list[int] = []
        for sequence in order:
            counts.append(
                sequence.chunk_end(room, self.limits.checkpoint_interval) - sequence.num_computed
            )
            room -= counts[-1]
            if room == 0:
                break
        tokens, seqs = sum(counts), len(counts)
        program = next(
            p for p in self._programs["prefill"] if p.max_tokens >= tokens and p.max_seqs >= seqs
        )
        return Batch.of(program, order[:seqs], counts)

    def _decode(self, decoding: list[Sequence]) -> Batch:
        program = next(p for p in self._programs["decode"] if p.max_seqs >= len(decoding))
        return Batch.of(program, decoding, [program.query_len] * len(decoding))


def num_common(digests: list[bytes], others: list[bytes]) -> int:
    """Whole pages that two sequences begin with: as digests are chained, equal ones have equal ones before them."""
    return bisect_left(
        range(min(len(digests), len(others))), True, key=lambda i: digests[i] != others[i]
    )


def place_bytes(plan: Plan, arena: str) -> int:
    """Bytes of one page, or of one row of state, in all layers."""
    buffers = [buffer.tensor for buffer in plan.pool.buffers if buffer.arena == arena]
    return sum(tensor.size_bytes() // int(tensor.shape[0]) for tensor in buffers)
