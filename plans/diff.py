"""What changed between two plans, one line a change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed_plan.plans.schema import Plan, Program


@dataclass(frozen=True, slots=True)
class Change:
    """One change: `+` new, `-` gone, `~` different."""

    sign: Literal["+", "-", "~"]
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.sign} {self.what:<34} {self.detail}".rstrip()


def diff(old: Plan, new: Plan) -> tuple[Change, ...]:
    """All changes; empty for equal plans."""
    if old == new:
        return ()
    facts = _changed(_facts(old), _facts(new))
    tensors = [
        *_changed(_named("weight", old.weights), _named("weight", new.weights)),
        *_changed(_named("buffer", old.buffers), _named("buffer", new.buffers)),
        *_changed({f"kernel {k.name}": "" for k in old.kernels}, {f"kernel {k.name}": "" for k in new.kernels}),
    ]
    found = (*facts, *_programs(old, new), *tensors, *_changed({"canary": old.canary}, {"canary": new.canary}))
    return found or (Change("~", "digest", f"{old.digest[:12]} -> {new.digest[:12]}"),)


def _facts(plan: Plan) -> dict[str, Any]:
    groups = {
        "spec": plan.spec, "model": plan.model.model_dump(), "target": plan.target.model_dump(),
        "layout": plan.layout.model_dump(), "limits": plan.limits.model_dump(),
        "memory": plan.memory_bytes_per_rank.model_dump(),
    }  # fmt: skip
    facts = {f"decision {d.name}": f"{d.value} ({d.reason})" for d in plan.decisions}
    facts |= {"schema_version": str(plan.schema_version), "compiler_version": plan.compiler_version}
    for name, group in groups.items():
        facts |= dict(_flat(name, group))
    return facts


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _flat(f"{name}.{key}", value[key])
    else:
        yield name, value


def _named(what: str, items: Any) -> dict[str, Any]:
    return {f"{what} {item.name}": item for item in items}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change("-", name)
        elif name not in old:
            yield Change("+", name, _short(new[name]))
        elif old[name] != new[name]:
            yield Change("~", name, _arrow(old[name], new[name]))


def _short(value: Any) -> str:
    text = str(value)
    return text if isinstance(value, (str, int, float)) and len(text) < 80 else ""


def _arrow(old: Any, new: Any) -> str:
    if isinstance(old, (str, int, float)) or old is None:
        return f"{old} -> {new}"
    if hasattr(old, "tensor"):
        return f"{old.tensor.dtype} {list(old.tensor.shape)} -> {new.tensor.dtype} {list(new.tensor.shape)}"
    return ""


def _programs(old: Plan, new: Plan) -> Iterator[Change]:
    before = {f"{p.phase}/{p.bucket}": p for p in old.programs}
    after = {f"{p.phase}/{p.bucket}": p for p in new.programs}
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield Change("-", f"program {name}")
        elif name not in before:
            yield Change("+", f"program {name}", f"{after[name].launches} launches")
        elif before[name] != after[name]:
            yield Change("~", f"program {name}", _program_arrow(before[name], after[name]))


def _program_arrow(old: Program, new: Program) -> str:
    pairs = (("launches", old.launches, new.launches), ("us", old.predicted_us, new.predicted_us))
    changed = [f"{what} {a} -> {b}" for what, a, b in pairs if a != b]
    return ", ".join(changed) or "steps or offsets"
