"""Golden tokens: a proof, in about a second, that plan, weights and machine agree with the reference."""

from __future__ import annotations

from tokenspeed_plan.plans.errors import CanaryError
from tokenspeed_plan.plans.schema import CanaryPrompt, Plan
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion, SamplingParams

# How far a logprob may be from the fp64 reference: a difference up to this is rounding, more is
# another model.
TOLERANCE = {"fp64": 1e-4, "fp32": 1e-2, "bf16": 0.5}


def golden(engine: Engine, prompts: list[list[int]], num_tokens: int) -> tuple[CanaryPrompt, ...]:
    """The engine's tokens, with logprobs and the lead of each token, to four decimals."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, num_logprobs=2)
    return tuple(
        CanaryPrompt(
            prompt_ids=tuple(prompt),
            token_ids=done.token_ids,
            logprobs=tuple(round(item.logprob, 4) for item in done.logprobs),
            margins=tuple(round(item.top[0][1] - item.top[1][1], 4) for item in done.logprobs),
        )
        for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True)
    )


def check_canary(plan: Plan, engine: Engine) -> int:
    """Replay the plan's golden prompts; returns how many tokens were compared.

    Where the reference's own lead over the runner-up is within the tolerance, either token is
    right, and the comparison of that prompt ends there.

    Raises:
        CanaryError: another token or another probability.
    """
    if not plan.canary:
        return 0
    longest = max(len(prompt.token_ids) for prompt in plan.canary)
    params = SamplingParams(max_tokens=longest, ignore_eos=True, num_logprobs=1)
    done = engine.generate([prompt.prompt_ids for prompt in plan.canary], params)
    return sum(
        _compare(index, *pair, TOLERANCE[plan.model.dtype])
        for index, pair in enumerate(zip(plan.canary, done, strict=True))
    )


def _compare(index: int, wanted: CanaryPrompt, got: Completion, tolerance: float) -> int:
    hint = "the weights or the plan were changed: plan again, or restore the checkpoint"
    for position, (token, logprob, margin) in enumerate(
        zip(wanted.token_ids, wanted.logprobs, wanted.margins, strict=True)
    ):
        actual = got.logprobs[position]
        if actual.token_id != token:
            if margin <= 2 * tolerance:
                return position
            raise CanaryError(
                f"canary prompt {index}, token {position}: got {actual.token_id}, the reference says {token}",
                hint,
            )
        if not abs(actual.logprob - logprob) <= tolerance:
            raise CanaryError(
                f"canary prompt {index}, token {position}: logprob {actual.logprob:.4f}, the reference says {logprob:.4f}",
                hint,
            )
    return len(wanted.token_ids)
