"""The text of a kernel: checked against its plan, then run to define its function."""

from __future__ import annotations

import linecache
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import KernelSpec, Launch
from tokenspeed_plan.plans.text import read_utf8

KERNELS = "kernels"
WARPGROUP = 4  # warps that multiply together on Hopper


def kind_of(kernel: KernelSpec) -> str:
    """The name of its function: that of the kernel without the digest."""
    return kernel.name.rpartition("_")[0]


def read_source(bundle: Path, kernel: KernelSpec) -> str:
    """The text of a kernel of a bundle.

    Raises:
        PlanError: it is not there, or is not what the plan was made with.
    """
    path = bundle / KERNELS / f"{kernel.name}.py"
    try:
        text = read_utf8(path)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read `{path}`", _HINT) from error
    check_source(kernel, text)
    return text


def check_source(kernel: KernelSpec, text: str) -> None:
    """The text must have the digest that the plan gives.

    Raises:
        PlanError: it was altered.
    """
    if kernel.launch is None or sha256(text) != kernel.launch.source_sha256:
        raise PlanError(f"the text of kernel `{kernel.name}` is not the plan's", _HINT)


_HINT = "make the plan again with `tokenspeed plan SPEC -o DIR`"


def load_function(kernel: KernelSpec, text: str) -> Any:
    """The Triton function in a kernel's text, whatever folder it came from.

    Triton reads the lines of a function through `linecache`: they are put there, so that what was
    checked is what is compiled, and no path gets into the result.

    Raises:
        PlanError: the text was altered.
    """
    check_source(kernel, text)
    module = ModuleType(kernel.name)
    module.__file__ = f"{kernel.name}.py"
    linecache.cache[module.__file__] = (
        len(text),
        None,
        text.splitlines(keepends=True),
        module.__file__,
    )
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module.__dict__[kind_of(kernel)]


def first_warps(function: Any, launch: Launch) -> int:
    """Warps that Triton is told of a function.

    A kernel of Gluon is told those of its first partition, a warpgroup; `num_warps` counts all.
    """
    is_gluon = getattr(function, "is_gluon", None)  # the interpreter's functions do not know
    if is_gluon is not None and is_gluon():
        return WARPGROUP
    return launch.num_warps
