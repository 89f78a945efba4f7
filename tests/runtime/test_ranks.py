"""Processes that run a sharded plan give the tokens of one rank, and notice a lost process."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bundles import COMMAND, break_kernels, in_text, token_ids, write_batch, write_bundle
from checkpoints import Kind, write_checkpoint
from click.testing import CliRunner
from conftest import ROOT
from drafting import plan_of
from rank_forks import LOOPBACK, batch, be_rank, free_port, logs, start, wait

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RankError
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.execution import rank_links, rank_place
from tokenspeed_plan.runtime.execution.ranks import follow, lead_of, leading

PROMPTS = [[5, 6, 7, 8] * 20, [9], list(range(40, 110))]
COUNTS = [9, 9, 9]  # one of prefill, eight of decode
LONG = {  # of an agent: rows of a batch would share one chunk
    "kind": "agentic",
    "first_turn_tokens": 96,
    "turns": 1,
    "turn_tokens": 1,
    "output_tokens": 16,
    "concurrency": 4,
}
SMALL = {
    "first_turn_tokens": 8,
    "output_tokens": 8,
    "concurrency": 1,
}  # one prompt of 12 tokens is compared
LAYOUTS = {
    "tp 2": ("moe", 2, {"tp": 2}),
    "tp 4": ("deep", 4, {"tp": 4}),
    "tp 8": ("wide", 8, {"tp": 8}),
    "ep 2": ("moe", 2, {"ep": 2}),
    "tp 2 x ep 2": ("deep", 4, {"tp": 2, "ep": 2}),
}


def be_rank_apart(rank: int, world: int, port: int, args: Sequence[str], log: Path) -> None:
    """The same, where what rank 1 writes to rank 0 arrives nowhere."""
    really = rank_links.share

    def share(size_bytes: int, exchange: Callable[[str], list[str]]) -> list[mmap.mmap]:
        maps = really(size_bytes, exchange)
        if rank and size_bytes:
            maps[0] = mmap.mmap(-1, size_bytes)
        return maps

    rank_links.share = share  # type: ignore[attr-defined]
    be_rank(rank, world, port, args, log)


def be_tiered_rank(rank: int, world: int, port: int, args: Sequence[str], log: Path) -> None:
    """Rank 0 writes what `take_turns` answers into its log."""
    os.environ |= LOOPBACK | {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    bundle = Path(args[0])
    links = rank_links.join(load_plan(bundle))
    engine = Engine.load(bundle, lead=lead_of(links))
    if rank:
        assert links.orders is not None
        follow(engine.executor, links.orders)
        return
    with leading(links):
        answers = take_turns(engine)
    log.write_text(json.dumps({"answers": answers, "hits": engine.metrics.host_hits}))


def take_turns(engine: Engine) -> list[list[int]]:
    """The answers of three conversations of two turns, in turn."""
    params, answers = SamplingParams(max_tokens=8, ignore_eos=True), []
    talks = [[start] * 40 for start in range(3)]
    for _ in range(2):
        for talk in talks:
            (done,) = engine.generate([talk], params)
            talk += [*done.token_ids, *range(20)]
            answers.append(list(done.token_ids))
    return answers


def alone(checkpoint: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The answers of one rank, in this process."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    engine = Engine.from_plan(plan_of(checkpoint, 0), checkpoint)
    return [list(done.token_ids) for done in engine.generate(prompts, params)]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers, which the interpreter gets through in seconds."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "short", Kind())


def gpus(count: int) -> dict[str, Any]:
    """Sections of a spec for so many ranks of one pool."""
    return {"target": {"count": count}, "disaggregation": "off"}


TWO = gpus(2)


@pytest.fixture(scope="module")
def pair(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two ranks, with a canary."""
    bundle = tmp_path_factory.mktemp("ranks") / "pair"
    write_bundle(
        bundle,
        checkpoint("moe"),
        canary=True,
        target={"count": 2},
        disaggregation="off",
        workload=LONG,
    )
    return bundle


@pytest.fixture(scope="module")
def short_pair(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle of two ranks, to be copied before it is changed."""
    bundle = tmp_path_factory.mktemp("ranks") / "short"
    write_bundle(bundle, short, **TWO, workload=SMALL)
    return bundle


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count", "moe"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ranks_give_the_tokens_of_one(
    kind: str, count: int, moe: dict[str, int], checkpoint: Any, tmp_path: Path
) -> None:
    folder, bundle = checkpoint(kind), tmp_path / "plan"
    layout = {"attention": {"tp": count}, "moe": moe}
    plan = write_bundle(
        bundle,
        folder,
        target={"count": count},
        disaggregation="off",
        parallelism=layout,
        workload=LONG,
    )
    assert sum(map(len, PROMPTS)) > plan.pool.limits.max_tokens, (
        "the prompts are computed in more than one chunk"
    )
    write_batch(tmp_path / "in.jsonl", PROMPTS, COUNTS)
    assert wait(start(count, batch(bundle, tmp_path), tmp_path)) == [0] * count, logs(
        tmp_path, count
    )
    assert token_ids(tmp_path / "out.jsonl") == alone(folder, PROMPTS, COUNTS[0])


@pytest.mark.slow
def test_each_rank_has_its_shard_on_the_host(short: Path, tmp_path: Path) -> None:
    """Conversations come back from there, where the devices have room for one of them."""
    talk = {"kind": "agentic", "first_turn_tokens": 40, "turns": 2, "turn_tokens": 20}
    talk |= {"output_tokens": 8, "concurrency": 1}
    plan = write_bundle(
        tmp_path / "plan", short, **TWO, workload=talk, serving={"host_cache_gib": 0.01}
    )
    assert plan.pool.layout.num_ranks == 2
    assert wait(start(2, [tmp_path / "plan"], tmp_path, be_tiered_rank)) == [0, 0], logs(
        tmp_path, 2
    )
    found = json.loads((tmp_path / "0.log").read_text())
    one = write_bundle(tmp_path / "one", short, workload=talk)
    assert found["answers"] == take_turns(Engine.from_plan(one, short, cache=False))
    assert found["hits"] == 3


@pytest.mark.slow
def test_masks_and_adjustments_reach_all_ranks(checkpoint: Any, tmp_path: Path) -> None:
    """A free row, one with a form, and one with penalties, on two ranks as on one."""
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "colours", "schema": schema}}
    asked: list[dict[str, Any]] = [
        {},
        {"response_format": form, "ignore_eos": False},
        {"presence_penalty": 1.5, "logit_bias": {"7": 100}},
    ]
    answers = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_bundle(
            folder / "plan",
            checkpoint("moe"),
            **gpus(count),
            workload=LONG,
            serving={"grammar": True, "penalties": True},
        )
        rows = write_batch(folder / "in.jsonl", PROMPTS, COUNTS)
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        for line, more in zip(lines, asked, strict=True):
            line["body"] |= more
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = wait(start(count, batch(folder / "plan", folder), folder))
        assert done == [0] * count, logs(folder, count)
        answers.append(token_ids(folder / "out.jsonl"))
    assert answers[0] == answers[1]
    free, formed, penalised = answers[0]
    alone_ids = alone(checkpoint("moe"), PROMPTS, COUNTS[0])
    assert free == alone_ids[0] and formed != alone_ids[1] and penalised != alone_ids[2]


@pytest.mark.slow
def test_torchrun_runs_a_batch(pair: Path, checkpoint: Any, tmp_path: Path) -> None:
    """This is the way that the README and the error messages name, with the canary."""
    write_batch(tmp_path / "in.jsonl", PROMPTS, COUNTS)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--no-python",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*torchrun, "--master-port", str(free_port()), *COMMAND, *map(str, batch(pair, tmp_path))],
        env=os.environ | LOOPBACK,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert token_ids(tmp_path / "out.jsonl") == alone(checkpoint("moe"), PROMPTS, COUNTS[0])


@pytest.mark.slow
def test_a_command_starts_its_ranks(pair: Path) -> None:
    """`check` with the canary; what the other rank prints is not shown, and none is left."""
    done = subprocess.run(
        [*COMMAND, "check", str(pair), "--canary"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("48 tokens agree") == 1


@pytest.mark.slow
def test_a_command_ends_with_a_lost_rank(pair: Path) -> None:
    """And with a frozen one, even where rank 0 is it; the batch then goes on where it was."""
    tool = [sys.executable, ROOT / "benchmarks/rank_faults.py", pair, "--times", "1"]
    faults = ["--rows", "160", "--faults", "kill1,stop0"]
    done = subprocess.run([*tool, *faults], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_of_ranks_give_the_references_tokens(
    short: Path, short_pair: Path, tmp_path: Path
) -> None:
    """In decode one kernel reduces over the ranks, adds the residual and takes the norm."""
    prompts, counts = [[7, 8, 9]], [5]
    plan = load_plan(short_pair)
    called = {step.kernel for step in plan.pool.programs[-1].steps if step.kind == "kernel"}
    assert "reduce_add_norm" in {
        kind_of(kernel) for kernel in plan.kernels if kernel.name in called
    }
    write_batch(tmp_path / "in.jsonl", prompts, counts)
    args = batch(short_pair, tmp_path, "--backend", "kernels")
    assert wait(start(2, args, tmp_path)) == [0, 0], logs(tmp_path, 2)
    assert token_ids(tmp_path / "out.jsonl") == alone(short, prompts, counts[0])


@pytest.mark.slow
def test_without_peer_memory_the_library_adds_up(
    short: Path, short_pair: Path, tmp_path: Path
) -> None:
    """All ranks do so, whoever found out, and rank 0 says so in one line."""
    prompts, counts = [[7, 8, 9]], [3]
    write_batch(tmp_path / "in.jsonl", prompts, counts)
    args = batch(short_pair, tmp_path, "--backend", "kernels")
    ranks = start(2, args, tmp_path, be_rank_apart)
    assert wait(ranks) == [0, 0], logs(tmp_path, 2)
    (line,) = logs(tmp_path, 2).splitlines()
    assert re.match(
        r"warning: the memory of other ranks cannot be used here: rank 0 read \[81, 0\] from rank "
        r"0 \(rank 0\); collectives of a library add up",
        line,
    ), line
    assert token_ids(tmp_path / "out.jsonl") == alone(short, prompts, counts[0])


@pytest.mark.slow
def test_every_step_of_two_ranks_is_compared(short_pair: Path, tmp_path: Path) -> None:
    done = wait(start(2, ["run", short_pair, "--check"], tmp_path))
    assert done == [0, 0], logs(tmp_path, 2)
    assert logs(tmp_path, 2).count("kernels and references agree; ") == 2, (
        "a step of each kernel, none left out"
    )


@pytest.mark.slow
def test_a_broken_sum_over_ranks_is_named(short_pair: Path, tmp_path: Path) -> None:
    """The broken kernel keeps only the last rank's part."""
    shutil.copytree(short_pair, tmp_path / "plan")
    broken = in_text("x += part.to(tl.float32)", "x = part.to(tl.float32)")
    break_kernels(tmp_path / "plan", "reduce_add_norm", broken)
    codes = wait(start(2, ["run", tmp_path / "plan", "--check"], tmp_path))
    assert all(codes), logs(tmp_path, 2)
    assert re.search(
        r"step \d+ of prefill/\d+, `reduce_add_norm_\w+`, .* differ by ", logs(tmp_path, 2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_processes_is_refused_once(
    count: int, pair: Path, tmp_path: Path
) -> None:
    write_batch(tmp_path / "in.jsonl", PROMPTS, COUNTS)
    codes = wait(start(count, batch(pair, tmp_path), tmp_path), 30)
    assert codes == [2] + [0] * (count - 1)
    text = logs(tmp_path, count)
    assert text.startswith(
        f"error: the plan has 2 ranks, this is one of {count} processes\n\nhint: "
    )
    assert text.count("error: ") == text.count("hint: ") == 1


@pytest.mark.slow
def test_a_checkpoint_without_its_weights_is_refused_by_all(
    pair: Path, checkpoint: Any, tmp_path: Path
) -> None:
    """All ranks find out by themselves; none waits for another, none ends in a traceback."""
    model = Path(shutil.copytree(checkpoint("moe"), tmp_path / "model"))
    (model / "model-1.safetensors").unlink()
    write_batch(tmp_path / "in.jsonl", PROMPTS, COUNTS)
    codes = wait(start(2, batch(pair, tmp_path, "--weights", model), tmp_path), 30)
    assert codes == [2, 2]
    for rank in range(2):
        text = (tmp_path / f"{rank}.log").read_text()
        assert text.startswith("error: ") and "is missing" in text and text.count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_the_other(victim: int, pair: Path, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", PROMPTS * 300, COUNTS * 300)
    ranks = start(2, batch(pair, tmp_path), tmp_path)
    wait_for_answers(ranks, tmp_path)
    ranks[victim].kill()
    codes = wait(ranks, 20)
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(2)]
    text = (tmp_path / f"{1 - victim}.log").read_text()
    assert re.match(rf"error: rank {victim} \(process \d+\) has ended\n", text), text
    assert text.count("error: ") == text.count("hint: ") == 1


def wait_for_answers(ranks: Sequence[BaseProcess], folder: Path) -> None:
    """Wait until a batch is in the middle."""
    until = time.monotonic() + 60
    while not (folder / "out.jsonl").exists() or not (folder / "out.jsonl").stat().st_size:
        assert time.monotonic() < until and all(rank.is_alive() for rank in ranks), logs(folder, 2)
        time.sleep(0.05)


def freeze(rank: BaseProcess, number: signal.Signals = signal.SIGSTOP) -> None:
    assert rank.pid
    os.kill(rank.pid, number)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_ends_the_other(victim: int, pair: Path, tmp_path: Path) -> None:
    """And it ends itself when it goes on."""
    write_batch(tmp_path / "in.jsonl", PROMPTS * 300, COUNTS * 300)
    ranks = start(2, batch(pair, tmp_path), tmp_path)
    wait_for_answers(ranks, tmp_path)
    freeze(ranks[victim])
    ranks[1 - victim].join(40)
    assert ranks[1 - victim].exitcode == 1, logs(tmp_path, 2)
    freeze(ranks[victim], signal.SIGCONT)
    assert wait(ranks, 40) == [1, 1]
    for rank in range(2):
        text = (tmp_path / f"{rank}.log").read_text()
        reason = "has ended" if rank == victim else "is frozen"
        assert re.match(rf"error: rank {1 - rank} \(process \d+\) {reason}\n", text), text
        assert text.count("error: ") == text.count("hint: ") == 1


@pytest.mark.slow
def test_an_idle_server_notices_a_frozen_rank(pair: Path, tmp_path: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    args = ["serve", pair, "--port", port, "--no-canary", "--rank-timeout", 7]
    (tmp_path / "0.log").touch()
    ranks = start(2, args, tmp_path)
    until = time.monotonic() + 60
    while "ready at" not in (tmp_path / "0.log").read_text():
        assert time.monotonic() < until, logs(tmp_path, 2)
        time.sleep(0.05)
    assert httpx.get(f"{address}/health").status_code == 200
    assert all(found.startswith("127.") for found in addresses_of(ranks)), "no other machine"
    freeze(ranks[1])
    while (found := httpx.get(f"{address}/health")).status_code == 200:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert found.status_code == 503 and found.json()["error"]["code"] == "stalled"
    ranks[0].join(40)
    assert ranks[0].exitcode == 1
    text = (tmp_path / "0.log").read_text()
    assert re.search(r"^error: rank 1 \(process \d+\) is frozen$", text, re.MULTILINE), text
    ranks[1].kill()


def addresses_of(ranks: Sequence[BaseProcess]) -> list[str]:
    """Where processes listen, by their open files; an IPv6 address never begins with 127."""
    inodes = set()
    for rank in ranks:
        for link in Path(f"/proc/{rank.pid}/fd").iterdir():
            inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                found.append(socket.inet_ntoa(raw[::-1]) if table == "tcp" else raw.hex())
    assert found
    return found


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK"),
        ({"RANK": "1"}, "RANK=1 and no WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 and no WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE="),
        ({"RANK": "0", "WORLD_SIZE": "\u00b2"}, "WORLD_SIZE=\u00b2"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 20}, "WORLD_SIZE=999"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["run", "serve", "check", "chat"])
def test_half_an_environment_is_refused(
    environment: dict[str, str], reason: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bundle = ROOT / "plans/frozen/demo-cpu"
    more = {"run": ["--prompt", "a"], "serve": ["--port", "0"], "check": ["--canary"], "chat": []}
    done = CliRunner().invoke(main, [command, str(bundle), *more[command]])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: the environment has {reason}"), done.stderr
    assert done.stderr.count("error: ") == done.stderr.count("hint: ") == 1


def test_one_process_needs_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (rank_place.own_rank(), rank_place.world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("address", "port", "reason"),
    [
        ("127.0.0.1", None, "the environment has WORLD_SIZE=2 and no MASTER_PORT"),
        ("127.0.0.1", "70000", "the environment has MASTER_PORT=70000"),
        ("127.0.0.1", "ten", "the environment has MASTER_PORT=ten"),
        ("192.0.2.1", "29999", "rank 0 cannot listen on 192.0.2.1:29999"),
    ],
)
def test_where_the_ranks_meet(
    address: str, port: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    if port is not None:
        monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(RankError) as caught:
        rank_place.find_store(0, 2)
    assert caught.value.message.startswith(reason)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_an_odd_environment_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "two")
    with pytest.raises(RankError, match=f"{name}=two"):
        {"WORLD_SIZE": rank_place.world_size, "RANK": rank_place.own_rank}[name]()
