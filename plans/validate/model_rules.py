"""What ties a plan to its model: its files, vocabulary, canary and promises."""

from __future__ import annotations

from tokenspeed_plan.plans.report import DEFINITIONS
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


def check_files(plan: Plan) -> None:
    """Files are named from the model's folder, and lie in it.

    Raises:
        PlanError: a name leads elsewhere.
    """
    for name in plan.model.files:
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or not name.isprintable():
            raise refuse(f"{name!r} is no file in the model's folder")
    for name, shard in plan.model.shards.items():
        if "/" in name or not name.isprintable() or not name.endswith(".safetensors"):
            raise refuse(f"{name!r} is no file of weights in the model's folder")
        if not shard.header_sha256:
            raise refuse(f"`{name}` has no digest of its header")


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


def check_predictions(plan: Plan) -> None:
    """Each promised number has an interval, and a decode step takes time.

    Raises:
        PlanError: a number or an interval is missing, or the time is none.
    """
    predicted = plan.predicted
    names = predicted.values.keys()
    if not names == predicted.low.keys() == predicted.high.keys():
        raise refuse("each predicted number needs an interval from `low` to `high`")
    missing = DEFINITIONS.keys() - names
    if missing:
        raise refuse(f"the plan predicts no `{min(missing)}`")
    if sum(predicted.decode_step_us.values()) <= 0:
        raise refuse("a decode step is predicted to take no time")
