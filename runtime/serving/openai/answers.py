"""Completions of the engine -> the parts of OpenAI's answers: choices, logprobs and usage."""

from __future__ import annotations

from bisect import bisect_left
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any, Protocol

from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.chat_format import MAX_TAG_TOKENS, THINK_BEGIN, THINK_END, ChatFormat
from tokenspeed_plan.runtime.request import Completion, TokenLogprobs
from tokenspeed_plan.runtime.serving.chat.answer_parser import AnswerParser, AnswerRules
from tokenspeed_plan.runtime.serving.chat.answer_parts import ParsedAnswer, ToolCall, assembled
from tokenspeed_plan.runtime.serving.openai.bodies import ChatBody, CompletionBody
from tokenspeed_plan.runtime.serving.openai.chat_fields import schemas_of
from tokenspeed_plan.runtime.streaming import Decoder

Json = dict[str, Any]


class ChatDecoder(Decoder, Protocol):
    """The half of a tokenizer that makes the text of chats."""

    @property
    def chat_format(self) -> ChatFormat:
        """What the chat template knows."""

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens spelled out."""


def usage(num_prompt_tokens: int, completions: Sequence[Completion]) -> Json:
    """Numbers of prompt tokens and generated tokens, and their sum."""
    generated = sum(len(completion.token_ids) for completion in completions)
    return counts_of(num_prompt_tokens, generated)


def thought_tokens(
    completion: Completion, rules: AnswerRules | None, decoder: Decoder
) -> int | None:
    """How many tokens of an answer are a thought, up to the tag at its end; None if none can be."""
    if rules is None or not rules.format.thinks:
        return None
    if not rules.is_thinking and not completion.text.lstrip().startswith(THINK_BEGIN):
        return 0
    ids = list(completion.token_ids)
    if THINK_END not in completion.text:
        return len(ids)
    return 1 + bisect_left(
        range(len(ids)), True, key=lambda last: THINK_END in decoder.decode(ids[: last + 1])
    )


def with_thoughts(
    counts: Json, completions: Sequence[Completion], rules: AnswerRules | None, decoder: Decoder
) -> Json:
    """Counts of tokens, and of those that are thoughts."""
    found = [thought_tokens(completion, rules, decoder) for completion in completions]
    known = [number for number in found if number is not None]
    if not known:
        return counts
    return counts | {"completion_tokens_details": {"reasoning_tokens": sum(known)}}


def counts_of(num_prompt_tokens: int, num_generated: int) -> Json:
    """Numbers of tokens as OpenAI names them."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
    }


def answer_rules(
    body: CompletionBody | ChatBody, prompt_ids: Sequence[int], tokenizer: ChatDecoder
) -> AnswerRules | None:
    """How the answers of a body are read; None where all of their text is for the user."""
    if not isinstance(body, ChatBody):
        return None
    format = tokenizer.chat_format
    schemas = None
    if body.callable_tools and format.calls:
        schemas = schemas_of(body.callable_tools)
    if schemas is None and not format.thinks:
        return None
    is_thinking = format.thinks and ends_in_thought(prompt_ids, tokenizer)
    return AnswerRules(format, is_thinking, schemas, body.parallel_tool_calls is not False)


def ends_in_thought(prompt_ids: Sequence[int], tokenizer: ChatDecoder) -> bool:
    """Whether a prompt opens a thought that the answer goes on with."""
    end = tokenizer.spell(prompt_ids[-MAX_TAG_TOKENS:])
    return end.rstrip().endswith(THINK_BEGIN)


def choice(
    body: CompletionBody | ChatBody,
    index: int,
    completion: Completion,
    decoder: Decoder,
    rules: AnswerRules | None = None,
) -> Json:
    """One choice of an answer. `token_ids` is ours; it comes on request."""
    result: Json = {
        "index": index,
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    if rules is not None:
        answer = parsed_answer(completion, rules)
        result["message"] = parsed_message(answer, completion.request_id)
        result["finish_reason"] = finish_reason(completion, bool(answer.calls))
    elif isinstance(body, ChatBody):
        result["message"] = {"role": "assistant", "content": completion.text}
    else:
        result["text"] = completion.text
    if completion.logprobs:
        offsets = TextOffsets(decoder)
        result["logprobs"] = logprobs_of(body, completion.logprobs, decoder, offsets)
    if isinstance(body, CompletionBody) and body.echo:
        _echo(result, body, completion, decoder)
    if body.return_token_ids:
        result["token_ids"] = list(completion.token_ids)
    return result


def _echo(result: Json, body: CompletionBody, completion: Completion, decoder: Decoder) -> None:
    """Put the prompt before a completion; nothing comes before its first token."""
    ids = completion.prompt_ids
    result["text"] = decoder.decode(list(ids)) + completion.text
    if body.logprobs is None:
        return
    offsets = TextOffsets(decoder)
    first = {
        "tokens": [_text_name(ids[0], decoder)],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [offsets.pass_token(ids[0])],
    }
    others = (*completion.prompt_logprobs, *completion.logprobs)
    found = logprobs_of(body, others, decoder, offsets)
    result["logprobs"] = {name: first[name] + values for name, values in found.items()}


def parsed_answer(completion: Completion, rules: AnswerRules) -> ParsedAnswer:
    """What a finished answer says."""
    parser = AnswerParser(rules)
    parts = parser.push(completion.text)
    return assembled([*parts, *parser.finish(is_cut(completion))])


def is_cut(completion: Completion) -> bool:
    """Whether an answer did not end by itself."""
    return completion.finish_reason != "stop"


def finish_reason(completion: Completion, has_calls: bool) -> str:
    """Why an answer ended, in OpenAI's words."""
    if has_calls and not is_cut(completion):
        return "tool_calls"
    return completion.finish_reason


def parsed_message(answer: ParsedAnswer, request_id: str) -> Json:
    """The message of an answer. Its text is null where it has none but thoughts or calls."""
    message: Json = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            call_entry(request_id, number, call) for number, call in enumerate(answer.calls)
        ]
    if len(message) > 2:
        message["content"] = answer.content or None
    return message


def call_entry(request_id: str, number: int, call: ToolCall) -> Json:
    """A call of a tool. The same call of the same request has the same id."""
    digest = sha256(f"{request_id}:{number}")[:24]
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{digest}", "type": "function", "function": function}


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
