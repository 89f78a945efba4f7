"""What came of hand-overs, as a server shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GaugeRow = tuple[str, str, Callable[[], float]]  # a name, a text, and what reads it
Gauges = list[GaugeRow]


@dataclass(slots=True)
class HandoverCounts:
    """Counters that only grow.

    `ordered` prompts were asked of peers; of these `done` came, `refused` had another digest than
    was said, `failed` could not be computed there, and `lost` went with their peer. `alone` were
    computed here after all. `wait_s` is the time from order to arrival of those that came,
    `exposed_s` the part of it after their last token was computed, and `computed_tokens` what peers
    did not find in their caches of them. They found `returned_tokens` as answers had gone back.

    Of answers that were `offered` to prefill pools, `returned` are there, `known` were there
    already, `unwanted` had no room, were not worth it or came with a wrong digest, and `dropped`
    were given up here or went with their peer.
    """

    ordered: int = 0
    done: int = 0
    refused: int = 0
    failed: int = 0
    lost: int = 0
    alone: int = 0
    size_bytes: int = 0
    wait_s: float = 0.0
    exposed_s: float = 0.0
    computed_tokens: int = 0
    returned_tokens: int = 0
    offered: int = 0
    returned: int = 0
    known: int = 0
    unwanted: int = 0
    dropped: int = 0
    returned_bytes: int = 0

    def gauges(self) -> Gauges:
        """Each of them with its name and what it means."""
        return [
            ("handovers_ordered", "Prompts that were asked of prefill pools", lambda: self.ordered),
            ("handovers_done", "Prompts that came from prefill pools", lambda: self.done),
            (
                "handovers_refused",
                "Prompts that came with a wrong digest, and were not used",
                lambda: self.refused,
            ),
            ("handovers_failed", "Prompts that a prefill pool gave up", lambda: self.failed),
            ("handovers_lost", "Prompts that went with their prefill pool", lambda: self.lost),
            ("handovers_alone", "Prompts of these computed here after all", lambda: self.alone),
            ("handover_bytes", "Bytes that came from prefill pools", lambda: self.size_bytes),
            ("handover_seconds", "From order to arrival, all together", lambda: self.wait_s),
            (
                "handover_tokens",
                "Tokens that prefill pools computed for them",
                lambda: self.computed_tokens,
            ),
            (
                "handover_exposed_seconds",
                "Of these, after the last token of the prompt was computed",
                lambda: self.exposed_s,
            ),
            ("answers_offered", "Answers that were offered to prefill pools", lambda: self.offered),
            ("answers_returned", "Answers that went back to them", lambda: self.returned),
            ("answers_known", "Answers that they knew", lambda: self.known),
            ("answers_unwanted", "Answers that they did not take", lambda: self.unwanted),
            ("answers_dropped", "Answers that were given up on their way", lambda: self.dropped),
            ("answer_bytes", "Bytes that went back with answers", lambda: self.returned_bytes),
            (
                "answer_hit_tokens",
                "Tokens of prompts that prefill pools had from answers",
                lambda: self.returned_tokens,
            ),
        ]
