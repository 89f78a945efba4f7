"""The plans of the examples, from git: `test_frozen.py` proves that they are what specs give."""

from __future__ import annotations

from functools import cache

from conftest import ROOT

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan

# The folder of an example, and that of its plan.
FROZEN = {
    "demo": "demo-cpu",
    "qwen3.5-397b-b200x8": "qwen3.5-397b-b200x8",
    "qwen3.5-35b-h200": "qwen3.5-35b-h200",
    "qwen3.5-35b-fp8-h200": "qwen3.5-35b-fp8-h200",
    "qwen3.5-122b-h200x2": "qwen3.5-122b-h200x2",
    "qwen3.5-397b-h200x8": "qwen3.5-397b-h200x8",
}


@cache
def frozen_plan(example: str) -> Plan:
    """The plan of an example; to plan the large ones again takes a quarter of a minute each."""
    return load_plan(ROOT / "plans/frozen" / FROZEN[example])
