"""Completions -> lines of an OpenAI batch output file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenspeed_plan.runtime.request import Completion, TokenLogprobs
from tokenspeed_plan.runtime.serving.openai.requests import ChatBody, CompletionBody, Row, Tokenizer

Json = dict[str, Any]


def answer_line(
    row: Row, completions: Sequence[Completion], tokenizer: Tokenizer, model: str
) -> Json:
    """The line of a row that was answered; one completion for each choice.

    It holds no clock: a row answered twice gives the same bytes, so `created` is 0.
    """
    is_chat = isinstance(row.body, ChatBody)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row.key.removeprefix('batch_req_')}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": row.body.model or model,
        "choices": [
            choice(row.body, index, completion, tokenizer)
            for index, completion in enumerate(completions)
        ],
        "usage": usage(completions[0].num_prompt_tokens, completions),
    }
    response = {
        "status_code": 200,
        "request_id": row.key.replace("batch_req_", "req_"),
        "body": body,
    }
    return {"id": row.key, "custom_id": row.custom_id, "response": response, "error": None}


def error_line(custom_id: str | None, line: int, code: str, message: str) -> Json:
    """The line of a row that was refused or failed."""
    error = {"code": code, "message": message, "line": line}
    return {
        "id": f"batch_req_line_{line}",
        "custom_id": custom_id,
        "response": None,
        "error": error,
    }


def usage(num_prompt_tokens: int, completions: Sequence[Completion]) -> Json:
    """Tokens in and out."""
    generated = sum(len(completion.token_ids) for completion in completions)
    total = num_prompt_tokens + generated
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": total,
    }


def choice(
    body: CompletionBody | ChatBody, index: int, completion: Completion, tokenizer: Tokenizer
) -> Json:
    """One of the answers to a row."""
    made: Json = {"index": index, "finish_reason": completion.finish_reason}
    if isinstance(body, ChatBody):
        made["message"] = {"role": "assistant", "content": completion.text}
        made["logprobs"] = (
            chat_logprobs(completion.logprobs, tokenizer) if completion.logprobs else None
        )
    else:
        made["text"] = completion.text
        made["logprobs"] = (
            text_logprobs(completion.logprobs, tokenizer) if completion.logprobs else None
        )
    if body.return_token_ids:
        made["token_ids"] = list(completion.token_ids)
    return made


def text_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer, at: int = 0) -> Json:
    """As completions have them; `at` is where the first token stands in the text."""
    tokens = [tokenizer.decode([item.token_id]) for item in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [
            {tokenizer.decode([token]): value for token, value in reversed(item.top)}
            for item in logprobs
        ],
        "text_offset": offsets,
    }


def chat_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> Json:
    """As chats have them."""

    def entry(token: int, value: float) -> Json:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {
        "content": [
            entry(item.token_id, item.logprob)
            | {"top_logprobs": [entry(*pair) for pair in item.top]}
            for item in logprobs
        ]
    }
