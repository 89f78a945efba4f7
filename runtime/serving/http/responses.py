"""Completions and deltas -> OpenAI's response bodies and server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tokenspeed_plan.plans.errors import EngineStopped, RequestFailed
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, try_later
from tokenspeed_plan.runtime.serving.http.parsing import ParsedRequest
from tokenspeed_plan.runtime.serving.openai.answers import (
    TextOffsets,
    choice,
    logprobs_of,
    usage,
)
from tokenspeed_plan.runtime.streaming import Decoder, Delta

Json = dict[str, Any]
_DONE = b"data: [DONE]\n\n"


class Answer:
    """Writes the answer to one request, whole or as events."""

    def __init__(self, request: ParsedRequest, decoder: Decoder, model: str, created: int) -> None:
        self._request = request
        self._decoder = decoder
        self._kind, self._chunk_kind, prefix = "text_completion", "text_completion", "cmpl"
        if request.is_chat:
            self._kind, self._chunk_kind = "chat.completion", "chat.completion.chunk"
            prefix = "chatcmpl"
        self._head: Json = {"id": f"{prefix}-{request.key}", "created": created, "model": model}
        ids = [item.request_id for item in request.requests]
        self._choice_index = {request_id: index for index, request_id in enumerate(ids)}
        self._offsets = [TextOffsets(decoder) for _ in ids]
        self._has_begun = [False] * len(ids)

    def whole(self, completions: Sequence[Completion]) -> Json:
        """Body of a response that is not streamed; one completion for each choice."""
        choices = [
            choice(self._request.body, index, completion, self._decoder)
            for index, completion in enumerate(completions)
        ]
        body = {"object": self._kind, "choices": choices, "usage": self._usage(completions)}
        return self._head | body

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Events of a streamed response, up to `[DONE]` or an error."""
        completions: list[Completion] = []
        try:
            async for delta in deltas:
                if delta.completion:
                    completions.append(delta.completion)
                yield self._event([self._chunk(delta)])
        except EngineStopped as error:
            yield _event(try_later(503, error.message, "engine_stopped").body)
            return
        except RequestFailed as error:
            yield _event(ApiError(500, error.message, "request_failed").body)
            return
        if self._request.include_usage:
            completions.sort(key=self._index_of)
            yield self._event([], self._usage(completions))
        yield _DONE

    def _index_of(self, completion: Completion) -> int:
        return self._choice_index[completion.request_id]

    def _event(self, choices: list[Json], counts: Json | None = None) -> bytes:
        body = self._head | {"object": self._chunk_kind, "choices": choices}
        if self._request.include_usage:
            body["usage"] = counts
        return _event(body)

    def _chunk(self, delta: Delta) -> Json:
        """What one choice has gained."""
        index = self._choice_index[delta.request_id]
        chunk: Json = {"index": index, "logprobs": None, "finish_reason": None}
        if delta.completion:
            chunk["finish_reason"] = delta.completion.finish_reason
        if self._request.is_chat:
            chunk["delta"] = self._message(index, delta)
        else:
            chunk["text"] = delta.text
        if delta.logprobs:
            chunk["logprobs"] = logprobs_of(
                self._request.body, delta.logprobs, self._decoder, self._offsets[index]
            )
        if self._request.body.return_token_ids:
            chunk["token_ids"] = list(delta.token_ids)
        self._has_begun[index] = True
        return chunk

    def _message(self, index: int, delta: Delta) -> Json:
        message = {"content": delta.text}
        if not self._has_begun[index]:
            message["role"] = "assistant"
        return message

    def _usage(self, completions: Sequence[Completion]) -> Json:
        """Token counts; a prompt counts once, whatever the number of its choices."""
        firsts = completions[:: self._request.num_choices]
        num_prompt_tokens = sum(completion.num_prompt_tokens for completion in firsts)
        num_cached_tokens = sum(completion.num_cached_tokens for completion in firsts)
        counts = usage(num_prompt_tokens, completions)
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
        return counts


def _event(body: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
