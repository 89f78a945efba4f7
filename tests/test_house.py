"""The house is in order: no private path in what we ship, and the pages that a reader looks for."""

from __future__ import annotations

import ast
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PAGES = ("AGENTS.md", "CHANGELOG.md", "LICENSE", "README.md")
BUILT = ("__pycache__", "build", "dist", "out.jsonl")
README_LINES = range(60, 121)
COMMANDS = (
    "make demo",
    "make quick",
    "make test",
    "make lint",
    "make plans",
    "make check-plans",
)

# Somebody's own folder, or a package registry: both belong in that machine's configuration.
PRIVATE = re.compile(
    r"(?<![\w.])/(?:home|root|work)/\w"
    r"|\b(?:files\.pythonhosted|pypi|test\.pypi|download\.pytorch|conda\.anaconda)\.(?:org|com)\b"
    r"|\b[\w.-]*(?:artifactory|nexus|devpi|jfrog)[\w-]*\.[a-z]+\b",
    re.IGNORECASE,
)
# Each of those has one of these, which is found faster.
PARTS = ("/home/", "/root/", "/work/", "pypi", "pythonhosted", "pytorch", "anaconda")
PARTS += ("artifactory", "nexus", "devpi", "jfrog")


def house_files() -> list[Path]:
    """What git holds or would add; every file, where there is no git."""
    listing = [
        "git",
        "-C",
        str(REPO),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        names = subprocess.run(listing, capture_output=True, check=False).stdout.split(b"\0")
    except FileNotFoundError:
        names = []
    paths = [REPO / name.decode() for name in names if name]
    paths = paths or [path for path in REPO.rglob("*") if not hidden_or_built(path)]
    return sorted({path for path in paths if path.is_file()})


def hidden_or_built(path: Path) -> bool:
    parts = path.relative_to(REPO).parts
    return any(
        part.startswith(".") or part in BUILT or part.endswith(".egg-info") for part in parts
    )


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file; nothing of a binary one."""
    data = path.read_bytes()
    if b"\0" not in data[:8192]:
        yield from enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1)


def faults(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace").lower()
    if not any(part in text for part in PARTS):
        return
    for number, line in lines_of(path):
        if found := PRIVATE.search(line):
            yield f"{path}:{number}: `{found.group()}`"


def test_no_private_path_or_registry() -> None:
    files = [path for path in house_files() if path != Path(__file__)]
    assert len(files) > 50
    found = [fault for path in files for fault in faults(path)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "is_private"),
    [
        ("cd /home/ann/x", True),
        ('"file:///root/x"', True),
        ("see https://pypi.org/simple", True),
        ("index = artifactory.example.com", True),
        ("https://example.org/work/x", False),
        ("src/work/x and root / work", False),
        ("on PyPI", False),
    ],
)
def test_rule_itself(line: str, is_private: bool, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"first\n{line}\n", encoding="utf-8")
    assert [fault.split(": ")[0] for fault in faults(path)] == [f"{path}:2"] * is_private


@pytest.mark.parametrize("name", PAGES)
def test_page_exists(name: str) -> None:
    assert (REPO / name).is_file() and (REPO / name).stat().st_size > 0


def test_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) in README_LINES


def test_agents_page_names_the_commands() -> None:
    text = (REPO / "AGENTS.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if command not in text] == []


def test_make_knows_the_commands() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {command.removeprefix("make ") for command in COMMANDS} <= targets


@pytest.mark.parametrize("name", [".ci/run", "tools/make_venv.sh"])
def test_script_is_executable(name: str) -> None:
    assert (REPO / name).stat().st_mode & stat.S_IXUSR


PRODUCT = ("codegen", "planner", "plans", "runtime")
TEXT_CALLS = {"open", "read_text", "write_text"}


def bare_text_calls(source: str) -> list[int]:
    """Lines that open a text file in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in TEXT_CALLS or ast.unparse(node.func) == "os.open":  # has no encoding
            continue
        given = [part.value for part in node.args if isinstance(part, ast.Constant)]
        is_binary = name == "open" and any("b" in str(value) for value in given)
        has_encoding = any(keyword.arg == "encoding" for keyword in node.keywords)
        if not is_binary and not has_encoding:
            found.append(node.lineno)
    return found


def test_every_text_file_is_utf8_whatever_the_locale() -> None:
    paths = [
        path
        for folder in PRODUCT
        for path in sorted((REPO / folder).rglob("*.py"))
        if "frozen" not in path.parts
    ]
    assert len(paths) > 50
    found = {str(path): bare_text_calls(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "is_bare"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ("path.open('w')", True),
        ("path.read_text(encoding='utf-8')", False),
        ("open(path, 'rb')", False),
        ("path.open('a+b')", False),
    ],
)
def test_the_rule_of_encodings_itself(source: str, is_bare: bool) -> None:
    assert bool(bare_text_calls(source)) == is_bare


def test_every_text_file_ends_its_last_line() -> None:
    source = {".md", ".py", ".sh", ".toml", ".yaml", ".txt", ".j2"}
    texts = [path for path in house_files() if path.suffix in source and path.stat().st_size]
    assert [str(path) for path in texts if not path.read_bytes().endswith(b"\n")] == []
