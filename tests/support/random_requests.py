"""Requests that are added to an engine at random moments."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tokenspeed_plan.runtime import Engine, Request


def answers_at_random(
    engine: Engine, requests: Sequence[Request], rng: random.Random
) -> dict[str, Any]:
    """Add all requests, up to three before a step; returns tokens, reason and text by name."""
    left, done = list(requests), {}
    while left or engine.num_unfinished:
        for _ in range(min(rng.choice((0, 0, 1, 3)), len(left))):
            engine.add(left.pop(0))
        done |= {item.request_id: item for item in engine.step()}
    return {name: (item.token_ids, item.finish_reason, item.text) for name, item in done.items()}
