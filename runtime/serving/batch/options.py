"""What a batch run is given: paths and options, facts of the plan, an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.serving.batch.kept_rows import MAX_KEPT_BYTES
from tokenspeed_plan.runtime.serving.batch.scan import Selection
from tokenspeed_plan.runtime.serving.batch.summary import Load
from tokenspeed_plan.runtime.serving.openai.answers import ChatDecoder
from tokenspeed_plan.runtime.serving.openai.conversion import Encoder, RequestLimits

Order = Literal["input", "completion"]


class BatchEngine(Protocol):
    """The methods of an engine that a batch run calls."""

    startup_s: dict[str, float]

    @property
    def num_unfinished(self) -> int:
        """Number of requests that wait or run."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> list[Completion]:
        """Run one step; returns the requests that it finished."""


class TextTokenizer(Encoder, ChatDecoder, Protocol):
    """Text to token ids and back."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Paths and options of a batch run.

    Attributes:
        input: JSONL file, gzipped where its name ends in `.gz`; `-` is standard input.
        output: file of answers; `-` is standard output.
        errors: file of failed rows; without one they go to the output.
        summary: file of the summary, as JSON.
        order: order of the output: as in the input, or as rows finish.
        max_errors: number of bad lines up to which the other rows still run.
        max_concurrency: requests in the engine at once; the plan's `max_seqs` by default.
        selection: rows that are answered.
        quiet: show neither progress nor summary.
        max_kept_bytes: lines of the input up to which parsed rows stay in memory until they run.
        first_line: number of the input's first line, where it is a part of a longer file.
    """

    input: Path
    output: Path
    errors: Path | None = None
    summary: Path | None = None
    order: Order = "input"
    max_errors: int = 0
    max_concurrency: int | None = None
    selection: Selection = field(default_factory=Selection)
    quiet: bool = False
    max_kept_bytes: int = MAX_KEPT_BYTES
    first_line: int = 1


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Facts of the plan that a batch run needs.

    `digest` stands for everything in the plan that decides an answer; it is part of each row's key.
    `load` is what the predictions are for; None where that is not known.
    """

    digest: str
    model: str
    max_seqs: int
    limits: RequestLimits
    predicted: Mapping[str, float]
    load: Load | None = None
