"""Times of calls as the profiler finds them: libraries' calls in a row have one time together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tokenspeed_plan.runtime.bench.clock import LIBRARY
from tokenspeed_plan.runtime.bench.replay import times_of


def test_calls_of_libraries_in_a_row_share_their_time() -> None:
    names = ["norm", LIBRARY, LIBRARY, "attention", LIBRARY]
    predicted_us = (1.0, 30.0, 10.0, 5.0, 7.0)
    calls = cast(Any, [SimpleNamespace(predicted_us=us) for us in predicted_us])
    found = [("norm", 2.0), (LIBRARY, 60.0), ("attention", 6.0), (LIBRARY, 8.0)]
    assert times_of(names, found, calls) == pytest.approx([2.0, 45.0, 15.0, 6.0, 8.0])
    with pytest.raises(AssertionError, match="lost a kernel"):
        times_of(names, found[1:], calls)
