"""What the files beside a model say about its tokenizer and its chat template.

They are read as transformers 5 reads them: some of its rules look odd, and all of them are its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.text import printable_line, read_utf8

Json = dict[str, Any]
T = TypeVar("T")

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATE_JSON = "chat_template.json"
MORE_TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (
    TOKENIZER,
    CONFIG,
    CHAT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    CHAT_TEMPLATE_JSON,
)

# The class that takes a tokenizer.json as it is; the others make their own from its vocabulary.
AS_IT_IS = "TokenizersBackend"
_REBUILT = ("Qwen2Tokenizer", "Qwen3_5Tokenizer")
_GENERIC = (AS_IT_IS, "PreTrainedTokenizer", "PythonBackend")
_CLASS_OF_MODEL = {
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "qwen3_next": "Qwen2Tokenizer",
    "qwen3_5": "Qwen3_5Tokenizer",
    "qwen3_5_text": "Qwen3_5Tokenizer",
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
}
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA = "extra_special_tokens"
_SPLIT = "split_special_tokens"
_PREFIX = "add_prefix_space"
_SPECIAL = {"special": True}
_MAX_ID = 1 << 31
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What would change the tokenizer in ways that are not followed here.
_UNKNOWN = (
    "_json_padding",
    "_json_truncation",
    "auto_map",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
    "post_processor",
    "tokenizer_object",
    "tokenizer_padding",
    "tokenizer_truncation",
)
_HINT = "use the files of the published model"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the model's own vocabulary, as the `tokenizers` library has them.

    `normalized` None is its default: the opposite of `special`.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


Token = str | AddedToken


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files say.

    Attributes:
        class_name: transformers' class of the tokenizer.
        data: tokenizer.json.
        declared: added tokens by their ids.
        named: special tokens by their names; templates know them by these.
        extra: special tokens without a name.
        add_prefix_space: a text begins as if a space were before it.
        split_special_tokens: special tokens in a text are text.
    """

    class_name: str
    data: Json
    declared: Mapping[int, AddedToken]
    named: Mapping[str, Token]
    extra: tuple[Token, ...]
    add_prefix_space: bool
    split_special_tokens: bool

    def num_ids(self) -> int:
        """One more than the highest token id."""
        vocab = self.data["model"]["vocab"]
        listed = {token["content"]: token["id"] for token in self.data.get("added_tokens") or ()}
        listed |= {token.content: index for index, token in self.declared.items()}
        specials = dict.fromkeys(map(text_of, (*self.named.values(), *self.extra)))
        new = [text for text in specials if text and text not in vocab and text not in listed]
        end = max(len(vocab), 1 + max(listed.values(), default=0)) + len(new)
        highest = max((*vocab.values(), *listed.values()))
        return int(max(1 + highest, end if new else 0))


def text_of(token: Token) -> str:
    """The text that stands for a token."""
    if isinstance(token, str):
        return token
    return token.content


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer's files of a model folder, but for the chat templates.

    Raises:
        PlanError: one is missing or malformed, or asks for what is not followed here.
    """
    path = folder / TOKENIZER
    try:
        text = read_utf8(path)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"cannot read `{path}`: {error}",
            "give prompts as token ids, or a complete model folder",
        ) from error
    data = _parse_object(text, path)
    return _checked(folder / TOKENIZER, lambda: _read(folder, data, text))


def special_tokens(folder: Path) -> dict[str, str]:
    """The names and texts of special tokens that a chat template sees.

    Raises:
        PlanError: see `read_tokenizer_files`.
    """
    named = read_tokenizer_files(folder).named
    return {name: text_of(token) for name, token in named.items()}


def chat_template(folder: Path, name: str = "default") -> str | None:
    """The template of a name; None if there is none.

    Chats with tools use `tool_use` where there is one. Files come before `tokenizer_config.json`.

    Raises:
        PlanError: a file is malformed.
    """
    templates = _template_files(folder)
    if templates:
        return templates.get(name)
    config = read_object(folder / CONFIG)
    source = config.get("chat_template")
    if source is None:
        source = read_object(folder / CHAT_TEMPLATE_JSON).get("chat_template")
    return _checked(folder / CONFIG, lambda: _template_of(source, name))


def template_names(folder: Path) -> list[str]:
    """The files of further chat templates, as paths from the folder."""
    return sorted(
        f"{MORE_TEMPLATES}/{path.name}" for path in (folder / MORE_TEMPLATES).glob("*.jinja")
    )


def _template_files(folder: Path) -> dict[str, str]:
    files = {}
    if (folder / CHAT_TEMPLATE).is_file():
        files["default"] = folder / CHAT_TEMPLATE
    for name in template_names(folder):
        files[name.partition("/")[2].removesuffix(".jinja")] = folder / name
    return {name: _read_text(path) for name, path in files.items()}


def _read_text(path: Path) -> str:
    try:
        return read_utf8(path)
    except UnicodeDecodeError as error:
        raise PlanError(f"`{path}` is not UTF-8", _HINT) from error
    except OSError as error:
        raise PlanError(f"cannot read `{path}`: {error.strerror}", _HINT) from error


def _template_of(source: Any, name: str) -> str | None:
    if isinstance(source, list):
        source = {item["name"]: item["template"] for item in source}
    if isinstance(source, dict):
        source = source.get(name)
    elif name != "default":
        return None
    if source is not None and not isinstance(source, str):
        raise TypeError("`chat_template` is not text")
    return source


def read_object(path: Path) -> Json:
    """A JSON object from a file; empty if there is no such file.

    Raises:
        PlanError: it is not UTF-8, not JSON or not an object.
    """
    if not path.is_file():
        return {}
    return _parse_object(_read_text(path), path)


def _parse_object(text: str, path: Path) -> Json:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"`{path}` is not JSON: {printable_line(str(error))}", _HINT) from error
    if not isinstance(data, dict):
        raise PlanError(f"`{path}` is not a JSON object", _HINT)
    return data


def _checked(path: Path, read: Callable[[], T]) -> T:
    """What `read` makes, with an error that names the file where it cannot."""
    try:
        return read()
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = printable_line(str(error))
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise PlanError(f"`{path}` or a file beside it is malformed: {reason}", _HINT) from error


def _read(folder: Path, data: Json, text: str) -> TokenizerFiles:
    _check_data(data)
    config = read_object(folder / CONFIG)
    _check_config(config)
    config.pop("add_bos_token", None)  # with a tokenizer.json its post-processor decides these
    config.pop("add_eos_token", None)
    class_name = _class_name(config, read_object(folder / "config.json"), text)
    if "additional_special_tokens" in config and not config.get(_EXTRA):
        config[_EXTRA] = config.pop("additional_special_tokens")
    by_model = _take_model_tokens(config)
    declared = _declared(folder, config, by_model, data)
    config = {key: _with_tokens(value) for key, value in config.items()}
    _add_defaults(config, class_name, data)
    named = _named_tokens(config, by_model, declared)
    add_prefix_space = config.get(_PREFIX)
    extra = config.get(_EXTRA, config.get("additional_special_tokens"))
    if not isinstance(extra, list | None):
        raise TypeError(f"`{_EXTRA}` is not a list")
    return TokenizerFiles(
        class_name=class_name,
        data=data,
        declared=dict(sorted(declared.items())),
        named=named,
        extra=tuple(_token(token, _EXTRA) for token in extra or ()),
        add_prefix_space=add_prefix_space is not None and _flag(add_prefix_space, _PREFIX),
        split_special_tokens=_flag(config.get(_SPLIT, False), _SPLIT),
    )


def _check_data(data: Json) -> None:
    """Refuse a tokenizer.json that is not BPE, or whose tokens have no numbers."""
    vocab = data["model"].get("vocab")
    if data["model"].get("type") != "BPE" or not isinstance(vocab, dict) or not vocab:
        raise ValueError("it is not BPE with a table of tokens")
    for index in vocab.values():
        _index(index)
    for token in data.get("added_tokens") or ():
        _added(token)
        _index(token["id"])


def _check_config(config: Json) -> None:
    for name in _UNKNOWN:
        if name in config and (config[name] or name == "auto_map"):
            raise ValueError(f"`{name}` in {CONFIG} is not supported")
    for name in ("padding_side", "truncation_side"):
        if config.get(name, "right") not in ("right", "left"):
            raise ValueError(f"`{name}` is {config[name]!r}, it must be right or left")
    for name in ("chat_control_tokens", "model_input_names"):
        if not isinstance(config.get(name, []), list):
            raise TypeError(f"`{name}` is not a list")


def _class_name(config: Json, model: Json, text: str) -> str:
    """The class that transformers chooses.

    Raises:
        ValueError: it is one that is not followed here.
    """
    own = _CLASS_OF_MODEL.get(model.get("model_type", ""), AS_IT_IS)
    asked = own
    for found in (model.get("tokenizer_class"), config.get("tokenizer_class")):
        if not isinstance(found, str | None) or found == "":
            raise TypeError("`tokenizer_class` is not a name")
        asked = found or asked
    asked = asked.removesuffix("Fast")
    if own == "Qwen3_5Tokenizer":
        return own  # published files name another class
    if asked in _REBUILT:
        return asked
    if asked in _GENERIC or (asked == "LlamaTokenizer" and '"ByteLevel"' in text):
        return AS_IT_IS
    raise ValueError(f"the tokenizer class `{asked}` is not supported")


def _take_model_tokens(config: Json) -> Json:
    """Remove and return the named special tokens that only this model has."""
    names = [
        name
        for name, value in config.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str)
    ]
    found: Json = {name: config.pop(name) for name in names}
    if isinstance(config.get(_EXTRA), dict):
        found |= config.pop(_EXTRA)
    return found


def _declared(folder: Path, config: Json, by_model: Json, data: Json) -> dict[int, AddedToken]:
    """Added tokens by their ids: the config's, or those of three other files."""
    if "added_tokens_decoder" in config:
        pairs = config["added_tokens_decoder"].items()
        return {_index(int(index)): _added(fields) for index, fields in pairs}
    _merge_map(config, by_model, read_object(folder / SPECIAL_TOKENS_MAP))
    declared = dict(_legacy_tokens(config, read_object(folder / ADDED_TOKENS)))
    return declared | {_index(fields["id"]): _added(fields) for fields in data["added_tokens"]}


def _merge_map(config: Json, by_model: Json, special_tokens_map: Json) -> None:
    """Put the tokens of special_tokens_map.json over those of the config."""
    for name, value in special_tokens_map.items():
        if name == _EXTRA and isinstance(value, list):
            known = list(config.get(_EXTRA) or [])
            tokens = [_extra(item) for item in value]
            value = [*known, *(token for token in tokens if token not in known)]
        elif name != _EXTRA and isinstance(value, dict):
            value = _added(value | _SPECIAL)
        config[name] = value
    if isinstance(config.get(_EXTRA), dict):
        by_model.update(config.pop(_EXTRA))


def _extra(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if "special" in item:
        raise TypeError(f"a token of `{_EXTRA}` in {SPECIAL_TOKENS_MAP} has `special`")
    return _added(item | _SPECIAL)


def _legacy_tokens(config: Json, indices: Json) -> Iterable[tuple[int, AddedToken]]:
    """The tokens of added_tokens.json."""
    tokens = [*(config.get(name) for name in _NAMED), *(config.get(_EXTRA) or ())]
    specials = {text_of(token) for token in tokens if isinstance(token, Token)}
    for text, index in indices.items():
        special = text in specials
        yield _index(index), AddedToken(text, normalized=not special, special=special)


def _with_tokens(value: Any) -> Any:
    """The value with each object of type `AddedToken` made a token."""
    if isinstance(value, list):
        return [_with_tokens(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("__type") == "AddedToken":
        return _added(value)
    return {key: _with_tokens(item) for key, item in value.items()}


def _add_defaults(config: Json, class_name: str, data: Json) -> None:
    """Fill in what a class assumes where the config does not even say null."""
    if class_name in _REBUILT:
        for name in ("unk_token", "eos_token", "pad_token"):
            config.setdefault(name, "<|endoftext|>")
    elif data.get("padding"):
        config.setdefault("pad_token", data["padding"]["pad_token"])


def _named_tokens(
    config: Json, by_model: Json, declared: Mapping[int, AddedToken]
) -> dict[str, Token]:
    """Special tokens by name, the standard ones first."""
    by_text = {token.content: token for token in declared.values()}
    named: dict[str, Token | None] = dict.fromkeys(_NAMED)
    for name in _NAMED:
        if config.get(name) is not None:
            token = _token(config[name], name)
            named[name] = by_text.get(text_of(token), token)
    for name, value in config.items():
        if name.endswith("_token") and name not in _NAMED and isinstance(value, Token):
            named[name] = value
    for name, value in by_model.items():
        named[name] = _token(_with_tokens(value), name)
    return {name: token for name, token in named.items() if token is not None}


def _token(value: Any, name: str) -> Token:
    if isinstance(value, Token):
        return value
    raise TypeError(f"`{name}` is neither text nor a token")


def _added(fields: Json) -> AddedToken:
    """An added token from its JSON.

    Raises:
        KeyError, TypeError: it has no text, or a flag that is not true or false.
    """
    flags = {name: fields[name] for name in _FLAGS if name in fields}
    if not isinstance(fields["content"], str):
        raise TypeError("the content of an added token is not text")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` of an added token is not true or false")
    return AddedToken(fields["content"], **flags)


def _index(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_ID:
        return value
    raise ValueError(f"{value!r:.40} is not a token id")


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is not true or false")
    return value
