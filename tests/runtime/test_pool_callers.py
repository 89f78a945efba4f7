"""Who calls a prefill pool: strangers with bad manners, and calls that come to nothing."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
from drafting import tokens_of
from pool_pairs import plan_of_two, pools

from tokenspeed_plan.runtime.pools.channel import Channel, Facts, greet_listener

PROMPT = list(range(40, 140))


def greet(address: tuple[str, int], answer: bytes) -> str:
    """Say something in place of a proof; returns what comes back before the connection ends."""
    with socket.create_connection(address, timeout=5) as connection:
        connection.recv(1 << 14)  # its nonce
        connection.sendall(struct.pack("!I", len(answer)) + answer)
        return connection.recv(1 << 14).decode(errors="replace")


@pytest.mark.parametrize("text", ["\u00e9", "\ud800", 7, None, ["x"]])
@pytest.mark.parametrize("key", ["proof", "nonce"])
def test_a_stranger_is_told_so_whatever_it_says(key: str, text: Any, checkpoint: Any) -> None:
    """The thread of a caller that ends by a fault of its own would leave the connection open."""
    folder = checkpoint("moe")
    with pools(plan_of_two(folder), folder, engine=False) as made:
        answer = json.dumps({"nonce": "n", "proof": "p", "facts": {}} | {key: text})
        assert "the token of this pool is another one" in greet(made.add_prefill(), answer.encode())


@pytest.mark.parametrize("num_strangers", [0, 1, 20])
def test_nothing_is_left_of_a_server_that_has_ended(num_strangers: int, checkpoint: Any) -> None:
    """Neither who waits for callers, nor who hears one, known or not; its listener stays open."""
    folder, before = checkpoint("moe"), set(threading.enumerate())
    plan = plan_of_two(folder)
    with pools(plan, folder, engine=False) as made, ExitStack() as sockets:
        address = made.add_prefill()
        known = Channel(call(address, sockets))
        greet_listener(known, made.token, Facts.of(plan, made.transport))
        strangers = [call(address, sockets) for _ in range(num_strangers)]
        for stranger in strangers[:16]:
            assert stranger.recv(1 << 14), "it is greeted"
        begun_s = time.monotonic()
        made.stop_prefills()
        assert time.monotonic() - begun_s < 2
        left = set(threading.enumerate()) - before
        assert not left, left
        call(address, sockets)


def call(address: tuple[str, int], sockets: ExitStack) -> socket.socket:
    return sockets.enter_context(socket.create_connection(address, timeout=5))


def test_a_call_that_comes_to_nothing_ends_no_listening(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process has no file left for a moment, or a caller has gone again."""
    folder, accept, failures = checkpoint("moe"), socket.socket.accept, [OSError(24, "files")] * 3

    def failing(self: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    with pools(plan_of_two(folder), folder) as made:
        handovers = made.connect([made.add_prefill()])
        assert not failures
        tokens_of(made.engine, [PROMPT], 2)
        assert handovers.counts.done == 1
