"""What changed between two plans, one line a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed_plan.plans.kernel_file import kind_of
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
    """All changes by meaning: what was asked, decided and promised first, then programs, kernels and tensors.

    Empty for equal plans.
    """
    if old == new:
        return ()
    found = (
        *_changed(_facts(old), _facts(new)),
        *_decisions(old, new),
        *_numbers("memory", _bytes(old), _bytes(new), " bytes"),
        *_numbers("predicted", old.predicted.values, new.predicted.values),
        *_programs(old, new),
        *_kernels(old, new),
        *_several("weights", _named(old.pool.weights), _named(new.pool.weights)),
        *_several("buffers", _named(old.pool.buffers), _named(new.pool.buffers)),
        *_changed({"canary": old.canary}, {"canary": new.canary}),
    )
    return found or (Change("~", "digest", f"{old.digest[:12]} -> {new.digest[:12]}"),)


def _facts(plan: Plan) -> dict[str, Any]:
    groups = {
        "spec": plan.spec,
        "model": plan.model.model_dump(),
        "target": plan.target.model_dump(),
        "layout": plan.pool.layout.model_dump(),
        "limits": plan.pool.limits.model_dump(),
    }
    facts = {"schema_version": str(plan.schema_version), "compiler_version": plan.compiler_version}
    for name, group in groups.items():
        facts |= dict(_flat(name, group))
    return facts


def _decisions(old: Plan, new: Plan) -> Iterator[Change]:
    """A decision that fell otherwise; one that did not, but for other reasons, says only that."""
    before, after = ({d.name: d for d in plan.decisions} for plan in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield Change("-", f"decision {name}")
        elif name not in before:
            yield Change("+", f"decision {name}", after[name].value)
        elif before[name].value != after[name].value:
            yield Change("~", f"decision {name}", f"{before[name].value} -> {after[name].value}")
        elif before[name].reason != after[name].reason:
            yield Change(
                "~", f"decision {name}", f"still {after[name].value}: {after[name].reason}"
            )
        elif before[name] != after[name]:
            yield Change(
                "~", f"decision {name}", f"still {after[name].value}: others that were looked at"
            )


def _bytes(plan: Plan) -> dict[str, float]:
    return plan.pool.memory_bytes_per_rank.model_dump()


def _numbers(
    what: str, old: Mapping[str, float], new: Mapping[str, float], unit: str = ""
) -> Iterator[Change]:
    """Numbers, with the change as a share."""
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, 0), new.get(name, 0)
        if a != b:
            share = f" ({b / a - 1:+.1%})" if a else ""
            yield Change("~", f"{what}.{name}", f"{a} -> {b}{unit}{share}")


def _kernels(old: Plan, new: Plan) -> Iterator[Change]:
    """Kernels by kind: how many there are, and whether their text changed; the digest in a name says that it did."""
    before, after = (Counter(kind_of(kernel) for kernel in plan.kernels) for plan in (old, new))
    same = {kernel.name for kernel in old.kernels} & {kernel.name for kernel in new.kernels}
    kept = Counter(name.rpartition("_")[0] for name in same)
    for kind in sorted(before.keys() | after.keys()):
        if not after[kind] or not before[kind]:
            count = before[kind] or after[kind]
            yield Change(
                "+" if after[kind] else "-",
                f"kernel {kind}",
                f"{count} of them" if count > 1 else "",
            )
        elif before[kind] != after[kind] or kept[kind] != after[kind]:
            counts = f"{before[kind]} -> {after[kind]}, " if before[kind] != after[kind] else ""
            yield Change(
                "~",
                f"kernel {kind}",
                f"{counts}{after[kind] - kept[kind]} of {after[kind]} are new",
            )


def _several(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """One line for what is many: how many came, went and changed, and the first of them."""
    changes = list(_changed(old, new))
    if changes:
        signs: Counter[str] = Counter(change.sign for change in changes)
        words = (("+", "new"), ("-", "gone"), ("~", "changed"))
        counts = ", ".join(f"{signs[sign]} {word}" for sign, word in words if signs[sign])
        first = f"first {changes[0].what} {changes[0].detail}".rstrip()
        yield Change("~", what, f"{counts}; {first}")


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _flat(f"{name}.{key}", value[key])
    else:
        yield name, value


def _named(items: Any) -> dict[str, Any]:
    return {item.name: item for item in items}


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
    before = {f"{p.phase}/{p.bucket}": p for p in old.pool.programs}
    after = {f"{p.phase}/{p.bucket}": p for p in new.pool.programs}
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield Change("-", f"program {name}")
        elif name not in before:
            yield Change("+", f"program {name}", f"{after[name].launches} launches")
        elif before[name] != after[name]:
            yield Change("~", f"program {name}", _program_arrow(before[name], after[name]))


def _program_arrow(old: Program, new: Program) -> str:
    pairs = (
        ("launches", old.launches, new.launches),
        ("predicted us", old.predicted_us, new.predicted_us),
    )
    changed = [f"{what} {a} -> {b} ({b / a - 1:+.1%})" for what, a, b in pairs if a != b]
    return ", ".join(changed) or "steps or offsets"
