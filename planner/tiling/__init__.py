"""Tiles: for each kind of kernel, which template, which block sizes, how many warps, best first."""

from tokenspeed_plan.planner.tiling.table import build_kernel

__all__ = ["build_kernel"]
