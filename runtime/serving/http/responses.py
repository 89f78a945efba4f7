"""Completions and deltas -> OpenAI's response bodies and server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tokenspeed_plan.plans.errors import EngineStopped
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.http.api_errors import try_later
from tokenspeed_plan.runtime.serving.http.parsing import ParsedRequest
from tokenspeed_plan.runtime.serving.openai.answers import (
    chat_logprobs,
    choice,
    text_logprobs,
    usage,
)
from tokenspeed_plan.runtime.serving.openai.requests import Tokenizer
from tokenspeed_plan.runtime.serving.streaming import Delta

Json = dict[str, Any]
_DONE = b"data: [DONE]\n\n"


class Answer:
    """Writes what one request gets."""

    def __init__(
        self, asked: ParsedRequest, tokenizer: Tokenizer, model: str, created: int
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        prefix, kind = (
            ("chatcmpl", "chat.completion") if asked.is_chat else ("cmpl", "text_completion")
        )
        self._head: Json = {
            "id": f"{prefix}-{asked.key}",
            "object": kind,
            "created": created,
            "model": model,
        }
        self._index = {request.request_id: number for number, request in enumerate(asked.requests)}
        self.host_outputs = [0] * len(asked.requests)  # characters, of each choice that has begun
        self._begun = [False] * len(asked.requests)

    def whole(self, completions: Sequence[Completion]) -> Json:
        """The body of a response that is not streamed."""
        choices = [
            choice(self._asked.body, index, done, self._tokenizer)
            for index, done in enumerate(completions)
        ]
        return self._head | {"choices": choices, "usage": self._usage(completions)}

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """The events of a response that is streamed, its end included; an engine that fails ends it with an error."""
        done: list[Completion] = []
        try:
            async for delta in deltas:
                done += [delta.completion] if delta.completion else []
                yield self._event([self._chunk(delta)])
        except EngineStopped as error:
            yield _data(try_later(503, error.message, "engine_stopped").body)
            return
        if self._asked.include_usage:
            done.sort(key=lambda completion: self._index[completion.request_id])
            yield self._event([], self._usage(done))
        yield _DONE

    def _event(self, choices: list[Json], total: Json | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
        body = self._head | {"object": kind, "choices": choices}
        return _data(body | {"usage": total} if self._asked.include_usage else body)

    def _chunk(self, delta: Delta) -> Json:
        index = self._index[delta.request_id]
        made: Json = {
            "index": index,
            "logprobs": None,
            "finish_reason": delta.completion.finish_reason if delta.completion else None,
        }
        if self._asked.is_chat:
            made["delta"] = ({} if self._begun[index] else {"role": "assistant"}) | {
                "content": delta.text
            }
            if delta.logprobs:
                made["logprobs"] = chat_logprobs(delta.logprobs, self._tokenizer)
        else:
            made["text"] = delta.text
            if delta.logprobs:
                made["logprobs"] = text_logprobs(
                    delta.logprobs, self._tokenizer, self.host_outputs[index]
                )
        if self._asked.body.return_token_ids:
            made["token_ids"] = list(delta.token_ids)
        self._begun[index] = True
        self.host_outputs[index] += len(delta.text)
        return made

    def _usage(self, completions: Sequence[Completion]) -> Json:
        """Prompts count once, whatever the number of choices."""
        firsts = completions[:: self._asked.num_choices]
        cached = sum(completion.num_cached_tokens for completion in firsts)
        counts = usage(sum(completion.num_prompt_tokens for completion in firsts), completions)
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


def _data(body: Json) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
