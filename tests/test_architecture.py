"""Four floors, short functions, full signatures: the rules of AGENTS.md that a machine can hold."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
ROOT_NAME = "tokenspeed_plan"
MAX_FUNCTION_LINES = 80
MEDIAN_FUNCTION_LINES = 10

# Per folder: the folders of ours that it may import, and the distributions beside the standard library.
OURS = {
    "plans": {"plans"},
    "codegen": {"codegen", "plans"},
    "runtime": {"runtime", "plans"},
    "planner": {"planner", "codegen", "plans", "runtime"},
}
THEIRS = {
    "plans": {"pydantic"},
    "codegen": {"jinja2"},
    "runtime": {"numpy", "pydantic", "safetensors", "tokenizers", "torch", "triton"},
    "planner": {"click", "networkx", "pydantic", "yaml"},
}
FOLDERS = sorted(OURS)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files(folder: str) -> list[Path]:
    files = sorted(path for path in (REPO / folder).rglob("*.py") if "frozen" not in path.relative_to(REPO).parts)
    assert files, f"`{folder}` has no Python file"
    return files


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.stmt | ast.expr | ast.arg) -> str:
    return f"{path.relative_to(REPO)}:{node.lineno}"


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names; `from tokenspeed_plan import plans` counts as `tokenspeed_plan.plans`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == ROOT_NAME:
        return [f"{ROOT_NAME}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def only_for_types(node: ast.AST, child: ast.AST) -> bool:
    """Whether `child` stands in the body of `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement, and whether importing the module leaves it alone."""
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, Function) or only_for_types(node, child)
        if isinstance(child, ast.stmt):
            yield child, inside
        yield from statements(child, inside)


def why_refused(folder: str, name: str, lazy: bool) -> str | None:
    """The rule that an import of `name` in `folder` breaks, if any."""
    top, _, rest = name.partition(".")
    if top in OURS:
        return f"bare name, write `{ROOT_NAME}.{name}`"
    if top != ROOT_NAME:
        allowed = top in THEIRS[folder] or top in sys.stdlib_module_names
        return None if allowed else f"`{folder}` may use only {', '.join(sorted(THEIRS[folder]))}"
    target = rest.partition(".")[0]
    if target not in OURS[folder]:
        return f"`{folder}` may import only {', '.join(sorted(OURS[folder]))}"
    if folder == "planner" and target == "runtime" and not lazy:
        return "the planner imports the runtime inside functions only"
    return None


def import_faults(folder: str, path: Path) -> Iterator[str]:
    for node, lazy in statements(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{place(path, node)}: relative import"
            continue
        for name in imported_names(node):
            if reason := why_refused(folder, name, lazy):
                yield f"{place(path, node)}: `{name}`: {reason}"


def functions(folder: str) -> Iterator[tuple[Path, Function]]:
    for path in source_files(folder):
        for node in ast.walk(parse(path)):
            if isinstance(node, Function):
                yield path, node


def num_lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def unannotated(node: Function) -> list[str]:
    spec = node.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    names = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
    return names if node.returns else [*names, "return"]


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return set(run.stdout.split())


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder: str) -> None:
    faults = [fault for path in source_files(folder) for fault in import_faults(folder, path)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("folder", "source", "message"),
    [
        ("plans", "import torch", "x.py:1: `torch`"),
        ("plans", "\nfrom tokenspeed_plan.planner import compile_plan", "x.py:2: `tokenspeed_plan.planner`"),
        ("runtime", "from tokenspeed_plan import codegen", "may import only plans, runtime"),
        ("runtime", "def f():\n    import networkx", "x.py:2: `networkx`"),
        ("codegen", "import click", "`codegen` may use only jinja2"),
        ("planner", "import plans.ops", "bare name, write `tokenspeed_plan.plans.ops`"),
        ("planner", "from . import spec", "relative import"),
        ("planner", "from tokenspeed_plan.runtime.engine import Engine", "inside functions only"),
        ("planner", "def f():\n    from tokenspeed_plan.runtime.engine import Engine", ""),
        ("planner", "if TYPE_CHECKING:\n    from tokenspeed_plan.runtime.engine import Engine", ""),
        ("planner", "if not TYPE_CHECKING:\n    import tokenspeed_plan.runtime", "inside functions only"),
        ("planner", "if TYPE_CHECKING:\n    pass\nelse:\n    import tokenspeed_plan.runtime", "x.py:4:"),
        ("runtime", "import torch.nn.functional as F\nfrom collections.abc import Callable", ""),
    ],
)
def test_import_rule_itself(
    folder: str, source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.REPO", tmp_path)
    path = tmp_path / "x.py"
    path.write_text(source, encoding="utf-8")
    faults = "\n".join(import_faults(folder, path))
    assert message in faults and bool(faults) == bool(message)


def test_no_long_function() -> None:
    sized = [(path, node, num_lines(node)) for folder in FOLDERS for path, node in functions(folder)]
    long = [f"{place(path, node)}: `{node.name}`: {size}" for path, node, size in sized if size > MAX_FUNCTION_LINES]
    assert not long, f"more than {MAX_FUNCTION_LINES} lines\n" + "\n".join(long)
    median = statistics.median(size for _, _, size in sized)
    assert median < MEDIAN_FUNCTION_LINES, f"the median function has {median} lines"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_signature_is_annotated(folder: str) -> None:
    faults = [
        f"{place(path, node)}: `{node.name}`: {', '.join(names)}"
        for path, node in functions(folder)
        if (names := unannotated(node))
    ]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("plans", {"torch", "numpy", "jinja2", "networkx", "click", "yaml"}),
        ("codegen", {"torch", "networkx", "click"}),
        ("runtime", {"networkx", "jinja2", "click", "yaml"}),
        ("runtime.batch", {"networkx", "jinja2", "click", "yaml"}),
        ("planner", {"torch", "transformers"}),
        ("planner.cli", {"torch", "transformers"}),
    ],
)
def test_import_loads_no_more_than_it_may(module: str, unwanted: set[str]) -> None:
    # Torch itself loads networkx, jinja2 and yaml when it finds them; what it brings is not ours.
    brought = modules_after("import torch") if "torch" not in unwanted else set()
    extra = modules_after(f"import {ROOT_NAME}.{module}") & unwanted - brought
    assert not extra, f"`import {ROOT_NAME}.{module}` loads {', '.join(sorted(extra))}"
