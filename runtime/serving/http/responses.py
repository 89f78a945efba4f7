"""Completions and deltas -> OpenAI's response bodies and server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenspeed_plan.plans.errors import EngineStopped, RequestFailed
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.chat.answer_parser import AnswerParser
from tokenspeed_plan.runtime.serving.chat.answer_parts import Part, ToolCall
from tokenspeed_plan.runtime.serving.events import TEXT, Frame, event
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, try_later
from tokenspeed_plan.runtime.serving.http.parsing import ParsedRequest
from tokenspeed_plan.runtime.serving.openai.answers import (
    ChatDecoder,
    TextOffsets,
    answer_rules,
    call_entry,
    choice,
    counts_of,
    finish_reason,
    is_cut,
    logprobs_of,
    usage,
    with_thoughts,
)
from tokenspeed_plan.runtime.streaming import Delta

Json = dict[str, Any]
_DONE = b"data: [DONE]\n\n"


class _Choice:
    """One choice of an answer, as it is streamed."""

    def __init__(self, answer: Answer, index: int) -> None:
        self._answer = answer
        self._index = index
        self._offsets = TextOffsets(answer.decoder)
        self._parser = None
        if answer.rules is not None:
            self._parser = AnswerParser(answer.rules)
        self._num_calls = 0
        self._has_begun = False
        self._frames: dict[str, Frame] = {}

    def events(self, delta: Delta) -> bytes:
        """The events of what it has gained, where that is nothing but text."""
        return b"".join(map(self._event, self._messages(delta)))

    def _event(self, message: Json) -> bytes:
        """An event; of one text only that text is written, the rest is there."""
        (name, text), *more = message.items()
        if more or not isinstance(text, str):
            return event(self._answer.body([self._chunk(message)], None))
        if name not in self._frames:
            self._frames[name] = Frame(self._answer.body([self._chunk({name: TEXT})], None))
        return self._frames[name].written(text)

    def is_plain(self, delta: Delta) -> bool:
        """Whether events of a delta say nothing but what each part adds."""
        return delta.completion is None and not self._tells_tokens(delta)

    def chunks(self, delta: Delta) -> list[Json]:
        """What it has gained, as one chunk for each part; the first has what goes with tokens."""
        found = [self._chunk(message) for message in self._messages(delta)]
        if not found and (delta.completion or self._tells_tokens(delta)):
            found = [self._chunk({})]
        if delta.completion:
            reason = delta.completion.finish_reason
            found[-1]["finish_reason"] = reason
            if self._parser is not None:
                found[-1]["finish_reason"] = finish_reason(delta.completion, self._num_calls > 0)
        if found:
            self._add_tokens(found[0], delta)
        return found

    def _messages(self, delta: Delta) -> list[Json]:
        """What each part adds to the message; of a completion there is a text alone."""
        if not self._answer.request.is_chat:
            return [{"text": delta.text}]
        if self._parser is None:
            return [self._begun() | {"content": delta.text}]
        parts = self._parser.push(delta.text)
        if delta.completion:
            parts += self._parser.finish(is_cut(delta.completion))
        messages = []
        if not self._has_begun:
            messages.append(self._begun() | {"content": ""})
        return messages + [self._message(part) for part in parts]

    def _begun(self) -> Json:
        """The role, which comes once."""
        if self._has_begun:
            return {}
        self._has_begun = True
        return {"role": "assistant"}

    def _message(self, part: Part) -> Json:
        if part.kind == "content":
            return {"content": part.text}
        if part.kind == "reasoning":
            return {"reasoning_content": part.text}
        entry: Json = {"function": {"arguments": part.text}}
        if part.kind == "call":
            name = self._answer.request.requests[self._index].request_id
            entry = call_entry(name, self._num_calls, ToolCall(part.text))
            self._num_calls += 1
        return {"tool_calls": [{"index": self._num_calls - 1} | entry]}

    def _chunk(self, message: Json) -> Json:
        chunk: Json = {"index": self._index, "logprobs": None, "finish_reason": None}
        if self._answer.request.is_chat:
            return chunk | {"delta": message}
        return chunk | {"text": ""} | message

    def _tells_tokens(self, delta: Delta) -> bool:
        return bool(delta.logprobs or self._answer.request.body.return_token_ids)

    def _add_tokens(self, chunk: Json, delta: Delta) -> None:
        body = self._answer.request.body
        if delta.logprobs:
            chunk["logprobs"] = logprobs_of(
                body, delta.logprobs, self._answer.decoder, self._offsets
            )
        if body.return_token_ids:
            chunk["token_ids"] = list(delta.token_ids)


class Answer:
    """Writes the answer to one request, whole or as events.

    Attributes:
        rules: how its text is read; None where all of it is for the user.
    """

    def __init__(
        self, request: ParsedRequest, decoder: ChatDecoder, model: str, created: int
    ) -> None:
        self.request = request
        self.decoder = decoder
        self.model, self.created = model, created
        self.rules = answer_rules(request.body, request.requests[0].prompt_ids, decoder)
        self._kind, self._chunk_kind, prefix = "text_completion", "text_completion", "cmpl"
        if request.is_chat:
            self._kind, self._chunk_kind = "chat.completion", "chat.completion.chunk"
            prefix = "chatcmpl"
        self._head: Json = {"id": f"{prefix}-{request.key}", "created": created, "model": model}
        ids = [item.request_id for item in request.requests]
        self._choice_index = {request_id: index for index, request_id in enumerate(ids)}
        self._choices = [_Choice(self, index) for index in range(len(ids))]
        self._completions: list[Completion] = []  # of choices that are streamed to their end
        self._num_generated = 0

    def whole(self, completions: Sequence[Completion]) -> Json:
        """Body of a response that is not streamed; one completion for each choice."""
        choices = [
            choice(self.request.body, index, completion, self.decoder, self.rules)
            for index, completion in enumerate(completions)
        ]
        body = {"object": self._kind, "choices": choices, "usage": self.usage(completions)}
        return self._head | body

    def at_once(self, completion: Completion) -> list[Json]:
        """The chunks of a choice that comes in one piece."""
        index = self._choice_index[completion.request_id]
        delta = Delta(
            completion.request_id,
            completion.text,
            completion.token_ids,
            completion.logprobs,
            completion,
        )
        return _Choice(self, index).chunks(delta)

    def begin(self) -> bytes:
        """Nothing comes before the events of the first delta."""
        return b""

    def events_of(self, delta: Delta) -> bytes:
        """The events of a delta."""
        choice = self._choices[self._choice_index[delta.request_id]]
        if choice.is_plain(delta) and not self.request.counts_on:
            return choice.events(delta)
        return b"".join(map(event, self.bodies_of(delta)))

    def end(self) -> bytes:
        """The event that has the counts of tokens alone, where it is asked for, and `[DONE]`."""
        if not self.request.include_usage:
            return _DONE
        return event(self.body([], self.stream_usage())) + _DONE

    def fail(self, error: EngineStopped | RequestFailed) -> bytes:
        """The event of an answer of which there is no more."""
        return event(failure(error).body)

    def bodies_of(self, delta: Delta) -> list[Json]:
        """The bodies of a delta's events."""
        return [self.body([chunk], self._counts_so_far()) for chunk in self.chunks_of(delta)]

    def chunks_of(self, delta: Delta) -> list[Json]:
        """What a choice gains with a delta, as one chunk for each part."""
        if delta.completion:
            self._completions.append(delta.completion)
        self._num_generated += len(delta.token_ids)
        return self._choices[self._choice_index[delta.request_id]].chunks(delta)

    def stream_usage(self) -> Json:
        """Token counts of a stream that has ended."""
        order = self._choice_index
        return self.usage(sorted(self._completions, key=lambda done: order[done.request_id]))

    def body(self, choices: list[Json], counts: Json | None) -> Json:
        """The body of an event."""
        body = self._head | {"object": self._chunk_kind, "choices": choices}
        if self.request.include_usage:
            body["usage"] = counts
        return body

    def _counts_so_far(self) -> Json | None:
        if not self.request.counts_on:
            return None
        prompts = self.request.requests[:: self.request.num_choices]
        return counts_of(sum(len(item.prompt_ids) for item in prompts), self._num_generated)

    def usage(self, completions: Sequence[Completion]) -> Json:
        """Token counts; a prompt counts once, whatever the number of its choices."""
        firsts = completions[:: self.request.num_choices]
        num_prompt_tokens = sum(completion.num_prompt_tokens for completion in firsts)
        num_cached_tokens = sum(completion.num_cached_tokens for completion in firsts)
        counts = usage(num_prompt_tokens, completions)
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
        return with_thoughts(counts, completions, self.rules, self.decoder)


def failure(error: EngineStopped | RequestFailed) -> ApiError:
    """What a client is told of an answer that does not come."""
    if isinstance(error, EngineStopped):
        return try_later(503, error.message, "engine_stopped")
    return ApiError(500, error.message, "request_failed")
