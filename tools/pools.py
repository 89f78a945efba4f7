"""Answers over two pools: python tools/pools.py --conversations 200 | --kills 200 | --exits 200.

All with the demo model; the prefill pool, or with --exits the decode pool, is a process of its own.

    --conversations N   random conversations, with drafts and without; ids must be those of one pool
    --kills N           the prefill pool is killed, frozen or both at random moments meanwhile
    --exits N           the decode pool is killed at random moments; the other must free everything

--prefill-ranks and --decode-ranks are the processes of each pool (with --exits the first has one),
--transport nixl hands over by NIXL. The exit code is 1 if an answer was wrong or lost, or if memory
was not given back. Answers are made first, by one engine without a cache.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

from conversations import Conversation, check_all_is_given_back, converse, replay

from tokenspeed_plan.planner import find_model
from tokenspeed_plan.planner.commands.engines import EngineOptions, load_engine
from tokenspeed_plan.planner.commands.rank_processes import (
    environment_alone,
    own_command,
    started_ranks,
)
from tokenspeed_plan.planner.compile import compile_bundle, compile_plan
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.bundle import save_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.execution.rank_links import join
from tokenspeed_plan.runtime.execution.ranks import leading
from tokenspeed_plan.runtime.pools.handovers import Handovers, PeerOptions, make_handovers
from tokenspeed_plan.runtime.pools.pool_rank import make_transport
from tokenspeed_plan.runtime.pools.prefill_server import make_prefill_server

MODEL = Path(__file__).parents[1] / "examples" / "demo" / "model"
TOKEN = "pools"  # both processes are ours
AT_ONCE = 20  # conversations
PEER_TIMEOUT_S = 3.0  # frozen pools are noticed after that
END_S = 30.0
DECODE = "--decode"


def make_plan(folder: Path, drafts: bool, ranks: tuple[int, int]) -> Plan:
    """Two pools of the demo model; `ranks` of the one for prompts, and of the one that answers.

    Answers go back, so that all this is also about these.
    """
    prefill, decode = ranks
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"path": str(MODEL), "weights": "fp32"},
            "target": {"gpu": "cpu", "count": prefill + decode},
            "workload": {"first_turn_tokens": 300, "output_tokens": 64, "concurrency": 8},
            "speculation": {"depth": 2} if drafts else "off",
            "disaggregation": {"prefill": prefill, "decode": decode, "answers": "return"},
        }
    )
    made = compile_bundle(spec, find_model(spec))
    save_plan(made.plan, folder, made.sources)
    return made.plan


class Prefill:
    """A prefill pool as a process, which can be killed and started again at its place."""

    def __init__(self, bundle: Path, transport: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self._words = ["serve", str(bundle), "--pool", "prefill", "--listen", "127.0.0.1:0"]
        self._words += ["--transport", transport]
        self.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self.listener.getsockname()
        return host, port

    def start(self) -> None:
        """Start it, or another one in its place."""
        number = self.listener.fileno()
        own = {"TOKENSPEED_LISTENER": str(number), "TOKENSPEED_PEER_TOKEN": TOKEN}
        self.process = subprocess.Popen(
            own_command(self._words),
            env=environment_alone() | own,
            pass_fds=[number],
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()


def one_rank(plan: Plan) -> Plan:
    """A plan of one process with the same answers."""
    if plan.pool.layout.num_ranks == 1:
        return plan.view(plan.pool)
    spec = Spec.model_validate(plan.spec | {"target": {"gpu": "cpu"}, "disaggregation": "off"})
    return compile_plan(spec, find_model(spec))


@contextmanager
def decode_ranks(bundle: Path, plan: Plan) -> Iterator[None]:
    """The other ranks of the decode pool; this process is rank 0."""
    count = plan.pool.layout.num_ranks
    if count == 1:
        yield
        return
    words = ("serve", str(bundle), "--pool", "decode", "--peers", "127.0.0.1:1", "--no-canary")
    with started_ranks(count, words), leading(join(plan.view(plan.pool))):
        yield


def decode_pool(bundle: Path, plan: Plan, address: tuple[str, int], transport: str) -> Engine:
    """An engine whose prompts are computed elsewhere."""
    engine = load_engine(bundle, EngineOptions(canary=False))
    options = PeerOptions((address,), TOKEN, PEER_TIMEOUT_S, retry_s=0.1)
    memory = make_transport(transport, engine.executor.memory)
    handovers = make_handovers(engine, plan, memory, options)
    if not handovers.start():
        raise SystemExit("the prefill pool does not answer")
    engine.loop.elsewhere = handovers
    return engine


def settle(engine: Engine) -> None:
    """Wait until nothing is on its way or abandoned, and check that all is given back."""
    until, held = time.monotonic() + END_S, engine.scheduler.reservations
    while (held.holds_any or not engine.is_idle) and time.monotonic() < until:
        engine.step()
        time.sleep(0.01)
    check_all_is_given_back(engine.scheduler.cache)


def forget(engine: Engine) -> None:
    """Let the prefix cache forget everything, so that the same prompts are ordered again."""
    cache = engine.scheduler.cache
    for node in cache.checkpoints:
        cache.forget_checkpoint(node.state_slot)


def show_counts(engine: Engine) -> None:
    handovers = engine.loop.elsewhere
    assert isinstance(handovers, Handovers)
    print({name: round(value, 3) for name, value in asdict(handovers.counts).items()}, flush=True)


def talk(plan: Plan, bundle: Path, count: int, seed: int, transport: str) -> None:
    """Random conversations with nothing in their way."""
    oracle, made = one_rank(plan), []
    for first in range(0, count, AT_ONCE):
        made.append(converse(oracle, MODEL, min(AT_ONCE, count - first), seed + first))
    prefill = Prefill(bundle, transport)
    try:
        with decode_ranks(bundle, plan):
            engine = decode_pool(bundle, plan, prefill.address, transport)
            for number, talks in enumerate(made):
                replay(engine, talks, seed + number, cancel=0.01)
                print(f"{sum(map(len, made[: number + 1]))} conversations", flush=True)
            settle(engine)
            show_counts(engine)
            engine.loop.close()
    finally:
        prefill.kill()


def disturb(prefill: Prefill, engine: Engine, count: int, seed: int, over: threading.Event) -> None:
    """On a thread: kill or freeze the prefill pool again and again, once it has orders."""
    rng, handovers = random.Random(seed), engine.loop.elsewhere
    assert isinstance(handovers, Handovers)
    for number in range(count):
        until = time.monotonic() + END_S
        while not handovers.num_jobs and time.monotonic() < until:
            over.wait(0.001)
        if over.wait(rng.choice((0.0, 0.005, 0.02, 0.1))):
            return
        if number % 3:
            prefill.process.send_signal(signal.SIGSTOP)
            over.wait(rng.choice((0.2, PEER_TIMEOUT_S + 1.0)))
        if number % 3 == 2:
            prefill.process.send_signal(signal.SIGCONT)
            continue
        prefill.kill()
        prefill.start()
    over.set()


def kill_prefill(plan: Plan, bundle: Path, count: int, seed: int, transport: str) -> None:
    """Conversations while the prefill pool comes and goes."""
    talks = converse(one_rank(plan), MODEL, AT_ONCE, seed)
    prefill = Prefill(bundle, transport)
    try:
        with decode_ranks(bundle, plan):
            engine = decode_pool(bundle, plan, prefill.address, transport)
            answer_under_kills(prefill, engine, talks, count, seed)
    finally:
        prefill.process.send_signal(signal.SIGCONT)
        prefill.kill()


def answer_under_kills(
    prefill: Prefill, engine: Engine, talks: list[Conversation], count: int, seed: int
) -> None:
    """The same conversations again and again, until all kills are made."""
    over = threading.Event()
    thread = threading.Thread(
        target=disturb, args=(prefill, engine, count, seed, over), daemon=True
    )
    thread.start()
    rounds = 0
    try:
        while not over.is_set():
            replay(engine, talks, seed + rounds, cancel=0.01)
            forget(engine)
            rounds += 1
    finally:
        over.set()
        thread.join(2 * PEER_TIMEOUT_S)
    prefill.process.send_signal(signal.SIGCONT)
    settle(engine)
    print(f"{count} kills, {rounds} times {len(talks)} conversations", flush=True)
    show_counts(engine)
    engine.loop.close()


def kill_decode(plan: Plan, bundle: Path, count: int, seed: int, transport: str) -> None:
    """Decode pools that die; every tenth one is left alone, and must be right."""
    rng = random.Random(seed)
    engine = Engine.load(bundle, role="prefill")
    server = make_prefill_server(
        engine, plan, make_transport(transport, engine.executor.memory), TOKEN
    )
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=server.serve, args=(listener,), daemon=True).start()
    words = [__file__, DECODE, str(bundle), str(listener.getsockname()[1]), transport]
    for number in range(count):
        child = subprocess.Popen([sys.executable, *words, str(seed)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        if number % 10 == 9:
            assert child.wait(300) == 0
        else:
            time.sleep(rng.uniform(0.0, 0.6))
            child.kill()
            child.wait()
        until, held = time.monotonic() + END_S, engine.scheduler.reservations
        while (engine.num_unfinished or held.holds_any) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        check_all_is_given_back(engine.scheduler.cache)
    print(f"{count} decode pools ended, nothing is held", flush=True)
    server.stop()


def decode(bundle: Path, port: int, transport: str, seed: int) -> None:
    """As a decode pool that may be killed: say when it begins, and check the answers."""
    from tokenspeed_plan.plans.bundle import load_plan

    plan = load_plan(bundle)
    talks = converse(one_rank(plan), MODEL, 6, seed)
    with decode_ranks(bundle, plan):
        engine = decode_pool(bundle, plan, ("127.0.0.1", port), transport)
        print("begun", flush=True)
        replay(engine, talks, seed)
        engine.loop.close()


def main() -> None:
    if sys.argv[1:2] == [DECODE]:
        _, _, folder, port, transport, seed = sys.argv
        decode(Path(folder), int(port), transport, int(seed))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else "")
    parser.add_argument("--conversations", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--exits", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--prefill-ranks", type=int, default=1)
    parser.add_argument("--decode-ranks", type=int, default=1)
    options = parser.parse_args()
    for drafts in (False, True):
        with tempfile.TemporaryDirectory() as name:
            bundle = Path(name)
            plan = make_plan(bundle, drafts, (options.prefill_ranks, options.decode_ranks))
            print(f"drafts {'on' if drafts else 'off'}", flush=True)
            half = (options.seed, options.transport)
            if options.conversations:
                talk(plan, bundle, options.conversations // 2, *half)
            if options.kills:
                kill_prefill(plan, bundle, options.kills // 2, *half)
            if options.exits:
                kill_decode(plan, bundle, options.exits // 2, *half)


if __name__ == "__main__":
    main()
