"""Library steps: planned by price, proved, checked at load, and replaced by the plan's kernels.

The library is a fake distribution on a CPU, with PyTorch's attention as its function.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from flashinfer_double import BatchPrefillWithPagedKVCacheWrapper, install_flashinfer
from plan_edits import with_program
from torch import Tensor

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.machines.hardware import find_hardware, known_profiles
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.errors import PlanError, SpecError
from tokenspeed_plan.plans.libraries import (
    LIBRARY_FUNCTIONS,
    LibraryFunction,
    in_versions,
    operands_by_role,
)
from tokenspeed_plan.plans.schema import KernelCall, KernelSpec, LibraryCall, Plan
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.execution.kernels import Launcher
from tokenspeed_plan.runtime.libraries import loader
from tokenspeed_plan.runtime.reference.attention import attention
from tokenspeed_plan.runtime.request import SamplingParams

NAME = "fake.attention_prefill"
FUNCTION = LibraryFunction(
    package="fake-attention",
    versions=">=1.2,<2",
    sms=(0,),
    runs=(("attention",), ("attention", "sigmoid_gate")),
    attrs={"mode": ("prefill",)},
    dtypes=("fp32",),
    head_bytes=4,
)
PRICE = """libraries:
  {name}:
    wait: {{value: {wait}, source: prior}}
    residual: {{value: {residual}, source: prior}}
"""


@dataclass
class FakeLibrary:
    """What was installed, and the tokens of each call.

    Attributes:
        folder: where the distribution is.
        profile: of a CPU that has a price of it.
        error: that is added to each result.
        calls: tokens of each call since the last `clear`.
    """

    folder: Path
    profile: Path
    error: float = 0.0
    calls: list[int] = field(default_factory=list)

    def install(self, version: str) -> None:
        """Make it an installed distribution of this release."""
        info = self.folder / f"fake_attention-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: fake-attention\nVersion: {version}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")

    def adapter(self, kernel: KernelSpec) -> Launcher:
        """What `fa3.attention_prefill` is for its package."""
        places = {param.name: index for index, param in enumerate(kernel.tensors)}
        roles = operands_by_role(kernel, "attention")
        names = ("q", "page_table", "context_lens", "cu_seqlens", "kv_cache")
        operands = [places[roles[name]] for name in names]
        result = places[kernel.parts[-1].outputs[0]]

        def run(_: object, *tensors: Tensor) -> tuple[()]:
            own = [tensors[index] for index in operands]
            (y,) = attention(kernel.parts[0].attrs, *own)
            if kernel.parts[-1].kind == "sigmoid_gate":
                gate = operands_by_role(kernel, "sigmoid_gate")["g"]
                y = y * torch.sigmoid(tensors[places[gate]])
            tensors[result].copy_(y + self.error)
            self.calls.append(len(y))
            return ()

        return run


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Known to planner and runtime, priced at next to nothing, and not installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    profile = tmp_path / "machine.yaml"
    library = FakeLibrary(folder, profile)
    monkeypatch.setitem(LIBRARY_FUNCTIONS, NAME, FUNCTION)
    monkeypatch.setitem(loader.ADAPTERS, NAME, library.adapter)
    profile.write_text(priced(wait=0.0, residual=0.1), encoding="utf-8")
    return library


def priced(wait: float, residual: float, name: str = NAME) -> str:
    """The CPU's profile with a price of a function."""
    return known_profiles()["cpu"] + PRICE.format(name=name, wait=wait, residual=residual)


class NoKernels:
    """Kernels of which none can be launched here: what is no library is a reference."""

    def has(self, kernel: KernelSpec) -> bool:
        return False

    def without_overlap(self) -> NoKernels:
        return self

    def launches(self, *_: Any) -> Any:
        raise AssertionError

    def launcher(self, *_: Any) -> Any:
        raise AssertionError


def plan_of(library: FakeLibrary, folder: Path, **target: Any) -> Plan:
    spec = make_spec(folder, target={"gpu": str(library.profile), **target})
    return compile_plan(spec, find_model(spec))


def calls_of(plan: Plan) -> dict[str, list[LibraryCall]]:
    """The library steps of each program that has some."""
    found: dict[str, list[LibraryCall]] = {}
    for program in plan.pool.programs:
        for step in program.steps:
            if isinstance(step, LibraryCall):
                found.setdefault(program.name, []).append(step)
    return found


def answers(plan: Plan, folder: Path) -> list[tuple[int, ...]]:
    engine = Engine.from_plan(plan, folder, chunk=40, kernels=NoKernels())
    prompts = [[(7 * i + size) % 300 for i in range(size)] for size in (1, 70, 130)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    return [tuple(done.token_ids) for done in engine.generate(prompts, params)]


def test_a_library_is_planned_where_it_is_cheaper(fake_library: Any, checkpoint: Any) -> None:
    """Without the package: all of it is data. Its kernels stay in the plan."""
    folder = checkpoint("moe")
    plan = plan_of(fake_library, folder)
    calls = calls_of(plan)
    prefill = {program.name for program in plan.pool.programs if program.phase == "prefill"}
    assert set(calls) == prefill
    call = calls[min(prefill)][0]
    assert (call.package, call.versions, call.fallback) == ("fake-attention", ">=1.2,<2", True)
    assert any(kernel.name == call.kernel for kernel in plan.kernels)
    assert call.workspace_bytes > 0
    most = max(call.workspace_bytes for found in calls.values() for call in found)
    assert plan.pool.memory_bytes_per_rank.reserved == most
    (decision,) = (each for each in plan.decisions if each.name == "libraries")
    assert NAME in decision.value
    for option in decision.options:
        assert option.numbers["library_us"] < option.numbers["kernel_us"]
    without = plan_of(fake_library, folder, libraries="none")
    assert not calls_of(without)
    assert plan.pool.programs[0].predicted_us < without.pool.programs[0].predicted_us
    details = {change.what: change.detail for change in diff(without, plan)}
    assert all("library calls 0 -> 1" in details[f"program {name}"] for name in prefill)


def test_a_dear_library_is_named_and_not_called(fake_library: Any, checkpoint: Any) -> None:
    fake_library.profile.write_text(priced(wait=1e9, residual=1.0), encoding="utf-8")
    plan = plan_of(fake_library, checkpoint("moe"))
    assert not calls_of(plan)
    (decision,) = (each for each in plan.decisions if each.name == "libraries")
    assert decision.value == "none"
    assert all(o.numbers["library_us"] > o.numbers["kernel_us"] for o in decision.options)


def test_a_profile_prices_only_what_its_machine_has(fake_library: Any) -> None:
    profile, text = fake_library.profile, priced(0.0, 1.0, "fa3.attention_prefill")
    profile.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match="no code for sm_0"):
        find_hardware(str(profile))
    profile.write_text(priced(0.0, 1.0, "cublas.gemm"), encoding="utf-8")
    with pytest.raises(SpecError, match=r"`libraries\.cublas\.gemm` is unknown"):
        find_hardware(str(profile))


def test_a_library_runs_in_the_place_of_the_kernel(fake_library: Any, checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of(fake_library, folder)
    fake_library.install("1.2.7.post1")
    found = answers(plan, folder)
    assert fake_library.calls[0] == 74  # of the batch that it is tried on
    # A prompt of one token is a decode step.
    assert sum(fake_library.calls[1:]) == 200 * len(calls_of(plan)["prefill/512"])
    assert found == answers(plan_of(fake_library, folder, libraries="none"), folder)


@pytest.mark.parametrize(
    ("version", "error", "says"),
    [
        (None, 0.0, "`fake-attention`, which is not installed"),
        ("1.1.9", 0.0, "`fake-attention` >=1.2,<2, installed is 1.1.9"),
        ("2.0", 0.0, "installed is 2.0"),
        ("1.2", 0.01, "`fake-attention` differs from the reference by"),
        ("1.2", float("nan"), "`fake-attention` differs from the reference by nan"),
    ],
)
def test_what_does_not_fit_is_replaced_or_refused(
    version: str | None,
    error: float,
    says: str,
    fake_library: Any,
    checkpoint: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoint("moe")
    if version is not None:
        fake_library.install(version)
    fake_library.error = error
    found = answers(plan_of(fake_library, folder), folder)
    note = capsys.readouterr().err
    assert note.count(says) == 1
    assert "the plan's own kernels run instead" in note
    assert len(fake_library.calls) <= 1  # the one that it was tried with
    assert found == answers(plan_of(fake_library, folder, libraries="none"), folder)
    required = plan_of(fake_library, folder, libraries="required")
    with pytest.raises(PlanError, match=says) as refused:
        answers(required, folder)
    assert refused.value.hint == "install it: `pip install 'fake-attention>=1.2,<2'`"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"function": "fake.gemm"}, "is no known function"),
        ({"package": "other"}, "is no known function"),
        ({"function": "fa3.attention_prefill", "package": "tokenspeed-fa3"}, "on sm_0"),
        ({"versions": "the newest"}, "are no bounds"),
        ({"workspace_bytes": 1}, "bytes of workspace, it needs"),
        ({"prepare": "batch"}, "prepare batch"),
        ({"args": ()}, "does not fit kernel"),
        ({"stream": 3}, "there is no stream 3"),
    ],
)
def test_a_corrupt_library_step_is_refused(
    changes: dict[str, Any], says: str, fake_library: Any, checkpoint: Any
) -> None:
    plan = plan_of(fake_library, checkpoint("moe"))
    program = plan.pool.programs[0]
    at = next(i for i, step in enumerate(program.steps) if isinstance(step, LibraryCall))
    steps = list(program.steps)
    steps[at] = steps[at].model_copy(update=changes)
    with pytest.raises(PlanError, match=says):
        validate(with_program(plan, 0, steps=tuple(steps)))


def test_a_library_computes_only_its_operators(fake_library: Any, checkpoint: Any) -> None:
    """A step that stands in for another kernel is refused, and so is one of a decode step."""
    plan = plan_of(fake_library, checkpoint("moe"))
    (call, *_), *_ = calls_of(plan).values()
    for program in plan.pool.programs:
        at = next(
            i
            for i, step in enumerate(program.steps)
            if isinstance(step, KernelCall)
            and (program.phase == "prefill" or step.kernel.startswith("attention"))
        )
        old = program.steps[at]
        assert isinstance(old, KernelCall)
        wrong = call.model_copy(update={"kernel": old.kernel, "args": old.args})
        steps = (*program.steps[:at], wrong, *program.steps[at + 1 :])
        index = plan.pool.programs.index(program)
        with pytest.raises(PlanError, match="does not compute"):
            validate(with_program(plan, index, steps=steps))


def test_few_tokens_are_left_to_the_kernels(
    fake_library: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(fake_library, checkpoint("moe"))
    buckets = [p.max_tokens for p in plan.pool.programs if p.name in calls_of(plan)]
    least = max(buckets)
    assert min(buckets) < least
    monkeypatch.setitem(LIBRARY_FUNCTIONS, NAME, replace(FUNCTION, least_tokens=least))
    with pytest.raises(PlanError, match=f"is for {least} tokens and more"):
        validate(plan)
    assert set(calls_of(plan_of(fake_library, checkpoint("moe")))) == {f"prefill/{least}"}


def test_the_workspace_is_reserved(fake_library: Any, checkpoint: Any) -> None:
    plan = plan_of(fake_library, checkpoint("moe"))
    memory = plan.pool.memory_bytes_per_rank
    lacking = memory.model_copy(update={"reserved": 0, "total": memory.total - memory.reserved})
    with pytest.raises(PlanError, match="0 bytes are reserved, a library takes"):
        validate(plan.with_pool(memory_bytes_per_rank=lacking))


ASKED = "flashinfer.attention_prefill"


@pytest.fixture
def cpu_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile of a CPU where FlashInfer's function runs in fp32 and is very dear."""
    function = replace(LIBRARY_FUNCTIONS[ASKED], sms=(0,), dtypes=("fp32",), attrs=FUNCTION.attrs)
    monkeypatch.setitem(LIBRARY_FUNCTIONS, ASKED, function)
    profile = tmp_path / "machine.yaml"
    profile.write_text(priced(wait=1e6, residual=9.0, name=ASKED), encoding="utf-8")
    return profile


def test_what_is_asked_for_is_called_whatever_it_costs(
    cpu_flashinfer: Path, tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer plans each batch once on the host, and computes all layers of it."""
    folder = checkpoint("moe")
    spec = make_spec(folder, target={"gpu": str(cpu_flashinfer), "libraries": ["flashinfer"]})
    plan = compile_plan(spec, find_model(spec))
    calls = calls_of(plan)
    assert {call.function for found in calls.values() for call in found} == {ASKED}
    assert all(call.fallback and call.prepare == "batch" for call in calls["prefill/512"])
    plain = make_spec(folder, target={"gpu": str(cpu_flashinfer)})
    unasked = compile_plan(plain, find_model(plain))
    assert not calls_of(unasked)
    assert plan.pool.programs[0].predicted_us > unasked.pool.programs[0].predicted_us
    install_flashinfer(monkeypatch, tmp_path / "site")
    wanted = answers(unasked, folder)
    assert not BatchPrefillWithPagedKVCacheWrapper.plans
    assert answers(plan, folder) == wanted
    chunks = 5  # of 40 tokens at most: of 70 + 130 tokens
    tried = 2  # plans of the batch that it is tried on, one for each back end
    assert BatchPrefillWithPagedKVCacheWrapper.plans == tried + chunks


def test_what_is_asked_for_must_have_a_price(checkpoint: Any) -> None:
    spec = make_spec(checkpoint("moe"), target={"gpu": "cpu", "libraries": ["flashinfer"]})
    with pytest.raises(SpecError, match="`flashinfer` has no price on"):
        compile_plan(spec, find_model(spec))


def test_releases_are_compared_by_their_numbers() -> None:
    assert in_versions("3.0.0.post20260810", ">=3.0,<3.1")
    assert in_versions("3.0", ">=3,<3.0.1")
    assert in_versions("10.2", ">=9.9")
    for version in ("2.9", "3.1", "3.1.0", "4", "unknown"):
        assert not in_versions(version, ">=3.0,<3.1"), version
