"""Processes forked from one that has loaded the product once, and has no threads.

A process that was forked from a test's own would keep the locks that threads of earlier tests held
at that moment, and wait for them without end.
"""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "torch.distributed",
        "tokenspeed_plan.planner.cli",
        "tokenspeed_plan.planner.commands.run",
        "tokenspeed_plan.planner.commands.serve",
        "tokenspeed_plan.runtime.engine",
        "tokenspeed_plan.runtime.execution.ranks",
        "tokenspeed_plan.runtime.serving.batch",
        "tokenspeed_plan.runtime.serving.http",
        "tokenspeed_plan.runtime.serving.leases.lease_worker",
    ]
)
