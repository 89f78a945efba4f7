"""How fast weights get from files into the arenas, compared with only reading the files.

    python benchmarks/load.py DIR [--folder /tmp]

Makes a checkpoint of random weights as the plan of DIR wants it, in a temporary folder, and reads
it from the page cache: raw, by one thread in blocks of 16 MiB, and through `load_weights`, digests
and checks of shapes included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.weight_files import INDEX_FILE
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES, Arenas
from tokenspeed_plan.runtime.loading.weights import load_weights

SHARD_BYTES = 2 << 30
BLOCK_BYTES = 16 << 20
ROUNDS = 3


def tensors_of(
    source: str, start: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[tuple[str, list[int]]]:
    """The names of the tensors that rank 0 reads for a piece, and how far it reads each."""
    ends = [first + count for first, count in zip(start, size, strict=True)]
    if "{expert}" not in source:
        yield source, ends
        return
    for expert in range(start[0], ends[0]):
        yield source.replace("{expert}", str(expert)), ends[1:]


def write_checkpoint(plan: Plan, folder: Path) -> int:
    """Write random tensors of the names and shapes that the plan reads; returns their bytes."""
    shapes: dict[str, list[int]] = {}
    for weight in plan.pool.weights:
        for piece in weight.pieces:
            for name, ends in tensors_of(piece.source, piece.start, piece.size):
                known = shapes.get(name, ends)
                shapes[name] = [max(pair) for pair in zip(known, ends, strict=True)]
    dtype = TORCH_DTYPES[plan.pool.weights[0].tensor.dtype]
    shard: dict[str, torch.Tensor] = {}
    shard_of: dict[str, str] = {}
    total = count = 0
    for name, shape in shapes.items():
        shard[name] = (
            torch.randn(shape[-1], dtype=torch.float32).to(dtype).expand(shape).contiguous()
        )
        shard_of[name] = f"model-{count}.safetensors"
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"model-{count}.safetensors")
            shard, count = {}, count + 1
    if shard:
        save_file(shard, folder / f"model-{count}.safetensors")
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return total


def read_raw(folder: Path) -> None:
    """Read all files and keep nothing."""
    block = bytearray(BLOCK_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest round."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    arenas = Arenas(plan.pool.arenas, plan.target.device)

    def load() -> None:
        load_weights(plan, Path(folder), lambda: arenas, 0)
        if plan.target.device == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size_bytes = write_checkpoint(plan, Path(folder))
        os.sync()
        raw_s, load_s = best_s(lambda: read_raw(Path(folder))), best_s(load)
    print(
        f"{size_bytes / 1e9:.2f} GB: raw {raw_s:.2f} s ({size_bytes / raw_s / 1e9:.2f} GB/s), "
        f"load_weights {load_s:.2f} s ({size_bytes / load_s / 1e9:.2f} GB/s): {raw_s / load_s:.0%}"
    )


if __name__ == "__main__":
    main()
