"""Bodies of OpenAI requests -> requests of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tokenspeed_plan.plans.chat_format import MAX_TAG_TOKENS, Chat, ChatFormat
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.grammars.matcher import Grammar
from tokenspeed_plan.runtime.request import Request, SamplingParams
from tokenspeed_plan.runtime.request_check import FieldError, ascii_text, check_request
from tokenspeed_plan.runtime.serving.chat.known_turns import KnownTurns
from tokenspeed_plan.runtime.serving.openai.answer_form import Grammars, grammar_of
from tokenspeed_plan.runtime.serving.openai.bodies import (
    MODEL_NOT_FOUND,
    UNSUPPORTED,
    ChatBody,
    CompletionBody,
    InvalidRequestError,
    invalid,
    unsupported,
)
from tokenspeed_plan.runtime.serving.openai.chat_fields import (
    template_messages,
    template_variables,
)

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
ANY_PROMPT = (0,)
PENALTY_FIELDS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_p",
    "logit_bias",
)
# How a body names the fields of a request.
FIELD_NAMES = {"prompt_ids": "prompt", "num_logprobs": "logprobs"}
# Few texts that a plan can serve have more characters for each token than this.
CHARS_PER_TOKEN = 4
CUT_TOKENS = 64


class Encoder(Protocol):
    """The half of a tokenizer that makes token ids, and of these a text that shows them all."""

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens spelled out."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that a prompt begins or ends with."""

    def most_tokens(self, text: str) -> int | None:
        """More tokens a text does not have; None where only its tokens would tell."""

    @property
    def chat_format(self) -> ChatFormat:
        """What the chat template knows."""

    def render_chats(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        """Each chat as one prompt, or why there is none."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of a plan that a request is checked against, in tokens.

    `default_max_tokens` is used where a completion has no `max_tokens`: what is no chat may go on
    for ever. `model` is the name that a request may give; None takes every name. With
    `caps_max_tokens` a `max_tokens` beyond the room that is left means all of it. `grammars`
    compiles the forms of answers; None where the plan takes none. `takes_penalties` says whether
    penalties, biases and `min_p` are served. `turns` has the tokens of earlier turns of chats.
    """

    max_seq_len: int
    default_max_tokens: int
    vocab_size: int
    model: str | None = None
    caps_max_tokens: bool = False
    grammars: Grammars | None = None
    takes_penalties: bool = False
    turns: KnownTurns | None = None


class _Rendered:
    """A tokenizer that has rendered the chat of one body."""

    def __init__(self, tokenizer: Encoder, outcome: str | RequestError) -> None:
        self.chat_format = tokenizer.chat_format
        self.encode = tokenizer.encode
        self.most_tokens = tokenizer.most_tokens
        self.spell = tokenizer.spell
        self._outcome = outcome

    def render_chats(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        """What came of it."""
        return [self._outcome for _ in chats]


def check_bodies(
    bodies: Sequence[CompletionBody | ChatBody], tokenizer: Encoder, limits: RequestLimits
) -> Iterator[InvalidRequestError | None]:
    """What `check_body` raises for each body; their chats are rendered together."""
    chats: dict[int, Chat] = {}
    for number, body in enumerate(bodies):
        if isinstance(body, ChatBody):
            with suppress(InvalidRequestError):  # it is raised again below
                chats[number] = chat_of(body, tokenizer.chat_format)
    texts = dict(zip(chats, tokenizer.render_chats([*chats.values()]), strict=True))
    for number, body in enumerate(bodies):
        own = tokenizer
        if number in texts:
            own = _Rendered(tokenizer, texts[number])
        try:
            check_body(body, own, limits)
        except InvalidRequestError as error:
            yield error
        else:
            yield None


def check_body(body: CompletionBody | ChatBody, tokenizer: Encoder, limits: RequestLimits) -> None:
    """Raise what `to_requests` would raise, without tokenising where the byte count is enough.

    Raises:
        InvalidRequestError: see `to_requests`.
    """
    if asks_no_form(body):
        check_model(body.model, limits)
        prompt = _prompt_or_refuse(body, tokenizer)
        room = limits.max_seq_len - (wanted_tokens(body) or 1)
        if isinstance(prompt, str) and prompt and has_room(prompt, room, tokenizer):
            _request(body, "0", ANY_PROMPT, limits)
            return
    to_requests(body, "0", tokenizer, limits)


def has_room(text: str, room: int, tokenizer: Encoder) -> bool:
    """Whether a text has at most so many tokens, as far as that is known without making them."""
    most = tokenizer.most_tokens(text)
    return most is not None and most <= room


def asks_no_form(body: CompletionBody | ChatBody) -> bool:
    """Whether its one prompt is all that has to be looked at."""
    if body.response_format is not None:
        return False
    if isinstance(body, ChatBody):
        return body.tools is None and body.tool_choice is None
    return isinstance(body.prompt, str)


def wanted_tokens(body: CompletionBody | ChatBody) -> int | None:
    """The body's limit of an answer."""
    if isinstance(body, ChatBody):
        return body.max_completion_tokens or body.max_tokens
    return body.max_tokens


def to_requests(
    body: CompletionBody | ChatBody, key: str, tokenizer: Encoder, limits: RequestLimits
) -> tuple[Request, ...]:
    """Requests named `<key>:<number>`: the body's `n` choices of each prompt, prompt after prompt.

    `key` ends in hexadecimal digits. Without a `seed` in the body they seed the first choice; each
    further choice adds one. A `seed` of the body seeds the first choice of each prompt.

    Raises:
        InvalidRequestError: a prompt is empty, too long or malformed; the model is another one; or
            the engine refuses it.
    """
    check_model(body.model, limits)
    requests: list[Request] = []
    for part in split_prompts(body):
        ids = tuple(prompt_ids(part, tokenizer, limits))
        first = _request(part, key, ids, limits)
        if isinstance(body, ChatBody) or body.response_format is not None:
            first = replace(first, grammar=_grammar(body, ids, tokenizer, limits))
        seed = first.params.seed
        if body.seed is None:
            seed += len(requests)
        for choice in range(body.n or 1):
            params = replace(first.params, seed=seed + choice)
            name = f"{key}:{len(requests)}"
            requests.append(Request(name, first.prompt_ids, params, first.grammar))
    return tuple(requests)


def _grammar(
    body: CompletionBody | ChatBody, ids: Sequence[int], tokenizer: Encoder, limits: RequestLimits
) -> Grammar | None:
    """What the answers of a prompt may be; None where no form was asked for.

    Raises:
        InvalidRequestError: it cannot be enforced.
    """
    spelled = tokenizer.spell(ids[-MAX_TAG_TOKENS:])
    return grammar_of(body, spelled, tokenizer.chat_format, limits.grammars)


def split_prompts(body: CompletionBody | ChatBody) -> list[CompletionBody | ChatBody]:
    """A body for each prompt of a body."""
    if isinstance(body, ChatBody) or not isinstance(body.prompt, list):
        return [body]
    if not body.prompt or isinstance(body.prompt[0], int):  # one prompt of token ids
        return [body]
    return [body.model_copy(update={"prompt": prompt}) for prompt in body.prompt]


def check_model(asked: str | None, limits: RequestLimits) -> None:
    """Refuse to answer in another model's name.

    Raises:
        InvalidRequestError: the body names a model that is not served.
    """
    if asked not in (None, limits.model) and limits.model is not None:
        name = ascii_text(str(asked))
        raise InvalidRequestError(
            f"the model `{name:.80}` does not exist; `{limits.model}` is served",
            "model",
            MODEL_NOT_FOUND,
        )


def _request(
    body: CompletionBody | ChatBody, key: str, ids: tuple[int, ...], limits: RequestLimits
) -> Request:
    """The first choice of a body.

    Raises:
        InvalidRequestError: the engine would refuse it.
    """
    seed = body.seed
    if seed is None:
        seed = int(key[-15:], 16)
    _refuse_penalties(body, limits)
    params = _sampling_params(body, _max_tokens(body, ids, limits), seed)
    request = Request(f"{key}:0", ids, params)
    try:
        check_request(request, limits.vocab_size, limits.max_seq_len)
    except FieldError as error:
        field = FIELD_NAMES.get(error.field, error.field)
        raise InvalidRequestError(error.message, field, "invalid_value") from None
    return request


def _refuse_penalties(body: CompletionBody | ChatBody, limits: RequestLimits) -> None:
    """Refuse what the plan has no operators for.

    Raises:
        InvalidRequestError: with the first such field.
    """
    for name in PENALTY_FIELDS:
        if getattr(body, name) is not None and not limits.takes_penalties:
            raise unsupported(name, "the plan takes none: plan with `serving.penalties`")


def _max_tokens(
    body: CompletionBody | ChatBody, ids: tuple[int, ...], limits: RequestLimits
) -> int:
    """The most tokens to generate: the body's limit; else a chat may use the room that is left.

    Raises:
        InvalidRequestError: the prompt does not fit the plan.
    """
    if not ids:
        raise InvalidRequestError("the prompt is empty")
    wanted, field, default = wanted_tokens(body), "prompt", limits.default_max_tokens
    if isinstance(body, ChatBody):
        field, default = "messages", limits.max_seq_len
    room = limits.max_seq_len - len(ids)
    if limits.caps_max_tokens and wanted is not None:
        wanted = min(wanted, max(room, 1))
    if room < (wanted or 1):
        raise InvalidRequestError(
            f"{len(ids)} prompt tokens and max_tokens {wanted or 1} are over the plan's limit of "
            f"{limits.max_seq_len} (max_seq_len): {_what_fits(room, limits)}",
            field,
            CONTEXT_LENGTH_EXCEEDED,
        )
    return wanted or min(default, room)


def _what_fits(room: int, limits: RequestLimits) -> str:
    if room > 0:
        return f"max_tokens may be {room}"
    return f"a prompt may have {limits.max_seq_len - 1}"


def prompt_ids(
    body: CompletionBody | ChatBody, tokenizer: Encoder, limits: RequestLimits
) -> list[int]:
    """Token ids of the prompt of a body that has one.

    Raises:
        InvalidRequestError: it is malformed, or much too long.
    """
    prompt = _prompt_or_refuse(body, tokenizer)
    if isinstance(prompt, str):
        return _encode(prompt, isinstance(body, ChatBody), tokenizer, limits)
    return prompt


def _prompt_or_refuse(body: CompletionBody | ChatBody, tokenizer: Encoder) -> str | list[int]:
    """The prompt of a body that has one.

    Raises:
        InvalidRequestError: it is malformed.
    """
    with _as_invalid():
        return _prompt(body, tokenizer)


def _encode(text: str, is_chat: bool, tokenizer: Encoder, limits: RequestLimits) -> list[int]:
    """The token ids of a prompt.

    Raises:
        InvalidRequestError: it is malformed, or much too long.
    """
    with _as_invalid():
        _refuse_long_text(text, tokenizer, limits.max_seq_len)
        if not is_chat:
            return tokenizer.encode(text)
        if limits.turns is not None:
            return limits.turns.encode(text)
        # A chat template writes the special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False)


@contextmanager
def _as_invalid() -> Iterator[None]:
    """What a tokenizer or a chat template refuses, as a fault of the request."""
    try:
        yield
    except RequestError as error:
        raise InvalidRequestError(error.message) from None
    except (UnicodeEncodeError, TypeError) as error:
        raise InvalidRequestError(
            f"the prompt is not Unicode text: {ascii_text(str(error))}"
        ) from None


def _refuse_long_text(text: str, tokenizer: Encoder, max_seq_len: int) -> None:
    """Refuse a text that is too long without making all of its tokens.

    Growing beginnings of it are tokenised, so that the work is bounded by what the plan can serve.
    Where a beginning is cut, a few tokens may be others than those of the whole text.

    Raises:
        InvalidRequestError: a beginning of it has more tokens than the plan serves.
    """
    size = CHARS_PER_TOKEN * max_seq_len + CUT_TOKENS
    while size < len(text):
        num_tokens = len(tokenizer.encode(text[:size]))
        if num_tokens > max_seq_len + CUT_TOKENS:
            raise InvalidRequestError(
                f"the prompt has over {num_tokens - CUT_TOKENS} tokens in the first {size} of its "
                f"{len(text)} characters, the plan's limit is {max_seq_len} (max_seq_len)",
                "prompt",
                CONTEXT_LENGTH_EXCEEDED,
            )
        size *= 2


def _prompt(body: CompletionBody | ChatBody, tokenizer: Encoder) -> str | list[int]:
    """The prompt of a body that has one, as text or as token ids."""
    if isinstance(body, ChatBody):
        return _chat_prompt(body, tokenizer)
    prompt: Any = body.prompt  # of one that was split
    if isinstance(prompt, str):
        return prompt
    return list(prompt)


def _chat_prompt(body: ChatBody, tokenizer: Encoder) -> str:
    """The text of a chat.

    Raises:
        InvalidRequestError: it has tools that its model would not get to see.
    """
    chat = Chat([])  # nobody reads it where the text is there
    if not isinstance(tokenizer, _Rendered):
        chat = chat_of(body, tokenizer.chat_format)
    (outcome,) = tokenizer.render_chats([chat])
    if isinstance(outcome, RequestError):
        raise outcome
    return outcome


def chat_of(body: ChatBody, format: ChatFormat) -> Chat:
    """What a chat template gets of a body.

    Raises:
        InvalidRequestError: it has tools that its model would not get to see.
    """
    if body.callable_tools and format.calls is None:
        raise InvalidRequestError(
            "the model's chat template knows no tools, or no form of calls that is read here: "
            'leave out `tools`, or send `tool_choice: "none"`',
            "tools",
            UNSUPPORTED,
        )
    messages = template_messages(body.messages, format)
    variables = template_variables(body.reasoning_effort, body.chat_template_kwargs)
    return Chat(messages, body.tools, variables)


def _sampling_params(body: CompletionBody | ChatBody, max_tokens: int, seed: int) -> SamplingParams:
    """What a body says about sampling."""
    temperature = body.temperature
    if temperature is None:
        temperature = 1.0  # OpenAI's default
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=body.top_p or 1.0,
        top_k=max(body.top_k or 0, 0),
        seed=seed,
        stop=_stop_strings(body),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=_num_logprobs(body),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        min_p=body.min_p or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}),
        prompt_logprobs=_prompt_logprobs(body),
    )


def _logit_bias(asked: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """The bias of each token; JSON has their ids as strings.

    Raises:
        InvalidRequestError: one is no id.
    """
    if not all(token.isascii() and token.isdecimal() and len(token) < 11 for token in asked):
        raise invalid("logit_bias", "its keys are token ids, as strings")
    return tuple((int(token), bias) for token, bias in asked.items() if bias)


def _stop_strings(body: CompletionBody | ChatBody) -> tuple[str, ...]:
    stop = body.stop or []
    if isinstance(stop, str):
        stop = [stop]
    return tuple(text for text in stop if text)


def _prompt_logprobs(body: CompletionBody | ChatBody) -> int | None:
    """Those of a prompt that comes back with its completion."""
    if isinstance(body, CompletionBody) and body.echo:
        return body.logprobs
    return None


def _num_logprobs(body: CompletionBody | ChatBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.logprobs:
        return body.top_logprobs or 0
    return None
