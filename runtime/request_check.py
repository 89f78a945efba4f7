"""Which requests an engine refuses, before any of them is queued."""

from __future__ import annotations

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.request import Request


def check_request(request: Request, plan: Plan) -> None:
    """Refuse what cannot be served.

    Raises:
        RequestError: the prompt is empty, has ids that the model does not have, or is longer than
            the plan serves; or a parameter means nothing.
    """
    if not request.prompt_ids:
        raise RequestError(
            f"request `{request.request_id}` has an empty prompt", "give at least one token"
        )
    request.params.check(plan.model.vocab_size)
    _check_length(request, plan.pool.limits.max_seq_len)
    _check_ids(request, plan.model.vocab_size)


def _check_length(request: Request, max_seq_len: int) -> None:
    length, max_tokens = len(request.prompt_ids), request.params.max_tokens
    if length + max_tokens > max_seq_len:
        raise RequestError(
            f"{length} prompt tokens and {max_tokens} new ones are over the plan's limit of "
            f"{max_seq_len} (max_seq_len)",
            "plan for longer conversations: raise `workload` in the spec",
        )


def _check_ids(request: Request, vocab_size: int) -> None:
    lowest, highest = min(request.prompt_ids), max(request.prompt_ids)
    worst = lowest if lowest < 0 else highest
    if not 0 <= worst < vocab_size:
        raise RequestError(
            f"token id {worst} is not in the vocabulary of {vocab_size}",
            "use the model's own tokenizer",
        )
