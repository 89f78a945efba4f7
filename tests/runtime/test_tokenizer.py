"""The tokenizer reads a model's files as transformers does, or says what is wrong with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_edits import (
    MODEL,
    TEXTS,
    added,
    copy_tokenizer,
    decoder_of,
    edit_json,
    edit_some,
)

from tokenspeed_plan.planner.models.checkpoint import num_valid_tokens
from tokenspeed_plan.plans.errors import PlanError, RequestError, SpecError, TokenspeedError
from tokenspeed_plan.plans.tokenizer_files import read_tokenizer_files, special_tokens
from tokenspeed_plan.runtime.tokenizer import Tokenizer

DEMO = Tokenizer.load(MODEL)
CONFIG, FILE = "tokenizer_config.json", "tokenizer.json"
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 2005,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|im_start|>": {"id": "<|im_start|>", "ids": [2006], "tokens": ["<|im_start|>"]}
    },
}
MINE = added("<mine>", lstrip=True, normalized=True) | {"__type": "AddedToken"}
# What changes in a file, by the file's name.
FOLDERS: dict[str, dict[str, dict[str, Any]]] = {
    "as published": {},
    "truncation": {"tokenizer.json": {"truncation": TRUNCATION}},
    "padding": {"tokenizer.json": {"padding": PADDING}},
    "a token before every prompt": {"tokenizer.json": {"post_processor": BOS}},
    "no token before every prompt": {"tokenizer_config.json": {"add_bos_token": True}},
    "a token of the config alone": {"tokenizer_config.json": {"sep_token": MINE}},
    "a token of another name": {"tokenizer_config.json": {"image_token": "<mine>"}},
    "tokens in a dict": {"tokenizer_config.json": {"extra_special_tokens": {"x": "<named>"}}},
    "tokens in a list": {"tokenizer_config.json": {"additional_special_tokens": [MINE]}},
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": added("<mine>")}},
    "added_tokens.json": {"added_tokens.json": {"<mine>": 2016, "<named>": 2017}},
    "special tokens are text": {"tokenizer_config.json": {"split_special_tokens": True}},
    "a space before": {"tokenizer_config.json": {"add_prefix_space": True}},
    "spaces cleaned up": {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}},
    "another normalizer": {"tokenizer.json": {"normalizer": {"type": "Lowercase"}}},
    "another class": {
        "config.json": {"model_type": "qwen3"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer.json": {"normalizer": {"type": "Lowercase"}, "padding": PADDING},
    },
    "Qwen3's class": {"config.json": {"model_type": "qwen3"}},
}


def agree(folder: Path) -> None:
    """Compare with transformers: ids, texts, names of special tokens, and numbers of ids."""
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.spell(ids) == theirs.decode(ids)
    assert special_tokens(folder) == theirs.special_tokens_map
    assert read_tokenizer_files(folder).num_ids() == ours.num_ids == len(theirs)


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    for file, change in FOLDERS[name].items():
        edit_json(folder / file, lambda data, change=change: data.update(change))
    agree(folder)


def test_the_configs_added_tokens_count(tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    tokens = decoder_of(folder)
    edit_json(folder / CONFIG, lambda data: data.update(added_tokens_decoder=tokens))
    edit_json(folder / FILE, lambda data: data.update(added_tokens=data["added_tokens"][:9]))
    agree(folder)
    assert len(Tokenizer.load(folder).encode("<tool_call>x</tool_call>")) == 3


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_files_are_read_as_transformers_reads_them_or_refused(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy_tokenizer(tmp_path_factory.mktemp("edited") / "model")
    edit_some(folder, random.Random(seed))
    with suppress(SpecError):
        num_valid_tokens(folder, 4096)
    try:
        Tokenizer.load(folder)
    except TokenspeedError as error:
        assert error.hint and "\n" not in error.message
    else:
        agree(folder)


BAD: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "an id that another token has": (
        CONFIG,
        lambda data: data.update(added_tokens_decoder={"2015": added("<mine>")}),
        "disagree",
    ),
    "a token as an object without its type": (
        CONFIG,
        lambda data: data.update(eos_token={"content": "<|im_end|>"}),
        "`eos_token` is neither text nor a token",
    ),
    "code of its own": (CONFIG, lambda data: data.update(auto_map=["a"]), "`auto_map`"),
    "an unheard class": (
        "config.json",
        lambda data: data.update(model_type="qwen3", tokenizer_class="GPT2Tokenizer"),
        "`GPT2Tokenizer` is not supported",
    ),
    "no BPE": (FILE, lambda data: data["model"].update(type="WordPiece"), "not BPE"),
    "no vocabulary": (FILE, lambda data: data["model"].update(vocab=[]), "not BPE"),
    "no model": (FILE, lambda data: data.pop("model"), "malformed: 'model' is missing"),
    "an id that is no number": (
        FILE,
        lambda data: data["added_tokens"][0].update(id="x"),
        "'x' is not a token id",
    ),
    "a merge of three": (
        FILE,
        lambda data: data["model"].update(merges=["a b c"]),
        "not a tokenizer",
    ),
    "a merge of nothing": (FILE, lambda data: data["model"].update(merges=[["zzz", "a"]]), "zzz"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_are_refused(name: str, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    edit_json(folder / CONFIG, lambda data: data.pop("tokenizer_class"))
    file, change, reason = BAD[name]
    edit_json(folder / file, change)
    with pytest.raises(PlanError, match=reason):
        Tokenizer.load(folder)


@pytest.mark.parametrize("file", [FILE, CONFIG, "special_tokens_map.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff", b"\xef\xbb\xbf{}"])
def test_what_is_no_json_object_is_refused(file: str, data: bytes, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    (folder / file).write_bytes(data)
    with pytest.raises(PlanError, match=file):
        Tokenizer.load(folder)
    with pytest.raises(SpecError, match=file):
        num_valid_tokens(folder, 4096)


def test_a_new_special_token_needs_a_row_of_the_table(tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    edit_json(folder / CONFIG, lambda data: data.update(sep_token="<mine>"))
    assert num_valid_tokens(folder, 2048) == num_valid_tokens(MODEL, 2048) + 1 == 2017
    with pytest.raises(SpecError, match="ids up to 2016, the model has 2016 rows"):
        num_valid_tokens(folder, 2016)


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(RequestError, match="not Unicode"):
        DEMO.encode("a\ud83d")


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2047), max_size=12))
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(ids: list[int]) -> None:
    data = b"".join(map(DEMO.token_bytes, ids))
    assert data.decode("utf-8", "replace") == DEMO.spell(ids)
    shown = b"".join(DEMO.token_bytes(token) for token in ids if not DEMO.is_special(token))
    assert shown.decode("utf-8", "replace") == DEMO.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "<|im_start|>x",
        "é" * 9,
        "\u0958" * 30,
        "\u1e9b\u0323",
        "请翻译",
        "\U0001d15e" * 9,
        "\u0390",
    ],
)
def test_a_text_has_no_more_tokens_than_it_may_have(text: str) -> None:
    """Among these are letters that NFC writes as three, and others that no token stands for."""
    most = DEMO.most_tokens(text)
    assert most is not None and len(DEMO.encode(text)) <= most
    assert most <= 3 * len(text.encode()) + 1


def test_the_tokens_of_half_a_pair_are_not_guessed() -> None:
    assert DEMO.most_tokens("\ud800") is None
