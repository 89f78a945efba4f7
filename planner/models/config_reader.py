"""Typed access to the fields of a JSON object, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed_plan.plans.errors import SpecError

MAX_NUMBER = 1e12  # larger numbers of a config are mistakes


class ConfigReader:
    """A config mapping; `name` is the model's, for messages."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.data = data

    def get(self, key: str, default: Any = None) -> Any:
        """The value of any type."""
        return self.data.get(key, default)

    def child(self, key: str) -> ConfigReader:
        """The object under a key.

        Raises:
            SpecError: there is none.
        """
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            raise self.error(f"`{key}` is {value!r}, not an object")
        return ConfigReader(self.name, value)

    def integer(self, key: str, default: int | None = None, minimum: int = 0) -> int:
        """An integer of at least `minimum`, and of at least 1 where there is no default.

        Raises:
            SpecError: it is missing, too small, or of another type.
        """
        value = self.data.get(key, default)
        if default is None:
            minimum = max(minimum, 1)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < minimum:
            raise self.error(f"`{key}` is {value!r}, not a positive integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
            SpecError: it is missing, not positive, huge, or of another type.
        """
        value = self.data.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < MAX_NUMBER:
            raise self.error(f"`{key}` is {value!r}, not a positive number")
        return float(value)

    def shares(self, key: str) -> tuple[float, ...]:
        """A list of numbers from 0 to 1; empty where there is none.

        Raises:
            SpecError: something else.
        """
        values = self.data.get(key, [])
        is_list = isinstance(values, list)
        if not is_list or not all(map(_is_share, values)):
            raise self.error(f"`{key}` must be a list of numbers from 0 to 1")
        return tuple(map(float, values))

    def error(self, what: str) -> SpecError:
        """An error of this config, to be raised."""
        return SpecError(
            f"config of `{self.name}`: {what}",
            "use the `config.json` that was published with the model",
        )


def _is_share(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= 1
