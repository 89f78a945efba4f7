"""How many drafts each decode bucket verifies a step: as many as make a token cheapest, none where none pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from tokenspeed_plan.planner.advisor.candidate import DEPTHS, Candidate
from tokenspeed_plan.planner.advisor.prediction import Predictor, digits
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision, Option

# of a token's time: a prediction does not tell depths apart that are closer (measured on an H200)
WORTH_A_DRAFT = 0.05


@dataclass(frozen=True, slots=True)
class Crossover:
    """Of one bucket: microseconds a token of a sequence takes with each number of drafts, and the number chosen."""

    bucket: int
    token_us: Mapping[int, float]
    depth: int

    @property
    def gain(self) -> float:
        """Tokens a second over those without drafts."""
        return self.token_us[0] / self.token_us[self.depth]


def crossovers(
    predictor: Predictor, candidate: Candidate, buckets: tuple[int, ...]
) -> tuple[Crossover, ...]:
    """Each bucket's depth: the one that the spec states, else the fewest drafts near the least time a token.

    Where rows of state for the deepest do not fit, all are at most as deep as the candidate, which
    does.

    Raises:
        SpecError: drafts are asked for, and the model has no layer that makes them.
    """
    stated = predictor.spec.stated_depth
    if not predictor.config.num_mtp_layers:
        if stated:
            raise SpecError(
                f"`{predictor.config.name}` has no MTP layer to draft with",
                "set `speculation: off`",
            )
        return tuple(Crossover(bucket, {0: 1.0}, 0) for bucket in buckets)
    made = tuple(_crossover(predictor, candidate, bucket, stated) for bucket in buckets)
    deepest = replace(
        candidate, knobs=replace(candidate.knobs, depth=max(each.depth for each in made))
    )
    if stated is None and predictor.fullest(deepest).total > predictor.hardware.memory_bytes:
        most = candidate.knobs.depth
        made = tuple(
            replace(
                each, depth=_shallowest({d: us for d, us in each.token_us.items() if d <= most})
            )
            for each in made
        )
    return made


def _crossover(
    predictor: Predictor, candidate: Candidate, bucket: int, stated: int | None
) -> Crossover:
    depths = DEPTHS if stated is None else sorted({0, stated})
    token_us = {depth: predictor.token_us(candidate, bucket, depth) for depth in depths}
    return Crossover(bucket, token_us, _shallowest(token_us) if stated is None else stated)


def _shallowest(token_us: Mapping[int, float]) -> int:
    least = min(token_us.values())
    return min(depth for depth, us in token_us.items() if us <= least * (1 + WORTH_A_DRAFT))


def decision(predictor: Predictor, found: tuple[Crossover, ...]) -> Decision:
    """What each bucket does, and the table in which one sees where that changes."""
    if predictor.spec.speculation == "off":
        return Decision(name="speculation", value="off", reason="as the spec says")
    if not predictor.config.num_mtp_layers:
        return Decision(
            name="speculation", value="off", reason="the model has no layer that drafts"
        )
    stated, gains = (
        predictor.spec.stated_depth,
        ", ".join(f"{each.gain:.2f} at {each.bucket}" for each in found),
    )
    how = "as the spec says" if stated is not None else "least time a token by batch"
    rates, few = ", ".join(f"{rate:g}" for rate in predictor.acceptance), predictor.spec.draft_vocab
    of = f" (of the first {few} tokens)" if few else ""
    return Decision(
        name="speculation",
        value=_value(found),
        reason=f"{how}; with {rates} of drafts{of} accepted, times the tokens without: {gains}",
        options=tuple(_option(each) for each in found),
    )


def _value(found: tuple[Crossover, ...]) -> str:
    runs = [
        (depth, [each.bucket for each in run])
        for depth, run in groupby(found, key=lambda each: each.depth)
    ]
    if len(runs) == 1:
        return f"depth {runs[0][0]}" if runs[0][0] else "off"
    words = [f"depth {depth}" if depth else "off" for depth, _ in runs]
    return ", ".join(
        f"{word} at batch {', '.join(map(str, of))}"
        for word, (_, of) in zip(words, runs, strict=True)
    )


def _option(each: Crossover) -> Option:
    numbers = {f"{depth} drafts": digits(us) for depth, us in each.token_us.items()}
    return Option(
        what=f"batch {each.bucket}, us a token",
        numbers=numbers,
        reason=f"{each.depth} drafts" if each.depth else "none",
    )
