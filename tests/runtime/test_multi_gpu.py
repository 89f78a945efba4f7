"""Two GPUs, for real: `pytest -m multi_gpu` on a machine that has them; elsewhere it is skipped."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import COMMAND, token_ids, write_batch
from conftest import ROOT

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.planner.advisor.sum_probe import EPS, compile_push_kernels, push_kernels
from tokenspeed_plan.planner.machines.hardware import find_hardware

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
HIDDEN = 2048
ROWS = (1, 4, 64, 256, 257, 3000)  # a program each, then in turns
SPAWN = multiprocessing.get_context("spawn")
PROMPTS = [[5, 6, 7, 8] * 20, [9], list(range(40, 110))]
COUNTS = [16, 16, 16]


def tokenspeed(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=180, cwd=ROOT
    )


def add_up(rank: int, port: int, out: Any) -> None:
    """On one rank, sums by NCCL and by our kernels: how far they differ, and digests of ours."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    from tokenspeed_plan.runtime.bench.rank_sums import Sums
    from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels
    from tokenspeed_plan.runtime.execution.rank_links import join_to_measure

    links, hardware = join_to_measure("cuda"), find_hardware("H200")
    assert links.collectives is not None
    limits = (256, max(ROWS))
    built = push_kernels(HIDDEN, 2, limits, hardware)
    kernels = CudaKernels(*compile_push_kernels(built, hardware.sm, default_cache()))
    specs = {most: each.kernel for most, each in zip(limits, built, strict=True)}
    sums, found = Sums(links, "cuda", kernels, specs), []
    for number, rows in enumerate(ROWS * 3):
        made = torch.Generator("cuda").manual_seed(number)
        parts, residual = (
            torch.randn(*shape, generator=made, device="cuda").bfloat16()
            for shape in ((2, rows, HIDDEN), (rows, HIDDEN))
        )
        norm = torch.randn(HIDDEN, generator=made, device="cuda").bfloat16()
        total, normed, by_nccl = (torch.empty_like(residual) for _ in range(3))
        sums.push([parts[rank].contiguous(), residual, norm, total, normed])()
        links.collectives.all_reduce(parts[rank].contiguous(), by_nccl)
        exact = by_nccl.float() + residual.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
        wanted = exact * scale * (1 + norm.float())
        error = (normed.float() - wanted).abs().max() / wanted.abs().max()
        found.append((error.item(), total.view(torch.int16).long().sum().item()))
    links.meet()
    out.put((rank, found))


def test_pushed_sums_are_those_of_nccl(free_port: int) -> None:
    out = SPAWN.Queue()
    ranks = [SPAWN.Process(target=add_up, args=(rank, free_port, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = (found for _, found in sorted(out.get(timeout=120) for _ in ranks))
    for process in ranks:
        process.join(30)
    assert [digest for _, digest in first] == [digest for _, digest in second], "the same bits"
    assert max(error for error, _ in first) < 1e-2


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("layout", ["tp", "ep"])
def test_two_gpus_answer_as_one(layout: str, tmp_path: Path) -> None:
    """The canary compares with fp64; then most greedy tokens are those of one GPU."""
    write_batch(tmp_path / "in.jsonl", PROMPTS, COUNTS)
    pair = ROOT / f"benchmarks/specs/demo-h200x2-{layout}.yaml"
    one = tmp_path / "one.yaml"
    lines = pair.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("parallelism")]
    text = "\n".join(kept).replace("count: 2", "count: 1")
    one.write_text(text.replace("examples/", f"{ROOT}/examples/"))
    answers = [answers_of(spec, tmp_path / spec.stem) for spec in (pair, one)]
    same = sum(a == b for a, b in zip(*map(flat, answers), strict=True))
    assert same >= 0.75 * sum(COUNTS), answers


def answers_of(spec: Path, folder: Path) -> list[list[int]]:
    """Plan, compare each step with its reference, and answer after the canary."""
    done = tokenspeed("plan", spec, "-o", folder)
    assert done.returncode == 0, done.stderr
    done = tokenspeed("run", folder, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "out.jsonl"
    done = tokenspeed("run", folder, "--input", folder.parent / "in.jsonl", "--output", out)
    assert done.returncode == 0, done.stderr
    return token_ids(out)


def flat(answers: Sequence[Sequence[int]]) -> list[int]:
    """All tokens in order."""
    return [token for answer in answers for token in answer]
