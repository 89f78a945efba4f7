"""A plan as one HTML page, which fetches nothing: computed here, drawn by `page.html.j2`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed_plan.codegen.page.templates import page_template
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.report import DEFINITIONS, as_dict, smallest_decode
from tokenspeed_plan.plans.schema import (
    Call,
    CollectiveCall,
    LibraryCall,
    Plan,
    RecordEvent,
    Step,
    WaitEvent,
)

WIDTH, HEIGHT = 900, 340
ROW = 22
Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RoofPoint:
    """A kernel on the roofline.

    Attributes:
        name: what it is called.
        phase: prefill or decode.
        intensity: FLOPs for each byte that it moves.
        flops_per_s: FLOPs that it reaches.
        share: its part of a step's time, 0 to 1.
    """

    name: str
    phase: str
    intensity: float
    flops_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Roof:
    """The machine's two limits, and the kernels under them."""

    bytes_per_s: float
    flops_per_s: float
    points: tuple[RoofPoint, ...]


def render_page(plan: Plan, roof: Roof | None) -> str:
    """The page; `roof` is None where the GPU's profile is not at hand."""
    predicted = plan.predicted
    return page_template("page.html.j2").render(
        plan=plan,
        report=as_dict(plan),
        definitions=DEFINITIONS,
        memory=_memory(plan),
        layers=[_layer(plan, layer) for layer in _shown_layers(plan)],
        timeline=_timeline(plan),
        front=_front(plan),
        roof=_roof(roof) if roof else None,
        spec=json.dumps(plan.spec, indent=2, sort_keys=True),
        rejected=predicted.rejected,
        width=WIDTH,
        height=HEIGHT,
        row=ROW,
    )


def _memory(plan: Plan) -> list[Point]:
    """Parts of a rank's memory, as pieces of one bar; what is free comes last."""
    sizes = plan.pool.memory_bytes_per_rank.model_dump()
    capacity = sizes.pop("capacity")
    total = sizes.pop("total")
    sizes["free"] = max(capacity - total, 0)
    parts: list[Point] = []
    x = 0.0
    for name, size in sizes.items():
        width = size / capacity * WIDTH
        parts.append({"name": name, "size": size, "x": x, "width": width})
        x += width
    return parts


def _calls(plan: Plan) -> list[Call]:
    return [step for step in smallest_decode(plan).steps if isinstance(step, Call)]


def _layer_of(step: Call) -> str:
    """The layer of what a kernel writes, the last that it names."""
    layer = ""
    for name in step.args:
        prefix, _, _ = name.partition(".")
        if name[:1] == "L" and name[1:2].isdigit():
            layer = prefix
    return layer


def _shown_layers(plan: Plan) -> list[str]:
    """The second layer of each kind of mixer, or the only one: the first begins differently."""
    kinds: dict[str, list[str]] = {}
    by_name = {kernel.name: kernel for kernel in plan.kernels}
    for step in _calls(plan):
        kernel = by_name[step.kernel]
        for part in kernel.parts:
            if part.kind in ("attention", "delta_rule"):
                layer = _layer_of(step)
                kinds.setdefault(part.kind, []).append(layer)
    shown = []
    for layers in kinds.values():
        _, *others = layers
        shown.append(next(iter(others), layers[0]))
    return shown


def _layer(plan: Plan, layer: str) -> dict[str, Any]:
    """Operators of a layer from top to bottom, the kernels they became, and what feeds what."""
    by_name = {kernel.name: kernel for kernel in plan.kernels}
    ops: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    made: dict[str, tuple[int, int]] = {}  # value -> operator, kernel
    op_edges: set[tuple[int, int]] = set()
    kernel_edges: set[tuple[int, int]] = set()
    for step in (step for step in _calls(plan) if _layer_of(step) == layer):
        kernel = by_name[step.kernel]
        outside = step.places(kernel)
        first = len(ops)
        for part in kernel.parts:
            for operand in part.operands:
                source = made.get(outside.get(operand, f"{len(kernels)}:{operand}"))
                if source:
                    op_edges.add((source[0], len(ops)))
                    kernel_edges.add((source[1], len(kernels)))
            for output in part.outputs:
                made[outside.get(output, f"{len(kernels)}:{output}")] = (len(ops), len(kernels))
            ops.append({"kind": part.kind, "y": len(ops) * ROW})
        height = (len(ops) - first) * ROW
        kernels.append(
            {"kind": kind_of(kernel), "us": step.predicted_us, "y": first * ROW, "height": height}
        )
    return {
        "name": layer,
        "ops": ops,
        "kernels": kernels,
        "op_arcs": [
            _arc(ops[a]["y"] + ROW / 2, ops[b]["y"] + ROW / 2) for a, b in sorted(op_edges)
        ],
        "kernel_arcs": [
            _arc(_middle(kernels[a]), _middle(kernels[b]))
            for a, b in sorted(kernel_edges)
            if a != b
        ],
        "height": len(ops) * ROW + 8,
    }


def _middle(box: Mapping[str, float]) -> float:
    return box["y"] + box["height"] / 2


def _arc(start: float, end: float) -> dict[str, float]:
    """From one height to another, bulging by its length."""
    length = end - start
    bulge = min(12 + length * 0.45, 130)
    return {"start": start, "end": end, "bulge": bulge}


def _timeline(plan: Plan) -> dict[str, Any]:
    """Every kernel of the smallest decode program on its stream, by predicted times."""
    program = smallest_decode(plan)
    bars = list(_bars(plan, program.steps))
    end = max((bar["start"] + bar["us"] for bar in bars), default=1.0)
    kinds = sorted({bar["kind"] for bar in bars})
    for bar in bars:
        bar |= {
            "x": bar["start"] / end * WIDTH,
            "width": max(bar["us"] / end * WIDTH, 0.4),
            "hue": kinds.index(bar["kind"]) * 360 // max(len(kinds), 1),
        }
    return {"bars": bars, "streams": program.num_streams, "end": end, "kinds": kinds}


def _kind_of_step(step: Call | CollectiveCall, names: Mapping[str, str]) -> str:
    """The kind of the kernel, the function of a library, or the collective."""
    if isinstance(step, CollectiveCall):
        return step.op
    if isinstance(step, LibraryCall):
        return step.function
    return names[step.kernel]


def _bars(plan: Plan, steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
    names = {kernel.name: kind_of(kernel) for kernel in plan.kernels}
    now: dict[int, float] = {}
    events: dict[int, float] = {}
    for step in steps:
        start = now.get(step.stream, 0.0)
        if isinstance(step, WaitEvent):
            now[step.stream] = max(start, events.get(step.event, 0.0))
        elif isinstance(step, RecordEvent):
            events[step.event] = start
        else:
            layer = ""
            if isinstance(step, Call):
                layer = _layer_of(step)
            kind = _kind_of_step(step, names)
            yield {
                "kind": kind,
                "layer": layer,
                "start": start,
                "us": step.predicted_us,
                "stream": step.stream,
            }
            now[step.stream] = start + step.predicted_us


def _front(plan: Plan) -> dict[str, Any]:
    """Deployments by a user's speed and a GPU's throughput: the Pareto front, and others."""
    front = {option.what for option in plan.predicted.front}
    every = [option for decision in plan.decisions for option in decision.options]
    others = [option for option in every if "tokens_per_s_user" in option.numbers]
    known = {option.what: option for option in (*plan.predicted.front, *others)}
    points: list[dict[str, Any]] = [
        {
            "what": what,
            "x": option.numbers["tokens_per_s_user"],
            "y": option.numbers["tokens_per_s_gpu"],
            "turn": option.numbers["turn_time_ms"],
            "reason": option.reason,
            "front": what in front,
        }
        for what, option in known.items()
    ]
    values = plan.predicted.values
    points.append(
        {
            "what": "this plan",
            "x": values["tokens_per_s_user"],
            "y": values["tokens_per_s_gpu"],
            "turn": values["turn_time_ms"],
            "reason": "",
            "front": "this plan",
        }
    )
    most_x, most_y = (1.08 * max(point[axis] for point in points) for axis in ("x", "y"))
    for point in points:
        point |= {"cx": point["x"] / most_x * WIDTH, "cy": HEIGHT - point["y"] / most_y * HEIGHT}
    return {"points": points, "x_ticks": _ticks(most_x, WIDTH), "y_ticks": _ticks(most_y, HEIGHT)}


def _ticks(most: float, length: float) -> list[tuple[float, str]]:
    """Four round numbers along an axis."""
    step = 10 ** math.floor(math.log10(most / 2))
    for factor in (1, 2, 5, 10):
        if most / (step * factor) <= 5:
            step *= factor
            break
    ticks = []
    for number in range(1, int(most / step) + 1):
        value = number * step
        ticks.append((value / most * length, f"{value:g}"))
    return ticks


def _roof(roof: Roof) -> dict[str, Any]:
    """Logarithmic axes that hold every point and the ridge."""
    ridge = roof.flops_per_s / roof.bytes_per_s
    xs = [ridge, *(point.intensity for point in roof.points)]
    ys = [roof.flops_per_s, *(point.flops_per_s for point in roof.points)]
    low_x, high_x = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs) * 2))
    low_y, high_y = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys) * 1.01))

    def x_of(value: float) -> float:
        return (math.log10(value) - low_x) / (high_x - low_x) * WIDTH

    def y_of(value: float) -> float:
        return HEIGHT - (math.log10(value) - low_y) / (high_y - low_y) * HEIGHT

    points = [
        {
            "name": p.name,
            "phase": p.phase,
            "cx": x_of(p.intensity),
            "cy": y_of(p.flops_per_s),
            "share": p.share,
            "radius": 3 + 14 * math.sqrt(p.share),
            "intensity": p.intensity,
            "tflops": p.flops_per_s / 1e12,
        }
        for p in roof.points
    ]
    start = 10.0**low_x
    return {
        "points": points,
        "slope": (
            x_of(start),
            y_of(max(start * roof.bytes_per_s, 10.0**low_y)),
            x_of(ridge),
            y_of(roof.flops_per_s),
        ),
        "x_ticks": [(x_of(10.0**k), f"1e{k}") for k in range(low_x + 1, high_x)],
        "y_ticks": [(HEIGHT - y_of(10.0**k), f"1e{k}") for k in range(low_y + 1, high_y)],
    }
