"""How a value from somebody's file is quoted in an error: short, on one line, and printable."""

from __future__ import annotations

import reprlib

from tokenspeed_plan.plans.text import printable_line

MAX_SHOWN = 60  # characters


def shown(value: object) -> str:
    """The value as Python writes it, in at most 60 characters.

    `reprlib` stops early, so that deep or endless values cost nothing.
    """
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python prints no integer of over 4,300 digits
        return f"a large {type(value).__name__}"
    text = printable_line(text)
    if len(text) > MAX_SHOWN:
        return f"{text[: MAX_SHOWN - 3]}..."
    return text
