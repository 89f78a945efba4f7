"""Tokens -> text of a growing answer: whole characters, none of them withdrawn later."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenspeed_plan.runtime.request import (
    Completion,
    NewToken,
    Request,
    TokenLogprobs,
)

_REPLACEMENT = "\ufffd"  # decoders return it for the bytes of an incomplete character


class Decoder(Protocol):
    """The half of a tokenizer that makes text."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer has gained since the last delta.

    The texts of all deltas of a request, joined, are the text of its `completion`; the same holds
    for tokens and logprobs. A token comes with the text that it helped to complete.

    Attributes:
        completion: comes with the last delta alone.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    completion: Completion | None = None


class Detokenizer:
    """Text of a growing list of tokens, in pieces of whole characters.

    Only the end of the list is decoded again: the new tokens and those of the last whole piece,
    since the text of a token may depend on the token before it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._num_complete_ids = 0  # leading `_ids` that belong to the last whole piece
        self._num_returned_chars = 0  # characters of the text of `_ids` that were returned

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add; the bytes of an incomplete character wait."""
        self._ids += token_ids
        text = self._decoder.decode(self._ids)
        if text.endswith(_REPLACEMENT):
            # Of several replacement characters only the last can still change.
            text = text[:-1]
            piece = text[self._num_returned_chars :]
            self._num_returned_chars = len(text)
            return piece
        piece = text[self._num_returned_chars :]
        del self._ids[: self._num_complete_ids]
        self._num_complete_ids = len(self._ids)
        self._num_returned_chars = len(self._decoder.decode(self._ids))
        return piece


class AnswerText:
    """Makes the deltas of one request; text that may become a stop string is held back."""

    def __init__(self, request: Request, decoder: Decoder | None) -> None:
        self._request_id = request.request_id
        self._stops = request.params.stop
        self._max_stop_chars = max(map(len, self._stops), default=0)
        self._detokenizer: Detokenizer | None = None
        if decoder:
            self._detokenizer = Detokenizer(decoder)
        self._text = ""  # whole characters that are held back
        self._tokens: list[NewToken] = []  # tokens that are held back with them
        self._num_sent_tokens = 0
        self._num_sent_chars = 0

    def push(self, tokens: Sequence[NewToken]) -> Delta:
        """What these tokens add; it is empty if all of it is held back."""
        self._tokens += tokens
        if self._detokenizer and tokens:
            self._text += self._detokenizer.push(token.token_id for token in tokens)
        end = len(self._text) - self._num_held_chars()
        if end == 0 and self._detokenizer:
            return Delta(self._request_id, "")
        return self._send(end)

    def finish(self, completion: Completion) -> Delta:
        """The rest of the answer, with its completion."""
        return Delta(
            self._request_id,
            completion.text[self._num_sent_chars :],
            completion.token_ids[self._num_sent_tokens :],
            completion.logprobs[self._num_sent_tokens :],
            completion,
        )

    def _send(self, end: int) -> Delta:
        """A delta of all tokens, and of the text up to `end`."""
        text, self._text = self._text[:end], self._text[end:]
        tokens, self._tokens = self._tokens, []
        self._num_sent_chars += len(text)
        self._num_sent_tokens += len(tokens)
        token_ids = tuple(token.token_id for token in tokens)
        logprobs = tuple(token.logprobs for token in tokens if token.logprobs)
        return Delta(self._request_id, text, token_ids, logprobs)

    def _num_held_chars(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for size in range(min(len(self._text), self._max_stop_chars), 0, -1):
            end = self._text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


class StepEngine(Protocol):
    """The members of an engine that streaming uses."""

    on_token: Callable[[NewToken], object] | None

    @property
    def tokenizer(self) -> Decoder | None:
        """Its tokenizer."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request."""

    def step(self) -> list[Completion]:
        """Run one step; returns the requests that it finished."""


def stream(engine: StepEngine, request: Request) -> Generator[Delta, None, None]:
    """Step an engine until one request is finished; yields a delta a step.

    Closing the generator cancels the request.
    """
    answer = AnswerText(request, engine.tokenizer)
    tokens = list[NewToken]()
    engine.add(request)
    engine.on_token = tokens.append
    try:
        while True:
            for completion in engine.step():
                if completion.request_id == request.request_id:
                    yield answer.finish(completion)
                    return
            new = [token for token in tokens if token.request_id == request.request_id]
            tokens.clear()
            yield answer.push(new)
    finally:
        engine.on_token = None
        engine.cancel(request.request_id)
