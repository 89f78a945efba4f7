"""What joins ranks: the ring of orders, the heartbeat, and what a loss does."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.runtime.execution import heartbeat as beats
from tokenspeed_plan.runtime.execution.heartbeat import RECORD_BYTES, Heartbeat, process_state
from tokenspeed_plan.runtime.execution.order_ring import NUM_SLOTS, OrderRing, ring_bytes
from tokenspeed_plan.runtime.execution.rank_loss import RankLoss
from tokenspeed_plan.runtime.execution.shared_bytes import share

PAYLOAD_BYTES = 1000


def make_ring(world: int = 3) -> tuple[mmap.mmap, list[OrderRing]]:
    """Both ends of a ring in one process; one that would wait for longer than 5 s fails."""
    memory = mmap.mmap(-1, ring_bytes(world, PAYLOAD_BYTES))
    until = time.monotonic() + 5.0

    def check() -> None:
        assert time.monotonic() < until, "waits for ever"

    return memory, [OrderRing(memory, rank, world, PAYLOAD_BYTES, check) for rank in range(world)]


def test_every_reader_gets_every_message_in_order() -> None:
    _, (writer, *readers) = make_ring()
    chance = random.Random(1)
    sent = [
        ((i, -i, i * i), chance.randbytes(chance.randrange(PAYLOAD_BYTES + 1))) for i in range(99)
    ]
    found: list[list[object]] = [[] for _ in readers]

    def read(index: int) -> None:
        found[index] += [readers[index].read() for _ in sent]

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(readers))]
    for thread in threads:
        thread.start()
    for order, payload in sent:
        writer.write(order, payload)
    for thread in threads:
        thread.join()
    assert found == [sent, sent]


def test_half_a_message_is_not_read() -> None:
    memory, (writer, reader, _) = make_ring()
    writer.write((1, 2, 3), b"payload")
    place = memory.find(b"payload")
    memory[place] ^= 1
    assert reader._peek() == [], "a byte has not arrived yet"
    memory[place] ^= 1
    assert reader.read() == ((1, 2, 3), b"payload")


def test_a_writer_waits_for_the_slowest_reader_and_gives_up_when_told() -> None:
    _, (writer, reader, _) = make_ring(2 + 1)
    for number in range(NUM_SLOTS):
        writer.write((number, 0, 0))
        reader.read()

    def check() -> None:
        raise RankError("rank 2 is lost", "")

    writer._check = check
    with pytest.raises(RankError, match="rank 2 is lost"):
        writer.write((NUM_SLOTS, 0, 0))


def test_a_reader_that_carries_out_nothing_is_named() -> None:
    _, (writer, reader, other) = make_ring()
    assert writer.stalled(0.0) == "", "nothing is to be done"
    writer.write((1, 0, 0))
    reader.read()
    assert writer.stalled(10.0) == ""
    assert writer.stalled(0.0) == "rank 2 has carried out no order for 0 s"
    other.read()
    assert writer.stalled(0.0) == ""


class Noted(RankLoss):
    """Notes the reason, and leaves the process alone."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = threading.Event()

    def note(self, reason: str) -> None:
        self.reason = reason
        self.noted.set()


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "has ended"), (signal.SIGSTOP, "is frozen")]
)
def test_a_heartbeat_names_a_process(
    number: signal.Signals, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    monkeypatch.setattr(beats, "FROZEN_S", 0.1)
    memory, loss = mmap.mmap(-1, 2 * RECORD_BYTES), Noted()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = Heartbeat(memory, 0, 2, 60.0, loss)
    try:
        beats._RECORD.pack_into(memory, RECORD_BYTES, 1, child.pid)
        assert not loss.noted.wait(0.2), loss.reason
        os.kill(child.pid, number)
        assert loss.noted.wait(5.0)
        assert loss.reason == f"rank 1 (process {child.pid}) {reason}"
    finally:
        mine.stop()
        child.kill()
        child.communicate()


def test_a_silent_rank_is_named_and_one_that_ended_well_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    memory, loss = mmap.mmap(-1, 2 * RECORD_BYTES), Noted()
    other = Heartbeat(memory, 1, 2, 60.0, Noted())
    mine = Heartbeat(memory, 0, 2, 0.2, loss)
    assert not loss.noted.wait(0.3), "it beats"
    other.stop()
    assert mine.has_ended(1) and not loss.noted.wait(0.3)
    beats._RECORD.pack_into(memory, RECORD_BYTES, 77, os.getpid())
    assert loss.noted.wait(5.0) and "has not been heard for" in loss.reason
    mine.stop()


def test_states_of_processes() -> None:
    assert process_state(os.getpid()) in ("R", "S")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_state(child.pid) == ""


def test_a_loss_explains_what_broke() -> None:
    loss = RankLoss()
    assert loss.error("the link broke", wait_s=0.0).message == "the link broke"
    loss.finish()
    loss.note("rank 1 has ended")
    assert not loss.is_known, "ranks may end after the work is done"


def test_ranks_share_bytes_that_have_no_name() -> None:
    """Two threads take the part of two ranks."""
    texts: dict[tuple[int, int], str] = {}
    barrier = threading.Barrier(2)
    found: dict[int, list[mmap.mmap]] = {}

    def rank(number: int) -> None:
        turns = iter(range(2))

        def exchange(text: str) -> list[str]:
            turn = next(turns)
            texts[turn, number] = text
            barrier.wait()
            return [texts[turn, other] for other in range(2)]

        found[number] = share(4096, exchange)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found[0][1][:3] = b"abc"
    assert found[1][1][:3] == b"abc" and found[1][0][:3] == bytes(3)
    assert torch.frombuffer(found[1][1], dtype=torch.uint8)[:3].tolist() == list(b"abc")
    assert not any(os.path.exists(path) for path in texts.values() if path)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed, or has crashed\n\nhint: "),
        ("witness.dismiss()", None),
    ],
)
def test_a_shell_speaks_for_a_rank_0_that_was_killed(end: str, says: str | None) -> None:
    code = (
        "import os, signal\n"
        "from tokenspeed_plan.planner.commands.rank_processes import _Witness\n"
        f"witness = _Witness()\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if says is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == -signal.SIGKILL
        assert done.stderr.startswith("error: rank 0 (process ") and says in done.stderr
