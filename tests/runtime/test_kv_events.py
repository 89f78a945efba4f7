"""Another router follows the prefix cache: what it puts together is what the cache holds."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands import serve
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache, as_words, chain_digest
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.serving import kv_events as module
from tokenspeed_plan.runtime.serving.kv_events import KvEvents, block_hash, kv_events, publisher

PAGE = 16
SEED = b"seed"


def small_cache(num_pages: int = 24) -> PrefixCache:
    plan = load_plan(ROOT / "plans" / "frozen" / "demo-cpu")
    limits = plan.pool.limits.model_copy(
        update={"page_size": PAGE, "num_pages": num_pages, "num_state_slots": 12}
    )
    return PrefixCache(limits, SEED, 1024, 1024, Metrics())


def remember(cache: PrefixCache, tokens: list[int]) -> None:
    """A sequence that was computed, and has ended: its pages, and a state at its end."""
    digests: list[bytes] = []
    cache.extend(digests, tokens, len(tokens))
    hit = cache.match(digests, tokens, len(tokens))
    node, pages = cache.use(hit)
    slot = cache.take_state_slot()
    while len(pages) < -(-len(tokens) // PAGE):
        page = cache.take_page()
        assert page is not None
        pages.append(page)
    node = cache.add_pages(node, digests, tokens, len(tokens), pages)
    cache.add_checkpoint(node, tokens, len(tokens), slot, pages)
    if hit.checkpoint.state_slot:
        cache.state_slots.drop(hit.checkpoint.state_slot)
    cache.state_slots.drop(slot)
    cache.drop_pages(pages)


class Follower:
    """An index as routers have it: blocks by hash, and for each its parent and tokens."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self.numbers: list[int] = []
        self.num_removed = 0

    def take(self, number: int, events: list[dict[str, Any]]) -> None:
        self.numbers.append(number)
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.blocks.clear()
            elif event["type"] == "BlockRemoved":
                for block in event["block_hashes"]:
                    self.num_removed += self.blocks.pop(block, None) is not None
            else:
                self._store(event)

    def _store(self, event: dict[str, Any]) -> None:
        parent, size = event["parent_block_hash"], event["block_size"]
        assert len(event["token_ids"]) == size * len(event["block_hashes"])
        for index, block in enumerate(event["block_hashes"]):
            assert parent is None or parent in self.blocks
            tokens = tuple(event["token_ids"][index * size : (index + 1) * size])
            self.blocks[block] = (parent, tokens)
            parent = block


def held_by(cache: PrefixCache) -> dict[int, tuple[int | None, tuple[int, ...]]]:
    found = {}
    for node in cache.tree:
        if node.digest:
            parent = node.parent
            is_first = parent is None or parent.parent is None
            above = None if is_first or parent is None else block_hash(parent.digest)
            found[block_hash(node.digest)] = (above, node.token_ids)
    return found


def talk(cache: PrefixCache, rng: random.Random, turns: int) -> None:
    conversations = [[rng.randrange(99) for _ in range(40)] for _ in range(4)]
    for _ in range(turns):
        tokens = rng.choice(conversations)
        if len(tokens) > 200:
            tokens[:] = tokens[:40]
        tokens += [rng.randrange(99) for _ in range(rng.randrange(40))]
        remember(cache, tokens)


def test_who_follows_knows_what_is_cached() -> None:
    cache, rng, follower = small_cache(), random.Random(0), Follower()
    talk(cache, rng, 5)  # as a canary does, before anybody follows
    events = KvEvents(PAGE, "CPU", follower.take)
    cache.tree.follow(events)
    events.begin()
    talk(cache, rng, 200)
    events.end()
    assert follower.blocks == held_by(cache) and follower.blocks
    assert follower.num_removed > 50
    assert follower.numbers == list(range(len(follower.numbers)))


def test_pages_that_follow_each_other_share_an_event() -> None:
    cache, batches = small_cache(), list[Any]()
    events = KvEvents(PAGE, "CPU", lambda number, batch: batches.append(batch))
    cache.tree.follow(events)
    tokens = list(range(3 * PAGE))
    remember(cache, tokens)
    events.begin()
    events.end()
    digests, digest = [], SEED
    for start in range(0, len(tokens), PAGE):
        digest = chain_digest(digest, as_words(tokens[start : start + PAGE]))
        digests.append(int.from_bytes(digest[-8:], "big"))
    assert batches == [
        [{"type": "AllBlocksCleared"}],
        [
            {
                "type": "BlockStored",
                "block_hashes": digests,
                "parent_block_hash": None,
                "token_ids": tokens,
                "block_size": PAGE,
                "lora_id": None,
                "medium": "CPU",
                "lora_name": None,
            }
        ],
    ]


def test_long_news_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHANGES", 2)
    cache, follower = small_cache(), Follower()
    events = KvEvents(PAGE, "CPU", follower.take)
    cache.tree.follow(events)
    remember(cache, list(range(5 * PAGE)))
    events.begin()
    events.end()
    assert follower.blocks == held_by(cache) and follower.numbers == [0, 1, 2, 3]


def free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("who_binds", ["engine", "gateway"])
def test_messages_are_those_of_vllm(who_binds: str) -> None:
    """Over ZeroMQ, read by a decoder that knows the fields alone."""
    zmq = pytest.importorskip("zmq")
    msgspec = pytest.importorskip("msgspec")
    cache, follower, topics = small_cache(), Follower(), set()
    engine: Any = SimpleNamespace(
        scheduler=SimpleNamespace(cache=cache),
        plan=SimpleNamespace(
            target=SimpleNamespace(device="cpu"),
            pool=SimpleNamespace(limits=SimpleNamespace(page_size=PAGE)),
        ),
    )
    endpoint, is_over = free_endpoint(), threading.Event()
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
    subscriber.setsockopt(zmq.RCVTIMEO, 200)

    def follow() -> None:
        while True:
            try:
                topic, number, payload = subscriber.recv_multipart()
            except zmq.Again:
                if is_over.is_set():
                    return
                continue
            topics.add(topic)
            when, events, rank = msgspec.msgpack.decode(payload)
            assert when > 1e9 and rank == 0
            follower.take(int.from_bytes(number, "big"), events)

    thread = threading.Thread(target=follow)
    if who_binds == "gateway":
        subscriber.bind(endpoint)
        endpoint = f">{endpoint}"
    else:
        subscriber.connect(endpoint)
    thread.start()
    early: set[int] = set()
    with publisher(endpoint) as out, kv_events(engine, out, "kv@pod@model"):
        while not follower.numbers:  # what is sent before it has joined is lost, as with vLLM
            assert len(early) < 1000
            tokens = [1000 + len(early)] * PAGE
            early.add(block_hash(chain_digest(SEED, as_words(tokens))))
            remember(cache, tokens)
            time.sleep(0.02)
        talk(cache, random.Random(1), 60)
    is_over.set()
    thread.join()
    subscriber.close()
    found, held = (
        {block: facts for block, facts in blocks.items() if block not in early}
        for blocks in (follower.blocks, held_by(cache))
    )
    assert found == held and held and topics == {b"kv@pod@model"}


@pytest.mark.parametrize(
    "endpoint", ["nowhere", "tcp://127.0.0.1", "tcp://192.0.2.1:1", "tcp://\udcff:1", ""]
)
def test_an_endpoint_that_cannot_be_opened(endpoint: str) -> None:
    pytest.importorskip("zmq")
    with pytest.raises(RequestError, match="cannot publish"), publisher(endpoint):
        raise AssertionError


def test_a_wrong_endpoint_is_refused_before_the_engine_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights may take minutes."""
    monkeypatch.setattr(serve, "ready_engine", pytest.fail)
    bundle = str(ROOT / "plans" / "frozen" / "demo-cpu")
    words = ["serve", bundle, "--port", "0", "--kv-events", "nowhere"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert re.search("error: (cannot publish|`--kv-events` needs)", result.output)
