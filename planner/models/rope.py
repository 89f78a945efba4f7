"""Rotary settings of a config, put together from the places where transformers looks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenspeed_plan.planner.models.config_reader import ConfigReader
from tokenspeed_plan.planner.models.registry import Family
from tokenspeed_plan.plans.shown import shown

DEFAULT_POSITIONS = 32768
MAX_POSITIONS = 1 << 30
_MAX_FACTOR = 1 << 16
# The values that these settings must have where they are given: others would change the angles.
_DEFAULTS: dict[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
_READ = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "mrope_section",
    "mrope_interleaved",
)
_YARN_READ = ("factor", "original_max_position_embeddings")
_INHERITED = ("rope_theta", "partial_rotary_factor")  # from the config, where they are not beside
_AXES = 3  # time, height and width of `mrope_section`; in text all three positions are the same


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings.

    Attributes:
        theta: base of the angles.
        factor: YaRN's, over 1 where it stretches the positions.
        original_max_positions: positions before they were stretched.
        max_positions: positions that the model serves.
        rotary_dim: rotated channels of a head.
    """

    theta: float
    factor: float
    original_max_positions: int
    max_positions: int
    rotary_dim: int


def read_rope(text: ConfigReader, family: Family, head_dim: int) -> Rope:
    """The rotary settings of a text config.

    Raises:
        SpecError: a setting is missing, means nothing, or is not planned.
    """
    settings = _settings(text)
    kind = _kind(text, settings)
    _refuse_unknown(settings, kind)
    positions = text.integer("max_position_embeddings", DEFAULT_POSITIONS, minimum=1)
    original, factor = positions, 1.0
    if kind == "yarn":
        original = _original(text, settings, positions)
        factor = settings.number("factor", most=_MAX_FACTOR)
        if factor < 1:
            raise text.error(f"YaRN of factor {factor} makes fewer positions, not more")
        # The published recipe adds the factor and leaves the number of positions alone.
        positions = max(positions, int(original * factor))
    if positions > MAX_POSITIONS:
        raise text.error(f"{original} positions x factor {factor} are over {MAX_POSITIONS}")
    theta = settings.number("rope_theta")
    if theta <= 1:
        raise text.error(f"`rope_theta` is {theta}, which turns all channels alike")
    return Rope(theta, factor, original, positions, _rotary_dim(settings, family, head_dim))


def _settings(text: ConfigReader) -> ConfigReader:
    """The object with the rotary settings, and what it takes from the config around it."""
    given = [key for key in ("rope_scaling", "rope_parameters") if text.get(key) not in (None, {})]
    if len(given) == 2:
        raise text.error(f"`rope_scaling` is {text.shown('rope_scaling')} beside `rope_parameters`")
    around = {key: text.data[key] for key in _INHERITED if key in text.data}
    if not given:
        return ConfigReader(text.name, around)
    return ConfigReader(text.name, around | dict(text.child(given[0]).data))


def _kind(text: ConfigReader, settings: ConfigReader) -> str:
    """`default` or `yarn`; older configs say `type`."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    said = [settings.get("type", kind), text.get("rope_type", kind)]
    if kind not in ("default", "yarn"):
        raise text.error(f"rope_type {shown(kind)} is not planned")
    for other in said:
        if other != kind:
            raise text.error(f"rope_type {shown(other)} beside {kind!r} is not planned")
    return str(kind)


def _refuse_unknown(settings: ConfigReader, kind: str) -> None:
    for key, value in settings.data.items():
        known = key in _READ or (kind == "yarn" and key in _YARN_READ)
        if not known and (key not in _DEFAULTS or value != _DEFAULTS[key]):
            raise settings.error(f"`{key}` is {settings.shown(key)}, which is not planned")
    sections = settings.get("mrope_section", [0] * _AXES)
    is_list = isinstance(sections, list) and len(sections) == _AXES
    if not is_list or not all(type(size) is int and size >= 0 for size in sections):
        raise settings.error(f"`mrope_section` is {settings.shown('mrope_section')}, not 3 sizes")


def _original(text: ConfigReader, settings: ConfigReader, positions: int) -> int:
    """Positions before YaRN: of the config, else of the settings, else all that there are."""
    key = "original_max_position_embeddings"
    if key in text.data:
        return text.integer(key)
    return settings.integer(key, positions, minimum=1)


def _rotary_dim(settings: ConfigReader, family: Family, head_dim: int) -> int:
    """Rotated channels of a head: all of them in families without DeltaNet, as in transformers."""
    key = "partial_rotary_factor"
    share = settings.get(key, family.rotary_share)
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1:
        raise settings.error(f"`{key}` is {settings.shown(key)}, not a share of a head")
    if not family.has_delta_net and share != 1:
        raise settings.error(f"`{key}` is {share!r}, {family.title} rotates whole heads")
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise settings.error(f"`{key}` is {share!r}, which turns {share!r} x {head_dim} channels")
    return dim
