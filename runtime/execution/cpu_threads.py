"""How many threads a plan for a CPU computes with."""

from __future__ import annotations

import os

import torch

from tokenspeed_plan.plans.schema import Plan

# Handing half of a small product to another thread takes longer than computing it: on two cores,
# 16 rows times 512 x 512 numbers take 0.19 ms with one thread and 0.27 ms with two.
_MIN_SHARED_WIDTH = 1024


def limit_threads(plan: Plan) -> None:
    """Compute a narrow model on a CPU with one thread, unless OMP_NUM_THREADS says otherwise."""
    is_narrow = plan.model.hidden_size < _MIN_SHARED_WIDTH
    if plan.target.device == "cpu" and is_narrow and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
