"""Completions of the engine -> the parts of OpenAI's answers: choices, logprobs and usage."""

from __future__ import annotations

from codecs import getincrementaldecoder
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
        offsets = TextOffsets(decoder)
        result["logprobs"] = logprobs_of(body, completion.logprobs, decoder, offsets)
    if body.return_token_ids:
        result["token_ids"] = list(completion.token_ids)
    return result


class TextOffsets:
    """Where the tokens of an answer begin in its text, in characters."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._characters = getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def pass_token(self, token_id: int) -> int:
        """The number of whole characters before a token, which is the next one."""
        offset = self._num_chars
        if not self._decoder.is_special(token_id):
            data = self._decoder.token_bytes(token_id)
            self._num_chars += len(self._characters.decode(data))
        return offset


def logprobs_of(
    body: CompletionBody | ChatBody,
    logprobs: Sequence[TokenLogprobs],
    decoder: Decoder,
    offsets: TextOffsets,
) -> Json:
    """Log probabilities in the form of the body's endpoint.

    `offsets` has passed the tokens of the answer before these.
    """
    if isinstance(body, ChatBody):
        return _chat_logprobs(logprobs, decoder)
    return {
        "tokens": [_text_name(item.token_id, decoder) for item in logprobs],
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [_top_by_text(item, decoder) for item in logprobs],
        "text_offset": [offsets.pass_token(item.token_id) for item in logprobs],
    }


def _top_by_text(item: TokenLogprobs, decoder: Decoder) -> Json:
    """Logprob of each likely token by its text; of two tokens with one text, the likelier one's."""
    return {_text_name(token, decoder): value for token, value in reversed(item.top)}


def _chat_logprobs(logprobs: Sequence[TokenLogprobs], decoder: Decoder) -> Json:
    content = []
    for item in logprobs:
        entry = _chat_token(item.token_id, item.logprob, decoder)
        entry["top_logprobs"] = [_chat_token(*pair, decoder) for pair in item.top]
        content.append(entry)
    return {"content": content}


def _chat_token(token_id: int, logprob: float, decoder: Decoder) -> Json:
    data = decoder.token_bytes(token_id)
    name = _name(token_id, data, "")
    return {"token": name, "logprob": logprob, "bytes": list(data) or None}


def _text_name(token_id: int, decoder: Decoder) -> str:
    return _name(token_id, decoder.token_bytes(token_id), "bytes:")


def _name(token_id: int, data: bytes, prefix: str) -> str:
    """A token as text; a part of a character as its bytes, as OpenAI spells them."""
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{value:02x}" for value in data)
