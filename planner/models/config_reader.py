"""Typed access to the fields of a JSON object, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed_plan.plans.errors import SpecError


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
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(f"`{key}` is {value!r}, not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
            SpecError: it is missing, not positive, huge, or of another type.
        """
        value = self.data.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.error(f"`{key}` is {value!r}, not a positive number")
        return float(value)

    def shares(self, key: str) -> tuple[float, ...]:
        """A list of numbers from 0 to 1; empty where there is none.

        Raises:
            SpecError: something else.
        """
        values = self.data.get(key, [])
        if not isinstance(values, list) or not all(_is_share(value) for value in values):
            raise self.error(f"`{key}` must be a list of numbers from 0 to 1")
        return tuple(float(value) for value in values)

    def error(self, what: str) -> SpecError:
        """An error of this config, to be raised."""
        return SpecError(
            f"config of `{self.name}`: {what}",
            "use the `config.json` that was published with the model",
        )


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]
