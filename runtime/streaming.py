"""Tokens -> text of a growing answer: whole characters, none of them withdrawn later."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import compress
from typing import NamedTuple, Protocol

from tokenspeed_plan.runtime.request import (
    Completion,
    NewToken,
    Request,
    TokenLogprobs,
)
from tokenspeed_plan.runtime.stop_strings import StopMatcher

_REPLACEMENT = "\ufffd"  # decoders return it for the bytes of an incomplete character
_UTF8 = getincrementaldecoder("utf-8")


class Decoder(Protocol):
    """The half of a tokenizer that makes text."""

    @property
    def joins_bytes(self) -> bool:
        """Whether the bytes of a text are those of its tokens, whatever stands beside them."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""

    def is_special(self, token_id: int) -> bool:
        """Whether an answer's text leaves the token out."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, in UTF-8; empty for an id that is no token."""


class Delta(NamedTuple):
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


class ByteDetokenizer:
    """Text of a growing list of tokens that are bytes, in pieces of whole characters.

    It does once for a token what a `Detokenizer` does twice for it and the one before.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._token_bytes = decoder.token_bytes
        self._characters = _UTF8("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add; the bytes of an incomplete character wait."""
        return self._characters.decode(b"".join(map(self._token_bytes, token_ids)))


def detokenizer(decoder: Decoder) -> Detokenizer | ByteDetokenizer:
    """What makes the text of tokens, as they come."""
    if decoder.joins_bytes:
        return ByteDetokenizer(decoder)
    return Detokenizer(decoder)


class SpelledText:
    """Text with its special tokens spelled out: stop strings are looked for in it.

    An answer shows it without them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._detokenizer = detokenizer(decoder)
        self._is_shown: list[bool] = []  # of each character
        self.text = ""

    def push(self, token_id: int) -> str:
        """Add and return what a token spells; the bytes of an incomplete character wait."""
        is_special = self._decoder.is_special(token_id)
        if is_special:
            piece = self._decoder.token_bytes(token_id).decode(errors="replace")
        else:
            piece = self._detokenizer.push([token_id])
        self.text += piece
        self._is_shown += [not is_special] * len(piece)
        return piece

    def shown(self, end: int) -> str:
        """What an answer shows of the text up to a character."""
        return "".join(compress(self.text[:end], self._is_shown))

    def drop(self, end: int) -> None:
        """Forget the text up to a character."""
        self.text = self.text[end:]
        del self._is_shown[:end]


class StopSearch:
    """Looks for stop strings in the whole characters of a growing list of tokens.

    A stop string may be a special token's, or have one in it.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._spelled = SpelledText(decoder)
        self._matcher = StopMatcher(stops)

    def push(self, token_id: int) -> bool:
        """Add a token; returns whether a stop string ends in it."""
        piece = self._spelled.push(token_id)
        self._spelled.drop(len(piece))
        return self._matcher.push(piece)


def text_before_stop(decoder: Decoder, ids: Sequence[int], stops: Sequence[str]) -> str:
    """The text of an answer, up to the first stop string."""
    text = decoder.decode(list(ids))
    if stops and any(decoder.is_special(token) for token in ids):
        spelled = SpelledText(decoder)
        for token in ids:
            spelled.push(token)
        cut = _first_stop(spelled.text, stops)
        if cut is not None:
            text = spelled.shown(cut)
        return text
    return text[: _first_stop(text, stops)]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins; None without one."""
    return min((text.find(stop) for stop in stops if stop in text), default=None)


class AnswerText:
    """Makes the deltas of one request; text that may become a stop string is held back."""

    def __init__(self, request: Request, decoder: Decoder | None) -> None:
        self._request_id = request.request_id
        self._decoder = decoder
        self._matcher = StopMatcher(request.params.stop)
        self._detokenizer: Detokenizer | ByteDetokenizer | None = None
        self._held: SpelledText | None = None  # whole characters that are held back
        if decoder and request.params.stop:
            self._held = SpelledText(decoder)
        elif decoder:
            self._detokenizer = detokenizer(decoder)
        self._tokens: list[NewToken] = []  # tokens that are held back with them
        self._num_sent_tokens = 0
        self._num_sent_chars = 0

    def push(self, tokens: Sequence[NewToken]) -> Delta:
        """What these tokens add; it is empty if all of it is held back."""
        self._tokens += tokens
        if self._decoder is None:
            return self._send("")
        text = self._text(self._decoder, [token.token_id for token in tokens])
        if not text:
            return Delta(self._request_id, "")
        return self._send(text)

    def _text(self, decoder: Decoder, ids: Sequence[int]) -> str:
        """What may be shown once these tokens are there."""
        if self._detokenizer is not None:
            return self._detokenizer.push([token for token in ids if not decoder.is_special(token)])
        held = self._held
        assert held is not None
        for token in ids:
            self._matcher.push(held.push(token))
        end = len(held.text) - self._matcher.num_begun
        text = held.shown(end)
        if text:
            held.drop(end)
        return text

    def finish(self, completion: Completion) -> Delta:
        """The rest of the answer, with its completion."""
        return Delta(
            self._request_id,
            completion.text[self._num_sent_chars :],
            completion.token_ids[self._num_sent_tokens :],
            completion.logprobs[self._num_sent_tokens :],
            completion,
        )

    def _send(self, text: str) -> Delta:
        """A delta of all tokens, and of a text."""
        tokens, self._tokens = self._tokens, []
        self._num_sent_chars += len(text)
        self._num_sent_tokens += len(tokens)
        token_ids = tuple(token.token_id for token in tokens)
        logprobs = tuple(token.logprobs for token in tokens if token.logprobs)
        return Delta(self._request_id, text, token_ids, logprobs)


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

    Raises:
        RequestFailed: the request has failed.
    """
    answer = AnswerText(request, engine.tokenizer)
    tokens = list[NewToken]()
    engine.add(request)
    engine.on_token = tokens.append
    try:
        while True:
            for completion in engine.step():
                if completion.request_id == request.request_id:
                    completion.check()
                    yield answer.finish(completion)
                    return
            new = [token for token in tokens if token.request_id == request.request_id]
            tokens.clear()
            yield answer.push(new)
    finally:
        engine.on_token = None
        engine.cancel(request.request_id)
