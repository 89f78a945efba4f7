"""Profiles of machines are complete, sourced and possible; errors are one line."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed_plan.planner.machines.hardware import (
    all_reduce_us,
    find_hardware,
    hardware_names,
    known_profiles,
    read_profile,
)
from tokenspeed_plan.plans.errors import SpecError

NAMES = ("A100", "B200", "B300", "GB200", "GB300", "H100", "H200", "RTX5090", "cpu")
SIZES = [1 << bits for bits in range(8, 28)]


def test_the_machines_that_we_promise() -> None:
    assert sorted(hardware_names()) == sorted(NAMES)
    assert find_hardware("A100-80G") == find_hardware("a100")
    assert find_hardware("RTX 5090").sm == 120


@pytest.mark.parametrize("name", NAMES)
def test_every_number_says_where_it_comes_from(name: str) -> None:
    machine = find_hardware(name)
    profile = read_profile(known_profiles()[name.lower()], name)
    for number in (
        *profile.numbers,
        *profile.matrix_flops_per_s,
        *profile.residuals,
        *profile.errors,
    ):
        assert len(machine.sources[number]) > 10, number
    assert machine.read_bytes_per_s <= machine.peak_bytes_per_s
    assert machine.usd_per_hour_reserved <= machine.usd_per_hour_on_demand


def test_the_tables_are_those_that_were_measured() -> None:
    """Points of aiconfigurator's tables, as the planners' survey gives them."""
    for name, size, count, wanted in (
        ("H200", 8192, 8, 3.6),
        ("H200", 131072, 8, 6.7),
        ("H200", 1 << 20, 8, 13.1),
        ("H200", 65536, 4, 3.5),
        ("B200", 8192, 8, 5.1),
        ("B200", 8192, 4, 4.6),
        ("B300", 65536, 8, 6.4),
        ("H100", 16384, 8, 3.8),
    ):
        assert all_reduce_us(find_hardware(name), size, count) == wanted, (name, size, count)


@pytest.mark.parametrize("name", NAMES)
@given(st.sampled_from([2, 4, 8]))
def test_more_bytes_and_more_gpus_never_take_less_time(name: str, count: int) -> None:
    machine = find_hardware(name)
    times = [all_reduce_us(machine, size, count) for size in SIZES]
    assert all(a <= b for a, b in pairwise(times))
    assert all(
        all_reduce_us(machine, size, 8) >= all_reduce_us(machine, size, count) for size in SIZES
    )
    assert all_reduce_us(machine, 8192, 1) == 0.0
    assert all_reduce_us(machine, 8192, 2 * machine.gpus_per_node) > all_reduce_us(machine, 8192, 8)


def test_past_the_tables_the_links_set_the_pace() -> None:
    """64 MiB over eight GPUs take seven eighths there and back over the links, and no more."""
    machine = find_hardware("H200")
    least_us = 2 * 7 / 8 * (64 << 20) / machine.link_bytes_per_s * 1e6
    assert least_us < all_reduce_us(machine, 64 << 20, 8) < 1.05 * least_us


def changed(path: str, value: Any) -> str:
    data = yaml.safe_load(known_profiles()["h200"])
    *folders, last = path.split(".")
    inner = data
    for folder in folders:
        inner = inner[folder]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("numbers.launch_us", None, "`numbers.launch_us` is missing"),
        ("numbers.speed", {"value": 1, "source": "prior"}, "`numbers.speed` is unknown"),
        ("numbers.l2_bytes", {"value": 1, "source": "prior"}, "nothing reads `numbers.l2_bytes`"),
        ("matrix_flops_per_s.nvfp4", {"value": 1, "source": "prior"}, "nvfp4` has a new name"),
        ("numbers.launch_us", {"value": 1}, "`numbers.launch_us.source`"),
        ("numbers.launch_us", {"value": -1, "source": "prior"}, "`numbers.launch_us.value`"),
        ("numbers.launch_us", {"value": 0, "source": "prior"}, "`numbers.launch_us` is 0"),
        (
            "numbers.launch_us",
            {"value": float("nan"), "source": "prior"},
            "`numbers.launch_us.value`",
        ),
        (
            "numbers.launch_us",
            {"value": 1, "source": "hearsay"},
            "source `hearsay` is not described",
        ),
        ("sources.rumour", "a blog", "source `rumour` has no number"),
        (
            "numbers.read_bytes_per_s",
            {"value": 9.0e12, "source": "prior"},
            "more than `peak_bytes_per_s`",
        ),
        ("residuals.product", None, "`residuals.product` is missing"),
        ("errors.memory", None, "`errors.memory` is missing"),
        ("all_reduce.one_shot", None, "`one_shot`"),
        ("all_reduce.ring", {"source": "prior", "us": {2: {8: 1.0}}}, "`one_shot`"),
        ("matrix_flops_per_s", {}, "no positive rate"),
        ("colour", "green", "`colour`"),
    ],
)
def test_a_bad_profile_says_what_is_wrong(path: str, value: Any, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_profile(changed(path, value), "mine.yaml")
    assert says in caught.value.message and "mine.yaml" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(changed("numbers.launch_us", {"value": 0.5, "source": "prior"}))
    assert find_hardware(str(path)).launch_us == 0.5
    for text in ("[", "- 1", "\x00"):
        path.write_text(text)
        with pytest.raises(SpecError):
            find_hardware(str(path))
    with pytest.raises(SpecError, match="cannot read"):
        find_hardware(str(tmp_path / "none.yaml"))
    with pytest.raises(SpecError, match="no GPU called"):
        find_hardware("H20000")


@pytest.mark.parametrize(
    ("name", "is_similar"), [("MI300X", False), ("TPUv5", False), ("B20", True), ("H20O", True)]
)
def test_an_unknown_gpu_gets_the_list(name: str, is_similar: bool) -> None:
    with pytest.raises(SpecError) as caught:
        find_hardware(name)
    assert "known: A100, B200" in caught.value.hint
    assert ("did you mean" in caught.value.hint) == is_similar
