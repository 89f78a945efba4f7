"""`tokenspeed serve` on the demo model, with OpenAI's client and with hostile clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_values import json_values
from server_load import load
from serving import KEY, Server, good_server, serving

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.serving.http import listen

BUNDLE = ROOT / "plans/frozen/demo-cpu"
MODEL = ROOT / "examples/demo/model"
PROMPT = "def fibonacci(n):\n"
MESSAGES: list[Any] = [{"role": "user", "content": "Write a function that reads a file."}]
ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--model-name", "demo", "--max-body-bytes", 1 << 20)
    with good_server(BUNDLE, tmp_path_factory.mktemp("server"), *options) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(BUNDLE, chat=ChatTemplate.load(MODEL))


def answer(engine: Engine, prompt: str, **params: Any) -> Any:
    """The engine's answer without a server."""
    assert engine.tokenizer
    return engine.generate([engine.tokenizer.encode(prompt)], SamplingParams(**params))[0]


def chat_prompt(engine: Engine) -> str:
    assert engine.tokenizer
    return engine.tokenizer.render_chat(MESSAGES)


def is_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == ERROR and error["message"] and (code is None or error["code"] == code), (
        error
    )
    return dict(error)


def test_completions_are_the_engines(client: openai.OpenAI, engine: Engine) -> None:
    wanted = answer(engine, PROMPT, max_tokens=30)
    done = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=30, temperature=0, user="anybody"
    )
    assert (done.choices[0].text, done.choices[0].finish_reason) == (
        wanted.text,
        wanted.finish_reason,
    )
    assert done.usage and done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": wanted.num_prompt_tokens,
        "completion_tokens": 30,
        "total_tokens": wanted.num_prompt_tokens + 30,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert (done.object, done.model, done.id[:5]) == ("text_completion", "demo", "cmpl-")
    assert abs(done.created - time.time()) < 60


def test_a_streamed_completion_is_the_same(client: openai.OpenAI, engine: Engine) -> None:
    wanted = answer(engine, PROMPT, max_tokens=30)
    create, options = client.completions.create, {"include_usage": True}
    chunks = list(
        create(
            model="demo",
            prompt=PROMPT,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options=options,
        )
    )  # type: ignore[call-overload]
    *text, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in text) == wanted.text
    assert [chunk.choices[0].finish_reason for chunk in text] == [None] * (len(text) - 1) + [
        "length"
    ]
    assert len(text) > 10 and len({chunk.id for chunk in chunks}) == 1
    assert usage.choices == [] and usage.usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in text)


def test_chats_are_the_engines(client: openai.OpenAI, engine: Engine) -> None:
    wanted = answer(engine, chat_prompt(engine), max_tokens=40)
    create = client.chat.completions.create
    done = create(model="demo", messages=MESSAGES, max_completion_tokens=40, temperature=0)
    message = done.choices[0].message
    assert (message.role, message.content, done.choices[0].finish_reason) == (
        "assistant",
        wanted.text,
        "length",
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    chunks = list(create(model="demo", messages=parts, max_tokens=40, temperature=0, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == wanted.text
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (
        len(chunks) - 1
    )
    assert (
        chunks[-1].choices[0].finish_reason == "length"
        and chunks[0].object == "chat.completion.chunk"
    )


def test_seeds_and_choices(client: openai.OpenAI, engine: Engine) -> None:
    """Choice `i` of a seed is the engine's answer to seed + i; without one, answers differ."""
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 1.2,
        "top_p": 0.95,
    }
    wanted = [
        answer(engine, PROMPT, max_tokens=12, temperature=1.2, top_p=0.95, seed=seed).text
        for seed in (7, 8, 9)
    ]
    done = client.completions.create(**body, n=3, seed=7)
    assert [(choice.index, choice.text) for choice in done.choices] == list(enumerate(wanted))
    assert done.usage and done.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in client.completions.create(**body, n=3, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == wanted
    assert len({client.completions.create(**body).choices[0].text for _ in range(3)}) == 3


def test_several_prompts(client: openai.OpenAI, engine: Engine) -> None:
    prompts = [PROMPT, "import os\n"]
    done = client.completions.create(model="demo", prompt=prompts, max_tokens=8, temperature=0, n=2)
    wanted = [answer(engine, prompt, max_tokens=8) for prompt in prompts]
    assert [choice.text for choice in done.choices] == [
        item.text for item in wanted for _ in range(2)
    ]
    assert done.usage and done.usage.prompt_tokens == sum(item.num_prompt_tokens for item in wanted)
    assert engine.tokenizer
    ids = client.completions.create(
        model="demo", prompt=engine.tokenizer.encode(PROMPT), max_tokens=8, temperature=0
    )
    assert ids.choices[0].text == wanted[0].text


def test_stop_strings(client: openai.OpenAI, engine: Engine) -> None:
    full = answer(engine, PROMPT, max_tokens=30).text
    stop = full[12:15]
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": 30,
        "temperature": 0,
        "stop": [stop, "~"],
    }
    done = client.completions.create(**body).choices[0]
    assert (done.text, done.finish_reason) == (full[: full.index(stop)], "stop")
    chunks = list(client.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI, engine: Engine) -> None:
    wanted = answer(engine, PROMPT, max_tokens=6, num_logprobs=2)
    values = pytest.approx([item.logprob for item in wanted.logprobs], abs=1e-4)
    tops = [pytest.approx([value for _, value in item.top], abs=1e-4) for item in wanted.logprobs]
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 2,
    }
    found = client.completions.create(**body).choices[0].logprobs
    assert (
        found
        and found.token_logprobs == values
        and found.tokens
        and "".join(found.tokens) == wanted.text
    )
    assert (
        found.top_logprobs
        and [sorted(top.values(), reverse=True) for top in found.top_logprobs] == tops
    )
    streamed = [
        chunk.choices[0].logprobs for chunk in client.completions.create(**body, stream=True)
    ]
    assert [value for item in streamed if item for value in item.token_logprobs or ()] == values
    assert [
        offset for item in streamed if item for offset in item.text_offset or ()
    ] == found.text_offset
    chat = answer(engine, chat_prompt(engine), max_tokens=6, num_logprobs=2)
    talked: dict[str, Any] = {
        "model": "demo",
        "messages": MESSAGES,
        "max_tokens": 6,
        "temperature": 0,
    }
    chunks = client.chat.completions.create(**talked, logprobs=True, top_logprobs=2, stream=True)
    content = [item for chunk in chunks for item in (chunk.choices[0].logprobs.content or [])]
    assert [item.logprob for item in content] == pytest.approx(
        [item.logprob for item in chat.logprobs], abs=1e-4
    )
    assert "".join(item.token for item in content) == chat.text and all(
        len(i.top_logprobs) == 2 for i in content
    )


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("demo", "model") and client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/5")


def test_many_clients_at_once_get_what_one_gets(client: openai.OpenAI, engine: Engine) -> None:
    prompts = [f"def f{index}(" for index in range(32)]
    with ThreadPoolExecutor(32) as pool:
        texts = list(
            pool.map(
                lambda prompt: (
                    client.completions.create(
                        model="demo", prompt=prompt, max_tokens=10, temperature=0
                    )
                    .choices[0]
                    .text
                ),
                prompts,
            )
        )
    assert engine.tokenizer
    wanted = engine.generate(map(engine.tokenizer.encode, prompts), SamplingParams(max_tokens=10))
    assert texts == [done.text for done in wanted]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "model"),
        ({"prompt": "x " * 4000}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 10**6}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"top_k": 1 << 40}, 400, "invalid_value", "top_k"),
        ({"n": 129}, 400, "invalid_value", "n"),
        ({"n": 128, "prompt": ["a", "b", "c"]}, 400, None, "n"),
        ({"stop": ["a"] * 5}, 400, "invalid_value", "stop"),
        ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
        ({"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
        ({"best_of": 2}, 400, "unsupported_parameter", "best_of"),
        ({"presence_penalty": 0.5}, 400, "unsupported_parameter", "presence_penalty"),
        ({"logit_bias": {"50256": -100}}, 400, "unsupported_parameter", "logit_bias"),
        ({"tools": [{}]}, 400, "unsupported_parameter", "tools"),
        ({"sed": 1}, 400, "unsupported_parameter", "sed"),
        ({"stream": "yes"}, 400, "invalid_value", "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_use": True}},
            400,
            "invalid_value",
            "stream_options",
        ),
        ({"prompt": None}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": ""}, 400, None, None),
        ({"prompt": []}, 400, None, None),
        ({"prompt": [10**9]}, 400, "invalid_value", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_value", "prompt"),
        ({"model": "\ud800"}, 400, "invalid_value", "model"),
        ({"stop": "\ud83d"}, 400, "invalid_value", "stop"),
        ({"user": "\ud83d"}, 400, "invalid_value", "user"),
        ({"stop_token_ids": [1 << 31]}, 400, "invalid_value", "stop_token_ids"),
        ({"stop_token_ids": [10**6]}, 400, "invalid_value", "stop_token_ids"),
        ({"prompt": [[1]] * 60_000, "n": 128}, 400, "invalid_value", "prompt"),
        ({"prompt": [[1]] * 2000, "n": 128}, 400, "invalid_value", "n"),
        ({"prompt": "a " * 400_000}, 400, "context_length_exceeded", "prompt"),
    ],
    ids=str,
)
def test_bad_bodies(
    change: dict[str, Any], status: int, code: str | None, param: str | None, server: Server
) -> None:
    body = {"model": "demo", "prompt": "a", "max_tokens": 2} | change
    for stream in (None, True):
        raw = json.dumps({"stream": stream} | body if "stream_options" not in change else body)
        error = is_error(server.http.post("/v1/completions", content=raw), status)
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error",
            code,
            param,
        )


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url"}]},
        {"content": "x"},
        {"role": "user", "content": 1},
        7,
    ],
)
def test_bad_messages(message: Any, server: Server) -> None:
    is_error(
        server.http.post("/v1/chat/completions", json={"messages": [message]}), 400, "invalid_value"
    )


def test_what_null_asks_for(server: Server) -> None:
    """Some clients send every field that they know."""
    body = {
        "prompt": "a",
        "max_tokens": 1,
        "stop": None,
        "logit_bias": None,
        "stream": None,
        "presence_penalty": 0.0,
    }
    assert server.http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 99_999, b"1" * 9999]
)
def test_what_is_no_json(raw: bytes, server: Server) -> None:
    error = is_error(server.http.post("/v1/completions", content=raw), 400)
    assert "the body " in error["message"] or "NaN" in error["message"]


def test_who_has_not_the_key(server: Server) -> None:
    for headers in (
        {},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": KEY},
        {"Authorization": "Bearer é"},
    ):
        with httpx.Client(base_url=server.url) as stranger:
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            found = stranger.post("/v1/completions", content=b"x" * (2 << 20), headers=raw)
            is_error(found, 401, "invalid_api_key")
            is_error(stranger.get("/v1/models", headers=raw), 401)
            assert stranger.get("/health").json() == {"status": "ok"}
            assert stranger.get("/metrics").status_code == 200


def test_routes_and_sizes(server: Server) -> None:
    is_error(server.http.get("/v1/nothing"), 404, "unknown_url")
    is_error(server.http.get("/docs"), 404)
    is_error(server.http.post("/v1/completions/", json={}), 404)
    assert is_error(server.http.get("/v1/completions"), 405, "method_not_allowed")
    assert server.http.get("/v1/completions").headers["allow"] == "POST"
    is_error(server.http.post("/v1/completions", content=b"x" * (1 << 20)), 400)
    is_error(
        server.http.post("/v1/completions", content=b"x" * ((1 << 20) + 1)),
        413,
        "request_too_large",
    )
    chunked = (b"x" * 65536 for _ in range(20))
    is_error(server.http.post("/v1/completions", content=chunked), 413, "request_too_large")


def test_a_body_that_says_that_it_is_too_large_is_not_waited_for(server: Server) -> None:
    """It takes no room from others, and its connection serves the next request."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    size = 2 << 20
    length = f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=10) as client:
        client.sendall((head + length).encode())
        assert status_of(client) == 413
        client.sendall(b"x" * size + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(client) == 200


def status_of(client: socket.socket) -> int:
    """Read a whole answer."""
    response = http.client.HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


FIELDS = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "stop_token_ids",
        "ignore_eos",
        "return_token_ids",
        "user",
        "metadata",
        "max_tokens",
        "max_completion_tokens",
        "presence_penalty",
        "frequency_penalty",
        "echo",
        "best_of",
        "tools",
        "logit_bias",
    ]
)
LIKELY = st.sampled_from(
    [0, 1, 2, -1, 1.0, 0.5, True, False, "a", "", "demo", ["a"], [[1, 2]], [1], {}, 2**63, -(2**63)]
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.dictionaries(FIELDS, LIKELY | json_values(), max_size=4),
    cut=st.integers(0, 400),
    chat=st.booleans(),
)
def test_any_body_is_answered_or_refused_in_order(
    fields: Any, cut: int, chat: bool, server: Server
) -> None:
    base: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "a"}
    raw = json.dumps(base | {"max_tokens": 2} | fields)[: cut or None].encode()
    found = server.http.post("/v1/chat/completions" if chat else "/v1/completions", content=raw)
    if found.status_code == 200:
        assert found.text.endswith("data: [DONE]\n\n") or found.json()["choices"]
        assert "error" not in found.text[:20]
    else:
        assert is_error(found, found.status_code)["type"] == "invalid_request_error"
        assert found.status_code in (400, 404)


def test_a_client_that_leaves_is_cancelled(server: Server) -> None:
    before = server.metric("requests_cancelled_total")
    body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "n": 4}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        chunks = response.iter_bytes()
        assert next(chunks)
        assert server.metric("requests_in_flight") == 4
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=0.05)
    assert not any(server.wait_until_idle().values())
    assert server.metric("requests_cancelled_total") == before + 8


def test_a_client_that_never_reads_holds_up_nobody(server: Server) -> None:
    """Its answer waits in the server's memory, and the engine serves others."""
    body = json.dumps(
        {
            "prompt": "a",
            "max_tokens": 1200,
            "ignore_eos": True,
            "stream": True,
            "n": 8,
            "logprobs": 20,
        }
    )
    fields = (
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        f"Content-Length: {len(body)}",
    )
    head = "\r\n".join((*fields, "", ""))
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        lazy.sendall((head + body).encode())
        while server.metric("requests_running") < 8:
            pass
        done = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4})
        assert done.status_code == 200
    assert not any(server.wait_until_idle().values())


@pytest.mark.slow
def test_sixty_four_clients_that_misbehave(server: Server) -> None:
    tally = asyncio.run(load(server.url, KEY, seconds=4, clients=64))
    assert not tally.faults, tally.faults[:5]
    assert len(tally.seen) == 8 and tally.seen["read_a_stream"] > 20


def test_metrics_count(server: Server) -> None:
    names = (
        "generated_tokens_total",
        "prompt_tokens_total",
        "requests_finished_total",
        "time_to_first_token_seconds_count",
    )
    before = [server.metric(name) for name in names]
    server.http.post(
        "/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "n": 2}
    )
    assert [server.metric(name) - was for name, was in zip(names, before, strict=True)] == [
        10,
        6,
        2,
        2,
    ]
    assert server.metric("state_slots") > 32 and server.metric("kv_pages") == 1296
    text = server.http.get("/metrics").text
    assert 'tokenspeed_http_responses_total{path="/v1/completions",status="200"}' in text
    assert len(set(re.findall(r'path="([^"]*)"', text))) <= 7, "clients cannot make names"
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = re.findall(r"^# TYPE tokenspeed_(\w+) ", text, re.MULTILINE)
    known = [name for name in named if not name.endswith("_created")]
    assert [name for name in known if f"`{name}`" not in page] == []


def ask(server: Server, **body: Any) -> httpx.Response:
    return server.http.post(
        "/v1/completions", json={"prompt": "a", "temperature": 0, "ignore_eos": True} | body
    )


def until(server: Server, name: str, least: float) -> None:
    end = time.monotonic() + 20
    while server.metric(name) < least:
        assert time.monotonic() < end, f"{name} stays below {least}"


@pytest.mark.parametrize("how", [pytest.param("answers", marks=pytest.mark.slow), "bound"])
def test_sigterm_finishes_what_runs_and_takes_no_more(how: str, tmp_path: Path) -> None:
    drain = 30 if how == "answers" else 0.3
    with (
        serving(BUNDLE, tmp_path, "--drain", drain, "--max-requests", 6) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        tokens = 300 if how == "answers" else 1200
        whole = [pool.submit(ask, server, max_tokens=tokens, n=2) for _ in range(2)]
        parts = pool.submit(lambda: ask(server, max_tokens=tokens, stream=True).text)
        until(server, "requests_running", 5)
        full = ask(server, max_tokens=1, n=2)
        is_error(full, 429, "rate_limit_exceeded")
        assert (
            full.headers["retry-after"] == "1"
            and full.json()["error"]["type"] == "rate_limit_error"
        )
        server.signal()
        while server.http.get("/health").status_code == 200:
            pass
        refused = ask(server, max_tokens=1)
        is_error(refused, 503, "shutting_down")
        assert refused.headers["retry-after"] == "1"
        found = [item.result() for item in whole]
        if how == "answers":
            assert all(len(item.json()["choices"]) == 2 for item in found)
            assert (
                parts.result().endswith("data: [DONE]\n\n")
                and '"finish_reason":"length"' in parts.result()
            )
        else:
            assert [is_error(item, 503, "engine_stopped")["type"] for item in found] == [
                "server_error"
            ] * 2
            *_, last = parts.result().strip().split("\n\n")
            assert set(json.loads(last.removeprefix("data: "))["error"]) == ERROR
        assert server.wait() == 0
        assert server.text().count("\n") == 1, server.text()


def test_an_address_that_is_taken_and_one_that_is_not(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(RequestError, match=rf"cannot listen on 127.0.0.1:{port}: "):
        listen("127.0.0.1", port)
    with listen("127.0.0.1", 0) as found:
        assert found.proto == socket.IPPROTO_TCP, (
            "else asyncio lets Nagle's algorithm hold each event back for 40 ms"
        )


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with serving(BUNDLE, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(ask, server, max_tokens=1200)
        until(server, "requests_running", 1)
        server.signal(signal.SIGINT)
        while server.http.get("/health").status_code == 200:
            pass
        server.signal(signal.SIGINT)
        assert server.wait(5) == 0
        is_error(pending.result(), 503)


def test_a_body_that_does_not_come(tmp_path: Path) -> None:
    with serving(BUNDLE, tmp_path, "--body-timeout", 0.2) as server:
        slow: Sequence[bytes] = [b'{"prompt": ', b'"a"}']

        def body() -> Iterator[bytes]:
            yield slow[0]
            time.sleep(0.6)
            yield slow[1]

        is_error(server.http.post("/v1/completions", content=body()), 408, "request_timeout")
        assert not any(server.wait_until_idle().values())
