"""What the plan can serve, from the workload; and from that the buckets of its programs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenspeed_plan.planner.ledger import AS_STATED, Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Capacity, Limits
from tokenspeed_plan.plans.types import RollbackWord

# Without drafts a step writes the state slot that it reads. With them a sequence reads one and
# writes another; each draft needs one more, unless its inputs are kept instead.
SLOTS_IN_PLACE = 1
MIN_DRAFTING_SLOTS = 2
PADDING_SLOTS = 2  # the first stays zero, the last belongs to padding
# A turn that continues inside a page copies that page: for a moment a sequence has both.
COPIED_PAGES = 1
ENDS_PER_CONVERSATION = 2  # checkpoints where the last prompt and the last answer end
TURN_STEP = 256  # tokens to which the prefill of a turn is rounded up
# Even an almost empty prefill step costs as much as this part of a chunk.
WORTH_A_STEP = 16
# Rows of a batch come once. Checkpoints serve those that begin alike, and those that are preempted:
# so many in all, and one more for each so many sequences.
BATCH_CHECKPOINTS = 16
SEQS_PER_CHECKPOINT = 8
# Sequences together hold more pages than planned about once in a thousand moments; then the
# youngest is preempted.
MARGIN = 3.0  # standard deviations of what they hold


@dataclass(frozen=True, slots=True)
class Holding:
    """What a sequence of a workload holds, beside what the longest one does.

    Attributes:
        mean_tokens: of a sequence at its end; None where all are as long as the longest.
        variance: square tokens by which that spreads.
        comes_once: nothing follows on a sequence, as on a row of a batch.
        shared_tokens: with which all sequences begin. Their pages are held once.
    """

    mean_tokens: float | None = None
    variance: float = 0.0
    comes_once: bool = False
    shared_tokens: int = 0

    @classmethod
    def of(cls, workload: WorkloadSpec) -> Holding:
        """What sequences of the workload hold."""
        once = workload.is_batch_of_rows
        prompts, outputs = workload.prompts, workload.outputs
        if not prompts.varies and not outputs.varies:
            return cls(comes_once=once, shared_tokens=workload.shared_tokens)
        variance = prompts.variance + workload.turns * outputs.variance
        mean = workload.mean_conversation_tokens
        return cls(mean, variance, once, workload.shared_tokens)

    def pages(self, num_seqs: int, longest_pages: int, page_size: int) -> int:
        """Pages for so many sequences: the mean, half a page that is not full, and a margin.

        Never more than for sequences that are all the longest, and enough for one of those. If
        lengths are independent, those of n sequences spread as sqrt(n) of them.
        """
        shared = self.shared_tokens // page_size
        most = shared + num_seqs * (longest_pages - shared + COPIED_PAGES)
        if self.mean_tokens is None:
            return most
        each = self.mean_tokens / page_size - shared + 0.5 + COPIED_PAGES
        margin = MARGIN * math.sqrt(num_seqs * self.variance) / page_size
        wanted = shared + math.ceil(num_seqs * each + margin)
        return min(max(wanted, longest_pages + COPIED_PAGES), most)

    def checkpoints(self, num_seqs: int, seq_tokens: int, spacing: int) -> int:
        """Checkpoints of so many sequences."""
        every = num_seqs * num_checkpoints(seq_tokens, spacing)
        if not self.comes_once:
            return every
        return min(every, BATCH_CHECKPOINTS + num_seqs // SEQS_PER_CHECKPOINT)


ALL_ALIKE = Holding()


@dataclass(frozen=True, slots=True)
class CapacityOptions:
    """What is chosen before a pool's capacity is planned.

    Attributes:
        chunk: tokens of a prompt that are computed at once; None for the machine's default.
        checkpoint_tokens: as in `checkpoint_spacing`.
        depth: the most drafts of a decode step.
        rollback: how rejected drafts are taken back. With `recompute` a sequence needs two state
            slots, whatever the depth.
    """

    chunk: int | None = None
    checkpoint_tokens: int | None = None
    depth: int = 0
    rollback: RollbackWord = "snapshot"

    @property
    def kept_inputs(self) -> int:
        """Queries of a decode step whose inputs are kept, to recompute the state from them."""
        if self.depth and self.rollback == "recompute":
            return self.depth + 1
        return 0


DEFAULT_CAPACITY = CapacityOptions()


def plan_capacity(
    workload: WorkloadSpec,
    config: ModelConfig,
    hardware: HardwareSpec,
    options: CapacityOptions = DEFAULT_CAPACITY,
) -> Capacity:
    """Pages and state slots for `concurrency` conversations, in whole pages.

    Any may be the longest, where they vary; not all at once.

    Args:
        workload: what is to be served.
        config: the model.
        hardware: the target.
        options: what was chosen before.

    Raises:
        SpecError: the model has fewer positions than the workload needs.
    """
    needed = workload.max_conversation_tokens
    check_positions(workload, config)
    page_size = hardware.page_size
    max_seqs, holding = workload.num_seqs, Holding.of(workload)
    pages = -(-needed // page_size)
    max_seq_len = min(pages * page_size, config.max_positions)
    chunk = options.chunk or prefill_chunk(hardware.prefill_chunk, workload)
    spacing = checkpoint_spacing(options.checkpoint_tokens, chunk, page_size)
    checkpoints = holding.checkpoints(max_seqs, max_seq_len, spacing)
    interval = spacing or max(chunk, page_size)
    if not config.has_state:
        # Each page is a checkpoint by itself. State slots are numbers then, without memory.
        checkpoints = 0
        interval = pages * page_size
    slots = state_slots_per_seq(options.depth, options.rollback)
    worth = chunk // WORTH_A_STEP
    if workload.shared_tokens:  # all rows find what one computes for it
        worth = min(worth, workload.shared_tokens // page_size * page_size)
    return Capacity(
        max_seqs=max_seqs,
        max_seq_len=max_seq_len,
        max_tokens=chunk,
        page_size=page_size,
        num_pages=holding.pages(max_seqs, pages, page_size),
        state_slots_per_seq=slots,
        num_state_slots=PADDING_SLOTS + max_seqs * slots + checkpoints,
        default_max_tokens=min(workload.outputs.longest, max_seq_len - 1),
        checkpoint_interval=interval,
        min_checkpoint_tokens=max(worth, page_size),
        num_checkpoints=checkpoints,
        kept_inputs=options.kept_inputs,
    )


def check_positions(workload: WorkloadSpec, config: ModelConfig) -> None:
    """Refuse a workload whose conversations are longer than what the model was trained on.

    Raises:
        SpecError: the model has fewer positions than the workload needs.
    """
    needed = workload.max_conversation_tokens
    if needed > config.max_positions:
        raise SpecError(
            f"the workload needs {needed} tokens in a sequence, "
            f"`{config.name}` has {config.max_positions} positions",
            "lower `workload.turns` or the tokens of a turn",
        )


def plan_limits(
    capacity: Capacity,
    interleaved_tokens: int | None,
    gathered_tokens: int = 0,
    filled_tokens: int = 0,
) -> Limits:
    """The capacity, with the prefill tokens between two decode steps.

    Args:
        capacity: of the pool.
        interleaved_tokens: at most; None for a whole chunk.
        gathered_tokens: for which prompts wait while all sequences are taken.
        filled_tokens: of a step in which a prompt ends, with a part of another; 0 for a chunk.
    """
    tokens = min(interleaved_tokens or capacity.max_tokens, capacity.max_tokens)
    return Limits(
        **capacity.model_dump(),
        interleaved_tokens=tokens,
        gathered_tokens=gathered_tokens,
        filled_tokens=filled_tokens,
    )


def state_slots_per_seq(depth: int, rollback: RollbackWord) -> int:
    """State slots that a sequence holds."""
    if not depth:
        return SLOTS_IN_PLACE
    if rollback == "recompute":
        return MIN_DRAFTING_SLOTS
    return MIN_DRAFTING_SLOTS + depth


def prefill_chunk(chunk: int, workload: WorkloadSpec) -> int:
    """The chunk, at most what can wait to be computed, rounded up to a power of two.

    That is the longest sequence. Rows of a batch wait together, so that a chunk takes several.
    """
    tokens = workload.max_conversation_tokens
    if workload.is_batch_of_rows:
        together = workload.num_seqs * math.ceil(workload.own_prompt_tokens)
        tokens = max(tokens, together)
    bits = (tokens - 1).bit_length()
    return min(chunk, 1 << bits)


def checkpoint_spacing(stated: int | None, chunk: int, page_size: int) -> int:
    """Tokens between two checkpoints of a prompt, in whole pages: a chunk where none is stated.

    0 keeps no checkpoints.
    """
    tokens = chunk
    if stated is not None:
        tokens = stated
    pages = -(-tokens // page_size)
    return pages * page_size


def num_checkpoints(seq_tokens: int, spacing: int) -> int:
    """Checkpoints of a conversation of that length."""
    if not spacing:
        return 0
    return ENDS_PER_CONVERSATION + seq_tokens // spacing


def record_cache(
    ledger: Ledger,
    limits: Limits,
    interleaving: str,
    has_state: bool = True,
    comes_once: bool = False,
) -> None:
    """Write down what is planned for the prefix cache, and for prefill between decode steps.

    Args:
        ledger: of the compilation.
        limits: of the plan.
        interleaving: why so much prefill comes between two decode steps.
        has_state: whether the model has recurrent state.
        comes_once: whether sequences are rows of a batch.
    """
    value, reason = "off", AS_STATED
    if limits.num_checkpoints:
        spacing = limits.checkpoint_interval
        value = f"{limits.num_checkpoints} checkpoints, in prompts every {spacing} tokens"
        reason = (
            f"{ENDS_PER_CONVERSATION} for each conversation where its last prompt and answer end, "
            "and turns start from; those between serve prompts that begin alike"
        )
        if comes_once:
            reason = (
                "nothing follows on a row of a batch: they serve rows that begin alike, and rows "
                "that are preempted"
            )
    if not has_state:
        value, reason = (
            "every page",
            "without recurrent state, keys and values are all that a hit needs",
        )
    ledger.record("prefix_cache", value, reason)
    tokens = f"{limits.interleaved_tokens} prefill tokens a decode step"
    ledger.record("interleaving", tokens, interleaving)


def decode_buckets(max_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the concurrency itself."""
    powers = [1 << bits for bits in range(max_seqs.bit_length())]
    smaller = [bucket for bucket in powers if bucket < max_seqs]
    return (*smaller, max_seqs)


def prefill_buckets(limits: Capacity, turn_tokens: int) -> tuple[int, ...]:
    """The chunk, a quarter of it, and what a later turn brings: fewer tokens want smaller tiles.

    A turn also computes the last token of the answer before it, which was emitted but not computed.
    """
    buckets = {max(limits.max_tokens // 4, 1), limits.max_tokens}
    turn = (turn_tokens // TURN_STEP + 1) * TURN_STEP
    if turn_tokens and turn < limits.max_tokens:
        buckets.add(turn)
    return tuple(sorted(buckets))
