"""From text to token ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tokenspeed_plan.plans.errors import PlanError, RequestError

Messages = list[dict[str, Any]]


class Tokenizer:
    """A tokenizer, with a chat template where there is one.

    Args:
        tokenizer: the checkpoint's.
        chat: writes messages as one prompt.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, chat: Callable[[Messages], str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat

    @classmethod
    def load(cls, folder: Path, chat: Callable[[Messages], str] | None = None) -> Tokenizer:
        """The tokenizer of a model folder.

        Raises:
            PlanError: there is none, or it cannot be read.
        """
        path = folder / "tokenizer.json"
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")), chat)
        except (OSError, ValueError) as error:
            raise PlanError(
                f"cannot read `{path}`: {error}",
                "give prompts as token ids, or a complete model folder",
            ) from error
        except Exception as error:  # `tokenizers` raises bare Exception for a malformed file
            raise PlanError(
                f"`{path}` is not a tokenizer: {error}", "use the file that came with the model"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: it is not Unicode.
        """
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RequestError("the prompt is not Unicode text", "give it as UTF-8")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def render_chat(self, messages: Messages) -> str:
        """A chat as one prompt, which ends where the answer begins.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        if self._chat is None:
            raise RequestError("the model has no chat template", "use `/v1/completions`")
        return self._chat(messages)
