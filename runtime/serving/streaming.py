"""Tokens -> text while an answer grows: whole characters only, and nothing that has to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenspeed_plan.runtime.request import (
    Completion,
    NewToken,
    Request,
    SamplingParams,
    TokenLogprobs,
)

_REPLACEMENT = "\ufffd"  # what the bytes of an unfinished character are decoded to


class Decoder(Protocol):
    """What gives token ids their text."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer has gained.

    All texts of a request together are the text of its `completion`, which comes with the last one;
    so are its tokens and logprobs. A token comes with the text that it helped to complete.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    completion: Completion | None = None


class Detokenizer:
    """Text of a growing list of tokens, in pieces of whole characters.

    Only the end of the list is decoded: the tokens of the last whole piece, since some decoders
    look at what stands before a token, and those after it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._num_told = 0  # of `_ids`, those whose text is told whole
        self.host_outputs = 0  # characters of the text of `_ids` that are told

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens bring; an unfinished character waits."""
        self._ids += token_ids
        text = self._decoder.decode(self._ids)
        if text.endswith(_REPLACEMENT):
            text = text[
                :-1
            ]  # of a run of them, only the last one can still become another character
            new, self.host_outputs = text[self.host_outputs :], len(text)
            return new
        new = text[self.host_outputs :]
        del self._ids[: self._num_told]
        self._num_told, self.host_outputs = len(self._ids), len(self._decoder.decode(self._ids))
        return new


class AnswerText:
    """One request's deltas. Text that may become a stop string waits until it has, or cannot any more."""

    def __init__(self, request: Request, decoder: Decoder | None) -> None:
        self._request_id = request.request_id
        self._params: SamplingParams = request.params
        self._detokenizer = Detokenizer(decoder) if decoder else None
        self._longest_stop = max(map(len, request.params.stop), default=0)
        self._text = ""  # whole characters that wait
        self._tokens: list[NewToken] = []  # those that wait with them
        self._num_told = 0  # tokens that were told
        self.host_outputs = 0  # characters that were told

    def push(self, tokens: Sequence[NewToken]) -> Delta:
        """What these tokens add; its text may be empty, then they wait."""
        self._tokens += tokens
        if self._detokenizer and tokens:
            self._text += self._detokenizer.push(token.token_id for token in tokens)
        end = len(self._text) - self._num_held()
        if not end and self._detokenizer:
            return Delta(self._request_id, "")
        ready, self._tokens = self._tokens, []
        text, self._text = self._text[:end], self._text[end:]
        self.host_outputs += len(text)
        self._num_told += len(ready)
        logprobs = tuple(token.logprobs for token in ready if token.logprobs)
        return Delta(self._request_id, text, tuple(token.token_id for token in ready), logprobs)

    def finish(self, completion: Completion) -> Delta:
        """The rest, with the completion."""
        return Delta(
            self._request_id,
            completion.text[self.host_outputs :],
            completion.token_ids[self._num_told :],
            completion.logprobs[self._num_told :],
            completion,
        )

    def _num_held(self) -> int:
        """Characters at the end of the text that begin a stop string; the longest such end."""
        sizes = range(min(len(self._text), self._longest_stop), 0, -1)
        ends = (
            size
            for size in sizes
            if any(stop.startswith(self._text[-size:]) for stop in self._params.stop)
        )
        return next(ends, 0)


class Steps(Protocol):
    """What streaming needs of an engine."""

    on_token: Callable[[NewToken], object] | None

    @property
    def tokenizer(self) -> Decoder | None:
        """Its tokenizer."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request."""

    def step(self) -> list[Completion]:
        """One step; returns what it finished."""


def stream(engine: Steps, request: Request) -> Generator[Delta, None, None]:
    """Step an engine until one request is answered: a delta a step. Closing it cancels the request."""
    text, tokens = AnswerText(request, engine.tokenizer), list[NewToken]()
    engine.add(request)
    engine.on_token = tokens.append
    try:
        while True:
            finished = [done for done in engine.step() if done.request_id == request.request_id]
            if finished:
                yield text.finish(finished[0])
                return
            yield text.push([token for token in tokens if token.request_id == request.request_id])
            tokens.clear()
    finally:
        engine.on_token = None
        engine.cancel(request.request_id)
