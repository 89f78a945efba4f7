"""The file that `tokenspeed measure-routing` writes: how unevenly a model's router chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tokenspeed_plan.plans.errors import SpecError

ROUTING_FILE_HINT = "`tokenspeed measure-routing DIR --input rows.jsonl` writes such a file"
MAX_SKEW = 4


def read_skew(path: Path) -> float:
    """The exponent of the Zipf law of experts.

    Raises:
        SpecError: the file cannot be read, is not JSON, or has no such number.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"cannot read the routing in `{path}`", ROUTING_FILE_HINT) from error
    skew: Any = None
    if isinstance(data, dict):
        skew = data.get("skew")
    is_number = isinstance(skew, int | float) and not isinstance(skew, bool)
    if not is_number or not math.isfinite(skew) or not 0 <= skew <= MAX_SKEW:
        raise SpecError(f"`{path}` has no `skew` from 0 to {MAX_SKEW:g}", ROUTING_FILE_HINT)
    return float(skew)
