"""Ways to change the files beside a model, and the folder that transformers reads the same way."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from conftest import ROOT

MODEL = ROOT / "examples/demo/model"
NAMES = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja")
TEXTS = (
    "",
    " ",
    "def f(a):\n    return a  # x\r\n\t",
    "  two spaces, don't they'LL I'm",
    "<|im_start|>user\nhi<|im_end|> \n<tool_call>x</tool_call><think>a</think>",
    "a<|im_end|>b <|endoftext|> c <sep><mine>  <named>x",
    "é e\u0301 \u0301\u0301 \u1e9b\u0323 \ufb01 \u212b",
    "日本語 का हिन्दी ไทย العربية",
    "🦜👩\u200d👩\u200d👧 \U0001f468\U0001f3fd 123 4567",
    "\x00\x1f\x7f\u0085\u2028\ufeff\ufffd\U0010ffff",
)


def copy_tokenizer(folder: Path) -> Path:
    """The demo model's folder without weights."""
    folder.mkdir()
    for name in NAMES:
        shutil.copy(MODEL / name, folder / name)
    return folder


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place; a missing one is an object without keys."""
    data = json.loads(path.read_bytes()) if path.exists() else {}
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def added(text: str, **flags: Any) -> dict[str, Any]:
    """An added token as tokenizer_config.json writes one."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, "special": True} | plain | flags


def decoder_of(folder: Path) -> dict[str, Any]:
    """The tokens that tokenizer.json adds, in the form of `added_tokens_decoder`."""
    data = json.loads((folder / "tokenizer.json").read_bytes())
    listed = data["added_tokens"]
    return {str(item["id"]): {k: v for k, v in item.items() if k != "id"} for item in listed}


VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1 << 40,
    0.5,
    "",
    "<mine>",
    "<|im_end|>",
    "right",
    [],
    {},
    ["a"],
)
VALUES += ([None], {"a": 1}, [{"content": "x"}], {"content": "<mine>"}, "\ud800", [[]])
TOKENS = ("<mine>", "<named>", "<|im_end|>", "<think>", "a", "é", " b", "", "日", "\u0301")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "image_token", "x_token")
KEYS = ("additional_special_tokens", "extra_special_tokens", "split_special_tokens")
KEYS += ("add_prefix_space", "add_bos_token", "clean_up_tokenization_spaces", "tokenizer_class")
KEYS += ("added_tokens_decoder", "padding_side", "model_input_names", "auto_map", "chat_template")
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "PreTrainedTokenizerFast")
CLASSES += ("TokenizersBackend", "LlamaTokenizerFast", "GPT2Tokenizer", "Unheard")
FRAME = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
PARTS: tuple[Any, ...] = (
    None,
    {"type": "NFC"},
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [2006], "tokens": ["<|im_start|>"]}
        },
    },
    {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<mine>",
    },
)


def some_token(rng: random.Random) -> Any:
    """A token as text or as one of the objects that files have."""
    text = rng.choice(TOKENS)
    flags = {name: rng.random() < 0.5 for name in ("lstrip", "rstrip", "normalized", "special")}
    typed = added(text, **flags) | {"__type": "AddedToken"}
    return rng.choice((text, text, typed, typed, added(text, **flags), rng.choice(VALUES)))


def edit_config(folder: Path, rng: random.Random) -> None:
    """Another special token, flag or class."""
    edit_json(
        folder / "tokenizer_config.json",
        lambda data: data.update(
            rng.choice(
                (
                    {rng.choice(NAMED): some_token(rng)},
                    {rng.choice(NAMED): some_token(rng)},
                    {rng.choice(KEYS): rng.choice(VALUES)},
                    {"additional_special_tokens": [some_token(rng), some_token(rng)]},
                    {"extra_special_tokens": {rng.choice(NAMED): some_token(rng)}},
                    {"tokenizer_class": rng.choice(CLASSES)},
                    {"added_tokens_decoder": decoder_of(folder)},
                )
            )
        ),
    )


def edit_map(folder: Path, rng: random.Random) -> None:
    """A special_tokens_map.json, or one more entry of it."""
    entry = rng.choice(
        (
            {rng.choice(NAMED): some_token(rng)},
            {"additional_special_tokens": [some_token(rng)]},
            {"extra_special_tokens": [some_token(rng)]},
        )
    )
    edit_json(folder / "special_tokens_map.json", lambda data: data.update(entry))


def edit_added(folder: Path, rng: random.Random) -> None:
    """An added_tokens.json."""
    entry = {rng.choice(TOKENS): rng.choice((2016, 2017, 2007, "x"))}
    edit_json(folder / "added_tokens.json", lambda data: data.update(entry))


def edit_declared(folder: Path, rng: random.Random) -> None:
    """Another flag or id of an added token, one token less or more."""

    def change(data: Any) -> None:
        tokens = data["added_tokens"]
        new = added(rng.choice(TOKENS)) | {"id": rng.choice((2016, 9, 3000))}
        flag = rng.choice(("lstrip", "rstrip", "normalized", "special", "single_word"))
        rng.choice(
            (
                lambda: rng.choice(tokens).update({flag: rng.choice((True, False, None, 1))}),
                lambda: tokens.pop(rng.randrange(len(tokens))),
                lambda: tokens.append(new),
            )
        )()

    edit_json(folder / "tokenizer.json", change)


def edit_frame(folder: Path, rng: random.Random) -> None:
    """Another normalizer, pre-tokenizer, post-processor or decoder; truncation, padding."""
    change = {rng.choice(FRAME): rng.choice((*PARTS, *PARTS, rng.choice(VALUES)))}
    edit_json(folder / "tokenizer.json", lambda data: data.update(change))


def edit_model(folder: Path, rng: random.Random) -> None:
    """Another option of BPE, or another kind of model."""

    def change(data: Any) -> None:
        model = data["model"]
        name = rng.choice(("type", "dropout", "unk_token", "ignore_merges", "byte_fallback"))
        name = rng.choice((name, "merges", "vocab", "fuse_unk"))
        value = rng.choice((*VALUES, "Unigram", model["merges"][:9], 0.3))
        model[name] = value

    edit_json(folder / "tokenizer.json", change)


def edit_kind(folder: Path, rng: random.Random) -> None:
    """Another family of models, whose tokenizer has another class."""
    kind = rng.choice(("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_moe"))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")


def edit_bytes(folder: Path, rng: random.Random) -> None:
    """A file that is no longer JSON, is nested too deeply, or is gone."""
    path = folder / rng.choice(("tokenizer_config.json", "tokenizer.json"))
    text = rng.choice(("", "[]", "5", "[" * 100_000, '{"a": NaN}', "{", "\ufeff{}", "\ud800"))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        path.unlink()


EDITS = (edit_config, edit_config, edit_map, edit_added, edit_declared, edit_frame, edit_model)
EDITS += (edit_kind, edit_kind, edit_config, edit_bytes)


def edit_some(folder: Path, rng: random.Random) -> list[str]:
    """One to four edits; returns their names."""
    edits = [rng.choice(EDITS) for _ in range(rng.randint(1, 4))]
    for edit in edits:
        with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            edit(folder, rng)  # an earlier edit may have left nothing to change
    return [edit.__name__ for edit in edits]
