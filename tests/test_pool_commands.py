"""Commands with a bundle of two pools: they start the other one, and do without it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import token_ids, write_batch, write_bundle
from click.testing import CliRunner
from pool_pairs import TWO_POOLS
from serving import Server, serving

from tokenspeed_plan.planner.cli import main

PROMPTS = [list(range(40, 40 + count)) for count in (200, 90, 3, 17)]


@pytest.fixture(scope="module")
def bundles(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle of two pools, and the same of one."""
    folder = tmp_path_factory.mktemp("pools")
    write_bundle(folder / "two", checkpoint("moe"), **TWO_POOLS)
    write_bundle(folder / "one", checkpoint("moe"))
    return folder / "two", folder / "one"


def refused(*args: object) -> str:
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == 2, result.output
    return result.output


def prefill_process(server: Server) -> int:
    """The process that the server has started for prompts."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == server.process.pid and b"prefill" in words:
                return int(folder.name)
    raise AssertionError("it has started none")


def answer(server: Server, prompt: list[int]) -> list[int]:
    body = {
        "prompt": prompt,
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.slow
def test_a_batch_over_two_pools(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    rows = write_batch(tmp_path / "rows.jsonl", PROMPTS, [9] * len(PROMPTS))
    found = []
    for bundle in bundles:
        output = tmp_path / f"{bundle.name}.jsonl"
        words = ["run", bundle, "--input", rows, "--output", output, "--no-canary", "--quiet"]
        result = CliRunner().invoke(main, [*map(str, words)])
        assert result.exit_code == 0, result.output
        found.append(token_ids(output))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_server_goes_on_without_its_prefill_pool(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    two, one = bundles
    others = [tmp_path / "one", tmp_path / "two"]
    for folder in others:
        folder.mkdir()
    with serving(one, others[0]) as server:
        wanted = [answer(server, prompt) for prompt in PROMPTS]
    with serving(two, others[1], "--peer-timeout", 3, "--metrics-port", 0) as server:
        assert answer(server, PROMPTS[0]) == wanted[0]
        assert server.metric("handovers_done") == 1
        page = re.search(r"metrics of the prefill pool at (\S+)", server.text())
        assert page and "tokenspeed_handovers_done 1.0" in httpx.get(page[1]).text
        frozen = prefill_process(server)
        os.kill(frozen, signal.SIGSTOP)
        assert answer(server, PROMPTS[1]) == wanted[1]
        assert server.metric("handovers_alone") == 1
        os.kill(frozen, signal.SIGKILL)
        assert answer(server, PROMPTS[3]) == wanted[3]
        until = time.monotonic() + 30
        while server.metric("handovers_done") == 1:  # another one takes its place
            assert time.monotonic() < until
            answer(server, [int(time.monotonic() * 10) % 400, *PROMPTS[0]])
            time.sleep(0.1)
        assert "it is started again" in server.text()


def test_words_that_contradict_each_other(bundles: tuple[Path, Path]) -> None:
    two, one = bundles
    assert "belong together" in refused("serve", two, "--pool", "prefill")
    assert "belong together" in refused("serve", two, "--pool", "decode")
    assert "belong together" in refused("serve", two, "--peers", "127.0.0.1:1")
    assert "is no HOST:PORT" in refused("serve", two, "--pool", "prefill", "--listen", "7000")
    open_to_all = ("serve", two, "--pool", "prefill", "--listen", "0.0.0.0:0")
    assert "without a token" in refused(*open_to_all)
    alone = ("serve", one, "--pool", "decode", "--peers", "127.0.0.1:1", "--port", 0)
    assert "the plan has one pool" in refused(*alone)
    missing = ("serve", one, "--pool", "prefill", "--listen", "127.0.0.1:0")
    assert "the plan has no pool of role `prefill`" in refused(*missing)
    there = ("--metrics-port", 0)
    assert "is of the prefill pool" in refused(*alone, *there)
    assert "not one for `--metrics-port`" in refused("serve", one, "--port", 0, *there)
    uncached = ("run", two, "--prompt", "x", "--no-cache")
    assert "`--no-cache` keeps none" in refused(*uncached)
