"""Completions of the engine -> the parts of OpenAI's answers: choices, logprobs and usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenspeed_plan.runtime.request import Completion, TokenLogprobs
from tokenspeed_plan.runtime.serving.openai.bodies import ChatBody, CompletionBody
from tokenspeed_plan.runtime.streaming import Decoder

Json = dict[str, Any]


def usage(num_prompt_tokens: int, completions: Sequence[Completion]) -> Json:
    """Numbers of prompt tokens and generated tokens, and their sum."""
    generated = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": num_prompt_tokens + generated,
    }


def choice(
    body: CompletionBody | ChatBody, index: int, completion: Completion, decoder: Decoder
) -> Json:
    """One choice of an answer. `token_ids` is ours; it comes on request."""
    result: Json = {
        "index": index,
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    if isinstance(body, ChatBody):
        result["message"] = {"role": "assistant", "content": completion.text}
    else:
        result["text"] = completion.text
    if completion.logprobs:
        result["logprobs"] = logprobs_of(body, completion.logprobs, decoder)
    if body.return_token_ids:
        result["token_ids"] = list(completion.token_ids)
    return result


def logprobs_of(
    body: CompletionBody | ChatBody,
    logprobs: Sequence[TokenLogprobs],
    decoder: Decoder,
    text_offset: int = 0,
) -> Json:
    """Log probabilities in the form of the body's endpoint.

    `text_offset` is the number of characters of the answer before the first of these tokens.
    """
    if isinstance(body, ChatBody):
        return _chat_logprobs(logprobs, decoder)
    return _text_logprobs(logprobs, decoder, text_offset)


def _text_logprobs(logprobs: Sequence[TokenLogprobs], decoder: Decoder, text_offset: int) -> Json:
    tokens = [decoder.decode([item.token_id]) for item in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [_top_by_text(item, decoder) for item in logprobs],
        "text_offset": offsets,
    }


def _top_by_text(item: TokenLogprobs, decoder: Decoder) -> Json:
    """Logprob of each likely token by its text; of two tokens with one text, the likelier one's."""
    return {decoder.decode([token]): value for token, value in reversed(item.top)}


def _chat_logprobs(logprobs: Sequence[TokenLogprobs], decoder: Decoder) -> Json:
    content = []
    for item in logprobs:
        entry = _chat_token(item.token_id, item.logprob, decoder)
        entry["top_logprobs"] = [_chat_token(*pair, decoder) for pair in item.top]
        content.append(entry)
    return {"content": content}


def _chat_token(token_id: int, logprob: float, decoder: Decoder) -> Json:
    text = decoder.decode([token_id])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
