"""Which GPUs of a host a pool of a plan takes."""

from __future__ import annotations

import os

import torch

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan


def prefill_devices(plan: Plan) -> str:
    """`CUDA_VISIBLE_DEVICES` of a prefill pool beside this decode pool.

    Both see all GPUs, since each writes the memory of the other; the own ones come first.

    Raises:
        PoolError: there are not enough.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        shown = ",".join(map(str, range(torch.cuda.device_count())))
    devices = [each for each in shown.split(",") if each]
    if len(devices) < plan.target.count:
        raise PoolError(
            f"the pools of the plan are for {plan.target.count} GPUs, this machine shows "
            f"{len(devices)}",
            "plan with `disaggregation: off`, or check `CUDA_VISIBLE_DEVICES`",
        )
    own = plan.pool.layout.num_ranks
    return ",".join(devices[own:] + devices[:own])
