"""What a history says of its machine: the host's work for a step, and how far prices are off.

Medians all the way, so that no run that was disturbed decides anything: of the steps of a program
in a run, of the runs of a program, of the programs.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tokenspeed_plan.runtime.bench.host_terms import HostTerms
from tokenspeed_plan.runtime.history.run_record import RunRecord, StepRow

MIN_ROW_STEPS = 20  # of a program in a run; fewer say nothing
MIN_RUNS = 3
MIN_STEPS = 300
MIN_SIZES = 2  # numbers of sequences through which the host's line goes


@dataclass(frozen=True, slots=True)
class Lessons:
    """What was learnt.

    Attributes:
        runs: that said something.
        steps: theirs, of the programs that said something.
        host: microseconds of the host; None where nothing was measured.
        factor: measured over predicted microseconds of the device; None where no prediction of the
            run is by the profile's prices, or no step was timed.
        spread: half the programs are as near to the factor as this, as a share of it.
        programs: with a factor of their own, in how many plans.
        plans: their number.
        has_sums: whether ranks add up in one of them.
    """

    runs: int
    steps: int
    host: HostTerms | None
    factor: float | None = None
    spread: float = 0.0
    programs: int = 0
    plans: int = 0
    has_sums: bool = False

    @property
    def is_enough(self) -> bool:
        """Whether there are runs and steps enough to believe it."""
        return self.runs >= MIN_RUNS and self.steps >= MIN_STEPS


def learn(records: Iterable[RunRecord], prices: str, known: HostTerms) -> Lessons:
    """Learn from the runs of one machine.

    Args:
        records: theirs.
        prices: digest of the profile; predictions by another one are passed over.
        known: the profile's terms of the host, kept where the history cannot tell them apart.
    """
    kept = [(record, _telling(record)) for record in records]
    kept = [(record, rows) for record, rows in kept if rows]
    every = [row for _, rows in kept for row in rows]
    steps = sum(row.steps for row in every)
    ratios: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    has_sums = False
    for record, rows in kept:
        if record.predicted is not None and record.predicted.prices == prices:
            has_sums |= record.ranks > 1
            for row, ratio in _ratios(rows):
                ratios[record.plan, row.phase, row.bucket].append(ratio)
    host = host_terms(every, known)
    if not ratios:
        return Lessons(len(kept), steps, host)
    factor, spread = _middle(ratios)
    plans = len({plan for plan, _, _ in ratios})
    return Lessons(len(kept), steps, host, factor, spread, len(ratios), plans, has_sums)


def _telling(record: RunRecord) -> list[StepRow]:
    """The programs of a run that had steps enough."""
    return [row for row in record.steps if row.steps >= MIN_ROW_STEPS]


def _ratios(rows: Iterable[StepRow]) -> Iterator[tuple[StepRow, float]]:
    """Measured over predicted time of the programs whose steps were timed."""
    for row in rows:
        if row.timed >= MIN_ROW_STEPS and row.device_us and row.predicted_us:
            yield row, row.device_us / row.predicted_us


def _middle(ratios: Mapping[tuple[str, str, int], Sequence[float]]) -> tuple[float, float]:
    """The factor of the median program, and the median distance from it as a share of it."""
    own = [statistics.median(found) for found in ratios.values()]
    factor = statistics.median(own)
    return factor, statistics.median(abs(ratio / factor - 1.0) for ratio in own)


def host_terms(rows: Sequence[StepRow], known: HostTerms) -> HostTerms | None:
    """The line of decode steps over their sequences (Theil and Sen), and what prompts take more.

    Source: Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 1968.
    """
    decode: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.phase == "decode" and row.host_us is not None:
            decode[round(row.seqs)].append(row.host_us)
    if not decode:
        return None
    points = {seqs: statistics.median(times) for seqs, times in decode.items()}
    seq_us = known.seq_us
    if len(points) >= MIN_SIZES:
        seq_us = max(_slope(points), 0.0)
    step_us = statistics.median(us - seq_us * seqs for seqs, us in points.items())
    prompts = [
        (row.host_us - step_us - seq_us * row.committed) / row.prompts
        for row in rows
        if row.phase == "prefill" and row.host_us is not None and row.prompts
    ]
    prompt_us = statistics.median(prompts) if prompts else known.prompt_us
    return HostTerms(max(step_us, 0.0), seq_us, max(prompt_us, 0.0))


def _slope(points: Mapping[int, float]) -> float:
    """The median of the slopes between all pairs."""
    pairs = combinations(points.items(), 2)
    return statistics.median((us - other_us) / (x - other) for (x, us), (other, other_us) in pairs)


def too_little(lessons: Lessons, name: str, damaged: int) -> str:
    """Why nothing is made of a history."""
    text = (
        f"{lessons.runs} runs on {name} with {lessons.steps} steps are too few, of {MIN_RUNS} runs "
        f"with {MIN_STEPS} steps, {MIN_ROW_STEPS} of a program"
    )
    if damaged:
        text = f"{text}; {damaged} lines are damaged"
    return text


def as_text(lessons: Lessons, profile: str) -> list[str]:
    """What was learnt, in lines; `profile` is what it is measured by."""
    host, lines = lessons.host, [f"{lessons.runs} runs with {lessons.steps} steps"]
    if host is None:
        lines.append(f"no run tells the host's work; that of {profile} stays")
    else:
        lines.append(
            f"the host works {host.step_us:.0f} us for a step, {host.seq_us:.2f} for each "
            f"sequence, {host.prompt_us:.0f} for each new prompt"
        )
    if lessons.factor is None:
        lines.append(f"no run was predicted by the prices of {profile}; they stay")
    else:
        lines.append(
            f"steps take {lessons.factor:.3f} x what {profile} says, by the median of "
            f"{lessons.programs} programs in {lessons.plans} plans; half are within "
            f"{lessons.spread:.1%} of it"
        )
    return lines
