"""Who calls a prefill pool: strangers with bad manners, and calls that come to nothing."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import pytest
from drafting import tokens_of
from pool_pairs import plan_of_two, pools

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
