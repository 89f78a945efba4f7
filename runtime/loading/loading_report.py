"""How far work is that takes long."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]  # is told a stage, and how many of how many parts are done


def nobody(stage: str, done: int, total: int) -> None:
    """Where nobody wants to know."""
