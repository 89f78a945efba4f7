"""Kernel text: a template and the constants that the planner chose become one readable Triton file.

Templates hold plain Triton with every constant baked; Jinja only picks what a kernel has and has
not. An unknown name in a template is an error.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.schema import KernelSpec, Launch
from tokenspeed_plan.plans.types import Constant, Dim

ROOT = Path(__file__).parent
FAMILIES = ("attention", "delta_net", "dense", "moe", "sampling", "speculation")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([ROOT, *(ROOT / family for family in FAMILIES)]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"literal": _literal, "shape": _shape}
    return environment


def render(kind: str, kernel: KernelSpec, launch: Launch, options: dict[str, object]) -> str:
    """The text of a kernel.

    Args:
        kind: the name of its function.
        kernel: parameters and parts.
        launch: the template, and the constants to bake (upper case).
        options: what the template chooses by (lower case).
    """
    context = {
        "kind": kind,
        "tensors": kernel.tensors,
        "launch_params": kernel.launch_params,
        "scalars": {param.name for param in kernel.launch_params},
        "parts": [{"kind": part.kind, "doc": OPS[part.kind].doc} for part in kernel.parts],
        "constants": dict(sorted(launch.constants.items())),
        "pdl": launch.pdl,
        "trigger_after_wait": launch.trigger_after_wait,
        "has": {param.name for param in kernel.tensors}.__contains__,
    }
    text = _environment().get_template(f"{launch.template}.py.j2").render(context | options)
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+\n", "\n", text)).rstrip() + "\n"


def _literal(value: Constant) -> str:
    return repr(value)


def _shape(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def source_digest(text: str) -> str:
    """What a plan says of a kernel's file."""
    return sha256(text)
