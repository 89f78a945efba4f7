"""Measurements as a table."""

from __future__ import annotations

from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """The table as text."""
    machine = found["machine"]
    reads_tb_per_s = machine["read_bytes_per_s"] / 1e12
    tflops_per_s = machine["matrix_flops_per_s"] / 1e12
    lines = [
        f"{found['model']} on {machine['name']}: reads {reads_tb_per_s:.3f} TB/s, "
        f"{tflops_per_s:.1f} TFLOP/s, {machine['launch_us']:.2f} us a launch"
    ]
    lines += _memory(**found["memory"])
    for program in found["programs"]:
        lines += ["", *_program(program)]
    return "\n".join(lines)


def _memory(planned_bytes: int, reserved_bytes: int, measured_bytes: int | None) -> list[str]:
    if measured_bytes is None:
        return []
    error = planned_bytes / measured_bytes - 1.0
    return [
        f"memory: {measured_bytes / 1e9:.2f} GB taken, {planned_bytes / 1e9:.2f} planned "
        f"with a margin of {reserved_bytes / 1e9:.2f}; off by {error:+.1%}"
    ]


def _program(p: dict[str, Any]) -> list[str]:
    lines = [
        f"{p['phase']} of {p['tokens']} tokens, {p['batch']} sequences at {p['context']} tokens: "
        f"{p['measured_us']:.1f} us (predicted {_interval(p)}), {p['tokens_per_s']:.0f} tokens/s",
        f"  floor {p['floor_us']:.1f} us ({p['floor_bytes'] / 1e9:.3f} GB): "
        f"{p['share_of_floor']:.1%} of it; {p['share_of_matrix_rate']:.1%} of the matrix rate; "
        f"{p['launches']} launches, {p['launches_per_layer']} a layer",
        f"  {'kernel':<44} {'calls':>5} {'us':>8} {'predicted':>9} {'GB/s':>7} {'share':>6} "
        f"{'total us':>9}",
    ]
    lines += map(_kernel, p["kernels"])
    return lines


def _kernel(k: dict[str, Any]) -> str:
    gb_per_s = k["bytes_per_s"] / 1e9
    return (
        f"  {k['kernel']:<44} {k['calls']:>5} {k['us']:>8.2f} {k['predicted_us']:>9.2f} "
        f"{gb_per_s:>7.0f} {k['share']:>6.1%} {k['total_us']:>9.1f}"
    )


def _interval(p: dict[str, Any]) -> str:
    """The prediction with its error, and with its interval where this batch was priced."""
    predicted_us = p["predicted_us"]
    low, high = p.get("predicted_interval_us", (predicted_us, predicted_us))
    error = predicted_us / p["measured_us"] - 1.0
    return f"{predicted_us:.1f}, {low:.1f} to {high:.1f}; off by {error:+.1%}"
