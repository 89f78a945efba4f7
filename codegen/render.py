"""Kernel text: a template and the constants that the planner chose become one readable Triton file.

Templates hold plain Triton with every constant baked; Jinja only picks what a kernel has and has
not. An unknown name in a template is an error.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension

from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.schema import KernelSpec, Launch, Part
from tokenspeed_plan.plans.types import Constant, Dim

ROOT = Path(__file__).parent
FAMILIES = ("attention", "delta_net", "dense", "moe", "sampling", "speculation")
INDENTED_LINE = re.compile(r"^( +)(.*\{\{.*)$", re.MULTILINE)
EXPRESSION = re.compile(r"\{\{(-?)(.+?)(-?)\}\}")


class HangingIndent(Extension):
    """What an expression expands to keeps the indentation of the line that it stands on.

    A macro is written at column 0, and called where its lines belong; each line after its first one
    is indented as the line of the call.
    """

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Add the filter `hang` to each expression on an indented line."""
        return INDENTED_LINE.sub(_hang_expressions, source)


def _hang_expressions(line: re.Match[str]) -> str:
    indent, rest = line[1], line[2]
    return indent + EXPRESSION.sub(rf"{{{{\1 (\2) | hang({len(indent)}) \3}}}}", rest)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([ROOT, *(ROOT / family for family in FAMILIES)]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        extensions=[HangingIndent],
        auto_reload=False,  # else it asks for the time of each file, again and again
    )
    environment.filters |= {"hang": _hang, "literal": _literal, "shape": _shape}
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
        "parts": [{"kind": part.kind, "doc": _doc(part)} for part in kernel.parts],
        "constants": dict(sorted(launch.constants.items())),
        "pdl": launch.pdl,
        "trigger_after_wait": launch.trigger_after_wait,
        "has": {param.name for param in kernel.tensors}.__contains__,
    }
    text = _environment().get_template(f"{launch.template}.py.j2").render(context | options)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


def _hang(value: object, width: int) -> str:
    """Indent all lines but the first by `width` columns; drop empty lines around them."""
    lines = str(value).strip("\n").split("\n")
    return ("\n" + " " * width).join(lines)


def _doc(part: Part) -> str:
    """The formula of a part. A plain norm has w in place of 1 + w."""
    doc = OPS[part.kind].doc
    if part.attrs.get("plain"):
        return doc.replace("(1 + w)", "w")
    return doc


def _literal(value: Constant) -> str:
    return repr(value)


def _shape(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def source_digest(text: str) -> str:
    """The SHA-256 of a kernel's file, as a plan holds it."""
    return sha256(text)
