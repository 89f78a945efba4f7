"""What a request may ask for: bounded before the engine, by the same rules at both doors."""

from __future__ import annotations

import ast
import json
from typing import Any, Literal

import pytest
import torch
from batch_fake import LIMITS, FakeTokenizer
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values
from pydantic import ValidationError

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.request import Request, SamplingParams
from tokenspeed_plan.runtime.request_check import check_request
from tokenspeed_plan.runtime.serving.batch.lines import custom_id_of, encode_line, error_line
from tokenspeed_plan.runtime.serving.batch.lines import parse_row as parse_line
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError
from tokenspeed_plan.runtime.serving.http.parsing import parse
from tokenspeed_plan.runtime.serving.openai.bodies import (
    MAX_FIELDS,
    ChatBody,
    CompletionBody,
    InvalidRequestError,
    parse_body,
)
from tokenspeed_plan.runtime.serving.openai.conversion import check_body, to_requests
from tokenspeed_plan.runtime.serving.openai.no_ops import NO_OPS
from tokenspeed_plan.runtime.stop_strings import StopMatcher
from tokenspeed_plan.runtime.streaming import StopSearch
from tokenspeed_plan.runtime.tokenizer import Tokenizer

COMPLETIONS: Literal["/v1/completions"] = "/v1/completions"
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "q"}]
NAMES = [*CompletionBody.model_fields, *ChatBody.model_fields, *NO_OPS, "custom_id", "sed"]
HARD = st.sampled_from(
    [
        *(
            sign * (1 << bits) + more
            for bits in (7, 31, 32, 63, 64)
            for sign in (1, -1)
            for more in (0, -1)
        ),
        *(1e-320, 1e-45, 1e38, 1.7e308, -0.0, 10**30),
        *("\ud83d", "\udc00x", "x" * 2000, "", "fake", "é", None, True, [], {}, [[]]),
        *([1 << 31], [255], [256], [[1]] * 9, ["\ud800"], ["a"] * 5, {"\ud800": 1}, ["a", "b"]),
    ]
)


def packs(request: Request) -> bool:
    """Whether a request fits the tensors that a step is fed with."""
    p = request.params
    floats = torch.tensor([p.temperature, p.top_p], dtype=torch.float32)
    torch.tensor([p.top_k, *p.stop_token_ids, *request.prompt_ids], dtype=torch.int32)
    torch.tensor([(p.seed + (1 << 63)) % (1 << 64) - (1 << 63)], dtype=torch.int64)
    "".join(p.stop).encode()
    return bool(floats.isfinite().all())


def at_both_doors(url: Any, body: dict[str, Any]) -> tuple[list[Request], str]:
    """The requests that the server makes of a body, or why it makes none; a batch does the same."""
    raw = json.dumps(body)
    line = f'{{"custom_id": "c", "method": "POST", "url": "{url}", "body": {raw}}}'
    served, refused = list[Request](), ""
    try:
        served = list(parse(raw.encode(), url, "fake", FakeTokenizer(), LIMITS).requests)
    except ApiError as error:
        json.dumps(error.body).encode("ascii")
        refused = str(error)
        refused.encode()
    try:
        row = parse_line(line.encode(), 1, "d")
        check_body(row.body, FakeTokenizer(), LIMITS)
        rows = list(to_requests(row.body, row.key, FakeTokenizer(), LIMITS))
    except InvalidRequestError as error:
        encode_line(error_line("c", 1, "invalid_request", str(error))).decode("ascii")
        assert refused, f"only a batch refuses: {error}"
        return [], refused
    assert not refused, f"only the server refuses: {refused}"
    assert [r.prompt_ids for r in rows] == [r.prompt_ids for r in served]
    return rows, ""


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), HARD | json_values(), max_size=3),
    chat=st.booleans(),
)
def test_what_passes_fits_the_engine_and_both_doors_agree(
    fields: dict[str, Any], chat: bool
) -> None:
    base: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "a"}
    if fields.get("stream") is True:
        del fields["stream"]  # batches do not stream
    if fields.get("stream") is not None or fields.get("stream_options"):
        fields.pop("stream_options", None)
    requests, _ = at_both_doors(CHAT if chat else COMPLETIONS, base | {"max_tokens": 2} | fields)
    for request in requests:
        check_request(request, LIMITS.vocab_size, LIMITS.max_seq_len)
        assert packs(request)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(SamplingParams.__dataclass_fields__)),
    value=HARD | json_values(),
)
def test_nothing_that_python_sends_reaches_a_tensor_that_cannot_hold_it(
    name: str, value: Any
) -> None:
    value = tuple(value) if isinstance(value, list) else value
    request = Request("r", (1,), SamplingParams(**{name: value}))
    try:
        check_request(request, LIMITS.vocab_size, LIMITS.max_seq_len)
    except RequestError as error:
        str(error).encode("ascii")
    else:
        assert packs(request)


@pytest.mark.parametrize("ids", [(1.5,), ("a",), (1 << 64,), (256,), (-1,)])
def test_prompts_of_what_are_no_token_ids(ids: Any) -> None:
    with pytest.raises(RequestError):
        check_request(Request("r", ids), 256, 64)


@pytest.mark.parametrize("name", NO_OPS)
def test_what_says_nothing_is_accepted(name: str) -> None:
    """As if it was not there; and any other value is refused by its name."""
    for url, base in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})):
        without = parse_body(url, base)
        for value in (*NO_OPS[name], None):
            assert parse_body(url, base | {name: value}) == without
        if name not in type(without).model_fields:
            with pytest.raises(InvalidRequestError, match=name) as caught:
                parse_body(url, base | {name: 0.25})
            assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"best_of": 3, "n": 3}, True),
        ({"best_of": 3, "n": 2}, False),
        ({"logit_bias": {"5": 0, "6": 0.0}}, True),
        ({"logit_bias": {"5": 0, "6": 1}}, False),
        ({"presence_penalty": False}, False),
        ({"min_p": 0.1}, False),
        ({"stop": [None]}, False),
        ({"prompt": [[1, 2], [3]], "n": 2}, True),
        ({"model": "fake"}, True),
        ({"model": "gpt-5"}, False),
        ({"model": ""}, False),
    ],
)
def test_fields_that_decide(fields: dict[str, Any], accepted: bool) -> None:
    _, refused = at_both_doors(COMPLETIONS, {"prompt": "a"} | fields)
    assert (refused == "") == accepted


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stop": list("abcde")}, "`stop`: list should have at most 4 items"),
        ({"stop": ["a", 1]}, "`stop[1]`: input should be a valid string"),
        ({"stop": 1}, "`stop`: input should be a string or a list of strings"),
        ({"prompt": [-1]}, "`prompt[0]`: input should be greater than or equal to 0"),
        ({"prompt": ["a", 1]}, "`prompt[1]`: input should be a valid string"),
        ({"prompt": [[1], [1, "a"]]}, "`prompt[1][1]`: input should be a valid integer"),
        ({"prompt": {}}, "`prompt`: input should be a string, token ids, or a list of these"),
        ({"top_p": 2}, "`top_p`: input should be less than or equal to 1"),
    ],
)
def test_an_error_is_about_the_form_that_was_meant(fields: dict[str, Any], says: str) -> None:
    _, refused = at_both_doors(COMPLETIONS, {"prompt": "a"} | fields)
    assert refused.startswith(says)


class CountingTokenizer(FakeTokenizer):
    """Counts the characters that it is given; `width` of them make a token."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.seen = 0

    def encode(self, text: str) -> list[int]:
        self.seen += len(text)
        return [1] * -(-len(text) // self.width)


@pytest.mark.parametrize("width", [1, 5, 16])
def test_a_long_text_is_not_tokenised_to_be_refused(width: int) -> None:
    tokenizer = CountingTokenizer(width)
    body = parse_body(COMPLETIONS, {"prompt": "é" * 2_000_000, "max_tokens": 1})
    with pytest.raises(InvalidRequestError, match=r"over .* tokens in the first .* characters"):
        to_requests(body, "0", tokenizer, LIMITS)
    assert tokenizer.seen < 8 * width * (LIMITS.max_seq_len + 64)
    fits = parse_body(COMPLETIONS, {"prompt": "é" * (width * 60), "max_tokens": 1})
    (request,) = to_requests(fits, "0", CountingTokenizer(width), LIMITS)
    assert len(request.prompt_ids) == 60


LINES = st.dictionaries(st.text(max_size=3) | st.just("body"), json_values(), max_size=3)


WRONG_ENTRIES = (-1, 1 << 31, "\ud800", None, 1.5, [], {}, [-1])


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
@pytest.mark.parametrize(
    ("model", "field", "first"),
    [
        (CompletionBody, "prompt", 1),
        (CompletionBody, "prompt", "a"),
        (CompletionBody, "prompt", [1]),
        (CompletionBody, "stop_token_ids", 1),
        (CompletionBody, "stop", "a"),
        (ChatBody, "messages", {"role": "user", "content": "a"}),
    ],
)
def test_the_first_wrong_entry_will_do(model: Any, field: str, first: Any, wrong: Any) -> None:
    """Words about each of millions would take a minute and gigabytes."""
    for entries in ([first, *[wrong] * 2000], [first, [wrong] * 2000], [wrong] * 2000):
        body = {"prompt": "a", field: entries}
        if model is ChatBody:
            body.pop("prompt")
        try:
            model.model_validate(body)
        except ValidationError as error:
            assert error.error_count() < 10


def test_a_line_has_a_bounded_number_of_fields() -> None:
    many = {f"x{number}": 1 for number in range(MAX_FIELDS + 1)}
    with pytest.raises(InvalidRequestError, match=f"has {MAX_FIELDS + 2} fields, the most is"):
        parse_body("/v1/completions", {"prompt": "a"} | many)
    with pytest.raises(InvalidRequestError, match=f"has {MAX_FIELDS + 1} fields, the most is"):
        parse_line(json.dumps(many).encode(), 1, "")


@settings(max_examples=100, deadline=None)
@given(
    line=LINES, name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), data=st.data()
)
def test_a_refused_line_keeps_its_name(line: dict[str, Any], name: str, data: Any) -> None:
    """Wherever it stands, and wherever the line is broken after it."""
    items = list(line.items())
    items.insert(data.draw(st.integers(0, len(items))), ("custom_id", name))
    raw = json.dumps(dict(items)).encode()
    assert custom_id_of(raw) == name
    whole = json.dumps(dict(items[: 1 + [key for key, _ in items].index("custom_id")]))[
        :-1
    ].encode()
    assert custom_id_of(whole + data.draw(st.binary(max_size=9))) in (name, None)
    assert custom_id_of(whole + b', "body": {"prompt": "a') == name


def test_names_that_cannot_be_read() -> None:
    for raw in (
        b"",
        b"[]",
        b'{"custom_id": 5}',
        b'{"body": {"custom_id": "x"}',
        b"\xff",
        b"[" * 10**5,
    ):
        assert custom_id_of(raw) is None
    assert custom_id_of(b'{"custom_id": "a\\ud800"}') == "a\\ud800"


LETTERS = st.text("ab", max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    pieces=st.lists(LETTERS, max_size=5),
)
def test_stop_strings_are_found_where_they_end(stops: list[str], pieces: list[str]) -> None:
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        before, text = len(text), text + piece
        ends = range(before + 1, len(text) + 1)
        wanted = any(text[:end].endswith(stop) for end in ends for stop in stops)
        assert matcher.push(piece) == wanted
        begun = [n for n in range(1, len(text) + 1) for s in stops if s.startswith(text[-n:])]
        assert matcher.num_begun == max(begun, default=0)


DEMO = Tokenizer.load(ROOT / "examples/demo/model")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), data=st.data())
def test_a_stop_string_is_found_in_the_token_that_completes_it(text: str, data: Any) -> None:
    ids = DEMO.encode(text)
    text = DEMO.decode(ids)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    search = StopSearch(DEMO, (stop,))
    found = [n for n, token in enumerate(ids, 1) if search.push(token)]
    wanted = [n for n in range(1, len(ids) + 1) if stop in DEMO.decode(ids[:n])]
    assert found[:1] == wanted[:1] or "\ufffd" in text


def test_no_json_that_is_written_may_hold_nan() -> None:
    """`NaN` is no JSON: readers refuse the file, or the whole line."""
    for folder in ("runtime", "planner"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "json.dumps":
                    assert "allow_nan=False" in ast.unparse(node), f"{path}:{node.lineno}"
