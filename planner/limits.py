"""From the workload to what the plan can serve, and from that to the buckets."""

from __future__ import annotations

from tokenspeed_plan.planner.hardware import HardwareSpec
from tokenspeed_plan.planner.model_config import ModelConfig
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Limits

ROWS_PER_SLOT = 2  # one to read, one to write; speculation will need 1 + depth more


def plan_limits(
    workload: WorkloadSpec, config: ModelConfig, hardware: HardwareSpec, chunk: int | None = None
) -> Limits:
    """The longest conversation, rounded up to a page; pages for `concurrency` of them.

    `chunk` tokens of a prompt are computed at once, the machine's default where it is None.

    Raises:
        SpecError: the model has fewer positions than the workload needs.
    """
    needed = workload.longest_tokens
    if needed > config.max_positions:
        raise SpecError(
            f"the workload needs {needed} tokens in a sequence, `{config.name}` has {config.max_positions} positions",
            "lower `workload.turns` or the tokens of a turn",
        )
    pages = -(-needed // hardware.page_size)
    max_seq_len = min(pages * hardware.page_size, config.max_positions)
    return Limits(
        max_seqs=workload.concurrency,
        max_seq_len=max_seq_len,
        max_tokens=prefill_chunk(chunk or hardware.prefill_chunk, max_seq_len),
        page_size=hardware.page_size,
        num_pages=pages * workload.concurrency,
        rows_per_slot=ROWS_PER_SLOT,
        num_rows=2 + workload.concurrency * ROWS_PER_SLOT,
        default_max_tokens=min(workload.output_tokens, max_seq_len - 1),
    )


def prefill_chunk(wanted: int, longest_tokens: int) -> int:
    """A chunk that is not longer than the longest sequence, rounded up to a power of two."""
    return min(wanted, 1 << (longest_tokens - 1).bit_length())


def decode_buckets(limits: Limits) -> tuple[int, ...]:
    """1, 2, 4, ... and the concurrency itself."""
    powers = [1 << i for i in range(limits.max_seqs.bit_length()) if 1 << i < limits.max_seqs]
    return (*powers, limits.max_seqs)


def prefill_buckets(limits: Limits) -> tuple[int, ...]:
    """A quarter of the chunk for short turns, and the chunk."""
    return tuple(sorted({max(limits.max_tokens // 4, 1), limits.max_tokens}))
