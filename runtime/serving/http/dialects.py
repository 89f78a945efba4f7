"""The APIs of a chat: OpenAI's own two, and Anthropic's. Each asks and answers in its own words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenspeed_plan.plans.errors import EngineStopped, RequestFailed
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.anthropic.message_writer import MessageWriter
from tokenspeed_plan.runtime.serving.anthropic.messages_api import chat_of_message
from tokenspeed_plan.runtime.serving.events import event
from tokenspeed_plan.runtime.serving.http.event_stream import EventWriter
from tokenspeed_plan.runtime.serving.http.responses import Answer
from tokenspeed_plan.runtime.serving.openai.bodies import (
    UNSUPPORTED,
    InvalidRequestError,
    Url,
)
from tokenspeed_plan.runtime.serving.openai.response_writer import ResponseWriter
from tokenspeed_plan.runtime.serving.openai.responses_api import chat_of_response
from tokenspeed_plan.runtime.streaming import Delta

Json = dict[str, Any]

# What a chat has and the other APIs do not.
_ONLY_CHATS = ("n", "logprobs", "return_token_ids", "response_format")


class Dialect(Protocol):
    """One API.

    Attributes:
        url: the endpoint whose rules hold for its bodies.
        caps_max_tokens: clients send the most that they know of, where there may be less room.
    """

    @property
    def url(self) -> Url:
        """The endpoint whose rules hold for its bodies."""

    @property
    def caps_max_tokens(self) -> bool:
        """Whether a `max_tokens` beyond the room means all of it."""

    def fields(self, asked: Json) -> Json:
        """The body of that endpoint which says the same.

        Raises:
            InvalidRequestError: none does.
        """

    def whole(self, answer: Answer, completions: Sequence[Completion]) -> Json:
        """A response that is not streamed; one completion for each choice."""

    def writer(self, answer: Answer) -> EventWriter:
        """What writes the events of a streamed response."""


@dataclass(frozen=True, slots=True)
class OwnDialect:
    """An endpoint that says it in its own words."""

    url: Url
    caps_max_tokens: bool = False

    def fields(self, asked: Json) -> Json:
        """What was asked."""
        return asked

    def whole(self, answer: Answer, completions: Sequence[Completion]) -> Json:
        """The answer of the endpoint."""
        return answer.whole(completions)

    def writer(self, answer: Answer) -> EventWriter:
        """The answer itself."""
        return answer


class _Writer(Protocol):
    """Writes a response of another API from the messages of a chat."""

    def begin(self) -> list[Json]:
        """The first events."""

    def take(self, delta: Json) -> Iterator[Json | bytes]:
        """Events of what a message has gained; each is written before the next is asked for.

        Those that add to a text come written.
        """

    def finish(self, reason: str, counts: Json) -> Iterator[Json]:
        """The last events."""

    def fail(self, message: str) -> list[Json]:
        """The last event of an answer that cannot be had."""


class _Translation:
    """Writes the events of a chat's answer in another API's words."""

    def __init__(self, answer: Answer, writer: _Writer) -> None:
        self._answer = answer
        self._writer = writer
        self._reason = "stop"

    def begin(self) -> bytes:
        """What tells of the answer itself."""
        return _typed(self._writer.begin())

    def events_of(self, delta: Delta) -> bytes:
        """The events of a delta."""
        data = b""
        for chunk in self._answer.chunks_of(delta):
            self._reason = chunk["finish_reason"] or self._reason
            data += _typed(self._writer.take(chunk["delta"]))
        return data

    def end(self) -> bytes:
        """What tells how it has ended."""
        return _typed(self._writer.finish(self._reason, self._answer.stream_usage()))

    def fail(self, error: EngineStopped | RequestFailed) -> bytes:
        """What tells that there is no more of it."""
        return _typed(self._writer.fail(error.message))


def _typed(events: Iterable[Json | bytes]) -> bytes:
    """Events that are named by their types, where they are not written yet."""
    return b"".join(
        item if isinstance(item, bytes) else event(item, item["type"]) for item in events
    )


def _fill(writer: _Writer, answer: Answer, completions: Sequence[Completion]) -> None:
    """Write a response that is complete: as one that came at once, so that its order is kept."""
    chunks = answer.at_once(completions[0])
    for chunk in chunks:
        list(writer.take(chunk["delta"]))
    list(writer.finish(chunks[-1]["finish_reason"], answer.usage(completions)))


def _refuse_chats_own(asked: Json, *more: str) -> None:
    """Refuse fields that only chats have.

    Raises:
        InvalidRequestError: with the first of them.
    """
    for name in (*_ONLY_CHATS, *more):
        if name in asked:
            raise InvalidRequestError(
                f"unknown field `{name}`, it is one of /v1/chat/completions", name, UNSUPPORTED
            )


class ResponsesDialect:
    """OpenAI's Responses API; it keeps no response."""

    url: Url = "/v1/chat/completions"
    caps_max_tokens = False

    def fields(self, asked: Json) -> Json:
        """The chat that says the same."""
        _refuse_chats_own(asked, "messages", "max_tokens", "max_completion_tokens")
        return chat_of_response(asked)

    def whole(self, answer: Answer, completions: Sequence[Completion]) -> Json:
        """The response with all of its items."""
        writer = self._writer(answer)
        _fill(writer, answer, completions)
        return writer.response

    def writer(self, answer: Answer) -> EventWriter:
        """Typed events, up to the one that has the whole response."""
        return _Translation(answer, self._writer(answer))

    def _writer(self, answer: Answer) -> ResponseWriter:
        request = answer.request
        return ResponseWriter(request.asked, request.key, answer.model, answer.created)


@dataclass(frozen=True, slots=True)
class MessagesDialect:
    """Anthropic's Messages API.

    Attributes:
        drops_billing: leave a client's counter out of its prompt.
    """

    drops_billing: bool = False
    url: Url = "/v1/chat/completions"
    caps_max_tokens: bool = True

    def fields(self, asked: Json) -> Json:
        """The chat that says the same."""
        _refuse_chats_own(asked, "stop", "max_completion_tokens")
        return chat_of_message(asked, self.drops_billing)

    def whole(self, answer: Answer, completions: Sequence[Completion]) -> Json:
        """The message with all of its blocks."""
        writer = self._writer(answer)
        _fill(writer, answer, completions)
        return writer.message

    def writer(self, answer: Answer) -> EventWriter:
        """Typed events, up to `message_stop` or an error."""
        return _Translation(answer, self._writer(answer))

    def _writer(self, answer: Answer) -> MessageWriter:
        (request,) = answer.request.requests
        return MessageWriter(answer.request.key, answer.model, len(request.prompt_ids))
