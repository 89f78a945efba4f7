"""Types of options: numbers that are numbers. Click's own take `nan`, which no bound refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

MAX_SECONDS = 1e6  # eleven days; the clocks of the system count milliseconds in 32 bits


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Chances(click.ParamType):  # type: ignore[type-arg]
    """A list of numbers from 0 to 1, separated by commas."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The numbers."""
        try:
            chances = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            chances = ()
        if not chances or not all(0.0 <= chance <= 1.0 for chance in chances):
            self.fail(f"`{value}` is no list of numbers from 0 to 1, as 0.9,0.8,0.7", param, ctx)
        return chances


def seconds_option(flag: str, name: str, default: float, text: str) -> Callable[[Any], Any]:
    """An option of so many seconds, more than none."""
    return click.option(
        flag,
        name,
        type=Number(min=0, min_open=True, max=MAX_SECONDS),
        default=default,
        show_default=True,
        help=text,
    )
