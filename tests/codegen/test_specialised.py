"""Grouped products by warps that load and warps that multiply agree with their references.

Without a GPU their partitions run as threads: this finds wrong indices, counts and phases, also of
programs that take several tiles, but no missing fence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
from gluon_double import in_place_of_gluon
from kernel_lab import DEVICE, Case, allowed, broken, errors, tiled

from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.codegen.moe.specialised_tiling import WARPS
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.plans.schema import GridDim

# Three of four experts have 153 pairs each: a whole tile and half of one.
ALL = Case("prefill", (3, 227), (0, 9), "bf16", "wide experts", "H200")
IN_FP8 = replace(ALL, kind="wide experts in blocks", fp8=True, quantises=True)
TILES = {"bf16": Tile(128, 128, 64, WARPS, 4), "fp8": Tile(128, 128, 128, WARPS, 4)}
CASES = {
    "all experts": ALL,
    "all experts in FP8": IN_FP8,
    "half tiles only in FP8": replace(IN_FP8, lengths=(64,), before=(0,)),
    "experts of a rank in FP8": replace(IN_FP8, layout=ParallelLayout(2, 1, 2)),
    "half tiles only": replace(ALL, lengths=(64,), before=(0,)),
    "experts of a rank": replace(ALL, layout=ParallelLayout(2, 1, 2)),
}
KINDS = ("grouped_up", "grouped_down")
PROGRAMS = 3  # each takes several tiles


def specialised(case: Case, kind: str) -> Built:
    built = tiled(case, kind, TILES["fp8" if case.fp8 else "bf16"])
    assert built.kernel.launch is not None
    assert built.kernel.launch.template == "grouped_specialised"
    launch = built.kernel.launch.model_copy(update={"grid": (GridDim(fixed=PROGRAMS),)})
    return replace(built, kernel=built.kernel.model_copy(update={"launch": launch}))


def gluon() -> AbstractContextManager[None]:
    """What the kernels import: Gluon itself where it can run."""
    if DEVICE == "cuda":
        return nullcontext()
    return in_place_of_gluon()


def differences(built: Built, case: Case) -> Iterator[tuple[str, float]]:
    with gluon():
        yield from errors(built, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_specialised_products_equal_their_references(name: str, kind: str) -> None:
    case = CASES[name]
    checked = dict(differences(specialised(case, kind), case))
    assert "y" in checked
    assert ("counters" in checked) == (kind == "grouped_up")
    for param, error in checked.items():
        assert error <= allowed(case, param), param


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("grouped_up", "slot * 128", "slot * 64"),
        ("grouped_up", "j // 2 * GAP", "j // 2 * 128"),
        ("grouped_up", "left / (1.0", "right / (1.0"),
        ("grouped_up", "asked == total - 1", "asked == total"),
        ("grouped_down", "order + next_begin + 64 + m", "order + next_begin + m"),
        ("grouped_down", "y_ptrs + 128", "y_ptrs"),
    ],
)
def test_a_broken_specialised_product_is_caught(kind: str, old: str, new: str) -> None:
    assert is_caught(ALL, kind, old, new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("grouped_up", "j * GAP * K", "j * 64 * K"),
        ("grouped_up", "is_gate, w_factor, up_factor", "is_gate, up_factor, w_factor"),
        ("grouped_up", "column * WIDTH // BLOCK", "column"),
        ("grouped_up", "2 * s + HALF).load", "2 * s).load"),
        ("grouped_down", "acc += step_sum", "acc = step_sum"),
        ("grouped_down", "next_begin + both, mask", "next_begin, mask"),
        ("grouped_down", "factors + step", "factors"),
    ],
)
def test_a_broken_specialised_product_in_fp8_is_caught(kind: str, old: str, new: str) -> None:
    assert is_caught(IN_FP8, kind, old, new)


def is_caught(case: Case, kind: str, old: str, new: str) -> bool:
    built = broken(specialised(case, kind), old, new)
    return any(not error <= allowed(case, name) for name, error in differences(built, case))
