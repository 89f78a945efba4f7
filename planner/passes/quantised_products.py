"""Quantise: products of many rows multiply FP8 by FP8 where that is cheaper, by price.

A weight in blocks of FP8 is either converted in the kernel, which reads activations as they are, or
multiplied as it is, at twice the rate: then its activations are quantised by a kernel before it,
once for all products that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.graph import Op, OpGraph, Tensor
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.cost import (
    Load,
    Variant,
    costed_op,
    is_quantised,
    time_of,
)
from tokenspeed_plan.planner.passes.lower import LoweredProgram
from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.schema import Option
from tokenspeed_plan.plans.types import DTYPE_BITS, TensorSpec

QUANTISED_ROWS = 64  # of a tile on the tensor cores that multiplies elements of FP8 as they are
_KINDS = ("linear", "grouped_up", "grouped_down")


@dataclass(frozen=True, slots=True)
class Prices:
    """Microseconds of products with weights that are converted, and of FP8 by FP8.

    The latter have the kernel in them that quantises the activations.
    """

    converted_us: float
    quantised_us: float

    @property
    def quantises(self) -> bool:
        """Whether FP8 by FP8 is cheaper."""
        return self.quantised_us < self.converted_us


def quantise_products(
    graph: OpGraph, hardware: HardwareSpec, load: Load, wanted: bool | None = None
) -> OpGraph:
    """The graph with activations quantised for the products where that is cheaper.

    Args:
        graph: expanded.
        hardware: the target.
        load: what the program is priced for, of its full size.
        wanted: quantise everywhere, or nowhere; None for where it is cheaper.
    """
    chosen = {
        name
        for name, products in _products_by_input(graph).items()
        if (prices_of(graph, products, hardware, load).quantises if wanted is None else wanted)
    }
    if not chosen:
        return graph
    tensors, ops = dict(graph.tensors), []
    for op in graph.ops:
        ops.append(_reading(graph, op, chosen))
        for name in op.outputs:
            if name in chosen:
                made = _quantised(name)
                spec = TensorSpec(shape=tensors[name].spec.shape, format=FP8_ROWS)
                tensors[made] = Tensor(made, spec)
                ops.append(
                    Op(made, "quantise", (name,), (made,), layer=op.layer, role=op.role, attrs={})
                )
    return replace(graph, ops=tuple(ops), tensors=tensors)


def _quantised(name: str) -> str:
    return f"{name}.fp8"


def _reading(graph: OpGraph, op: Op, chosen: set[str]) -> Op:
    """The operator, reading its activations in FP8 where they are quantised."""
    if not _is_fp8_product(graph, op) or op.inputs[0] not in chosen:
        return op
    dtype = graph.tensors[op.inputs[0]].spec.dtype
    inputs = (_quantised(op.inputs[0]), *op.inputs[1:])
    return replace(op, inputs=inputs, attrs={**op.attrs, "dtype": dtype})


def _is_fp8_product(graph: OpGraph, op: Op) -> bool:
    return op.kind in _KINDS and graph.weights[op.weights[0]].spec.format == FP8


def _products_by_input(graph: OpGraph) -> Mapping[str, Sequence[Op]]:
    """The products of weights in FP8 by what they read.

    The head's are left out where it takes the last rows itself.
    """
    found: dict[str, list[Op]] = {}
    apart = {name for op in graph.ops if op.kind == "last_token" for name in op.outputs}
    for op in graph.ops:
        for part in op.members:
            if _is_fp8_product(graph, part) and part.inputs[0] not in apart:
                found.setdefault(part.inputs[0], []).append(part)
    return found


def prices_of(graph: OpGraph, products: Sequence[Op], hardware: HardwareSpec, load: Load) -> Prices:
    """What products of the same activations take in both ways."""
    spec = graph.tensors[products[0].inputs[0]].spec
    rows, columns = spec.bind(load.num_tokens, load.num_seqs)
    if hardware.sm < 90 or "fp8" not in hardware.matrix_flops_per_s or rows < QUANTISED_ROWS:
        return Prices(0.0, float("inf"))
    converted = [_us(graph, op, hardware, load, "bf16") for op in products]
    quantised = [_us(graph, op, hardware, load, "fp8") for op in products]
    return Prices(sum(converted), sum(quantised) + _quantise_us(rows * columns, hardware))


def _us(graph: OpGraph, op: Op, hardware: HardwareSpec, load: Load, dtype: str) -> float:
    """Microseconds of a product whose elements are multiplied as `dtype`."""
    costed = costed_op(graph, op)
    members = tuple(replace(member, matrix_dtype=dtype) for member in costed.members)
    variant: Variant = "_fp8"
    if dtype == "fp8":
        variant = "_quantised"
    priced = replace(costed, members=members, variant=variant)
    return time_of(priced, costed.work(load), load, hardware).total_us


def _quantise_us(num_elements: int, hardware: HardwareSpec) -> float:
    """Of a kernel that reads elements of bf16 and writes them as FP8."""
    moved_bytes = num_elements * (DTYPE_BITS["bf16"] / 8 + FP8_ROWS.bytes_per_element)
    busy_us = moved_bytes / hardware.read_bytes_per_s * 1e6 * hardware.residuals["rows"]
    return hardware.launch_us + hardware.waits_us["rows"] + busy_us


def record_quantised(
    ledger: Ledger, programs: Sequence[LoweredProgram], hardware: HardwareSpec
) -> None:
    """Write down in which programs FP8 is multiplied by FP8."""
    options: list[Option] = []
    some: list[str] = []
    for program in programs:
        graph = program.graph
        num_tokens = program.bucket * graph.num_queries
        load = Load(num_tokens, min(program.max_seqs, num_tokens), 0)
        products = _products_by_input(graph)
        if not products:
            continue
        all_prices = [prices_of(graph, found, hardware, load) for found in products.values()]
        quantised = sum(is_quantised(graph, found[0]) for found in products.values())
        name = f"{graph.phase}/{program.bucket}"
        if quantised:
            some.append(name)
        options.append(
            Option(
                what=f"{name}: {quantised} of {len(products)} activations are quantised",
                numbers=_numbers(all_prices),
            )
        )
    if not options:
        return
    value = "weights are converted"
    if some:
        value = f"FP8 times FP8 in {', '.join(some)}; weights are converted elsewhere"
    ledger.record("fp8_products", value, _REASON, options=tuple(options))


def _numbers(prices: Sequence[Prices]) -> dict[str, float]:
    """All products of a program in both ways, where both are possible."""
    if not all(each.converted_us for each in prices):
        return {}
    return {
        "converted_us": round(sum(each.converted_us for each in prices), 1),
        "quantised_us": round(sum(each.quantised_us for each in prices), 1),
    }


_REASON = (
    "for each activation the cheaper of kernels that convert the weights which multiply it, and of "
    f"FP8 times FP8 with a kernel that quantises it; the latter from {QUANTISED_ROWS} rows on"
)
