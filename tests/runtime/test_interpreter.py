"""Whole models in Triton's interpreter give the references' tokens; `--check` finds a fault."""

from __future__ import annotations

import multiprocessing
import os
import pty
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from bundles import (
    COMMAND,
    Change,
    break_kernels,
    in_text,
    token_ids,
    write_batch,
    write_bundle,
)
from checkpoints import KERNEL, Kind, write_checkpoint
from conftest import ROOT
from forks import Done, run_forked

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import GridDim, Launch
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.backend import KernelBackend, ReferenceBackend, load_kernels
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.loading.preflight import find_weights
from tokenspeed_plan.runtime.loading.weights import load_weights

DEMO = ROOT / "plans/frozen/demo-cpu"
CHUNK = 64  # of the delta rule
# Heads as large as those of the published models, but few of them: the interpreter takes a second
# for a large matrix.
FEW_HEADS = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
# One prompt of 12 tokens is compared.
SMALL = {"first_turn_tokens": 8, "output_tokens": 8, "concurrency": 1}


def run(*args: object) -> Done:
    """The command in a process of its own, where nobody has asked for the interpreter yet."""
    return run_forked(be_alone, ["run", *map(str, args)])


def be_alone(words: list[str]) -> None:
    assert "triton.language" not in sys.modules
    for name in os.environ.keys() - own_environment().keys():
        del os.environ[name]
    main(words)


def own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}


@pytest.mark.slow
def test_check_tells_a_terminal_how_far_it_is() -> None:
    ours, terminal = pty.openpty()
    words, said, piped = [*COMMAND, "run", str(DEMO), "--check"], b"", subprocess.PIPE
    with subprocess.Popen(words, env=own_environment(), stdout=piped, stderr=terminal) as process:
        os.close(terminal)
        with suppress(OSError):  # that is how a terminal ends
            while part := os.read(ours, 1 << 12):
                said += part
        os.close(ours)
        assert process.stdout and b"kernels and references agree" in process.stdout.read()
    stage = rb"\r\x1b\[Kcomparing steps of (prefill|decode)/\d+: \d+ of \d+"
    assert re.search(stage, said) and said.endswith(b"\r\x1b[K")


def interpreted_tokens(
    bundle: Path, folder: Path, prompts: list[list[int]], counts: list[int]
) -> list[list[int]]:
    """What the kernels of a bundle answer."""
    source, output = write_batch(folder / "in.jsonl", prompts, counts), folder / "out.jsonl"
    options = ("--backend", "kernels", "--no-canary", "--quiet")
    done = run(bundle, *options, "--input", source, "--output", output)
    assert done.returncode == 0, done.stderr
    return token_ids(output)


def reference_tokens(bundle: Path, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """What the references answer."""
    params = SamplingParams(max_tokens=max(counts), ignore_eos=True)
    done = Engine.load(bundle).generate(prompts, params)
    return [list(item.token_ids[:count]) for item, count in zip(done, counts, strict=True)]


def prompt(length: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def is_clean_error(done: Done, says: str) -> None:
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == done.stderr.count("\nhint: ") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def checkpoint_of_large_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the `kernel` kind, with heads of 128 and 256, but shorter."""
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / "heads", Kind(sizes=KERNEL | FEW_HEADS)
    )


@pytest.fixture(scope="module")
def bundle(checkpoint_of_large_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small plan of it, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("interpreter") / "plan"
    write_bundle(folder, checkpoint_of_large_heads, workload=SMALL)
    return folder


@pytest.mark.slow
def test_the_demo_model_gives_the_same_tokens(tmp_path: Path) -> None:
    """The frozen plan. One answer is longer, so that batches of two and of one are decoded."""
    prompts, counts = [prompt(18, 2000), prompt(2, 2000)], [3, 2]
    wanted = reference_tokens(DEMO, prompts, counts)
    assert interpreted_tokens(DEMO, tmp_path, prompts, counts) == wanted


@pytest.mark.slow
def test_large_heads_give_the_same_tokens(checkpoint_of_large_heads: Path, tmp_path: Path) -> None:
    """Two chunks of the delta rule beside a short prompt, then a ragged batch in decode."""
    bundle = tmp_path / "plan"
    write_bundle(bundle, checkpoint_of_large_heads)
    prompts, counts = [prompt(CHUNK + 1, 400), prompt(3, 400)], [4, 4]
    wanted = reference_tokens(bundle, prompts, counts)
    assert interpreted_tokens(bundle, tmp_path, prompts, counts) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("rollback", ["snapshot", "recompute"])
def test_verified_drafts_give_the_same_tokens(
    rollback: str, trained_moe: Path, tmp_path: Path
) -> None:
    """Three queries a sequence. Steps accept none, one and both of their drafts."""
    spec = {
        "workload": SMALL | {"concurrency": 2},
        "speculation": {"depth": 2, "rollback": rollback},
    }
    write_bundle(tmp_path / "plan", trained_moe, **spec)
    engine = Engine.load(tmp_path / "plan")
    prompts, counts = [[3, 4, 5], [7, 300, 20, 11]], [11, 3]
    wanted = [
        list(done.token_ids)
        for done in engine.generate(prompts, SamplingParams(max_tokens=11, ignore_eos=True))
    ]
    accepted = engine.accept_counts
    assert accepted[0] > accepted[1] > accepted[2] > 0
    found = interpreted_tokens(tmp_path / "plan", tmp_path, prompts, counts)
    assert found == [wanted[0], wanted[1][:3]]


@pytest.mark.slow
def test_check_agrees(bundle: Path) -> None:
    """A pipe gets no line of its progress."""
    done = run(bundle, "--check")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "steps: kernels and references agree; the largest difference is " in done.stdout


@pytest.mark.slow
def test_check_agrees_on_programs_that_draft(tmp_path: Path) -> None:
    """Every step that has a kernel runs on the results of the steps before it."""
    checkpoint = write_checkpoint(tmp_path / "model", Kind())
    write_bundle(tmp_path / "plan", checkpoint, workload=SMALL, speculation={"depth": 2})
    done = run(tmp_path / "plan", "--check")
    assert done.returncode == 0, done.stderr
    assert "steps: kernels and references agree; the largest difference is " in done.stdout


def half_a_grid(text: str, launch: Launch) -> tuple[str, Launch]:
    """Launch programs for the first head only, so that the other heads' output stays as it was."""
    assert launch.grid[1].fixed == FEW_HEADS["linear_num_value_heads"]
    return text, launch.model_copy(update={"grid": (launch.grid[0], GridDim(fixed=1))})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(
            "gated_norm", in_text("* gate * tl.sigmoid(gate)", "* tl.sigmoid(gate)"), id="its text"
        ),
        pytest.param("gated_norm", half_a_grid, id="its launch"),
    ],
)
def test_check_names_the_broken_step(
    kind: str, change: Change, bundle: Path, tmp_path: Path
) -> None:
    """The digests fit the broken kernel, so that only its results show the fault."""
    broken = Path(shutil.copytree(bundle, tmp_path / "plan"))
    break_kernels(broken, kind, change)
    done = run(broken, "--check")
    is_clean_error(done, "kernel and reference differ by")
    assert f", `{kind}_" in done.stderr and "error: step " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["--check"], ["--backend", "kernels", "--prompt", "x", "--max-tokens", "1"]]
)
def test_an_altered_text_is_refused_before_it_runs(
    how: list[str], bundle: Path, tmp_path: Path
) -> None:
    """This holds even where the result would be right."""
    altered, trace = Path(shutil.copytree(bundle, tmp_path / "plan")), tmp_path / "trace"
    path = min((altered / "kernels").glob("gated_norm_*.py"))
    path.write_text(f"{path.read_text()}\nopen({str(trace)!r}, 'w').close()\n")
    is_clean_error(run(altered, *how), f"the text of kernel `{path.stem}` is not the plan's")
    assert not trace.exists()


def full_size_tokens(prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    """The tokens of kernels bound as on a GPU: to addresses, at a program's full size."""
    plan = load_plan(DEMO)
    folder = find_weights(plan, DEMO, None)
    arenas, weights = load_weights(plan, folder, lambda: Arenas(plan.pool.arenas))
    kernels, reference = load_kernels(plan, DEMO), ReferenceBackend(plan)
    backend = KernelBackend(plan, kernels, reference, full_size=True)
    engine = Engine(plan, Executor(PlanMemory(plan, arenas, weights), backend))
    answers = [engine.generate([prompt], params) for prompt in prompts]  # each of its own size
    return [tuple(done.token_ids) for (done,) in answers]


@pytest.mark.slow
def test_kernels_need_only_addresses() -> None:
    """Kernels bound once, at a program's full size, compute batches of any size."""
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompts = [list(range(5, 12)), list(range(30, 50))]
    # A new process, as another test may have loaded Triton to compile.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        whole = pool.submit(full_size_tokens, prompts, params).result()
    assert whole == [tuple(done.token_ids) for done in Engine.load(DEMO).generate(prompts, params)]
