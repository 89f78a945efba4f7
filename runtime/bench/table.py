"""The measurements as a table."""

from __future__ import annotations

from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    machine = found["machine"]
    lines = [
        f"{found['model']} on {machine['name']}: reads {machine['read_bytes_per_s'] / 1e12:.3f} TB/s, "
        f"{machine['matrix_flops_per_s'] / 1e12:.1f} TFLOP/s, {machine['launch_us']:.2f} us a launch"
    ]
    lines += _memory(**found["memory"])
    for program in found["programs"]:
        lines += ["", *_program(program)]
    return "\n".join(lines)


def _memory(planned_bytes: int, reserved_bytes: int, measured_bytes: int | None) -> list[str]:
    if measured_bytes is None:
        return []
    return [
        f"memory: {measured_bytes / 1e9:.2f} GB taken, {planned_bytes / 1e9:.2f} planned with a margin of "
        f"{reserved_bytes / 1e9:.2f}; off by {planned_bytes / measured_bytes - 1.0:+.1%}"
    ]


def _program(p: dict[str, Any]) -> list[str]:
    head = [
        f"{p['phase']} of {p['tokens']} tokens, {p['batch']} sequences at {p['context']} tokens: "
        f"{p['measured_us']:.1f} us (predicted {_interval(p)}), {p['tokens_per_s']:.0f} tokens/s",
        f"  floor {p['floor_us']:.1f} us ({p['floor_bytes'] / 1e9:.3f} GB): {p['share_of_floor']:.1%} of it; "
        f"{p['share_of_matrix_rate']:.1%} of the matrix rate; "
        f"{p['launches']} launches, {p['launches_per_layer']} a layer",
        f"  {'kernel':<44} {'calls':>5} {'us':>8} {'predicted':>9} {'GB/s':>7} {'share':>6} {'total us':>9}",
    ]
    return head + [
        f"  {k['kernel']:<44} {k['calls']:>5} {k['us']:>8.2f} {k['predicted_us']:>9.2f} {k['bytes_per_s'] / 1e9:>7.0f} "
        f"{k['share']:>6.1%} {k['total_us']:>9.1f}"
        for k in p["kernels"]
    ]


def _interval(p: dict[str, Any]) -> str:
    """The prediction, with its interval and its error where this batch was priced."""
    low, high = p.get("predicted_interval_us", (p["predicted_us"], p["predicted_us"]))
    return f"{p['predicted_us']:.1f}, {low:.1f} to {high:.1f}; off by {p['predicted_us'] / p['measured_us'] - 1.0:+.1%}"
