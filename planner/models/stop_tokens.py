"""The tokens that end an answer, from the places and in the order that transformers knows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenspeed_plan.planner.models.config_reader import ConfigReader
from tokenspeed_plan.plans.weight_files import HINT, read_json_object

_MOST = 64  # tokens that end an answer


def stop_tokens(readers: Iterable[ConfigReader], vocab_size: int) -> tuple[int, ...]:
    """The ids of the first object that has any, in ascending order; all of them are checked.

    Raises:
        SpecError: an id that the model does not have.
    """
    first: tuple[int, ...] = ()
    for reader in readers:
        first = first or _ids(reader, vocab_size)
    return first


def _ids(reader: ConfigReader, vocab_size: int) -> tuple[int, ...]:
    value = reader.get("eos_token_id")
    ids = value
    if value is None:
        ids = []
    elif not isinstance(value, list):
        ids = [value]
    if len(ids) > _MOST or not all(_is_token(item, vocab_size) for item in ids):
        raise reader.error(
            f"`eos_token_id` is {reader.shown('eos_token_id')}, not token ids from 0 to "
            f"{vocab_size - 1}"
        )
    return tuple(sorted(set(ids)))


def _is_token(item: object, vocab_size: int) -> bool:
    return type(item) is int and 0 <= item < vocab_size


def tokenizer_stop_tokens(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokenizer's own end, for a model whose configs name none; empty where it has none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ()
    config = read_json_object(path, HINT)
    token = config.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    for content, number in _added_tokens(folder, config):
        if content == token and _is_token(number, vocab_size):
            return (number,)
    return ()


def _added_tokens(folder: Path, config: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    """Text and id of each token that was added to the vocabulary, as far as they can be read."""
    path = folder / "tokenizer.json"
    if path.is_file():
        listed = read_json_object(path, HINT).get("added_tokens")
        for entry in filter(_is_object, _items(listed)):
            yield entry.get("content"), entry.get("id")
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for key, entry in decoder.items():
            if _is_object(entry) and key.isascii() and key.isdigit():
                yield entry.get("content"), int(key[:9])


def _items(value: object) -> list[Any]:
    if isinstance(value, list):
        return value
    return []


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
