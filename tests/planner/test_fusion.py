"""Rewrites on random graphs: fusion never changes a number, and each rewrite pays."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import ONE_RANK
from model_graphs import context
from torch import Tensor as Values

from tokenspeed_plan.planner.graph import Op, OpGraph, Source, Stage, Tensor, Weight
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.passes.cost import Load, op_time
from tokenspeed_plan.planner.passes.fuse import FUSIONS
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.plans.types import Dim, Phase, TensorSpec
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES

T, H = 5, 6
Emit = Callable[["_Random"], None]


class _Random:
    """A random graph of the operators in rewrites; a value may have any number of readers."""

    def __init__(self, seed: int, phase: Phase) -> None:
        self.rng, self.phase = random.Random(seed), phase
        self.ops: list[Op] = []
        self.weights: dict[str, Weight] = {}
        self.tensors: dict[str, Tensor] = {}
        self.rows = [self.tensor("x0", H), self.tensor("x1", H)]
        self.gates = [self.tensor("g0", 1)]

    def tensor(self, name: str, width: int, rows: Dim = "num_tokens") -> str:
        self.tensors[name] = Tensor(name, TensorSpec.of(shape=(rows, width), dtype="fp64"))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        source = Source(name, shape, (0,) * len(shape), shape)
        self.weights[name] = Weight(name, TensorSpec.of(shape=shape, dtype="fp64"), (source,))
        return name

    def emit(
        self, kind: str, inputs: tuple[str, ...], width: int, *weights: str, **attrs: float | str
    ) -> str:
        out = self.tensor(f"{kind}{len(self.ops)}", width)
        self.ops.append(Op(out, kind, inputs, (out,), weights, attrs=attrs))
        return out

    def row(self) -> str:
        """A value, often the newest, so that runs come up."""
        return self.rows[-1] if self.rng.random() < 0.6 else self.rng.choice(self.rows)

    def grow(self) -> None:
        """One more operator, or two that belong together."""
        kind = self.rng.choice(
            [
                "rms_norm",
                "linear",
                "add",
                "silu_mul",
                "sigmoid_gate",
                "gated_add",
                "all_reduce",
                "gate",
            ]
        )
        x = self.row()
        if kind == "rms_norm":
            self.rows.append(self.emit(kind, (x,), H, self.weight(H), eps=1e-6))
        elif kind == "linear":
            self.rows.append(self.emit(kind, (x,), H, self.weight(H, H), splits=(H,)))
        elif kind == "silu_mul":
            both = self.emit("linear", (x,), 2 * H, self.weight(2 * H, H), splits=(2 * H,))
            self.rows.append(self.emit(kind, (both,), H))
        elif kind == "gate":
            self.gates.append(self.emit("linear", (x,), 1, self.weight(1, H), splits=(1,)))
        elif kind == "gated_add":
            self.rows.append(self.emit(kind, (x, self.row(), self.rng.choice(self.gates)), H))
        elif kind == "all_reduce":
            self.rows.append(self.emit(kind, (x,), H, num_ranks=1))
        else:
            self.rows.append(self.emit(kind, (x, self.row()), H))

    def graph(self) -> OpGraph:
        for _ in range(self.rng.randrange(3, 25)):
            self.grow()
        kept = tuple(self.rng.sample(self.rows[2:], k=min(2, len(self.rows) - 2)))
        return OpGraph(
            self.phase,
            Stage.SHARDED,
            tuple(self.ops),
            self.tensors,
            self.weights,
            ("x0", "x1", "g0"),
            kept,
        )


def evaluate(graph: OpGraph, seed: int) -> dict[str, Values]:
    """Run the reference bodies in fp64; of a fused operator only its declared outputs are kept."""
    random_values = torch.Generator().manual_seed(seed)
    known = {
        name: torch.randn(
            T, graph.tensors[name].spec.bind(T, 1)[1], generator=random_values, dtype=torch.float64
        )
        for name in graph.inputs
    }
    known |= {
        name: torch.randn(w.spec.bind(T, 1), generator=random_values, dtype=torch.float64)
        for name, w in sorted(graph.weights.items())
    }
    for op in graph.ordered():
        inside = {name: known[name] for name in (*op.inputs, *op.weights)}
        for member in op.members:
            body = REFERENCE_BODIES.get(member.kind, lambda attrs, x: (x,))  # one rank's all-reduce
            results = body(member.attrs, *(inside[name] for name in member.operands))
            inside |= dict(zip(member.outputs, results, strict=True))
        known |= {name: inside[name] for name in op.outputs}
    return {name: known[name] for name in graph.outputs}


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 10**9),
    st.sets(st.sampled_from(range(len(FUSIONS)))),
    st.sampled_from(["prefill", "decode"]),
)
def test_fusion_does_not_change_random_graphs(seed: int, chosen: set[int], phase: Phase) -> None:
    plain = _Random(seed, phase).graph()
    options = PassOptions(fusions=tuple(FUSIONS[index] for index in sorted(chosen)))
    fused = run(plain, PassContext(ONE_RANK, find_hardware("cpu"), options=options), Stage.FUSED)
    wanted, got = evaluate(plain, seed), evaluate(fused, seed)
    assert all(torch.equal(got[name], wanted[name]) for name in plain.outputs)


def test_random_graphs_hold_runs_to_fuse() -> None:
    context = PassContext(ONE_RANK, find_hardware("cpu"))
    found = {
        op.kind
        for seed in range(200)
        for op in run(_Random(seed, "decode").graph(), context, Stage.FUSED).ops
        if op.parts
    }
    assert {
        "reduce_add_norm",
        "norm_linear",
        "norm_linear_silu_mul",
        "linear_silu_mul",
        "linear_add",
        "add_norm",
    } <= found


@pytest.mark.parametrize("gpu", ["H200", "B200"])
@pytest.mark.parametrize(("phase", "depth"), [("prefill", 0), ("decode", 0), ("decode", 3)])
def test_every_rewrite_pays_by_the_cost_model(gpu: str, phase: Phase, depth: int) -> None:
    tokens = 2048 if phase == "prefill" else depth + 1
    layout = ParallelLayout(8, 8, 1) if gpu == "B200" else ONE_RANK
    size = "397b-a17b" if gpu == "B200" else "35b-a3b"
    hardware, load = find_hardware(gpu), Load(tokens, 1, 4096)
    sizes = (tokens, 1 if depth else tokens)
    built = build(context(size, depth), phase, depth)
    expanded = run(built, PassContext(layout, hardware, *sizes), Stage.EXPANDED)
    unfused = {op.name: op for op in expanded.ops}
    fused_for = sizes if phase == "prefill" else (1, 1)  # whether ranks push depends on it
    for op in run(expanded, PassContext(layout, hardware, *fused_for), Stage.FUSED).ops:
        separate_us = sum(
            op_time(expanded, unfused[member.name], load, hardware).total_us for member in op.parts
        )
        if len(op.parts) > 1:  # a sum over ranks alone is no rewrite: see `test_reduction`
            # A product may have another tile with its sum, by a few percent of its price.
            assert op_time(expanded, op, load, hardware).total_us < 1.03 * separate_us, op.name
