"""What the functions of libraries for attention over pages have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed_plan.plans.libraries import operands_by_role
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.schema import KernelSpec

softplus_backward = torch.ops.aten.softplus_backward.grad_input
GATE_IS_ONE = 20.0  # from here on a gate is open: the sigmoid is 1 to 2e-9
OPERANDS = ("q", "kv_cache", "page_table", "context_lens", "cu_seqlens")


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Where the tensors of a kernel of attention are, and its constants.

    Attributes:
        operands: places of `OPERANDS` among the kernel's tensors.
        result: the place of the result.
        gate: the place of its output gate, if it has one.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: of all of them.
        page_size: tokens of a page.
    """

    operands: tuple[int, ...]
    result: int
    gate: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @classmethod
    def of(cls, kernel: KernelSpec) -> PagedAttention:
        """That of a kernel whose first part is attention, and whose last may be its gate."""
        places = {param.name: index for index, param in enumerate(kernel.tensors)}
        roles = operands_by_role(kernel, "attention")
        attrs = kernel.parts[0].attrs
        gate = None
        if kernel.parts[-1].kind == "sigmoid_gate":
            gate = places[operands_by_role(kernel, "sigmoid_gate")["g"]]
        return cls(
            operands=tuple(places[roles[name]] for name in OPERANDS),
            result=places[kernel.parts[-1].outputs[0]],
            gate=gate,
            num_heads=integer(attrs, "num_heads"),
            num_kv_heads=integer(attrs, "num_kv_heads"),
            head_dim=integer(attrs, "head_dim"),
            page_size=integer(attrs, "page_size"),
        )

    @property
    def heads(self) -> tuple[int, int]:
        """The shape of a token's queries."""
        return self.num_heads, self.head_dim

    def multiply_by_gate(self, tensors: Sequence[Tensor]) -> None:
        """Multiply the result by the sigmoid of its gate, if it has one.

        That is the derivative of softplus, which PyTorch multiplies by in one pass over the memory:
        `mul_(sigmoid())` is two, with a tensor between them that is rounded once more.
        """
        if self.gate is not None:
            y_TN, g_TN = tensors[self.result], tensors[self.gate]
            softplus_backward(y_TN, g_TN, 1.0, GATE_IS_ONE, grad_input=y_TN)
