"""The only file that reads or writes a plan bundle."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenspeed_plan.plans.canon import canonical, plan_digest, sha256
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.kernel_file import KERNELS, read_source
from tokenspeed_plan.plans.schema import SCHEMA_VERSION, Plan
from tokenspeed_plan.plans.signature import SIGNATURE_FILE, Signers
from tokenspeed_plan.plans.text import first_complaint, read_utf8
from tokenspeed_plan.plans.validate import validate

PLAN_FILE = "plan.json"
CUBIN = "cubin"
# The elements of these fields get a line each, so that a diff of two plans is readable: one line
# for each weight, buffer, kernel and step.
_OPENED = frozenset(
    (
        "arenas",
        "binaries",
        "buffers",
        "canary",
        "decisions",
        "kernels",
        "limits",
        "model",
        "pools",
        "predicted",
        "programs",
        "spec",
        "steps",
        "target",
        "weights",
    )
)
_OPENED_ITEMS = frozenset(("pools", "programs"))  # and their elements are opened too


def seal(plan: Plan) -> Plan:
    """The plan with its digest filled in."""
    return plan.model_copy(update={"digest": plan_digest(plan.model_dump(mode="json"))})


def dump_plan(plan: Plan) -> str:
    """The text of plan.json: canonical, one line for each weight, buffer, kernel and step."""
    return _text_of(plan.model_dump(mode="json"))


def _text_of(fields: dict[str, Any]) -> str:
    return _open(fields, "", 0) + "\n"


def _open(value: dict[str, Any] | list[Any], key: str, indent: int) -> str:
    """The elements of the field `key`, one below the other."""
    inner = []
    if isinstance(value, dict):
        for name in sorted(value):
            field = _spell(value[name], name, indent)
            inner.append(f"{canonical(name)}: {field}")
        return _bracket("{", inner, "}", indent)
    for item in value:
        if key in _OPENED_ITEMS:
            inner.append(_open(item, "", indent + 1))
        else:
            inner.append(canonical(item))
    return _bracket("[", inner, "]", indent)


def _spell(value: Any, key: str, indent: int) -> str:
    """The field `key`, opened if it is one of those that are and has elements."""
    has_elements = isinstance(value, (dict, list)) and len(value) > 0
    if key not in _OPENED or not has_elements:
        return canonical(value)
    return _open(value, key, indent + 1)


def _bracket(opening: str, inner: list[str], closing: str, indent: int) -> str:
    pad = "\n" + " " * indent
    lines = f",{pad} ".join(inner)
    return f"{opening}{pad} {lines}{pad}{closing}"


def save_plan(
    plan: Plan,
    folder: Path,
    sources: Mapping[str, str] | None = None,
    cubins: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the bundle, `plan.json` last. Each file is written whole or not at all.

    Nothing outside the folder is written or deleted, whatever it holds.

    Args:
        plan: what to write.
        folder: where to.
        sources: the text of each kernel by name.
        cubins: binaries by file name.

    Raises:
        PlanError: a folder of the bundle is a link to another one.
    """
    path = folder / PLAN_FILE
    for inner in (folder / KERNELS, folder / CUBIN):
        _refuse_link(inner)
    replaced = _files_listed(path)
    texts = {}
    for name, text in (sources or {}).items():
        texts[f"{name}.py"] = text.encode()
    binaries = cubins or {}
    _write_all(folder / KERNELS, texts)
    _write_all(folder / CUBIN, binaries)
    _write(path, dump_plan(plan).encode())
    _drop_replaced(folder / KERNELS, replaced - texts.keys())
    _drop_replaced(folder / CUBIN, replaced - binaries.keys())
    return path


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise PlanError(
            f"`{folder}` is a link to another folder", "delete the link, or name a new folder"
        )


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        _write(folder / name, data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with draft.open("xb") as file:  # never through a link
        file.write(data)
    draft.replace(path)


# Files of kernels, whose names end with their digests. Nobody else's files have such names.
_OURS = re.compile(r"[a-z0-9_]+_[0-9a-f]{12}(?:\.py|\.sm[0-9]+\.cubin)")


def _files_listed(path: Path) -> set[str]:
    """Files of kernels and binaries of the plan to be replaced, of any schema version."""
    if not path.is_file():
        return set()
    try:
        fields = json.loads(path.read_bytes())
        names = {f"{item['kernel']}.sm{item['sm']}.cubin" for item in fields["binaries"]}
        names |= {f"{item['name']}.py" for item in fields["kernels"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return set()
    return {name for name in names if _OURS.fullmatch(name)}


def _drop_replaced(folder: Path, names: set[str]) -> None:
    """Delete files of the replaced plan; other files stay."""
    for path in sorted(folder.glob("*")):
        if path.name in names:
            path.unlink()


def write_signature(folder: Path, signature: bytes) -> Path:
    """Put a signature beside its plan; returns its path."""
    path = folder / SIGNATURE_FILE
    _write(path, signature)
    return path


def check_sources(plan: Plan, folder: Path) -> int:
    """The kernels beside a plan must be its own; returns how many there are.

    Raises:
        PlanError: one is missing, was altered, or is not in the plan.
    """
    built = [kernel for kernel in plan.kernels if kernel.launch is not None]
    for kernel in built:
        read_source(folder, kernel)
    found = {path.stem for path in (folder / KERNELS).glob("*.py")}
    strangers = found - {kernel.name for kernel in built}
    if strangers:
        path = folder / KERNELS / f"{min(strangers)}.py"
        raise PlanError(f"`{path}` is not in the plan", _REPLAN)
    return len(built)


def check_cubins(plan: Plan, folder: Path) -> int:
    """The binaries beside a plan must be its own; returns how many there are.

    Raises:
        PlanError: one is missing or was altered.
    """
    for binary in plan.binaries:
        path = folder / CUBIN / f"{binary.kernel}.sm{binary.sm}.cubin"
        digest = ""
        if path.is_file():
            digest = sha256(path.read_bytes())
        if digest != binary.cubin_sha256:
            raise PlanError(f"`{path}` is not the plan's binary", _REPLAN)
    return len(plan.binaries)


def parse_plan(text: str | bytes, name: str) -> Plan:
    """A plan from its text, checked against the schema only.

    Raises:
        PlanError: not JSON, another schema version, or fields that do not fit.
    """
    try:
        fields = json.loads(
            text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise PlanError(f"`{name}` is not JSON: {error}", _REPLAN) from error
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA_VERSION:
        raise PlanError(
            f"`{name}` has schema version {version!r}, this build reads {SCHEMA_VERSION}", _REPLAN
        )
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise PlanError(f"`{name}` at {first_complaint(error)}", _REPLAN) from error


_MAX_WHOLE = 1 << 63  # no size, count or token id is as large
_MAX_DIGITS = 20


def _whole(digits: str) -> int:
    """An integer that fits 64 bits.

    Raises:
        ValueError: it does not.
    """
    if len(digits) > _MAX_DIGITS or not -_MAX_WHOLE <= int(digits) < _MAX_WHOLE:
        raise ValueError(f"{digits[:_MAX_DIGITS]}... does not fit 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    """A number that a double holds.

    Raises:
        ValueError: it is too large.
    """
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:_MAX_DIGITS]} is no finite number")
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


_REPLAN = "make the plan again with `tokenspeed plan SPEC -o DIR`"


def read_plan(folder: Path) -> str:
    """The text of a bundle's plan.

    Raises:
        PlanError: there is no readable bundle.
    """
    path = folder / PLAN_FILE
    if path.is_fifo():  # it could be waited for without end
        raise PlanError(f"`{path}` is a pipe", "name a folder that `tokenspeed plan` wrote")
    try:
        return read_utf8(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise PlanError(
            f"cannot read `{path}`: {reason}", "name a folder that `tokenspeed plan` wrote"
        ) from error


def check_digest(fields: Mapping[str, Any]) -> None:
    """The fields of a plan must be what their digest says.

    Raises:
        PlanError: something was altered after planning.
    """
    actual = plan_digest(fields)
    if fields["digest"] != actual:
        raise PlanError(
            f"the plan's digest is {fields['digest'][:16]}, its content has {actual[:16]}", _REPLAN
        )


def load_plan(folder: Path, signers: Signers | None = None) -> Plan:
    """Read a bundle, and check its schema, its rules, its digest and its spelling.

    With `signers`, one of them must have signed it.

    Raises:
        PlanError: with what is wrong; nothing else is raised for bad input.
    """
    text = read_plan(folder)
    if signers is not None:
        signers.check(folder, text.encode())
    return _checked_plan(text, str(folder / PLAN_FILE))


@lru_cache(maxsize=1)
def _checked_plan(text: str, name: str) -> Plan:
    """The plan of a text; a command asks several times, and the checks of a large one take 1 s.

    Raises:
        PlanError: with what is wrong.
    """
    plan = parse_plan(text, name)
    validate(plan)
    fields = plan.model_dump(mode="json")
    check_digest(fields)
    if text != _text_of(fields):
        raise PlanError(f"the text of `{name}` was altered after planning", _REPLAN)
    return plan
