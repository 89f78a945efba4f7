"""Plan bundles on disk, also broken ones, and the command that runs them in its own process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import make_spec
from planning import compiled

from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.golden import with_canary
from tokenspeed_plan.plans.bundle import load_plan, save_plan, seal
from tokenspeed_plan.plans.canon import kernel_name, sha256
from tokenspeed_plan.plans.kernel_file import kind_of, read_source
from tokenspeed_plan.plans.schema import KernelCall, KernelSpec, Launch, Plan, Step

COMMAND = (sys.executable, "-c", "from tokenspeed_plan.planner.cli import main; main()")
Change = Callable[[str, Launch], tuple[str, Launch]]


def write_bundle(folder: Path, checkpoint: Path, canary: bool = False, **changes: Any) -> Plan:
    """Write the bundle of `make_spec(checkpoint, **changes)`; runs start faster with no canary."""
    spec = make_spec(checkpoint, **changes)
    made = compiled(spec)
    plan = with_canary(made.plan, spec, find_model(spec)) if canary else made.plan
    save_plan(plan, folder, made.sources)
    return plan


def break_kernels(bundle: Path, kind: str, change: Change) -> None:
    """Change text and launch of all kernels of a kind, with names and digests that fit."""
    plan = load_plan(bundle)
    broken = {
        kernel.name: _broken(kernel, read_source(bundle, kernel), change)
        for kernel in plan.kernels
        if kind_of(kernel) == kind
    }
    assert broken, f"no kernel is a `{kind}`"
    texts = {
        kernel.name: read_source(bundle, kernel)
        for kernel in plan.kernels
        if kernel.name not in broken
    }
    texts |= {kernel.name: text for kernel, text in broken.values()}
    kernels = [
        broken[kernel.name][0] if kernel.name in broken else kernel for kernel in plan.kernels
    ]
    names = {old: kernel.name for old, (kernel, _) in broken.items()}
    programs = tuple(
        program.model_copy(update={"steps": tuple(_renamed(step, names) for step in program.steps)})
        for program in plan.pool.programs
    )
    kept = tuple(sorted(kernels, key=lambda kernel: kernel.name))
    save_plan(
        seal(plan.with_pool(programs=programs).model_copy(update={"kernels": kept})), bundle, texts
    )


def _broken(kernel: KernelSpec, text: str, change: Change) -> tuple[KernelSpec, str]:
    assert kernel.launch is not None
    text, launch = change(text, kernel.launch)
    launch = launch.model_copy(update={"source_sha256": sha256(text)})
    made = kernel.model_copy(update={"launch": launch})
    return made.model_copy(update={"name": kernel_name(kind_of(kernel), made)}), text


def _renamed(step: Step, names: dict[str, str]) -> Step:
    if isinstance(step, KernelCall) and step.kernel in names:
        return step.model_copy(update={"kernel": names[step.kernel]})
    return step


def in_text(old: str, new: str) -> Change:
    """A change of a piece of the text."""

    def change(text: str, launch: Launch) -> tuple[str, Launch]:
        assert old in text, old
        return text.replace(old, new), launch

    return change


def write_batch(path: Path, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Path:
    """Write a batch file of greedy completions of token ids, of exactly `counts` tokens each."""
    fixed = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    rows = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": list(prompt), "max_tokens": count, **fixed},
        }
        for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_ids(path: Path) -> list[list[int]]:
    """The answers of a batch's output file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["response"]["body"]["choices"][0]["token_ids"] for line in lines]
