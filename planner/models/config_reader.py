"""Typed access to the fields of a JSON object, with errors that name the field and its bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.shown import shown

MAX_INTEGER = 1 << 20
MAX_NUMBER = 1e12  # larger numbers of a config are mistakes
# The most that a field may say; MAX_INTEGER where none is listed. No published model comes near.
_MOST = {
    "head_dim": 1 << 12,
    "hidden_size": 1 << 17,
    "linear_conv_kernel_dim": 1 << 6,
    "linear_key_head_dim": 1 << 12,
    "linear_num_key_heads": 1 << 12,
    "linear_num_value_heads": 1 << 12,
    "linear_value_head_dim": 1 << 12,
    "max_position_embeddings": 1 << 30,
    "mtp_num_hidden_layers": 1 << 6,
    "num_attention_heads": 1 << 12,
    "num_experts": 1 << 13,
    "num_experts_per_tok": 1 << 10,
    "num_hidden_layers": 1 << 8,
    "num_key_value_heads": 1 << 12,
    "num_local_experts": 1 << 13,
    "original_max_position_embeddings": 1 << 30,
}


class ConfigReader:
    """A config mapping; `name` is the model's, for messages."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.data = data

    def get(self, key: str, default: Any = None) -> Any:
        """The value of any type."""
        return self.data.get(key, default)

    def shown(self, key: str) -> str:
        """The value as errors quote it."""
        if key not in self.data:
            return "missing"
        return shown(self.data[key])

    def child(self, key: str) -> ConfigReader:
        """The object under a key.

        Raises:
            SpecError: there is none.
        """
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            raise self.error(f"`{key}` is {self.shown(key)}, not an object")
        return ConfigReader(self.name, value)

    def integer(self, key: str, default: int | None = None, minimum: int = 0) -> int:
        """An integer of at least `minimum`, and of at least 1 where there is no default.

        Raises:
            SpecError: it is missing, too small, over the field's bound, or of another type.
        """
        value = self.data.get(key, default)
        if default is None:
            minimum = max(minimum, 1)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < minimum:
            raise self.error(f"`{key}` is {self.shown(key)}, not a positive integer")
        most = _MOST.get(key, MAX_INTEGER)
        if value > most:
            raise self.error(f"`{key}` is {self.shown(key)}, the most is {most}")
        return int(value)

    def number(self, key: str, default: float | None = None, most: float = MAX_NUMBER) -> float:
        """A positive number.

        Raises:
            SpecError: it is missing, not positive, over the bound, or of another type.
        """
        value = self.data.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not value > 0:
            raise self.error(f"`{key}` is {self.shown(key)}, not a positive number")
        if not value <= most:
            raise self.error(f"`{key}` is {self.shown(key)}, the most is {most:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false.

        Raises:
            SpecError: something else, such as the word "false".
        """
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"`{key}` is {self.shown(key)}, not true or false")
        return value

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
