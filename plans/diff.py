"""What changed between two plans, one line a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import BufferSpec, Decision, Plan, Pool, Program, WeightSpec

_MAX_VALUE_CHARS = 80


@dataclass(frozen=True, slots=True)
class Change:
    """One change: `+` new, `-` gone, `~` different."""

    sign: Literal["+", "-", "~"]
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.sign} {self.what:<34} {self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class _PoolPair:
    """A pool of both plans; `prefix` names it where there is more than one."""

    prefix: str
    old: Pool
    new: Pool


def diff(old: Plan, new: Plan) -> tuple[Change, ...]:
    """All changes by meaning: facts, decisions and predictions, then programs, kernels and tensors.

    Empty for equal plans.
    """
    if old == new:
        return ()
    pairs = _pool_pairs(old, new)
    found = [*_changed(_plan_facts(old), _plan_facts(new)), *_pools(old, new)]
    for pair in pairs:
        found += _changed(_pool_facts(pair.old, pair.prefix), _pool_facts(pair.new, pair.prefix))
    found += _decisions(old, new)
    for pair in pairs:
        found += _memory(pair)
    found += _numbers("predicted", old.predicted.values, new.predicted.values)
    for pair in pairs:
        found += _programs(pair)
    found += _kernels(old, new)
    for pair in pairs:
        found += _summary(
            pair.prefix + "weights", _named(pair.old.weights), _named(pair.new.weights)
        )
        found += _summary(
            pair.prefix + "buffers", _named(pair.old.buffers), _named(pair.new.buffers)
        )
    found += _changed({"canary": old.canary}, {"canary": new.canary})
    if not found:
        found = [Change("~", "digest", f"{old.digest[:12]} -> {new.digest[:12]}")]
    return tuple(found)


def _by_role(plan: Plan) -> dict[str, Pool]:
    return {pool.role: pool for pool in plan.pools}


def _pool_pairs(old: Plan, new: Plan) -> list[_PoolPair]:
    before, after = _by_role(old), _by_role(new)
    pairs = []
    for role in sorted(before.keys() & after.keys()):
        prefix = f"{role}."
        if len(before) == len(after) == 1:
            prefix = ""
        pairs.append(_PoolPair(prefix, before[role], after[role]))
    return pairs


def _pools(old: Plan, new: Plan) -> Iterator[Change]:
    before, after = _by_role(old), _by_role(new)
    for role in sorted(before.keys() - after.keys()):
        yield Change("-", f"pool {role}")
    for role in sorted(after.keys() - before.keys()):
        yield Change("+", f"pool {role}", f"{len(after[role].programs)} programs")


def _plan_facts(plan: Plan) -> dict[str, Any]:
    facts = {"schema_version": str(plan.schema_version), "compiler_version": plan.compiler_version}
    facts |= dict(_flat("spec", plan.spec))
    facts |= dict(_flat("model", plan.model.model_dump()))
    return facts | dict(_flat("target", plan.target.model_dump()))


def _pool_facts(pool: Pool, prefix: str) -> dict[str, Any]:
    facts = dict(_flat(f"{prefix}layout", pool.layout.model_dump()))
    return facts | dict(_flat(f"{prefix}limits", pool.limits.model_dump()))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _flat(f"{name}.{key}", value[key])
    else:
        yield name, value


def _decisions(old: Plan, new: Plan) -> Iterator[Change]:
    before = {decision.name: decision for decision in old.decisions}
    after = {decision.name: decision for decision in new.decisions}
    for name in sorted(before.keys() | after.keys()):
        what = f"decision {name}"
        if name not in after:
            yield Change("-", what)
        elif name not in before:
            yield Change("+", what, after[name].value)
        elif before[name] != after[name]:
            yield Change("~", what, _decision_arrow(before[name], after[name]))


def _decision_arrow(old: Decision, new: Decision) -> str:
    """Another value; or, where it stayed, another reason or other options."""
    if old.value != new.value:
        return f"{old.value} -> {new.value}"
    if old.reason != new.reason:
        return f"still {new.value}: {new.reason}"
    return f"still {new.value}: other options"


def _memory(pair: _PoolPair) -> Iterator[Change]:
    old = pair.old.memory_bytes_per_rank.model_dump()
    new = pair.new.memory_bytes_per_rank.model_dump()
    return _numbers(f"{pair.prefix}memory", old, new, " bytes")


def _numbers(
    what: str, old: Mapping[str, float], new: Mapping[str, float], unit: str = ""
) -> Iterator[Change]:
    """Numbers, with the relative change."""
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, 0), new.get(name, 0)
        if a == b:
            continue
        detail = f"{a} -> {b}{unit}"
        if a:
            detail += f" ({b / a - 1:+.1%})"
        yield Change("~", f"{what}.{name}", detail)


def _programs(pair: _PoolPair) -> Iterator[Change]:
    before = {program.name: program for program in pair.old.programs}
    after = {program.name: program for program in pair.new.programs}
    for name in sorted(before.keys() | after.keys()):
        what = f"{pair.prefix}program {name}"
        if name not in after:
            yield Change("-", what)
        elif name not in before:
            yield Change("+", what, f"{after[name].launches} launches")
        elif before[name] != after[name]:
            yield Change("~", what, _program_arrow(before[name], after[name]))


def _program_arrow(old: Program, new: Program) -> str:
    numbers = (
        ("launches", old.launches, new.launches),
        ("predicted us", old.predicted_us, new.predicted_us),
    )
    changed = [f"{what} {a} -> {b} ({b / a - 1:+.1%})" for what, a, b in numbers if a != b]
    return ", ".join(changed) or "steps or offsets"


def _kernels(old: Plan, new: Plan) -> Iterator[Change]:
    """Kernels by kind: how many there are, and how many have a name that is new."""
    before = Counter(kind_of(kernel) for kernel in old.kernels)
    after = Counter(kind_of(kernel) for kernel in new.kernels)
    old_names = {kernel.name for kernel in old.kernels}
    kept = Counter(kind_of(kernel) for kernel in new.kernels if kernel.name in old_names)
    for kind in sorted(before.keys() | after.keys()):
        what = f"kernel {kind}"
        if not after[kind]:
            yield Change("-", what, _several(before[kind]))
        elif not before[kind]:
            yield Change("+", what, _several(after[kind]))
        elif before[kind] != after[kind] or kept[kind] != after[kind]:
            detail = f"{after[kind] - kept[kind]} of {after[kind]} are new"
            if before[kind] != after[kind]:
                detail = f"{before[kind]} -> {after[kind]}, {detail}"
            yield Change("~", what, detail)


def _several(count: int) -> str:
    if count == 1:
        return ""
    return f"{count} of them"


def _named(items: Iterable[WeightSpec | BufferSpec]) -> dict[str, Any]:
    return {item.name: item for item in items}


def _summary(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """One line for many tensors: how many are new, gone and changed, and the first of them."""
    changes = list(_changed(old, new))
    if not changes:
        return
    signs: Counter[str] = Counter(change.sign for change in changes)
    words = (("+", "new"), ("-", "gone"), ("~", "changed"))
    counts = ", ".join(f"{signs[sign]} {word}" for sign, word in words if signs[sign])
    first = f"{changes[0].what} {changes[0].detail}".rstrip()
    yield Change("~", what, f"{counts}; first {first}")


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change("-", name)
        elif name not in old:
            yield Change("+", name, _short(new[name]))
        elif old[name] != new[name]:
            yield Change("~", name, _arrow(old[name], new[name]))


def _short(value: Any) -> str:
    """A value that fits a line, else nothing."""
    if not isinstance(value, (str, int, float)):
        return ""
    text = str(value)
    if len(text) >= _MAX_VALUE_CHARS:
        return ""
    return text


def _arrow(old: Any, new: Any) -> str:
    if isinstance(old, (str, int, float)) or old is None:
        return f"{old} -> {new}"
    if isinstance(old, (WeightSpec, BufferSpec)):
        return f"{_tensor(old)} -> {_tensor(new)}"
    return ""


def _tensor(item: WeightSpec | BufferSpec) -> str:
    return f"{item.tensor.format} {list(item.tensor.shape)}"
