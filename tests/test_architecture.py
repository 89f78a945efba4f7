"""The house law that a machine can hold: floors, names, function length, annotations."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = {
    "plans": {"pydantic"},
    "codegen": {"jinja2", "triton", "yaml"},
    "runtime": {
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "pydantic",
        "triton",
        "cuda",
        "fastapi",
        "starlette",
        "uvicorn",
        "prometheus_client",
    },
    "planner": {"networkx", "pydantic", "yaml", "click"},
}
MAY_IMPORT = {
    "plans": {"plans"},
    "codegen": {"plans", "codegen"},
    "runtime": {"plans", "runtime"},
    "planner": {"plans", "codegen", "planner"},
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
EVERY = [path for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [
    path for path in EVERY if "frozen" not in path.relative_to(ROOT).parts
]  # a plan's kernels are data
IDS = [str(path.relative_to(ROOT)) for path in FILES]


HTTP = {
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
}  # of the extra `serve`: for runtime/serving/http alone


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, not run at import) of each import; `from tokenspeed_plan import plans` gives the full name."""
    tree = ast.parse(source)
    lazy = {
        id(inner) for node in ast.walk(tree) for part in unrun(node) for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "tokenspeed_plan":
            yield from (
                (node.lineno, f"tokenspeed_plan.{alias.name}", id(node) in lazy)
                for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), id(node) in lazy


def unrun(node: ast.AST) -> list[ast.stmt]:
    """What importing a module leaves alone: the bodies of functions and of `if TYPE_CHECKING`."""
    types_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return node.body if types_only or isinstance(node, Function) else []


def fault(floor: str, module: str, lazy: bool) -> str | None:
    """The rule that an import breaks, if any."""
    root, _, rest = module.partition(".")
    if not root:
        return "write the full name, not a relative one"
    if root in FLOORS:
        return f"write tokenspeed_plan.{module}"
    if root != "tokenspeed_plan":
        known = root in FLOORS[floor] | set(sys.stdlib_module_names)
        return None if known else f"{floor} knows only {', '.join(sorted(FLOORS[floor]))}"
    allowed = MAY_IMPORT[floor] | ({"runtime"} if floor == "planner" and lazy else set())
    return (
        None
        if rest.partition(".")[0] in allowed
        else f"{floor} imports only {', '.join(sorted(allowed))} here"
    )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    for line, module, lazy in imports(path.read_text()):
        reason = fault(floor, module, lazy)
        assert reason is None, f"{path}:{line}: {module}: {reason}"


def test_only_the_server_knows_http() -> None:
    for path in FILES:
        found = {module.partition(".")[0] for _, module, _ in imports(path.read_text())} & HTTP
        assert not found or path.parent == ROOT / "runtime/serving/http", f"{path}: {found}"


@pytest.mark.parametrize(
    ("floor", "source", "reason"),
    [
        ("plans", "import torch", "plans knows only pydantic"),
        ("plans", "from tokenspeed_plan import planner", "plans imports only plans here"),
        ("runtime", "def f():\n    import networkx", "runtime knows only"),
        (
            "runtime",
            "from tokenspeed_plan.codegen import ChatTemplate",
            "runtime imports only plans, runtime here",
        ),
        ("codegen", "import click", "codegen knows only jinja2, triton, yaml"),
        ("planner", "import plans.ops", "write tokenspeed_plan.plans.ops"),
        ("planner", "from . import spec", "write the full name"),
        ("planner", "import tokenspeed_plan.runtime", "planner imports only"),
        (
            "planner",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import tokenspeed_plan.runtime",
            "planner imports only",
        ),
        ("planner", "if TYPE_CHECKING:\n    import tokenspeed_plan.runtime", None),
        ("planner", "async def f():\n    from tokenspeed_plan.runtime.engine import Engine", None),
        ("runtime", "import torch.nn.functional as F", None),
    ],
)
def test_the_rule_can_fail(floor: str, source: str, reason: str | None) -> None:
    ((_, module, lazy),) = imports(source)
    found = fault(floor, module, lazy)
    assert found == reason if reason is None else found is not None and found.startswith(reason)


def functions() -> list[tuple[str, Function]]:
    return [
        (f"{path}:{node.lineno}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function)
    ]


def test_functions_are_short() -> None:
    lengths = {where: (node.end_lineno or 0) - node.lineno + 1 for where, node in functions()}
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] <= 60, longest
    assert statistics.median(lengths.values()) < 10


def test_everything_is_annotated() -> None:
    for where, node in functions():
        spec = node.args
        every = (
            *spec.posonlyargs,
            *spec.args,
            *spec.kwonlyargs,
            *filter(None, (spec.vararg, spec.kwarg)),
        )
        arguments = [a for a in every if a.arg not in ("self", "cls")]
        assert node.returns is not None, where
        assert all(a.annotation for a in arguments), where


def test_the_code_stays_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) < 18_500


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("plans", {"torch", "jinja2", "networkx", "click", "yaml"}),
        ("runtime", {"torch", "jinja2", "networkx", "click"}),
        (
            "runtime.engine",
            {"jinja2.sandbox", "click", "tokenspeed_plan.planner", "tokenspeed_plan.codegen"},
        ),
        (
            "runtime.serving.async_engine",
            {"fastapi", "starlette", "uvicorn", "prometheus_client", "click"},
        ),
        ("planner", {"torch"}),
        ("planner.cli", {"torch", "fastapi", "uvicorn", "prometheus_client"}),
    ],
)
def test_imports_stay_lean(module: str, unwanted: set[str]) -> None:
    code = f"import sys, tokenspeed_plan.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(done.stdout.split())
    assert not loaded & unwanted
