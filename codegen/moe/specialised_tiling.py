"""Grouped products of experts by warps that load, and warps that multiply: Hopper, bf16 and FP8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenspeed_plan.codegen.tiling import Tiling, Work, fixed, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.types import Constant, TensorSpec

WARPS = 12  # four load, two groups of four multiply: no other kernel has so many
LOADERS = 128  # threads


@dataclass(frozen=True, slots=True)
class _Step:
    """What is loaded at once.

    Attributes:
        lines: of a weight, in a tile.
        depth: of a step.
        down_stages: steps in flight; a tile has as many at least.
        up_stages: the same, where the result is half as wide and leaves more shared memory.
    """

    lines: int
    depth: int
    down_stages: int
    up_stages: int

    def width(self, is_up: bool) -> int:
        """Columns of the result that a tile computes; up needs both halves of its weight."""
        if is_up:
            return self.lines // 2
        return self.lines

    def stages(self, is_up: bool) -> int:
        """Steps in flight."""
        if is_up:
            return self.up_stages
        return self.down_stages


IN_BF16 = _Step(lines=256, depth=64, down_stages=4, up_stages=4)
# Two sums of a tile are in a thread's registers. An H200 takes 370 us for 8,192 tokens (1,024 x
# 2,048), 385 with four stages, and 445 without warps that load; down 237 for 269.
IN_FP8 = _Step(lines=128, depth=BLOCK, down_stages=4, up_stages=6)


def _step(work: Work) -> _Step:
    if work.quantised:
        return IN_FP8
    return IN_BF16


def specialised_tile(work: Work, columns: int, depth: int, is_up: bool) -> list[Tile]:
    """The tile of such a kernel, where there is one."""
    step = _step(work)
    width, stages = step.width(is_up), step.stages(is_up)
    plain = not (work.is_fp8("w") or work.is_fp4("w"))
    known = work.dtype == "bf16" and (work.quantised or plain) and not work.by_seqs
    fits = columns % width == 0 and depth % step.depth == 0 and depth >= stages * step.depth
    if work.hardware.sm == 90 and known and fits:
        return [Tile(128, width, step.depth, WARPS, stages)]
    return []


def specialised_tiling(
    work: Work, tile: Tile, sizes: Mapping[str, Constant], is_up: bool
) -> Tiling:
    """A program for each multiprocessor."""
    columns, experts = int(sizes["N"]), int(sizes["EXPERTS"])
    step = _step(work)
    halves: dict[str, Constant] = {"GAP": step.lines // 2, "LINES": columns}
    if is_up:
        halves = {"GAP": columns, "LINES": 2 * columns}
    halves["WIDTH"] = step.width(is_up)
    if work.quantised:
        halves["BLOCK"] = BLOCK
    # Few long tiles are asked for, so that all programs end together; short ones are dealt out.
    scratch: dict[str, TensorSpec] = {}
    if is_up:
        scratch = {"counters": TensorSpec.of(shape=(1,), dtype="i32")}
    return Tiling(
        template="grouped_specialised",
        constants={
            "BLOCK_E": max(up2(experts + 1), LOADERS),
            "EXPERTS": experts,
            "K": sizes["K"],
            "N": columns,
            "STAGES": tile.num_stages,
            "TOP_K": sizes["TOP_K"],
        }
        | halves,
        grid=(fixed(max(work.hardware.num_sms, 1)),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={
            "silu_mul": is_up,
            "asks": is_up,
            "x": "x" if is_up else "h",
            "quantised": work.quantised,
        },
        scratch=scratch,
    )
