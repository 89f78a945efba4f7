"""What makes one engine faster than another: the times of the same deployment, term by term."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.engine_profile import Engine, terms_us
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.step_model import host_us
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.advisor.workload import conversation
from tokenspeed_plan.plans.figures import plain

OURS = "tokenspeed-plan"
PARTS = {"decode_step_us": "a decode step", "prompt_us": "the prompt of an average turn"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two engines on one deployment: the terms of each, in microseconds, by part and term.

    `batch`: sequences of the decode step, the same for both.
    """

    names: tuple[str, str]
    batch: int
    terms: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]
    launches: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        """Stable fields."""
        rounded = {
            part: [{name: digits(us) for name, us in each.items()} for each in pair]
            for part, pair in self.terms.items()
        }
        return {
            "engines": list(self.names),
            "batch": self.batch,
            "launches_per_step": [digits(count) for count in self.launches],
            **rounded,
        }

    def lines(self) -> Iterator[str]:
        """A table in words: what each term adds, and the difference."""
        first, second = self.names
        yield f"by term, microseconds: {first}, {second}, difference"
        launches = " and ".join(plain(count) for count in self.launches)
        for part, (own, other) in self.terms.items():
            what = PARTS.get(part, "a first token besides its prompt")
            if part == "decode_step_us":
                what += f" of {self.batch} sequences, {launches} launches"
            yield f"  {what}"
            for name in own:
                us = (own[name], other[name], round(other[name] - own[name], 3))
                if any(us):
                    yield f"    {name:<26} " + " ".join(f"{plain(each):>11}" for each in us)


def compare(predictor: Predictor, best: Prediction, other: Engine | None) -> Comparison:
    """The terms of a predictor's engine beside those of another one, or of ours.

    Args:
        predictor: with an engine.
        best: the deployment that is compared.
        other: the second engine; None for our runtime.
    """
    second = replace(predictor, engine=other, shared_steps=None, memories={}, maps={})
    pair = (predictor, second)
    batch = max(round(best.turn.batch), 1)
    predictions = [each.predict(best.candidate) for each in pair]
    steps = [_decode_step(each, best.candidate, batch) for each in pair]
    prompts = [_terms(prediction.prompt) for prediction in predictions]
    waits = [
        each.engine.first_token_us(best.prompt_tokens) if each.engine else 0.0 for each in pair
    ]
    terms = {
        "decode_step_us": (_terms(steps[0]), _terms(steps[1])),
        "prompt_us": (prompts[0], prompts[1]),
        "first_token_us": ({"front end": waits[0]}, {"front end": waits[1]}),
    }
    names = (_name(predictor.engine), _name(other))
    return Comparison(names, batch, terms, (steps[0].launches, steps[1].launches))


def _decode_step(predictor: Predictor, candidate: Candidate, batch: int) -> StepTime:
    """A step in the middle of the conversation, with the host's work that it does not hide."""
    steps, knobs = predictor.steps, candidate.knobs
    context = conversation(predictor.spec.workload).mean_context
    step = steps.decode(candidate.layout, batch, context, knobs.depth, knobs.kv_dtype)
    return step + StepTime(host=max(host_us(steps, batch) - step.total_us, 0.0))


def _name(engine: Engine | None) -> str:
    return engine.title if engine else OURS


def _terms(step: StepTime) -> dict[str, float]:
    """The terms and their sum."""
    return {**terms_us(step), "total": step.total_us}
