"""What no client may take from the others: connections, places, time, and a server of its own."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from conftest import ROOT
from serving import KEY, Server, be_command, serving

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.runtime.serving.http.callers import CheckHost
from tokenspeed_plan.runtime.serving.http.health import Progress
from tokenspeed_plan.runtime.serving.http.heap import EVERY_S, HeapTrimmer, trim_heap
from tokenspeed_plan.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # whole processes, or many examples

BUNDLE = ROOT / "plans/frozen/demo-cpu"
BODY = {"prompt": "a", "max_tokens": 2, "temperature": 0}
HALF_HEADER = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
HALF_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{"
)
METRICS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without a key, with short deadlines for all but bodies."""
    options = ("--header-timeout", 0.4, "--write-timeout", 0.4, "--max-requests", 4)
    with serving(BUNDLE, tmp_path_factory.mktemp("server"), *options) as found:
        yield found
        found.signal()
        assert found.wait() == 0
        assert found.text().count("\n") == 1, found.text()


def connect(server: Server, data: bytes) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 20)
    found.sendall(data)
    return found


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def ends(found: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    data = b""
    try:
        while chunk := found.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("begun", [b"", b"G", HALF_HEADER, METRICS + HALF_HEADER])
def test_a_header_that_does_not_come(begun: bytes, server: Server) -> None:
    with connect(server, begun) as slow:
        assert ends(slow).count(b"HTTP/1.1") == begun.count(b"\r\n\r\n")


def test_a_header_that_drips(server: Server) -> None:
    with connect(server, HALF_HEADER) as slow, pytest.raises(OSError):
        for _ in range(1000):
            slow.sendall(b"X: ")
            time.sleep(0.02)


def test_what_follows_a_refusal_has_a_deadline_too(server: Server) -> None:
    """The rest of a body that nobody reads."""
    head = HALF_BODY.replace(b"POST /v1/completions", b"POST /nowhere").replace(b"100", b"1000000")
    with connect(server, head) as slow, pytest.raises(OSError):
        for _ in range(1000):
            slow.sendall(b"x")
            time.sleep(0.02)


def test_a_client_that_never_reads_is_dropped(server: Server) -> None:
    """Its answers do not fit the sockets' buffers, and wait in the server."""
    with connect(server, b"") as lazy:
        lazy.settimeout(20)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                lazy.sendall(METRICS * 100)


def be_small(args: Sequence[str], log: Path) -> None:
    """A server whose sockets hold little."""
    from tokenspeed_plan.runtime.serving import http

    listen = http.listen

    def listen_small(host: str, port: int) -> socket.socket:
        found = listen(host, port)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return found

    http.listen = listen_small
    be_command(args, log)


def test_the_place_of_a_client_that_never_reads_is_given_back(tmp_path: Path) -> None:
    more = {"max_tokens": 100, "n": 4, "logprobs": 20, "stream": True, "ignore_eos": True}
    body = json.dumps(BODY | more).encode()
    head = HALF_BODY.removesuffix(b"{").replace(b"100", b"%d" % len(body))
    with serving(BUNDLE, tmp_path, "--write-timeout", 0.4, main=be_small) as server:
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            lazy.sendall(head + body)
            until(lambda: server.metric("requests_in_flight") == 4)
            assert not any(server.wait_until_idle(60).values())
        assert server.metric("requests_cancelled_total") > 0


def test_bodies_that_do_not_come_hold_no_place(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(12):  # three times the places
            stack.enter_context(connect(server, HALF_BODY))
        until(lambda: server.metric("connections") > 12)
        assert server.metric("requests_in_flight") == 0
        assert server.http.post("/v1/completions", json=BODY).status_code == 200


def test_large_bodies_have_a_bound_together(tmp_path: Path) -> None:
    limit = 1 << 18
    head = HALF_BODY.replace(b"100", b"%d" % limit) + b" " * (limit - 2)
    with serving(BUNDLE, tmp_path, "--max-body-bytes", limit) as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server, head)) for _ in range(16)]
        refused = [slow for slow in held if b"503" in ends_of_one(slow)]
        assert 0 < len(refused) < 16
        assert server.http.post("/v1/completions", json=BODY).status_code == 200


def ends_of_one(slow: socket.socket) -> bytes:
    """The status of an answer, if one comes at once."""
    slow.settimeout(0.1)
    try:
        return slow.recv(64)
    except TimeoutError:
        return b""


def be_patient(args: Sequence[str], log: Path) -> None:
    """A server that lets silent connections be until their deadline."""
    from tokenspeed_plan.runtime.serving.http import connections

    connections._STALE_S = 60.0
    be_command(args, log)


def test_connections_are_bounded(tmp_path: Path) -> None:
    options = ("--max-connections", 6)
    with serving(BUNDLE, tmp_path, *options, main=be_patient) as server, ExitStack() as stack:
        assert server.http.get("/health").status_code == 200  # it keeps this connection
        held = [stack.enter_context(connect(server, HALF_BODY)) for _ in range(5)]
        until(lambda: server.metric("connections") == 6)
        with httpx.Client(base_url=server.url) as other:
            found = other.post("/v1/completions", json=BODY)
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json()["error"]["code"] == "overloaded"
        for _ in range(20):
            with connect(server, b"") as one_more:
                assert b"503" in ends(one_more)
        assert server.metric("connections_refused") == 21
        held[0].close()
        until(lambda: server.metric("connections") < 6)
        with httpx.Client(base_url=server.url) as other:
            assert other.get("/health").status_code == 200
        assert server.text().count("\n") == 2 and "6 connections are open" in server.text()


def test_connections_stay_below_the_limit_of_files(tmp_path: Path) -> None:
    """Silent connections make room, so that others are served before any deadline."""
    options = ("--header-timeout", 60)
    with serving(BUNDLE, tmp_path, *options, num_files=96) as server, ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(server, HALF_HEADER))
        until(lambda: is_healthy(server))
        assert server.http.post("/v1/completions", json=BODY).status_code == 200
        assert server.text().count("\n") == 2 and "which is the limit" in server.text()


def is_healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_limit_of_files_that_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="open files leaves none"),
        serving(BUNDLE, tmp_path, num_files=40),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("x.localhost.", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("[::ffff:127.0.0.1]", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("localhost@evil.example", 403),
        ("evil.example@localhost", 403),
        ("[::2]", 403),
        ("10.0.0.1", 403),
        ("0.0.0.0", 403),
        ("", 403),
    ],
)
def test_a_page_cannot_name_its_own_host(host: str, status: int, server: Server) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        found = server.http.get(path, headers={"Host": host})
        assert found.status_code == status, host
    if status == 403:
        assert found.json()["error"]["code"] == "wrong_host"


def test_the_name_that_the_server_was_given_is_its_own() -> None:
    check = CheckHost(SimpleNamespace(), own_host="Demo.Test")  # type: ignore[arg-type]
    assert check._is_own("demo.test:80") and not check._is_own("demo.test.evil.example")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        (None, 415),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
    ],
)
def test_a_page_cannot_send_json_unasked(
    content_type: str | None, status: int, server: Server
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    found = server.http.post("/v1/completions", content=json.dumps(BODY), headers=headers)
    assert found.status_code == status
    if status == 415:
        assert found.json()["error"]["code"] == "unsupported_type"


def test_with_a_key_any_host_will_do(tmp_path: Path) -> None:
    with serving(BUNDLE, tmp_path, "--api-key", KEY, "--host", "0.0.0.0") as server:
        raw = json.dumps(BODY)
        assert server.http.post("/v1/completions", content=raw).status_code == 200
        assert server.http.get("/v1/models", headers={"Host": "proxy.test"}).status_code == 200
        typed = {"Content-Type": "text/plain"}
        assert server.http.post("/v1/completions", content=raw, headers=typed).status_code == 415


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "`--host` is empty"),
        (" ", "`--host` is empty"),
        ("0.0.0.0", "without a key the server may listen on this machine alone, not on 0.0.0.0"),
        ("0", "without a key the server may listen on this machine alone, not on 0.0.0.0"),
        ("::", "without a key the server may listen on this machine alone, not on ::"),
        ("a" * 100, "cannot listen on "),
        ("no.such.host.invalid", "cannot listen on no.such.host.invalid:"),
    ],
)
def test_hosts_that_are_refused(host: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENSPEED_API_KEY", raising=False)
    done = CliRunner().invoke(main, ["serve", str(BUNDLE), "--port", "0", "--host", host])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {message}"), done.output
    assert done.output.count("error: ") == done.output.count("hint: ") == 1


def be_stuck(args: Sequence[str], log: Path, where: str) -> None:
    """A server in which a thread stands still for ever."""
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.serving.http import app, server

    def stand_still(*_: object) -> Any:
        time.sleep(1e6)

    if where == "parse":
        app.parse = stand_still
    else:
        Engine.step = stand_still  # type: ignore[method-assign]
    server._FLUSH_S, server._END_S = 0.2, 0.2
    be_command(args, log)


def test_a_parser_that_stands_still(tmp_path: Path) -> None:
    """Its client's place is given back; a signal ends the server although the thread goes on."""
    with serving(BUNDLE, tmp_path, "--drain", 0.1, main=be_stuck, where="parse") as server:
        for _ in range(6):  # more than there are threads
            with pytest.raises(httpx.ReadTimeout):
                server.http.post("/v1/completions", json=BODY, timeout=0.1)
        assert not any(server.wait_until_idle().values())
        ends_with_an_error(server)


def test_others_run_while_a_text_is_tokenised() -> None:
    tokenizer = Tokenizer.load(ROOT / "examples/demo/model")
    begins, ends, num_turns = threading.Event(), threading.Event(), 0

    def work() -> None:
        begins.set()
        tokenizer.encode("x" * 200_000)
        ends.set()

    thread = threading.Thread(target=work)
    thread.start()
    begins.wait()
    while not ends.is_set():
        time.sleep(0.001)  # lets the other thread run, and needs Python's lock to go on
        num_turns += 1
    thread.join()
    assert num_turns > 10


def be_busy(args: Sequence[str], log: Path) -> None:
    """A server in which what takes long takes for ever."""
    from tokenspeed_plan.runtime.serving.http import app

    parse = app.parse

    def slow_parse(raw: bytes, *rest: Any) -> Any:
        if len(raw) > 1 << 17:
            time.sleep(1e6)
        return parse(raw, *rest)

    app.parse = slow_parse
    be_command(args, log)


def test_small_bodies_do_not_wait_for_large_ones(tmp_path: Path) -> None:
    with serving(BUNDLE, tmp_path, main=be_busy) as server:
        for _ in range(8):
            with pytest.raises(httpx.ReadTimeout):
                server.http.post("/v1/completions", json={"prompt": "x" * (1 << 18)}, timeout=0.1)
        assert server.http.post("/v1/completions", json=BODY).status_code == 200


def test_an_engine_that_stands_still(tmp_path: Path) -> None:
    options = ("--drain", 0.1, "--stall", 0.2)
    with serving(BUNDLE, tmp_path, *options, main=be_stuck, where="step") as server:
        assert server.http.get("/health").status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=BODY, timeout=0.1)
        until(lambda: server.http.get("/health").status_code != 200)
        found = server.http.get("/health")
        assert found.status_code == 503 and found.json()["error"]["code"] == "stalled"
        ends_with_an_error(server)


def ends_with_an_error(server: Server) -> None:
    server.signal()
    assert server.wait(20) == 1
    assert re.search(r"\nerror: the server did not end .*\n\nhint: .*\n$", server.text())
    assert server.text().count("error: ") == 1 and "Traceback" not in server.text()


def test_an_idle_engine_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(loop=SimpleNamespace(num_moves=0), num_unfinished=0)
    requests, clock = SimpleNamespace(num_open=0), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(engine, requests)  # type: ignore[arg-type]

    def after(seconds: float) -> float:
        clock[0] += seconds
        progress.note()
        return progress.stands_s

    assert after(100) == 0
    requests.num_open = 1
    assert after(3) == 3 and after(4) == 7
    engine.loop.num_moves += 1
    assert after(1) == 0
    requests.num_open, engine.num_unfinished = 0, 1  # its client has left, and it is still there
    assert after(2) == 2


def test_the_heap_is_trimmed_every_now_and_then() -> None:
    now_s, trimmed = [0.0], list[float]()
    trimmer = HeapTrimmer(lambda: trimmed.append(now_s[0]), lambda: now_s[0])
    for tick in range(300):
        now_s[0] = tick / 10
        trimmer.note()
    assert trimmed == [EVERY_S, 2 * EVERY_S]
    trim_heap()
