"""From the workload to what the plan can serve, and from that to the buckets."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision, Limits
from tokenspeed_plan.plans.types import Phase

# one to read, one to write; each draft needs one more, where inputs are not kept instead
ROWS_PER_SLOT = 2
# of a sequence: a turn that goes on inside a page copies it, and for a moment both are there
COPIED_PAGES = 1
ENDS_PER_CONVERSATION = 2  # checkpoints where the last prompt and the last answer end
AS_ASKED = "as the spec says"
TURN_STEP = 256  # tokens to which the prefill of a turn is rounded up
# a prefill step costs as much as this part of a chunk even when it is almost empty
WORTH_A_STEP = 16


def plan_limits(
    workload: WorkloadSpec,
    config: ModelConfig,
    hardware: HardwareSpec,
    chunk: int | None = None,
    checkpoint_tokens: int | None = None,
    depth: int = 0,
    recomputes: bool = False,
) -> Limits:
    """The longest conversation, rounded up to a page; pages for `concurrency` of them, rows for `depth` drafts.

    Where drafts' inputs are kept, the rows are as many as without drafts.

    `chunk` tokens of a prompt are computed at once, the machine's default where it is None;
    `checkpoint_tokens` as in `checkpoint_spacing`.

    Raises:
        SpecError: the model has fewer positions than the workload needs.
    """
    needed = workload.max_conversation_tokens
    if needed > config.max_positions:
        raise SpecError(
            f"the workload needs {needed} tokens in a sequence, `{config.name}` has {config.max_positions} positions",
            "lower `workload.turns` or the tokens of a turn",
        )
    pages = -(-needed // hardware.page_size)
    max_seq_len = min(pages * hardware.page_size, config.max_positions)
    chunk = prefill_chunk(chunk or hardware.prefill_chunk, max_seq_len)
    spacing = checkpoint_spacing(checkpoint_tokens, chunk, hardware.page_size)
    kept = workload.concurrency * num_checkpoints(max_seq_len, spacing)
    rows = state_slots_per_seq(depth, recomputes)
    return Limits(
        max_seqs=workload.concurrency,
        max_seq_len=max_seq_len,
        max_tokens=chunk,
        page_size=hardware.page_size,
        num_pages=(pages + COPIED_PAGES) * workload.concurrency,
        state_slots_per_seq=rows,
        num_state_slots=2 + workload.concurrency * rows + kept,
        default_max_tokens=min(workload.output_tokens, max_seq_len - 1),
        interleaved_tokens=chunk,
        checkpoint_interval=spacing or max(chunk, hardware.page_size),
        min_checkpoint_tokens=max(chunk // WORTH_A_STEP, hardware.page_size),
        num_checkpoints=kept,
        kept_inputs=depth + 1 if depth and recomputes else 0,
    )


def state_slots_per_seq(depth: int, recomputes: bool) -> int:
    """Rows of state that a sequence holds."""
    return ROWS_PER_SLOT + (0 if recomputes else depth)


def prefill_chunk(wanted: int, max_conversation_tokens: int) -> int:
    """A chunk that is not longer than the longest sequence, rounded up to a power of two."""
    return min(wanted, 1 << (max_conversation_tokens - 1).bit_length())


def checkpoint_spacing(asked: int | None, chunk: int, page_size: int) -> int:
    """Tokens between two checkpoints of a prompt, in whole pages: a chunk unless `asked`; 0 keeps none."""
    return -(-(chunk if asked is None else asked) // page_size) * page_size


def num_checkpoints(seq_tokens: int, spacing: int) -> int:
    """Checkpoints of a conversation of that length."""
    return ENDS_PER_CONVERSATION + seq_tokens // spacing if spacing else 0


def cache_decisions(limits: Limits, tpot_ms: float | None) -> tuple[Decision, ...]:
    """What was planned for conversations that come again, and why."""
    kept = f"{limits.num_checkpoints} checkpoints, in prompts every {limits.checkpoint_interval} tokens"
    ends = f"{ENDS_PER_CONVERSATION} for each conversation where its last prompt and answer end, and turns start from"
    within = (
        f"with a decode step within {tpot_ms} ms"
        if tpot_ms
        else "a chunk: the spec names no time per token"
    )
    return (
        Decision(
            name="prefix_cache",
            value=kept if limits.num_checkpoints else "off",
            reason=f"{ends}; those between serve prompts that begin alike"
            if limits.num_checkpoints
            else AS_ASKED,
        ),
        Decision(
            name="interleaving",
            value=f"{limits.interleaved_tokens} prefill tokens a decode step",
            reason=within,
        ),
    )


def interleaved_tokens(
    limits: Limits, tpot_ms: float | None, predicted_us: Mapping[tuple[Phase, int], float]
) -> int:
    """Prefill tokens between two decode steps, so that both together stay within the planned time per token.

    Times are taken to grow evenly from one bucket to the next. At least one page, so that prompts
    are computed at all.
    """
    if tpot_ms is None:
        return limits.max_tokens
    decode_us = max(us for (phase, _), us in predicted_us.items() if phase == "decode")
    left_us = tpot_ms * 1e3 - decode_us
    known = sorted(
        (bucket, us) for (phase, bucket), us in predicted_us.items() if phase == "prefill"
    )
    tokens = known[0][0] if known[0][1] <= left_us else limits.page_size
    for (low, low_us), (high, high_us) in pairwise(known):
        if low_us <= left_us:
            share = min((left_us - low_us) / max(high_us - low_us, 1e-9), 1.0)
            tokens = low + int((high - low) * share)
    return min(tokens, limits.max_tokens)


def decode_buckets(max_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the concurrency itself."""
    powers = [1 << i for i in range(max_seqs.bit_length()) if 1 << i < max_seqs]
    return (*powers, max_seqs)


def prefill_buckets(limits: Limits, turn_tokens: int) -> tuple[int, ...]:
    """The chunk, a quarter of it, and what a later turn brings: fewer rows want smaller tiles.

    With a turn's own tokens comes the last one of the answer before it, which was said but not
    computed.
    """
    quarter, turn = max(limits.max_tokens // 4, 1), (turn_tokens // TURN_STEP + 1) * TURN_STEP
    return tuple(
        sorted(
            {quarter, limits.max_tokens}
            | ({turn} if turn_tokens and turn < limits.max_tokens else set())
        )
    )
