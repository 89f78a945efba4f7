"""The APIs of a chat: OpenAI's own two, and Anthropic's. Each asks and answers in its own words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenspeed_plan.plans.errors import EngineStopped, RequestFailed
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.anthropic.message_writer import MessageWriter
from tokenspeed_plan.runtime.serving.anthropic.messages_api import chat_of_message
from tokenspeed_plan.runtime.serving.http.responses import Answer, event, failure
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

    def events(self, answer: Answer, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """The events of a streamed response."""

    def events_of(self, answer: Answer) -> Callable[[Delta], bytes] | None:
        """What makes the events of one delta in the middle; None where only `events` knows them."""


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

    def events(self, answer: Answer, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """The events of the endpoint."""
        return answer.events(deltas)

    def events_of(self, answer: Answer) -> Callable[[Delta], bytes]:
        """What makes the events of one delta."""
        return answer.events_of


class _Writer(Protocol):
    """Writes a response of another API from the messages of a chat."""

    def begin(self) -> list[Json]:
        """The first events."""

    def take(self, delta: Json) -> list[Json]:
        """Events of what a message has gained."""

    def finish(self, reason: str, counts: Json) -> list[Json]:
        """The last events."""


async def _translated(answer: Answer, deltas: AsyncIterator[Delta], writer: _Writer) -> Any:
    """Events of a stream, in another API's words.

    Raises:
        EngineStopped, RequestFailed: there is no more of it.
    """
    reason, counts = "stop", Json()
    for item in writer.begin():
        yield event(item, item["type"])
    async for chunk in answer.chunks(deltas):
        counts = chunk.get("usage") or counts
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            for item in writer.take(choice["delta"]):
                yield event(item, item["type"])
    for item in writer.finish(reason, counts):
        yield event(item, item["type"])


def _fill(writer: _Writer, answer: Answer, completions: Sequence[Completion]) -> None:
    """Write a response that is complete: as one that came at once, so that its order is kept."""
    chunks = answer.at_once(completions[0])
    for chunk in chunks:
        writer.take(chunk["delta"])
    writer.finish(chunks[-1]["finish_reason"], answer.usage(completions))


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

    async def events(self, answer: Answer, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Typed events, up to the one that has the whole response."""
        writer = self._writer(answer)
        try:
            async for data in _translated(answer, deltas, writer):
                yield data
        except (EngineStopped, RequestFailed) as error:
            for item in writer.fail("server_error", error.message):
                yield event(item, item["type"])

    def events_of(self, answer: Answer) -> None:
        """Each event depends on those before it."""

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

    async def events(self, answer: Answer, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Typed events, up to `message_stop` or an error."""
        try:
            async for data in _translated(answer, deltas, self._writer(answer)):
                yield data
        except (EngineStopped, RequestFailed) as error:
            yield event(failure(error).anthropic_body, "error")

    def events_of(self, answer: Answer) -> None:
        """Each event depends on those before it."""

    def _writer(self, answer: Answer) -> MessageWriter:
        (request,) = answer.request.requests
        return MessageWriter(answer.request.key, answer.model, len(request.prompt_ids))
