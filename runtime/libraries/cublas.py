"""Products by cuBLAS, as PyTorch calls it.

Shapes: T tokens, I columns of x, O rows of the weight, N of them for one result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.libraries import operands_by_role
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.execution.fp8_blocks import Scaled, parts_of
from tokenspeed_plan.runtime.execution.kernels import Launcher

FACTORS = 4  # cuBLAS wants them in multiples of this, of tokens and of the depth


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


def linear_fp8(kernel: KernelSpec) -> Launcher:
    """A function of the kernel's tensors: y = x W^T of FP8 in blocks, or that and r, in bf16."""
    places = {param.name: index for index, param in enumerate(kernel.tensors)}
    roles = operands_by_role(kernel, "linear")
    x, weight = places[roles["x"]], places[roles["w"]]
    x_spec, w_spec = kernel.tensors[x].tensor, kernel.tensors[weight].tensor
    results = [places[name] for name in kernel.parts[-1].outputs]
    residual = None
    if len(kernel.parts) > 1:
        residual = places[operands_by_role(kernel, "add")["r"]]

    def run(_: object, *tensors: Tensor) -> tuple[()]:
        rows = _padded(parts_of(tensors[x], x_spec))
        w = parts_of(tensors[weight], w_spec)
        factors, missing = w.scales, -w.scales.shape[1] % FACTORS
        if missing:
            factors = F.pad(factors, (0, missing))
        first = 0
        for place in results:
            y_TN = tensors[place]
            end = first + y_TN.shape[1]
            part = Scaled(w.elements[first:end], factors[first // BLOCK : end // BLOCK])
            _multiply(rows, part, y_TN)
            first = end
        if residual is not None:
            tensors[results[0]].add_(tensors[residual])
        return ()

    return run


def _padded(x: Scaled) -> Scaled:
    """Activations with as many tokens as cuBLAS wants, and their factors by columns."""
    missing = -x.elements.shape[0] % FACTORS
    elements, factors = x.elements, x.scales.t()
    if missing:
        elements = F.pad(elements.view(torch.uint8), (0, 0, 0, missing)).view(elements.dtype)
        factors = F.pad(factors, (0, missing))
    return Scaled(elements, factors.contiguous().t())


def _multiply(x: Scaled, w: Scaled, y_TN: Tensor) -> None:
    """y = x W^T, without the tokens that were added."""
    count = y_TN.shape[0]
    whole = y_TN
    if len(x.elements) > count:
        whole = torch.empty(len(x.elements), y_TN.shape[1], dtype=y_TN.dtype, device=y_TN.device)
    torch._scaled_mm(
        x.elements, w.elements.t(), x.scales, w.scales.t(), out_dtype=y_TN.dtype, out=whole
    )
    if whole is not y_TN:
        y_TN.copy_(whole[:count])
