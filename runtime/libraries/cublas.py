"""Products by cuBLAS, as PyTorch calls it.

Shapes: T tokens, I columns of x, O rows of the weight, N of them for one result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed_plan.plans.libraries import operands_by_role
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.kernels import Launcher


def linear(kernel: KernelSpec) -> Launcher:
    """A function of the kernel's tensors: y = x W^T, the rows of W shared out over the results."""
    places = {param.name: index for index, param in enumerate(kernel.tensors)}
    roles = operands_by_role(kernel, "linear")
    x, weight = places[roles["x"]], places[roles["w"]]
    results = [places[name] for name in kernel.parts[0].outputs]

    def run(_: object, *tensors: Tensor) -> tuple[()]:
        x_TI, w_OI = tensors[x], tensors[weight]
        first = 0
        for place in results:
            y_TN = tensors[place]
            end = first + y_TN.shape[1]
            torch.mm(x_TI, w_OI[first:end].t(), out=y_TN)
            first = end
        return ()

    return run
