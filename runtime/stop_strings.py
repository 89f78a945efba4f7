"""Stop strings in a growing text: found, or begun, without looking at the same text twice."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for some strings in a text that grows (Knuth, Morris and Pratt, 1977).

    The work for a character does not depend on the length of the strings, nor of the text.

    Args:
        stops: what to look for; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters at the text's end that begin each string

    def push(self, text: str) -> bool:
        """Add to the text; returns whether one of the strings ends in what was added."""
        found = False
        for index, stop in enumerate(self._stops):
            matched, borders = self._matched[index], self._borders[index]
            for letter in text:
                matched = _next(stop, borders, matched, letter)
                found = found or matched == len(stop)
            self._matched[index] = matched
        return found

    @property
    def num_begun(self) -> int:
        """Characters at the text's end that are one of the strings, or may become one."""
        return max(self._matched, default=0)


def _next(stop: str, borders: list[int], matched: int, letter: str) -> int:
    """Characters of `stop` that are matched after one more letter."""
    while matched and (matched == len(stop) or stop[matched] != letter):
        matched = borders[matched]
    return matched + (stop[matched] == letter)


def _borders(stop: str) -> list[int]:
    """For each length of a beginning of `stop`: its longest shorter end that also begins `stop`."""
    borders = [0, 0]
    for length in range(1, len(stop)):
        borders.append(_next(stop, borders, borders[length], stop[length]))
    return borders
