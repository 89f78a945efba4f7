"""Golden tokens: they prove that plan, weights and machine agree with the reference.

The proof takes about a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenspeed_plan.plans.errors import CanaryError
from tokenspeed_plan.plans.schema import CanaryPrompt, Plan
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion, SamplingParams

# How far a logprob may be from the fp64 reference. A smaller difference is rounding; a larger one
# means another model.
TOLERANCE = {"fp64": 1e-4, "fp32": 1e-2, "bf16": 0.5}

DAMAGED = "look for NaN or infinity in the checkpoint's tensors; restore it, and plan again"


def golden(engine: Engine, prompts: list[list[int]], num_tokens: int) -> tuple[CanaryPrompt, ...]:
    """The engine's tokens, with the logprob and the margin of each, to four decimals.

    The margin is the lead of the token's logprob over the runner-up's.

    Raises:
        CanaryError: the model gives no answer.
    """
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, num_logprobs=2)
    completions = _answers(engine, prompts, params)
    return tuple(
        CanaryPrompt(
            prompt_ids=tuple(prompt),
            token_ids=done.token_ids,
            logprobs=tuple(round(item.logprob, 4) for item in done.logprobs),
            margins=tuple(round(item.top[0][1] - item.top[1][1], 4) for item in done.logprobs),
        )
        for prompt, done in zip(prompts, completions, strict=True)
    )


def _answers(
    engine: Engine, prompts: Iterable[Sequence[int]], params: SamplingParams
) -> list[Completion]:
    """The answers to all prompts.

    Raises:
        CanaryError: one of them cannot be answered.
    """
    completions = engine.generate(prompts, params)
    for index, done in enumerate(completions):
        if done.error is not None:
            raise CanaryError(f"canary prompt {index}: {done.error}", DAMAGED)
    return completions


def check_canary(plan: Plan, engine: Engine) -> int:
    """Replay the plan's golden prompts; returns how many tokens were compared.

    Where the reference's own lead over the runner-up is within the tolerance, either token is
    right, and the comparison of that prompt ends there.

    Raises:
        CanaryError: another token or another probability, or no answer.
    """
    if not plan.canary:
        return 0
    max_tokens = max(len(prompt.token_ids) for prompt in plan.canary)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, num_logprobs=1)
    prompts = [prompt.prompt_ids for prompt in plan.canary]
    completions = _answers(engine, prompts, params)
    tolerance = TOLERANCE[plan.model.dtype]
    num_compared = 0
    for index, wanted in enumerate(plan.canary):
        num_compared += _compare(index, wanted, completions[index], tolerance)
    return num_compared


def _compare(index: int, wanted: CanaryPrompt, got: Completion, tolerance: float) -> int:
    """Compare one prompt; returns how many of its tokens were compared."""
    hint = "the weights or the plan were changed: plan again, or restore the checkpoint"
    for position, (token, logprob, margin) in enumerate(
        zip(wanted.token_ids, wanted.logprobs, wanted.margins, strict=True)
    ):
        actual = got.logprobs[position]
        where = f"canary prompt {index}, token {position}"
        if actual.token_id != token:
            if margin <= 2 * tolerance:
                return position
            raise CanaryError(
                f"{where}: got {actual.token_id}, the reference says {token}",
                hint,
            )
        if not abs(actual.logprob - logprob) <= tolerance:
            raise CanaryError(
                f"{where}: logprob {actual.logprob:.4f}, the reference says {logprob:.4f}",
                hint,
            )
    return len(wanted.token_ids)
