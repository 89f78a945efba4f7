"""The largest load that is still good enough, found by trying."""

from __future__ import annotations

from collections.abc import Callable

CLOSE_ENOUGH = 1.05  # of the largest good load to the least bad one
MAX_TRIES = 40


def largest_rate(is_good: Callable[[float], bool], first: float) -> float | None:
    """The largest rate that is good, within 5 %; every rate below it is taken to be good.

    Args:
        is_good: tries a rate.
        first: tried first; doubled or halved until the answer changes.

    Returns:
        None where no rate is good that can be told from none.
    """
    good, bad = 0.0, 0.0
    rate = first
    for _ in range(MAX_TRIES):
        if is_good(rate):
            good = rate
        else:
            bad = rate
        if good and bad and bad <= good * CLOSE_ENOUGH:
            break
        if not bad:
            rate = 2.0 * good
        elif not good:
            rate = bad / 2.0
        else:
            rate = (good * bad) ** 0.5
    return good or None


def largest_count(
    is_good: Callable[[int], bool], most: int, close_enough: float = 1.0
) -> int | None:
    """The largest number from 1 that is good; every number below it is taken to be good.

    Args:
        is_good: tries a number.
        most: that may be tried.
        close_enough: the quotient of the least bad and the largest good one that is; 1 for none
            between them.

    Returns:
        None where not even 1 is good.
    """
    good, bad = 0, most + 1
    count = 1
    while bad > max(good + 1, good * close_enough):
        if is_good(count):
            good = count
        else:
            bad = count
        count = min(2 * good, most) if bad > most else (good + bad) // 2
    return good or None
