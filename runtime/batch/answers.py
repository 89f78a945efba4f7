"""Completions -> lines of an OpenAI batch output file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenspeed_plan.runtime.batch.rows import ChatBody, Codec, Row
from tokenspeed_plan.runtime.request import Completion, TokenLogprobs

Json = dict[str, Any]


def answer_line(row: Row, completions: Sequence[Completion], codec: Codec, model: str) -> Json:
    """The line of a row that was answered; one completion for each choice.

    It holds no clock: a row answered twice gives the same bytes, so `created` is 0.
    """
    is_chat = isinstance(row.body, ChatBody)
    choices = [_choice(row, index, completion, codec) for index, completion in enumerate(completions)]
    prompt = completions[0].num_prompt_tokens
    generated = sum(len(completion.token_ids) for completion in completions)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row.key.removeprefix('batch_req_')}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": row.body.model or model,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }
    response = {"status_code": 200, "request_id": row.key.replace("batch_req_", "req_"), "body": body}
    return {"id": row.key, "custom_id": row.custom_id, "response": response, "error": None}


def error_line(custom_id: str | None, line: int, code: str, message: str) -> Json:
    """The line of a row that was refused or failed."""
    error = {"code": code, "message": message, "line": line}
    return {"id": f"batch_req_line_{line}", "custom_id": custom_id, "response": None, "error": error}


def _choice(row: Row, index: int, completion: Completion, codec: Codec) -> Json:
    choice: Json = {"index": index, "finish_reason": completion.finish_reason}
    if isinstance(row.body, ChatBody):
        choice["message"] = {"role": "assistant", "content": completion.text}
        choice["logprobs"] = _chat_logprobs(completion.logprobs, codec) if completion.logprobs else None
    else:
        choice["text"] = completion.text
        choice["logprobs"] = _text_logprobs(completion.logprobs, codec) if completion.logprobs else None
    if row.body.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return choice


def _text_logprobs(logprobs: Sequence[TokenLogprobs], codec: Codec) -> Json:
    tokens = [codec.decode([item.token_id]) for item in logprobs]
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [{codec.decode([token]): value for token, value in reversed(item.top)} for item in logprobs],
        "text_offset": offsets,
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprobs], codec: Codec) -> Json:
    def entry(token: int, value: float) -> Json:
        text = codec.decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {
        "content": [
            entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*pair) for pair in item.top]}
            for item in logprobs
        ]
    }
