"""Prices of kernels by class, from published measurements of single kernels; no engine was run.

    pip install --no-deps aiconfigurator-core==0.12.0 && pip install pyarrow
    python benchmarks/kernel_prices.py SYSTEMS sglang/0.5.14 > benchmarks/engines/kernels/NAME.yaml
    python benchmarks/kernel_prices.py SYSTEMS --transfer

SYSTEMS is the package's folder `systems`: NVIDIA's tables of one kernel at a time, in a CUDA graph,
on each machine (Apache-2.0). A kernel's roofline time comes from our own graph of the same shape;
its wait and its residual are the line through the table's times.

`--transfer`: how much of a new machine's rates kernels of Triton reach, beside the H200.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tokenspeed_plan.planner.advisor.calibration import NO_WAIT_US, Sample, fit
from tokenspeed_plan.planner.advisor.step_model import StepModel, stored_formats
from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.passes.cost import (
    CostedOp,
    Load,
    costed_op,
    kernel_time_of,
    op_class,
)
from tokenspeed_plan.planner.passes.op_terms import Formats, weight_specs
from tokenspeed_plan.plans.schema import BatchSize, Work

MODELS = {"qwen3.5-397b-a17b": (4, 8), "qwen3.5-35b-a3b": (1, 2)}  # and ranks
MACHINES = {
    "H100": "h100_sxm",
    "H200": "h200_sxm",
    "B200": "b200_sxm",
    "GB200": "gb200",
    "B300": "b300_sxm",
    "GB300": "gb300",
}
GEMMS = {"bf16": "bfloat16", "fp8": "fp8_block", "nvfp4": "nvfp4"}
DECODE, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (1023, 8191, 65535)
PREFILL = (256, 512, 1024, 2048, 4096, 8192, 16384)
TRITON = "triton"
ROUTING = "balanced"


@dataclass(frozen=True)
class Tables:
    """The measurements on one machine, in microseconds."""

    folder: Path
    release: str

    @cache  # noqa: B019
    def index(self, name: str, keys: tuple[str, ...], only: str) -> Mapping[tuple[Any, ...], float]:
        """The fastest kernel by key; of attention not Triton's. Empty where there is no table."""
        import pyarrow.parquet as parquet

        family, _, file = name.partition("/")
        path = self.folder / family / self.release / f"{file}_perf.parquet"
        found: dict[tuple[Any, ...], float] = {}
        if not path.is_file():
            return found
        table = parquet.ParquetFile(path).read(columns=["kernel_source", "latency", *keys])
        columns = [table[column].to_pylist() for column in ("kernel_source", "latency", *keys)]
        for source, latency_ms, *key in zip(*columns, strict=True):
            if (only and not source.startswith(only)) or (
                "attention/" in name and TRITON in source
            ):
                continue
            place = tuple(key)
            found[place] = min(found.get(place, 1e12), 1e3 * latency_ms)
        return found

    def gemm(self, rows: int, columns: int, width: int, dtype: str) -> float | None:
        """A product of rows of `width` with `columns` columns."""
        keys = ("m", "n", "k", "gemm_dtype")
        return self.index("gemm/gemm", keys, "").get((rows, columns, width, dtype))

    def experts(self, tokens: int, shape: tuple[int, ...], dtype: str, only: str) -> float | None:
        """Routed experts, from router logits to their sum; `shape` ends with the ranks."""
        keys = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
        extra = ("moe_ep_size", "moe_dtype", "distribution")
        key = (tokens, *shape, 1, dtype, ROUTING)
        return self.index("moe/moe", (*keys, *extra), only).get(key)

    def attention(
        self, phase: str, seqs: int, length: int, heads: tuple[int, int], kv_dtype: str
    ) -> float | None:
        """Heads of 256."""
        keys = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype")
        extra = ("step", "isl", "window_size")
        place = (length, 1) if phase == "generation" else (0, length)
        key = (seqs, *heads, 256, {"bf16": "bfloat16"}.get(kv_dtype, kv_dtype), *place, 0)
        return self.index(f"attention/{phase}_attention", (*keys, *extra), "").get(key)

    def delta(self, kernel: str, seqs: int, length: int, heads: int) -> float | None:
        """The delta rule of `heads` value heads of 128."""
        keys = ("batch_size", "seq_len", "num_v_heads")
        return self.index(DELTA, keys, kernel).get((seqs, length, heads))

    @property
    def launch_us(self) -> float:
        """From one small kernel to the next: the convolution of one token."""
        return min(self.index(DELTA, ("batch_size",), "causal_conv1d_update").values())


DELTA = "linear_attention/gdn"


def bare(hardware: HardwareSpec) -> HardwareSpec:
    """The machine without waits and residuals, so that times are those of the roofline."""
    return replace(
        hardware,
        launch_us=NO_WAIT_US,
        delta_token_us=0.0,
        waits_us=dict.fromkeys(hardware.waits_us, 0.0),
        residuals=dict.fromkeys(hardware.residuals, 1.0),
        matrix_residuals={},
        libraries={},
        whole_tiles=True,
    )


@dataclass(frozen=True)
class Shapes:
    """One model on one machine, in one format, on some ranks."""

    weights: str
    ranks: int
    tables: Tables
    steps: StepModel
    triton: bool = False

    def samples(self) -> Iterator[Sample]:
        """All kernels of a layer that the tables have."""
        for tokens in DECODE:
            for context in CONTEXTS:
                for kv_dtype in ("bf16", "fp8"):
                    yield from self._step("decode", tokens, tokens, context, kv_dtype)
        for tokens in PREFILL:
            yield from self._step("prefill", tokens, 1, (tokens + 1) // 2, "bf16")

    def _step(
        self, phase: Any, tokens: int, seqs: int, context: int, kv_dtype: str
    ) -> Iterator[Sample]:
        """Samples of one step; those that no context changes come with the first one."""
        graph = self.steps.graph(ParallelLayout(self.ranks, self.ranks, 1), phase, tokens, seqs)
        formats = replace(stored_formats(kv_dtype), quantised_products=True)
        load = Load(tokens, seqs, context, formats=formats)
        is_first = phase == "prefill" or (context, kv_dtype) == (CONTEXTS[0], "bf16")
        for heaviest, ops in self._groups(graph, formats).items():
            if heaviest[0] != "attention" and not is_first:
                continue
            costed = [costed_op(graph, op, formats) for op in ops]
            kinds = {part.kind for part in ops[0].members}
            name = op_class(kinds, tokens, seqs, costed[0].variant)
            step = (phase, tokens, seqs, context, kv_dtype)
            measured = self._measured(graph, heaviest[0], ops[0], step)
            if measured is not None:
                times = (
                    kernel_time_of(each, self._work(each, load), load, self.steps.hardware)
                    for each in costed
                )
                busy_us = sum(time.busy_us for time in times)
                yield Sample(name, measured / len(ops), busy_us / len(ops))

    def _work(self, op: CostedOp, load: Load) -> Work:
        """What it does where routing is balanced: no expert is hit twice before all are once."""
        moe = self.steps.config.moe
        hits = 0.0
        if moe is not None:
            hits = float(min(load.num_tokens * moe.num_experts_per_token, moe.num_experts))
        batch = BatchSize(load.num_tokens, load.num_seqs, load.context_tokens, hits)
        return op.amounts.at(batch)

    def _groups(self, graph: OpGraph, formats: Formats) -> dict[tuple[str, int], list[Op]]:
        """Kernels that one measurement covers, of the first layer of each kind."""
        groups: dict[tuple[str, int], list[Op]] = defaultdict(list)
        for op in graph.ops:
            costed = costed_op(graph, op, formats)
            is_sum = any(part.kind == "expert_sum" for part in op.members)
            if op.layer is None or costed.is_small or costed.collective is not None or is_sum:
                continue
            key = (costed.heaviest, id(op) if costed.heaviest == "product" else 0)
            if not groups[key] or groups[key][0].layer == op.layer:
                groups[key].append(op)
        return groups

    def _measured(
        self, graph: OpGraph, heaviest: str, op: Op, step: tuple[str, int, int, int, str]
    ) -> float | None:
        phase, tokens, seqs, context, kv_dtype = step
        config, tables = self.steps.config, self.tables
        if heaviest == "product":
            return None if self.triton else self._product(graph, op, tokens)
        if heaviest in ("experts", "grouped"):
            return self._experts(tokens)
        if heaviest.startswith("delta") and config.delta_net:
            heads = config.delta_net.num_v_heads // self.ranks
            if phase == "decode":
                return tables.delta("fused_recurrent", seqs, 1, heads)
            return tables.delta("chunk_gated_delta_rule", 1, tokens, heads)
        if self.triton:
            return None
        heads = config.attention
        own = (heads.num_qo_heads // self.ranks, max(heads.num_kv_heads // self.ranks, 1))
        if phase == "decode":
            return tables.attention("generation", seqs, context, own, kv_dtype)
        return tables.attention("context", 1, tokens, own, kv_dtype)

    def _product(self, graph: OpGraph, op: Op, tokens: int) -> float | None:
        specs = weight_specs(graph, op)
        stored = self.weights if specs[0].format.block else "bf16"
        shapes = [spec.bind(0, 0) for spec in specs]
        if any(len(shape) < 2 for shape in shapes):
            return None
        columns = sum(shape[-2] for shape in shapes)
        return self.tables.gemm(tokens, columns, shapes[0][-1], GEMMS[stored])

    def _experts(self, tokens: int) -> float | None:
        config, moe = self.steps.config, self.steps.config.moe
        if moe is None:
            return None
        shape = (config.hidden_size, moe.intermediate_size, moe.num_experts_per_token)
        only = "sglang_fused_moe_triton" if self.triton else ""
        ranks = (moe.num_experts, self.ranks)
        return self.tables.experts(tokens, (*shape, *ranks), GEMMS[self.weights], only)


def machine_samples(systems: Path, machine: str, release: str, triton: bool) -> list[Sample]:
    """All samples of a machine."""
    tables = Tables(systems / "data" / MACHINES[machine], release)
    hardware, found = bare(find_hardware(machine)), []
    for model in MODELS:
        config, _ = load_preset(model)
        for weights in ("bf16",) if triton else GEMMS:
            if weights == "nvfp4" and hardware.sm < 100:
                continue
            steps = StepModel(config, hardware, weights)
            for ranks in MODELS[model]:
                shapes = Shapes(weights, ranks, tables, steps, triton)
                found += [
                    each
                    for each in shapes.samples()
                    if weights == "bf16" or each.op_class.rpartition("_")[2] in FORMAT_ENDS
                ]
    return found


# The tables call one kernel over and over, so that weights and states may come from the L2 cache; a
# step reads each of them once, from memory, at no more than the memory's rate.
READ_ONCE = ("stream", "few_rows", "experts", "attention_decode", "delta_step")
MOST_WAIT_US = 50.0  # a table with more has launches by the host in it, and no price of a kernel
FORMAT_ENDS = ("fp8", "quantised", "fp4")


def least_residual(name: str) -> float:
    """The least that a class may take of the roofline's time in a step."""
    return 1.0 if name.startswith(READ_ONCE) else 0.0


def prices(systems: Path, release: str) -> dict[str, Any]:
    """The file of an engine's kernels."""
    machines = {}
    for machine in MACHINES:
        tables = Tables(systems / "data" / MACHINES[machine], release)
        found = fit(machine_samples(systems, machine, release, False), tables.launch_us)
        machines[machine] = {
            "launch_us": round(tables.launch_us, 2),
            "classes": {
                name: {
                    "wait": round(max(found.waits_us[name] - tables.launch_us, 0.0), 2),
                    "residual": round(max(residual, least_residual(name)), 3),
                    "error": round(found.errors[name], 3),
                }
                for name, residual in found.residuals.items()
                if found.waits_us[name] < MOST_WAIT_US
            },
        }
    engine, _, version = release.partition("/")
    source = (
        f"aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), tables of {engine} {version}: single "
        "kernels in a CUDA graph. Written by benchmarks/kernel_prices.py"
    )
    return {"name": f"{engine} {version}", "source": source, "machines": machines}


def transfer(systems: Path) -> None:
    """The residuals of Triton's kernels on each machine, over those on the H200."""
    fits = {
        machine: fit(machine_samples(systems, machine, "sglang/0.5.14", True), 1.7)
        for machine in MACHINES
    }
    base = fits["H200"].residuals
    for machine, found in fits.items():
        ratios = {name: round(found.residuals[name] / base[name], 3) for name in base}
        print(machine, ratios, {name: round(each, 3) for name, each in found.errors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("systems", type=Path)
    parser.add_argument("release", nargs="?")
    parser.add_argument("--transfer", action="store_true")
    options = parser.parse_args()
    if options.transfer:
        transfer(options.systems)
    else:
        text = prices(options.systems, options.release)
        print(yaml.safe_dump(text, sort_keys=False, width=100, default_flow_style=None), end="")


if __name__ == "__main__":
    main()
