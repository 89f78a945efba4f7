"""The host's part of a step: the fit finds what made the steps, and waiting is no work."""

from __future__ import annotations

import random
from typing import Any

import pytest
from drafting import plan_of

from tokenspeed_plan.runtime.bench.host_terms import (
    HostStep,
    WaitingLaunch,
    fit,
    measure_host,
)
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.launch import EagerLaunch


def test_a_fit_finds_what_made_the_steps() -> None:
    """Steps that are filling up, and a few that were disturbed, have no voice.

    Kernels of a prompt are launched while the device computes: no work before it begins.
    """
    dice, steps = random.Random(0), []
    for size in (1, 4, 16, 64):
        launched_us = 200 * (5.0 + size / 64)
        us = 30.0 + 250.0 + 120.0 * size + launched_us
        steps.append(HostStep("prefill", size, 0, us, 200, launched_us))
        steps.append(HostStep("decode", size, size // 2, 999.0))
        steps += [HostStep("decode", size, size, 30.0 + 4.0 * size) for _ in range(40)]
        steps += [HostStep("decode", size, size, dice.uniform(500, 5000)) for _ in range(5)]
    found = fit(steps)
    assert (found.step_us, found.seq_us) == pytest.approx((30.0, 4.0))
    assert (found.prefill_us, found.prompt_us) == pytest.approx((250.0, 120.0))
    assert found.launch_us == pytest.approx(5.0 + (4 + 16) / 2 / 64)
    alone = fit([step for step in steps if step.phase == "decode" or step.seqs == 4])
    assert (alone.prefill_us, alone.prompt_us) == pytest.approx((0.0, 250.0 / 4 + 120.0))


def test_waiting_is_no_work(checkpoint: Any) -> None:
    """A replay on the CPU takes far longer than what the host does for it."""
    plan = plan_of(checkpoint("moe"), 0)
    launch = WaitingLaunch(EagerLaunch(), replays_itself=True)
    engine = Engine.from_plan(plan, checkpoint("moe"), launch=launch)
    found = measure_host(engine, launch, (1, 4, 8))
    assert found.step_us + found.seq_us > 0
    assert found.prompt_us > 0
    assert launch.waited_s > 0
