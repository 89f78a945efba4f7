"""What changed between two plans, one line a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import (
    BufferSpec,
    Decision,
    KernelSpec,
    LibraryCall,
    Plan,
    Pool,
    Program,
    WeightSpec,
)
from tokenspeed_plan.plans.text import printable_line
from tokenspeed_plan.plans.types import TensorSpec

_MAX_VALUE_CHARS = 80
_Item = WeightSpec | BufferSpec


@dataclass(frozen=True, slots=True)
class Change:
    """One change: `+` new, `-` gone, `~` different."""

    sign: Literal["+", "-", "~"]
    what: str
    detail: str = ""

    def __str__(self) -> str:
        line = f"{self.sign} {self.what:<34} {self.detail}"
        return printable_line(line.rstrip())


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
    found = list(_changed(_plan_facts(old), _plan_facts(new)))
    found += _pools(old, new)
    for pair in pairs:
        before = _pool_facts(pair.old, pair.prefix)
        found += _changed(before, _pool_facts(pair.new, pair.prefix))
    found += _decisions(old, new)
    for pair in pairs:
        found += _memory(pair)
    found += _numbers("predicted", old.predicted.values, new.predicted.values)
    for pair in pairs:
        found += _programs(pair)
    found += _kernels(old, new)
    for pair in pairs:
        found += _tensors(f"{pair.prefix}weights", pair.old.weights, pair.new.weights)
        found += _tensors(f"{pair.prefix}buffers", pair.old.buffers, pair.new.buffers)
    found += _changed({"canary": old.canary}, {"canary": new.canary})
    if not found:
        found = [Change("~", "digest", f"{old.digest[:12]} -> {new.digest[:12]}")]
    return tuple(found)


def _by_role(plan: Plan) -> dict[str, Pool]:
    return {pool.role: pool for pool in plan.pools}


def _pool_pairs(old: Plan, new: Plan) -> list[_PoolPair]:
    before = _by_role(old)
    after = _by_role(new)
    common = sorted(before.keys() & after.keys())
    pairs = []
    for role in common:
        prefix = f"{role}."
        if len(before) == len(after) == 1:
            prefix = ""
        pair = _PoolPair(prefix, before[role], after[role])
        pairs.append(pair)
    return pairs


def _pools(old: Plan, new: Plan) -> Iterator[Change]:
    before = _by_role(old)
    after = _by_role(new)
    gone = before.keys() - after.keys()
    for role in sorted(gone):
        yield Change("-", f"pool {role}")
    added = after.keys() - before.keys()
    for role in sorted(added):
        count = len(after[role].programs)
        yield Change("+", f"pool {role}", f"{count} programs")


def _plan_facts(plan: Plan) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "schema_version": str(plan.schema_version),
        "compiler_version": plan.compiler_version,
    }
    facts.update(_flat("spec", plan.spec))
    facts.update(_flat("model", plan.model.model_dump()))
    facts.update(_flat("target", plan.target.model_dump()))
    return facts


def _pool_facts(pool: Pool, prefix: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    facts.update(_flat(f"{prefix}layout", pool.layout.model_dump()))
    facts.update(_flat(f"{prefix}limits", pool.limits.model_dump()))
    if pool.host_cache is not None:
        facts.update(_flat(f"{prefix}host_cache", pool.host_cache.model_dump()))
    if pool.answer_returns is not None:
        facts.update(_flat(f"{prefix}answer_returns", pool.answer_returns.model_dump()))
    return facts


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
        one = before.get(name)
        other = after.get(name)
        if other is None:
            yield Change("-", what)
        elif one is None:
            yield Change("+", what, other.value)
        elif one != other:
            yield Change("~", what, _decision_arrow(one, other))


def _decision_arrow(old: Decision, new: Decision) -> str:
    """Another value; or, where it stayed, another reason or other options."""
    if old.value != new.value:
        return f"{old.value} -> {new.value}"
    if old.reason != new.reason:
        return f"still {new.value}: {new.reason}"
    return f"still {new.value}: other options"


def _memory(pair: _PoolPair) -> Iterator[Change]:
    before = pair.old.memory_bytes_per_rank.model_dump()
    after = pair.new.memory_bytes_per_rank.model_dump()
    what = f"{pair.prefix}memory"
    return _numbers(what, before, after, " bytes")


def _numbers(
    what: str, old: Mapping[str, float], new: Mapping[str, float], unit: str = ""
) -> Iterator[Change]:
    """Numbers, with the relative change."""
    for name in sorted(old.keys() | new.keys()):
        before = old.get(name, 0)
        after = new.get(name, 0)
        if before == after:
            continue
        detail = f"{before} -> {after}{unit}"
        if before:
            detail += _share(before, after)
        yield Change("~", f"{what}.{name}", detail)


def _share(before: float, after: float) -> str:
    """The relative change."""
    return f" ({after / before - 1:+.1%})"


def _programs(pair: _PoolPair) -> Iterator[Change]:
    before = {program.name: program for program in pair.old.programs}
    after = {program.name: program for program in pair.new.programs}
    for name in sorted(before.keys() | after.keys()):
        what = f"{pair.prefix}program {name}"
        one = before.get(name)
        other = after.get(name)
        if other is None:
            yield Change("-", what)
        elif one is None:
            yield Change("+", what, f"{other.launches} launches")
        elif one != other:
            yield Change("~", what, _program_arrow(one, other))


def _program_arrow(old: Program, new: Program) -> str:
    numbers = (
        ("launches", old.launches, new.launches),
        ("library calls", _library_calls(old), _library_calls(new)),
        ("predicted us", old.predicted_us, new.predicted_us),
    )
    changed = []
    for what, before, after in numbers:
        if before != after:
            share = _share(before, after) if before else ""
            changed.append(f"{what} {before} -> {after}{share}")
    return ", ".join(changed) or "steps or offsets"


def _library_calls(program: Program) -> int:
    return sum(isinstance(step, LibraryCall) for step in program.steps)


def _kernels(old: Plan, new: Plan) -> Iterator[Change]:
    """Kernels by kind: how many there are, and how many have a name that is new."""
    before = _kinds(old.kernels)
    after = _kinds(new.kernels)
    old_names = {kernel.name for kernel in old.kernels}
    kept = _kinds(kernel for kernel in new.kernels if kernel.name in old_names)
    for kind in sorted(before.keys() | after.keys()):
        what = f"kernel {kind}"
        was = before[kind]
        now = after[kind]
        added = now - kept[kind]
        if not now:
            yield Change("-", what, _several(was))
        elif not was:
            yield Change("+", what, _several(now))
        elif was != now:
            yield Change("~", what, f"{was} -> {now}, {added} of {now} are new")
        elif added:
            yield Change("~", what, f"{added} of {now} are new")


def _kinds(kernels: Iterable[KernelSpec]) -> Counter[str]:
    return Counter(kind_of(kernel) for kernel in kernels)


def _several(count: int) -> str:
    if count == 1:
        return ""
    return f"{count} of them"


def _tensors(what: str, old: Iterable[_Item], new: Iterable[_Item]) -> Iterator[Change]:
    """One line for many tensors: how many are new, gone and changed, and the first of them."""
    before = {item.name: item for item in old}
    after = {item.name: item for item in new}
    changes = list(_changed(before, after))
    if not changes:
        return
    signs: Counter[str] = Counter(change.sign for change in changes)
    counts = []
    for sign, word in (("+", "new"), ("-", "gone"), ("~", "changed")):
        if signs[sign]:
            counts.append(f"{signs[sign]} {word}")
    summary = ", ".join(counts)
    first = changes[0]
    detail = f"{summary}; first {first.what} {first.detail}"
    yield Change("~", what, detail.rstrip())


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change("-", name)
        elif name not in old:
            yield Change("+", name, _short(new[name]))
        elif old[name] != new[name]:
            detail = _arrow(old[name], new[name])
            yield Change("~", name, detail)


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
        before = _spell(old.tensor)
        return f"{before} -> {_spell(new.tensor)}"
    return ""


def _spell(tensor: TensorSpec) -> str:
    shape = list(tensor.shape)
    return f"{tensor.format} {shape}"
