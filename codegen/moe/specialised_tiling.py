"""Grouped products of experts by warps that load, and warps that multiply: Hopper, bf16 and FP8."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed_plan.codegen.tiling import Tiling, Work, fixed, up2
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.types import Constant, TensorSpec

WARPS = 12  # four load, two groups of four multiply: no other kernel has so many
LINES = 256  # of a weight, in a tile
DEPTH = 64  # of a step
STAGES = 4
LOADERS = 128  # threads


def specialised_tile(work: Work, columns: int, depth: int, is_up: bool) -> list[Tile]:
    """The tile of such a kernel, where there is one."""
    width = _width(is_up)
    in_bf16 = work.dtype == "bf16" and not (
        work.is_fp8("w") or work.is_fp4("w") or work.quantised or work.by_seqs
    )
    fits = columns % width == 0 and depth % DEPTH == 0 and depth >= STAGES * DEPTH
    if work.hardware.sm == 90 and in_bf16 and fits:
        return [Tile(128, width, DEPTH, WARPS, STAGES)]
    return []


def specialised_tiling(
    work: Work, tile: Tile, sizes: Mapping[str, Constant], is_up: bool
) -> Tiling:
    """A program for each multiprocessor."""
    columns, experts = int(sizes["N"]), int(sizes["EXPERTS"])
    lines = LINES
    if work.quantised:  # two sums of a tile are in a thread's registers
        lines = LINES // 2
    halves: dict[str, Constant] = {"GAP": lines // 2, "LINES": columns, "WIDTH": lines}
    if is_up:
        halves = {"GAP": columns, "LINES": 2 * columns, "WIDTH": lines // 2}
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


def _width(is_up: bool) -> int:
    """Columns of the result that a tile computes; up needs both halves of its weight."""
    return LINES // 2 if is_up else LINES
