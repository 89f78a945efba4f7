"""From the workload to what the plan can serve, and from that to the buckets of its programs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Capacity, Limits
from tokenspeed_plan.plans.types import Phase

# A sequence reads one state slot and writes another. Each draft needs one more slot, unless its
# inputs are kept instead.
MIN_SLOTS_PER_SEQ = 2
# A turn that continues inside a page copies that page: for a moment a sequence has both.
COPIED_PAGES = 1
ENDS_PER_CONVERSATION = 2  # checkpoints where the last prompt and the last answer end
AS_ASKED = "as the spec says"
TURN_STEP = 256  # tokens to which the prefill of a turn is rounded up
# Even an almost empty prefill step costs as much as this part of a chunk.
WORTH_A_STEP = 16


def plan_capacity(
    workload: WorkloadSpec,
    config: ModelConfig,
    hardware: HardwareSpec,
    chunk: int | None = None,
    checkpoint_tokens: int | None = None,
    depth: int = 0,
    recomputes: bool = False,
) -> Capacity:
    """Pages and state slots for `concurrency` of the longest conversations, in whole pages.

    Args:
        workload: what is to be served.
        config: the model.
        hardware: the target.
        chunk: tokens of a prompt that are computed at once; the machine's default where it is None.
        checkpoint_tokens: as in `checkpoint_spacing`.
        depth: the most drafts of a decode step.
        recomputes: whether rejected drafts are taken back by recomputing the state from kept
            inputs; then a sequence needs no more slots than without drafts.

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
    pages = -(-needed // hardware.page_size)
    max_seq_len = min(pages * hardware.page_size, config.max_positions)
    chunk = prefill_chunk(chunk or hardware.prefill_chunk, max_seq_len)
    spacing = checkpoint_spacing(checkpoint_tokens, chunk, hardware.page_size)
    kept = workload.concurrency * num_checkpoints(max_seq_len, spacing)
    interval = spacing or max(chunk, hardware.page_size)
    if not config.has_state:
        # Each page is a checkpoint by itself. State slots are numbers then, without memory.
        kept, interval = 0, pages * hardware.page_size
    slots = state_slots_per_seq(depth, recomputes)
    return Capacity(
        max_seqs=workload.concurrency,
        max_seq_len=max_seq_len,
        max_tokens=chunk,
        page_size=hardware.page_size,
        num_pages=(pages + COPIED_PAGES) * workload.concurrency,
        state_slots_per_seq=slots,
        num_state_slots=2 + workload.concurrency * slots + kept,
        default_max_tokens=min(workload.output_tokens, max_seq_len - 1),
        checkpoint_interval=interval,
        min_checkpoint_tokens=max(chunk // WORTH_A_STEP, hardware.page_size),
        num_checkpoints=kept,
        kept_inputs=depth + 1 if depth and recomputes else 0,
    )


def plan_limits(
    capacity: Capacity, tpot_ms: float | None, predicted_us: Mapping[tuple[Phase, int], float]
) -> Limits:
    """What the plan can serve. The times of its programs are given by phase and bucket."""
    tokens = interleaved_tokens(capacity, tpot_ms, predicted_us)
    return Limits(**capacity.model_dump(), interleaved_tokens=tokens)


def state_slots_per_seq(depth: int, recomputes: bool) -> int:
    """State slots that a sequence holds."""
    return MIN_SLOTS_PER_SEQ + (0 if recomputes else depth)


def prefill_chunk(chunk: int, max_conversation_tokens: int) -> int:
    """The chunk, at most the longest sequence rounded up to a power of two."""
    return min(chunk, 1 << (max_conversation_tokens - 1).bit_length())


def checkpoint_spacing(asked: int | None, chunk: int, page_size: int) -> int:
    """Tokens between two checkpoints of a prompt, in whole pages: a chunk unless `asked`.

    0 keeps no checkpoints.
    """
    tokens = chunk if asked is None else asked
    return -(-tokens // page_size) * page_size


def num_checkpoints(seq_tokens: int, spacing: int) -> int:
    """Checkpoints of a conversation of that length."""
    if not spacing:
        return 0
    return ENDS_PER_CONVERSATION + seq_tokens // spacing


def record_cache(
    ledger: Ledger, limits: Limits, tpot_ms: float | None, has_state: bool = True
) -> None:
    """Write down what is planned for the prefix cache, and for prefill between decode steps."""
    value, reason = "off", AS_ASKED
    if limits.num_checkpoints:
        spacing = limits.checkpoint_interval
        value = f"{limits.num_checkpoints} checkpoints, in prompts every {spacing} tokens"
        reason = (
            f"{ENDS_PER_CONVERSATION} for each conversation where its last prompt and answer end, "
            "and turns start from; those between serve prompts that begin alike"
        )
    if not has_state:
        value, reason = (
            "every page",
            "without recurrent state, keys and values are all that a hit needs",
        )
    ledger.record("prefix_cache", value, reason)
    within = "a chunk: the spec names no time per token"
    if tpot_ms:
        within = f"with a decode step within {tpot_ms} ms"
    tokens = f"{limits.interleaved_tokens} prefill tokens a decode step"
    ledger.record("interleaving", tokens, within)


def interleaved_tokens(
    limits: Capacity, tpot_ms: float | None, predicted_us: Mapping[tuple[Phase, int], float]
) -> int:
    """Prefill tokens between two decode steps that keep both within the planned time per token.

    Times are taken to grow evenly from one bucket to the next. The result is at least one page, so
    that prompts make progress.
    """
    if tpot_ms is None:
        return limits.max_tokens
    decode_us = 0.0
    known: list[tuple[int, float]] = []
    for (phase, bucket), us in sorted(predicted_us.items()):
        if phase == "decode":
            decode_us = max(decode_us, us)
        else:
            known.append((bucket, us))
    left_us = tpot_ms * 1e3 - decode_us
    shortest, shortest_us = known[0]
    tokens = shortest if shortest_us <= left_us else limits.page_size
    for (low, low_us), (high, high_us) in pairwise(known):
        if low_us <= left_us:
            share = min((left_us - low_us) / max(high_us - low_us, 1e-9), 1.0)
            tokens = low + int((high - low) * share)
    return min(tokens, limits.max_tokens)


def decode_buckets(max_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the concurrency itself."""
    powers = [1 << i for i in range(max_seqs.bit_length()) if 1 << i < max_seqs]
    return (*powers, max_seqs)


def prefill_buckets(limits: Capacity, turn_tokens: int) -> tuple[int, ...]:
    """The chunk, a quarter of it, and what a later turn brings: fewer tokens want smaller tiles.

    A turn also computes the last token of the answer before it, which was emitted but not computed.
    """
    buckets = {max(limits.max_tokens // 4, 1), limits.max_tokens}
    turn = (turn_tokens // TURN_STEP + 1) * TURN_STEP
    if turn_tokens and turn < limits.max_tokens:
        buckets.add(turn)
    return tuple(sorted(buckets))
