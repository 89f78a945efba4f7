"""What ties a plan to its model: the vocabulary and the canary prompts."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.validate.refusal import refuse


def check_vocabulary(plan: Plan, pool: Pool) -> None:
    """Token ids are below `vocab_size`: each of them must have a logit.

    Raises:
        PlanError: there are more or fewer logits.
    """
    for buffer in pool.buffers:
        if buffer.name not in ("logits", "verify_logits"):
            continue
        width = buffer.tensor.shape[-1]
        if width != plan.model.vocab_size:
            raise refuse(f"{width} logits for a vocabulary of {plan.model.vocab_size}")


def check_canary(plan: Plan) -> None:
    """Each token of a canary has a logprob and a margin.

    Raises:
        PlanError: one has not.
    """
    for prompt in plan.canary:
        columns = (prompt.token_ids, prompt.logprobs, prompt.margins)
        lengths = {len(column) for column in columns}
        if len(lengths) != 1 or 0 in lengths:
            raise refuse("a canary needs a logprob and a margin for each of its tokens")
