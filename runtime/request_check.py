"""What a request may ask for: one function bounds every field of it before it is queued.

The server, the batch runner and the canary all come through here. What passes fits the tensors that
a step is fed with and the work that a token may cost, so that no request can raise in the engine.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

from tokenspeed_plan.plans.errors import PlanError, RequestError
from tokenspeed_plan.plans.ops import MAX_BIASED
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.request import Request, SamplingParams

# Every token looks for every stop string, and every step sorts the stop ids.
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_INT32 = (1 << 31) - 1
# Far from the largest fp32: what is divided by it or by its inverse is still a number.
MAX_TEMPERATURE = 1e6
MIN_REPETITION, MAX_REPETITION = 0.01, 100.0
MAX_BIAS = 100.0  # OpenAI's


class FieldError(RequestError):
    """A request that cannot be served.

    Attributes:
        field: the one at fault, as `Request` and `SamplingParams` name it.
    """

    def __init__(self, field: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.field = field


def check_request(request: Request, vocab_size: int, max_seq_len: int) -> None:
    """Refuse what cannot be served.

    Args:
        request: nothing of it is trusted, not even its types.
        vocab_size: token ids are below this.
        max_seq_len: prompt and generated tokens of one sequence.

    Raises:
        RequestError: the prompt is empty, has ids that the model does not have, or is longer than
            the plan serves; or a parameter means nothing.
    """
    if not request.prompt_ids:
        raise FieldError(
            "prompt_ids",
            f"request `{ascii_text(str(request.request_id))}` has an empty prompt",
            "give at least one token",
        )
    check_params(request.params, vocab_size)
    check_length(request, max_seq_len)
    check_token_ids("prompt_ids", request.prompt_ids, vocab_size)


def check_operators(request: Request, plan: Plan) -> None:
    """Refuse what a plan has no operators for.

    Raises:
        RequestError: names what the plan would need.
    """
    if request.grammar is not None and not plan.takes_grammars:
        raise RequestError("the plan takes no grammars", "plan with `serving.grammar: true`")
    changes = request.params.penalises or request.params.min_p
    if changes and not plan.takes_penalties:
        raise RequestError("the plan takes no penalties", "plan with `serving.penalties: true`")


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Refuse what no kernel could carry out, and what would cost too much.

    Raises:
        RequestError: a value has the wrong type or is out of its range.
    """
    _check_integer("max_tokens", params.max_tokens, 1, MAX_INT32)
    _check_integer("top_k", params.top_k, 0, MAX_INT32)
    _check_integer("seed", params.seed, -(1 << 63), (1 << 64) - 1)
    _check_integer("num_logprobs", params.num_logprobs or 0, 0, vocab_size)
    _check_integer("prompt_logprobs", params.prompt_logprobs or 0, 0, vocab_size)
    _check_number("temperature", params.temperature, 0, MAX_TEMPERATURE)
    _check_number("top_p", params.top_p, 0, 1)
    if params.top_p == 0:
        raise FieldError("top_p", f"top_p is {params.top_p}", "it must be above 0 and up to 1")
    _check_number("presence_penalty", params.presence_penalty, -2, 2)
    _check_number("frequency_penalty", params.frequency_penalty, -2, 2)
    _check_number("repetition_penalty", params.repetition_penalty, MIN_REPETITION, MAX_REPETITION)
    _check_number("min_p", params.min_p, 0, 1)
    _check_bias(params.logit_bias, vocab_size)
    _check_stops(params.stop)
    _check_count("stop_token_ids", params.stop_token_ids, MAX_STOP_IDS)
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)


def check_token_ids(field: str, token_ids: Seq[int], vocab_size: int) -> None:
    """Refuse ids that the model does not have.

    Raises:
        RequestError: one of them is no integer, or not in the vocabulary.
    """
    hint = "use the model's own tokenizer"
    try:
        ids = array("q", token_ids)
    except (TypeError, OverflowError) as error:
        raise FieldError(field, f"{field} are no token ids: {error}", hint) from None
    if not ids:
        return
    worst = max(ids)
    if min(ids) < 0:
        worst = min(ids)
    if not 0 <= worst < vocab_size:
        raise FieldError(
            field, f"token id {worst} is not in the vocabulary of {vocab_size} ({field})", hint
        )


def stop_ids_of(plan: Plan) -> tuple[int, ...]:
    """The tokens that end an answer of a plan's model.

    Raises:
        PlanError: there are too many, or the model does not have one of them.
    """
    ids = plan.model.eos_token_ids
    try:
        _check_count("eos_token_id", ids, MAX_STOP_IDS)
        check_token_ids("eos_token_id", ids, plan.model.vocab_size)
    except FieldError as error:
        raise PlanError(error.message, "mend the model's config, and plan again") from None
    return ids


def ascii_text(text: str) -> str:
    """The text as one line of ASCII, so that it can be written anywhere."""
    return text.encode("unicode_escape").decode()


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: it holds no half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_length(request: Request, max_seq_len: int) -> None:
    """Refuse what is longer than a plan serves.

    Raises:
        RequestError: prompt and answer together are.
    """
    length, max_tokens = len(request.prompt_ids), request.params.max_tokens
    if length + max_tokens > max_seq_len:
        raise FieldError(
            "prompt_ids",
            f"{length} prompt tokens and {max_tokens} new ones are over the plan's limit of "
            f"{max_seq_len} (max_seq_len)",
            "plan for longer conversations: raise `workload` in the spec",
        )


def _check_integer(name: str, value: object, lowest: int, highest: int) -> None:
    wanted = f"it must be an integer from {lowest} to {highest}"
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise FieldError(name, f"{name} is {_shown(value)}", wanted)


def _check_number(name: str, value: object, lowest: float, highest: float) -> None:
    """A number that is not finite is in no range."""
    wanted = f"it must be a number from {lowest} to {highest:g}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # type: ignore[operator]
        raise FieldError(name, f"{name} is {_shown(value)}", wanted)


def _shown(value: object) -> str:
    """A value in an error. Python refuses to write an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return ascii_text(f"{value!r:.60}")


def _check_count(name: str, values: object, most: int) -> None:
    if not isinstance(values, tuple):
        raise FieldError(name, f"{name} is {type(values).__name__}", "give a tuple")
    if len(values) > most:
        raise FieldError(name, f"{name} has {len(values)} entries", f"give at most {most}")


def _check_bias(bias: Seq[tuple[int, float]], vocab_size: int) -> None:
    """A token has one bias at most."""
    _check_count("logit_bias", bias, MAX_BIASED)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in bias):
        raise FieldError("logit_bias", "logit_bias has what is no pair", "give (token id, bias)")
    ids = [token for token, _ in bias]
    check_token_ids("logit_bias", ids, vocab_size)
    if len(set(ids)) < len(ids):
        raise FieldError("logit_bias", "logit_bias names a token twice", "name it once")
    for _, value in bias:
        _check_number("logit_bias", value, -MAX_BIAS, MAX_BIAS)


def _check_stops(stops: Seq[object]) -> None:
    _check_count("stop", stops, MAX_STOPS)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise FieldError("stop", "a stop string is empty or no string", "leave it out")
        if len(stop) > MAX_STOP_CHARS:
            raise FieldError(
                "stop",
                f"a stop string has {len(stop)} characters",
                f"give at most {MAX_STOP_CHARS}",
            )
        if not is_unicode(stop):
            raise FieldError(
                "stop",
                f"the stop string `{ascii_text(stop):.60}` is not Unicode text",
                "it holds half of a surrogate pair: give the whole character",
            )
