"""How a decode step takes rejected drafts back.

`snapshot`: a step leaves a recurrent state after each of its queries, and the next step starts from
the one after the last accepted draft. This takes memory, and writes every state in each step.

`recompute`: the state before the step stays, the inputs of its queries are kept, and the next step
first recomputes the state after the accepted drafts. This does a step's arithmetic twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.draft_depths import (
    WORTH_A_DRAFT,
    BucketDepth,
    bucket_depths,
    max_depth,
)
from tokenspeed_plan.planner.advisor.memory_model import MemoryMap
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.types import RollbackWord


@dataclass(frozen=True, slots=True)
class Rollback:
    """One of the two ways, with the drafts of each bucket and the memory that it takes."""

    predictor: Predictor
    table: tuple[BucketDepth, ...]
    memory: MemoryMap

    @property
    def word(self) -> RollbackWord:
        """Which of the two it is."""
        return self.predictor.rollback

    @property
    def depth(self) -> int:
        """The most drafts of any bucket."""
        return max_depth(self.table)

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        limit = self.predictor.hardware.memory_bytes
        return self.memory.total <= limit

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state on a rank, checkpoints included."""
        return self.memory.state + self.memory.checkpoints

    @property
    def token_us(self) -> float:
        """Microseconds for a token of a sequence, the mean over all buckets."""
        times_us = [each.token_us[each.depth] for each in self.table]
        return geometric_mean(times_us)

    def __str__(self) -> str:
        return self.word


def allowed_rollbacks(
    spec: Spec, config: ModelConfig, hardware: HardwareSpec
) -> tuple[RollbackWord, ...]:
    """The ways to try, the usual one first; one alone where the spec states it or nothing drafts.

    A GPU waits for memory, so `recompute` usually wins; a CPU waits for arithmetic.
    """
    if spec.stated_rollback:
        return (spec.stated_rollback,)
    ways: tuple[RollbackWord, ...] = ("snapshot", "recompute")
    if hardware.sm > 0:
        ways = ("recompute", "snapshot")
    drafts = config.num_mtp_layers > 0 and spec.stated_depth != 0
    if drafts:
        return ways
    return ways[:1]


def rollbacks(
    predictors: Sequence[Predictor], candidate: Candidate, buckets: tuple[int, ...]
) -> list[Rollback]:
    """Each way with its drafts and its memory."""
    ways = []
    for predictor in predictors:
        table = bucket_depths(predictor, candidate, buckets)
        knobs = replace(candidate.knobs, depth=max_depth(table))
        memory = predictor.fullest(replace(candidate, knobs=knobs))
        ways.append(Rollback(predictor, table, memory))
    return ways


def choose(ways: Sequence[Rollback]) -> Rollback:
    """The first way that fits, unless another one saves enough time."""
    fitting = [way for way in ways if way.fits] or list(ways)
    usual = fitting[0]
    fastest = min(fitting, key=_token_us)
    if fastest.token_us * (1 + WORTH_A_DRAFT) < usual.token_us:
        return fastest
    return usual


def _token_us(way: Rollback) -> float:
    return way.token_us
