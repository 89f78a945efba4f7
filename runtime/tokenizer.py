"""From text to token ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tokenspeed_plan.plans.chat_format import Chat, ChatFormat
from tokenspeed_plan.plans.errors import PlanError, RequestError
from tokenspeed_plan.plans.text import printable_line
from tokenspeed_plan.plans.tokenizer_files import (
    AS_IT_IS,
    TOKENIZER,
    AddedToken,
    TokenizerFiles,
    read_tokenizer_files,
    text_of,
)

# Texts come one by one; its threads would warn whenever this process starts another one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Messages = list[dict[str, Any]]

# How transformers' classes split a text before BPE, whatever tokenizer.json says.
_SPLIT = {
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen3_5Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_HINT = "use the files of the published model"


class WriteChat(Protocol):
    """A chat template."""

    @property
    def source(self) -> str:
        """Its text."""

    @property
    def format(self) -> ChatFormat:
        """How it spells what is no plain text."""

    def __call__(
        self,
        messages: Messages,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as one prompt, which ends where the answer begins."""

    def render_all(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        """The prompt of each chat, or why there is none."""


class Tokenizer:
    """A tokenizer, with a chat template where there is one.

    Args:
        tokenizer: the checkpoint's.
        chat: writes messages as one prompt.
        names: of its class and of its special tokens, as transformers has them.

    Attributes:
        chat_format: what the chat template knows.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat: WriteChat | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._names = dict(names or {})
        self._tokenizer = tokenizer
        self._chat = chat
        self._growth = _growth(tokenizer)
        self.chat_format = ChatFormat()
        if chat is not None:
            self.chat_format = chat.format
        added = tokenizer.get_added_tokens_decoder().items()
        specials = {index: token.content for index, token in added if token.special}
        # What an answer is read by must be in its text.
        tags = self.chat_format.tags
        self._shown_ids = frozenset(index for index, text in specials.items() if text in tags)
        self._special_ids = frozenset(specials) - self._shown_ids
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for

    @classmethod
    def load(cls, folder: Path, chat: WriteChat | None = None) -> Tokenizer:
        """The tokenizer of a model folder.

        Raises:
            PlanError: there is none, or it cannot be read as transformers reads it.
        """
        files = read_tokenizer_files(folder)
        try:
            tokenizer = _build(files)
        except Exception as error:  # `tokenizers` raises bare Exception for a malformed file
            reason = printable_line(str(error))
            raise PlanError(
                f"`{folder / TOKENIZER}` is not a tokenizer: {reason}", _HINT
            ) from error
        _check_ids(files, tokenizer, folder)
        named = {name: text_of(token) for name, token in files.named.items()}
        return cls(tokenizer, chat, {"tokenizer_class": files.class_name} | named)

    def without_chat(self) -> Tokenizer:
        """The same, not loaded again, without a chat template."""
        return Tokenizer(self._tokenizer, None, self._names)

    @property
    def info(self) -> dict[str, str]:
        """Its class, its special tokens and its chat template, as vLLM tells them."""
        if self._chat is None:
            return self._names
        return self._names | {"chat_template": self._chat.source}

    @property
    def num_ids(self) -> int:
        """One more than the highest token id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        The tokens that a model's tokenizer puts around every text are for prompts; a chat template
        writes its own.

        Raises:
            RequestError: it is not Unicode.
        """
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RequestError("the prompt is not Unicode text", "give it as UTF-8")
        # Unlike `encode`, `encode_batch` lets other threads run.
        (found,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    def most_tokens(self, text: str) -> int | None:
        """More tokens a text does not have; None where only its tokens would tell.

        A token stands for at least one byte of the text as it is normalised. ASCII stays as it is;
        NFC makes at most three bytes of one (UAX #15, in UTF-8).
        """
        if text.isascii():
            return len(text)
        if self._growth is None:
            return None
        try:
            return self._growth * len(text.encode()) + 1  # a space may be put before it
        except UnicodeEncodeError:
            return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens but for a chat's tags."""
        if self._shown_ids.isdisjoint(ids):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return "".join(self._decode_runs(ids))

    def _decode_runs(self, ids: Sequence[int]) -> Iterator[str]:
        for is_shown, run in groupby(ids, self._shown_ids.__contains__):
            yield str(self._tokenizer.decode(list(run), skip_special_tokens=not is_shown))

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def is_special(self, token_id: int) -> bool:
        """Whether an answer's text leaves the token out."""
        return token_id in self._special_ids

    @property
    def joins_bytes(self) -> bool:
        """Whether the bytes of a text are those of its tokens, whatever stands beside them."""
        return isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, in UTF-8: a part of a character where the token is one.

        Empty for an id that is no token: tables of published models are padded.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def _read_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        values = _byte_values()
        if all(letter in values for letter in token):
            return bytes(values[letter] for letter in token)
        return str(token).encode()

    def render_chat(
        self,
        messages: Messages,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as one prompt, which ends where the answer begins.

        Args:
            messages: as transformers takes them.
            tools: JSON schemas of functions; None without tools.
            variables: further ones of the template, as `enable_thinking`.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        if self._chat is None:
            raise _no_template()
        return self._chat(messages, tools, variables)

    def render_chats(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        """Each chat as `render_chat` renders it, or what that raises; faster than one by one."""
        if self._chat is None:
            return [_no_template() for _ in chats]
        return self._chat.render_all(chats)


def _growth(tokenizer: tokenizers.Tokenizer) -> int | None:
    """By how much its normaliser may lengthen a text, in bytes of UTF-8; None: not known."""
    if tokenizer.normalizer is None:
        return 1
    if isinstance(tokenizer.normalizer, normalizers.NFC):
        return 3
    return None


def _no_template() -> RequestError:
    return RequestError("the model has no chat template", "use `/v1/completions`")


@cache
def _byte_values() -> dict[str, int]:
    """The letters that stand for bytes in the tokens of byte-level BPE.

    A printable byte is its own letter, and the n-th of the others is U+0100 + n: OpenAI's GPT-2,
    `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    values = {chr(value): value for value in printable}
    return values | {chr(0x100 + index): value for index, value in enumerate(others)}


def _build(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """The tokenizer as transformers' class makes it, without truncation and padding."""
    make = _read if files.class_name == AS_IT_IS else _rebuild
    tokenizer = make(files)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = files.split_special_tokens
    specials = [*files.named.values(), *files.extra]
    tokenizer.add_tokens(_missing(files, tokenizer, specials))
    if files.class_name == "Qwen2Tokenizer":
        tokenizer.add_tokens([_convert(text_of(token)) for token in specials])
    return tokenizer


def _read(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json.

    Raises:
        ValueError: it draws lots, or is not byte-level.
    """
    if files.data["model"].get("dropout"):
        raise ValueError("the dropout of its BPE makes other tokens each time")
    if '"ByteLevel"' not in json.dumps(files.data["decoder"], allow_nan=False):
        raise ValueError("its decoder is not `ByteLevel`")
    return tokenizers.Tokenizer.from_str(json.dumps(files.data, allow_nan=False))


def _rebuild(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """A tokenizer of the file's vocabulary, merges and post-processor, the rest from the class."""
    model = files.data["model"]
    frame = files.data | {"model": model | {"vocab": {}, "merges": []}, "added_tokens": []}
    merges = [_pair(merge) for merge in model["merges"]]
    bpe = models.BPE(
        vocab=model["vocab"],
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT[files.class_name]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(files.add_prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    post_processor = tokenizers.Tokenizer.from_str(
        json.dumps(frame, allow_nan=False)
    ).post_processor
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


def _pair(merge: str | list[str]) -> tuple[str, str]:
    if isinstance(merge, str):
        merge = merge.split(" ")
    left, right = merge
    return left, right


def _missing(
    files: TokenizerFiles, tokenizer: tokenizers.Tokenizer, specials: Iterable[str | AddedToken]
) -> list[tokenizers.AddedToken]:
    """The declared tokens and the special ones that the tokenizer does not have yet."""
    there = tokenizer.get_added_tokens_decoder().values()
    reprs = {repr(token) for token in there}
    missing: list[str | AddedToken]
    missing = [token for token in files.declared.values() if repr(_convert(token)) not in reprs]
    known = {token.content for token in there} | set(map(text_of, missing))
    names = {text_of(token) for token in files.named.values()}
    for token in specials:
        if text_of(token) not in known and token not in missing:
            missing.append(token)
    return [_convert(token, text_of(token) in names) for token in missing]


def _convert(token: str | AddedToken, special: bool = False) -> tokenizers.AddedToken:
    """The library's token; one that is only a text is special."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
    if token.normalized is not None:
        flags["normalized"] = token.normalized
    converted = tokenizers.AddedToken(token.content, special=token.special, **flags)
    converted.special = token.special or special
    return converted


def _check_ids(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Each token that a file lists must be there under its id: the model was trained with it.

    Raises:
        PlanError: one is not; transformers would read it as text or by another id.
    """
    listed = [(token["content"], token["id"]) for token in files.data.get("added_tokens") or ()]
    listed += [(token.content, index) for index, token in files.declared.items()]
    for text, wanted in listed:
        found = tokenizer.token_to_id(text)
        if found != wanted:
            raise PlanError(
                f"the files of `{folder}` disagree: the id of `{printable_line(text)}` is {wanted} "
                f"in one of them, with all of them it is {found}",
                "list the same added tokens in tokenizer.json and tokenizer_config.json",
            )
