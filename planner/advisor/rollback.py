"""Where a step goes back to when drafts were wrong.

Either each row of a step leaves a state, and the next step reads that after the last one that came
true; or the state before them all stays, the inputs of the rows are kept, and the next step
computes those that came true again. Rows take memory and are written anew in each step; inputs take
a step's arithmetic twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.draft_depths import WORTH_A_DRAFT, Crossover, crossovers
from tokenspeed_plan.planner.advisor.hardware import GIB, HardwareSpec
from tokenspeed_plan.planner.advisor.memory_model import MemoryMap
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Decision


@dataclass(frozen=True, slots=True)
class Rollback:
    """One of the two ways, with the drafts of each bucket and the memory that it takes."""

    predictor: Predictor
    table: tuple[Crossover, ...]
    memory: MemoryMap

    @property
    def recomputes(self) -> bool:
        """Inputs, not rows."""
        return self.predictor.recomputes

    @property
    def depth(self) -> int:
        """The most drafts."""
        return max(each.depth for each in self.table)

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.memory.total <= self.predictor.hardware.memory_bytes

    @property
    def token_us(self) -> float:
        """Time a token of a sequence, over all buckets."""
        return geometric_mean(each.token_us[each.depth] for each in self.table)

    def __str__(self) -> str:
        return "recompute" if self.recomputes else "snapshot"


def kept_first(spec: Spec, config: ModelConfig, hardware: HardwareSpec) -> list[bool]:
    """Whether inputs are kept, the usual way first; one way alone where the spec says so or nothing is drafted.

    A GPU waits for memory, so that it keeps inputs; a CPU for arithmetic.
    """
    stated, drafts = spec.stated_rollback, bool(config.num_mtp_layers) and spec.stated_depth != 0
    usual = hardware.sm > 0
    return [stated == "recompute"] if stated else [usual, not usual] if drafts else [usual]


def rollbacks(
    predictors: Sequence[Predictor], candidate: Candidate, buckets: tuple[int, ...]
) -> list[Rollback]:
    """What each way makes of the buckets; raises as `crossovers` does."""
    made = []
    for predictor in predictors:
        table = crossovers(predictor, candidate, buckets)
        knobs = replace(candidate.knobs, depth=max(each.depth for each in table))
        made.append(Rollback(predictor, table, predictor.fullest(replace(candidate, knobs=knobs))))
    return made


def choose(ways: Sequence[Rollback]) -> Rollback:
    """The first that fits, unless another one is worth it."""
    fitting = [way for way in ways if way.fits] or list(ways)
    best = min(fitting, key=lambda way: way.token_us)
    return best if best.token_us * (1 + WORTH_A_DRAFT) < fitting[0].token_us else fitting[0]


def decision(ways: Sequence[Rollback], chosen: Rollback) -> Decision:
    """What is gone back to, and what the other way would take."""
    if not chosen.depth:
        return Decision(name="rollback", value="none", reason="nothing is drafted")
    others = [way for way in ways if way is not chosen]
    if not others:
        return Decision(name="rollback", value=str(chosen), reason="as the spec says")
    (other,) = others
    state, compared = chosen.memory, other.memory
    gib = f"{(state.state + state.checkpoints) / GIB:.2f} GiB of state"
    versus = f"{(compared.state + compared.checkpoints) / GIB:.2f}"
    gain = other.token_us / chosen.token_us
    what = f"{gib}, {versus} with {other}; {gain:.3f} times its tokens"
    more = "" if other.depth == chosen.depth else f", which drafts at most {other.depth}"
    fits = "" if other.fits else f", which do not fit: {compared.total / GIB:.1f} GiB"
    return Decision(
        name="rollback", value=str(chosen), reason=f"{what}{more}{fits}", runner_up=str(other)
    )
