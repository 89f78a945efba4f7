"""The bytes of a stream: ready parts say what whole bodies say, and HTTP's parts are h11's.

And the bodies with which evaluations and load generators ask for them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import h11
import pytest
from chat_fuzzing import tokenizer_of
from chat_models import in_tags, tool
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from uvicorn import Config
from uvicorn.server import ServerState

from tokenspeed_plan.runtime.request import Completion, NewToken, TokenLogprobs
from tokenspeed_plan.runtime.serving.async_engine import Stream
from tokenspeed_plan.runtime.serving.events import event
from tokenspeed_plan.runtime.serving.http.connections import CONNECTION, Connection, Wire
from tokenspeed_plan.runtime.serving.http.dialects import (
    Dialect,
    MessagesDialect,
    OwnDialect,
    ResponsesDialect,
)
from tokenspeed_plan.runtime.serving.http.event_stream import event_stream, streamed
from tokenspeed_plan.runtime.serving.http.parsing import parse
from tokenspeed_plan.runtime.serving.http.responses import Answer
from tokenspeed_plan.runtime.serving.openai.bodies import Url
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
from tokenspeed_plan.runtime.streaming import AnswerText, Delta

NAME = "\0"  # as a text that is left open is written
LIMITS = RequestLimits(1000, 16, 2048)
TEXT: Url = "/v1/completions"
CHAT: Url = "/v1/chat/completions"
SAID = f'A "quoted"\0 \\ é 👍\n</think>\n\nsays.\n{in_tags("look", {"at": "<b>"})}'
ASKED = [{"role": "user", "content": "x"}]
TOOLS = [tool("look", {"at": {"type": "string"}})]
COUNTS = {"stream_options": {"include_usage": True}}
ALL_COUNTS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
BODIES: list[tuple[Url, str, dict[str, Any]]] = [
    (TEXT, "plain", {"prompt": ["a", "b"], "n": 2}),
    (TEXT, "plain", {"prompt": "a", "logprobs": 1, "return_token_ids": True}),
    (TEXT, "plain", {"prompt": "a"} | COUNTS),
    (CHAT, "plain", {}),
    (CHAT, "tags", {}),
    (CHAT, "tags", {"tools": TOOLS}),
    (CHAT, "tags", COUNTS),
    (CHAT, "json", ALL_COUNTS),
]


def answers_of(url: Url, template: str, asked: dict[str, Any]) -> tuple[Answer, Answer]:
    """Two writers of one answer."""
    tokenizer = tokenizer_of(template)
    body = {"stream": True} | asked
    if url == CHAT:
        body["messages"] = ASKED
    parsed = parse(json.dumps(body).encode(), url, "m", tokenizer, LIMITS)
    return Answer(parsed, tokenizer, NAME, 1), Answer(parsed, tokenizer, NAME, 1)


def deltas_of(answer: Answer, cuts: Sequence[int]) -> list[Delta]:
    """What each choice gains, in turns; one token a cut."""
    places = [0, *sorted(cuts), len(SAID)]
    made = []
    for begin, end in pairwise(places):
        for request in answer.request.requests:
            logprobs: tuple[TokenLogprobs, ...] = ()
            if request.params.num_logprobs is not None:
                logprobs = (TokenLogprobs(65, -0.5, ((65, -0.5),)),)
            made.append(Delta(request.request_id, SAID[begin:end], (65,), logprobs))
    ids = (65,) * (len(cuts) + 2)
    for request in answer.request.requests:
        done = Completion(request.request_id, ids, SAID, "stop", 3, 0.0, 0.0)
        made.append(Delta(request.request_id, "", (65,), (), done))
    return made


async def each(deltas: Sequence[Delta]) -> AsyncIterator[Delta]:
    for delta in deltas:
        yield delta


@pytest.mark.parametrize("body", BODIES, ids=str)
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, len(SAID)), max_size=12))
def test_events_are_the_bodies(body: tuple[Url, str, dict[str, Any]], cuts: list[int]) -> None:
    """Whatever is written ahead of its text: the same bytes as each body by itself."""

    async def both() -> tuple[bytes, bytes]:
        one, other = answers_of(*body)
        deltas = deltas_of(one, cuts)
        written = b"".join([part async for part in event_stream(one, each(deltas))])
        bodies = [event(item) for delta in deltas for item in other.bodies_of(delta)]
        return written, b"".join(bodies) + other.end()

    written, wanted = asyncio.run(both())
    assert written == wanted


def requested(wire: h11.Connection, method: str, version: str) -> None:
    wire.receive_data(f"{method} / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    while not isinstance(wire.next_event(), h11.EndOfMessage):
        pass


@given(
    parts=st.lists(st.binary(max_size=40), max_size=4),
    method=st.sampled_from(("GET", "HEAD")),
    version=st.sampled_from(("1.1", "1.0")),
    has_length=st.booleans(),
)
@settings(deadline=None)
def test_parts_of_a_body_are_those_of_h11(
    parts: list[bytes], method: str, version: str, has_length: bool
) -> None:
    """Also in the next answer of a connection; a HEAD has no body, HTTP 1.0 no chunks."""
    size = sum(map(len, parts))
    headers = [("content-length", str(size))] if has_length else [("x", "y")]
    if method == "HEAD":
        parts = [b"" for _ in parts]
    said = []
    for wire in (Wire(h11.SERVER), h11.Connection(h11.SERVER)):
        data = b""
        for _ in range(2):
            requested(wire, method, version)
            data += wire.send(h11.Response(status_code=200, headers=headers)) or b""
            for part in parts:
                data += wire.send(h11.Data(data=part)) or b""
            data += wire.send(h11.EndOfMessage()) or b""
            if wire.our_state is not h11.DONE:
                break
            wire.start_next_cycle()
        said.append(data)
    assert said[0] == said[1]


def test_a_part_of_a_chunked_body_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(h11.SERVER)
    requested(wire, "GET", "1.1")
    wire.send(h11.Response(status_code=200, headers=[]))

    def refuse(*_: Any) -> None:
        raise AssertionError("h11 is asked")

    monkeypatch.setattr(h11.Connection, "send", refuse)
    assert wire.send(h11.Data(data=b"hello")) == b"5\r\nhello\r\n"


class Written(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: Any) -> None:
        self.data += data

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        pass


def connected(app: Any, version: str = "1.1") -> tuple[Connection, Written]:
    """A connection on which a request has come, and what is written to it."""
    config = Config(app, http=Connection, lifespan="off", log_level="error")
    config.load()
    connection, written = Connection(config, ServerState(), {}), Written()
    connection.connection_made(written)
    connection.data_received(f"GET / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    return connection, written


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_connection_writes_while_its_answer_goes_on(version: str) -> None:
    """Neither before nor after, nor to a client that reads too slowly; HTTP 1.0 has no parts."""
    said: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = scope["extensions"][CONNECTION]

        def write(data: bytes) -> None:
            said.append(connection.write_part(lambda: data))

        write(b"no")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        write(b"1")
        await send({"type": "http.response.body", "body": b"2", "more_body": True})
        connection.pause_writing()
        write(b"no")
        connection.resume_writing()
        write(b"")
        write(b"3")
        await send({"type": "http.response.body", "body": b""})
        write(b"no")

    async def serve() -> bytes:
        connection, written = connected(app, version)
        await asyncio.gather(*connection.tasks)
        connection._unset_keepalive_if_required()
        return written.data

    head, _, body = asyncio.run(serve()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    if version == "1.1":
        assert said == [False, True, False, True, True, False]
        assert body == b"1\r\n1\r\n1\r\n2\r\n1\r\n3\r\n0\r\n\r\n"
    else:
        assert not any(said) and body == b"2"


class Quiet:
    """An engine whose steps the test makes up."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def cancel(self, *request_ids: str) -> None:
        pass


APIS: list[tuple[Dialect, dict[str, Any]]] = [
    (OwnDialect(TEXT), {"prompt": "x"}),
    (OwnDialect(CHAT), {"messages": ASKED}),
    (ResponsesDialect(), {"input": "x"}),
    (MessagesDialect(), {"messages": ASKED, "max_tokens": 30}),
]


@pytest.mark.parametrize(("dialect", "asked"), APIS, ids=lambda value: type(value).__name__)
def test_a_token_is_written_before_the_loop_turns(dialect: Dialect, asked: dict[str, Any]) -> None:
    """In all APIs, so that a token wakes no task; all parts are what one task would write."""
    tokenizer = tokenizer_of("plain")
    body = json.dumps({"stream": True} | asked).encode()
    parsed = parse(body, dialect.url, "m", tokenizer, LIMITS, dialect.fields)
    (request,) = parsed.requests
    ids = tokenizer.encode("def add(a, b): return a", add_special_tokens=False)
    done = Completion(request.request_id, tuple(ids), tokenizer.decode(ids), "stop", 3, 0.0, 0.0)
    stream = Stream(Quiet(tokenizer), parsed.requests)  # type: ignore[arg-type]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        writer = dialect.writer(Answer(parsed, tokenizer, NAME, 1))
        await streamed(Request(scope, receive), stream, writer)(scope, receive, send)

    async def serve() -> bytes:
        connection, written = connected(app)
        for token in ids[:-1]:
            for _ in range(20):  # the response's task waits for a token after these
                await asyncio.sleep(0)
            before = len(written.data)
            stream.put(NewToken(request.request_id, token))
            stream.tell()
            assert len(written.data) > before
        stream.put(done)
        stream.tell()
        await asyncio.gather(*connection.tasks)
        connection._unset_keepalive_if_required()
        return written.data

    async def written_by_a_task() -> bytes:
        writer = dialect.writer(Answer(parsed, tokenizer, NAME, 1))
        text = AnswerText(request, tokenizer)
        deltas = [text.push([NewToken(request.request_id, token)]) for token in ids[:-1]]
        parts = event_stream(writer, each([*deltas, text.finish(done)]))
        return b"".join([part async for part in parts])

    _, _, chunks = asyncio.run(serve()).partition(b"\r\n\r\n")
    assert joined(chunks) == asyncio.run(written_by_a_task())


def joined(chunks: bytes) -> bytes:
    """The body that comes in chunks."""
    body = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        body, chunks = body + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize("place", ["begin", "events_of", "end"])
def test_events_that_cannot_be_made_are_an_error_of_their_answer(place: str) -> None:
    """The client is told so, in the words of its API; nothing is raised into the server."""
    for dialect, asked in APIS:
        tokenizer = tokenizer_of("plain")
        body = json.dumps({"stream": True} | asked).encode()
        parsed = parse(body, dialect.url, "m", tokenizer, LIMITS, dialect.fields)
        writer = dialect.writer(Answer(parsed, tokenizer, NAME, 1))

        def fail(*_: Any) -> bytes:
            raise KeyError("no events")

        setattr(writer, place, fail)
        deltas = each([Delta(parsed.requests[0].request_id, "a", (65,))])
        parts = event_stream(writer, deltas)
        said = asyncio.run(gathered(parts))
        assert b"KeyError: 'no events'" in said[-1] and b"error" in said[-1]


async def gathered(parts: AsyncIterator[bytes]) -> list[bytes]:
    return [part async for part in parts]


LOADS: list[tuple[str, Url, dict[str, Any]]] = [
    (
        "lm-eval",
        TEXT,
        {"prompt": [[1, 2, 3], [4, 5]], "temperature": 0, "max_tokens": 1, "logprobs": 1}
        | {"seed": 1234, "echo": True},
    ),
    (
        "guidellm",
        TEXT,
        {"prompt": "1 3 m0", "max_tokens": 24, "stop": None, "ignore_eos": True, "stream": True}
        | ALL_COUNTS,
    ),
    (
        "guidellm-chat",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 1 m0"}]}]}
        | {"max_completion_tokens": 24, "stop": None, "ignore_eos": True, "stream": True}
        | ALL_COUNTS,
    ),
    (
        "guidellm-responses",
        CHAT,
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "1 2 m0"}]}]}
        | {"max_output_tokens": 24, "stop": None, "ignore_eos": True, "stream": True},
    ),
    (
        "vllm",
        TEXT,
        {"prompt": "a b", "repetition_penalty": 1.0, "max_tokens": 24, "logprobs": None}
        | {"stream": True, "ignore_eos": True}
        | COUNTS,
    ),
]


@pytest.mark.parametrize(("name", "url", "body"), LOADS, ids=[load[0] for load in LOADS])
def test_what_evaluations_and_load_generators_send(
    name: str, url: Url, body: dict[str, Any]
) -> None:
    """Bodies as they come from them; each has as many tokens as it says."""
    dialect = ResponsesDialect() if "input" in body else OwnDialect(url)
    raw = json.dumps({"model": "m"} | body).encode()
    found = parse(raw, url, "m", tokenizer_of("plain"), LIMITS, dialect.fields)
    most = 1 if name == "lm-eval" else 24
    assert {request.params.max_tokens for request in found.requests} == {most}
    assert found.stream == ("stream" in body)
    if name == "lm-eval":
        assert [request.params.prompt_logprobs for request in found.requests] == [1, 1]
