"""How many threads a plan for a CPU computes with."""

from __future__ import annotations

import os

import torch

from tokenspeed_plan.plans.schema import Plan

# Handing half of a small product to another thread takes longer than computing it: on two cores,
# 16 rows times 512 x 512 numbers take 0.19 ms with one thread and 0.27 ms with two.
_MIN_SHARED_WIDTH = 1024


def limit_threads(plan: Plan) -> None:
    """Compute a narrow model on a CPU with one thread, and share the cores among ranks.

    OMP_NUM_THREADS may say otherwise.
    """
    if plan.target.device != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if plan.model.hidden_size < _MIN_SHARED_WIDTH:
        torch.set_num_threads(1)
    elif plan.target.count > 1:
        torch.set_num_threads(max(torch.get_num_threads() // plan.target.count, 1))
