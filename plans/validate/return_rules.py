"""Answers that go back to a prefill pool: they leave hand-overs what those may have at once."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.validate.refusal import refuse


def check_answer_returns(plan: Plan, pool: Pool) -> None:
    """Answers go back to a prefill pool alone, and have state slots there.

    Raises:
        PlanError: naming what is wrong.
    """
    returns, limits = pool.answer_returns, pool.limits
    if returns is None:
        return
    if pool.role != "prefill":
        raise refuse(f"answers go back to a pool of role `{pool.role}`")
    if returns.slots > limits.max_seqs:
        raise refuse(f"{returns.slots} answers go back at once, of {limits.max_seqs} sequences")
    most = limits.num_checkpoints - limits.max_seqs
    if pool.slot_bytes("state") and returns.slots > most:
        raise refuse(
            f"{returns.slots} answers go back at once, and prompts leave {most} of the "
            f"{limits.num_checkpoints} checkpoints"
        )
    if returns.least_tokens < limits.page_size:
        raise refuse(f"{returns.least_tokens} tokens of an answer go back, less than a page")
