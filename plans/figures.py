"""Numbers as people read them: four digits, and no exponent."""

from __future__ import annotations

import re
from decimal import Decimal

_EXPONENT = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?e[+-]\d+\b")


def plain(value: float) -> str:
    """The number with four digits that count, written out."""
    return format(Decimal(f"{value:.4g}"), "f")


def without_exponents(text: str) -> str:
    """A text in which each number with an exponent is written out."""
    return _EXPONENT.sub(lambda found: format(Decimal(found.group()), "f"), text)
