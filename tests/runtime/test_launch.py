"""Both launchers bind exactly the parameters of a kernel, in their order."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.kernel_abi import with_launch_params
from tokenspeed_plan.plans.schema import (
    Binary,
    GridDim,
    KernelSpec,
    Launch,
    Param,
    Part,
)
from tokenspeed_plan.plans.types import RankShift, TensorSpec
from tokenspeed_plan.runtime.execution import cuda_kernels, triton_kernels
from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.execution.triton_kernels import TritonKernels

RANK, NUM_TOKENS, NUM_SEQS, WIDTH = 1, 3, 2, 4
SHIFTS = {
    "row_start": RankShift(div=1, mod=2, step=10),
    "expert_start": RankShift(div=1, mod=2, step=7),
}


def make_kernel(ranks: int) -> KernelSpec:
    """A kernel with every role; with one rank without the tables."""
    rows = TensorSpec.of(shape=("num_tokens", WIDTH), dtype="fp32")
    tensors = (
        Param(name="add_r", role="input", tensor=rows),
        Param(name="x", role="input", tensor=rows),
        Param(name="w", role="weight", tensor=TensorSpec.of(shape=(WIDTH,), dtype="fp32")),
        Param(name="y", role="output", tensor=rows, access="write"),
    )
    scratch = Param(name="counters", role="scratch", tensor=rows, access="update")
    parts = [Part(kind="embed", operands=(), outputs=(), attrs={}, rank_attrs=SHIFTS)]
    if ranks > 1:
        attrs = {"num_ranks": ranks}
        parts.append(Part(kind="all_reduce", operands=("x",), outputs=("z",), attrs=attrs))
    launch = Launch(
        template="t",
        constants={},
        grid=(GridDim(block=1),),
        num_warps=4,
        num_stages=1,
        pdl=False,
        source_sha256="",
    )
    kernel = KernelSpec(name="test_0", params=tensors, parts=tuple(parts), launch=launch)
    return with_launch_params(kernel, (scratch,))


def make_tensors(kernel: KernelSpec) -> list[Tensor]:
    shapes = (param.tensor.bind(NUM_TOKENS, NUM_SEQS) for param in kernel.tensors)
    return [torch.full(shape, float(index)) for index, shape in enumerate(shapes)]


TABLE = torch.tensor([5, 6])
PROGRAM = 3


def make_peers() -> PeerMemory:
    """Two ranks."""
    return PeerMemory(torch.zeros(4, dtype=torch.uint8), TABLE.tolist())


def by_name(kernel: KernelSpec, values: tuple[Any, ...]) -> dict[str, Any]:
    names = [param.name for param in kernel.params]
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_triton_binds_all_parameters_in_order(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, launches = make_kernel(ranks), list[tuple[Any, ...]]()

    class Function:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert grid == (NUM_TOKENS,)
            return self.launch

        def launch(self, *args: Any, num_warps: int, num_stages: int) -> None:
            launches.append(args)

    monkeypatch.setattr(triton_kernels, "load_function", lambda *_: Function())
    tensors, backend = make_tensors(kernel), TritonKernels({kernel.name: ""})
    launcher = backend.launcher(kernel, RANK, NUM_TOKENS, NUM_SEQS, make_peers(), PROGRAM)
    launcher({}, *tensors)
    (args,) = launches
    bound = by_name(kernel, args)
    assert all(bound[p.name] is x for p, x in zip(kernel.tensors, tensors, strict=True))
    assert (bound["row_start"], bound["expert_start"]) == (10, 7)
    assert (bound["num_tokens"], bound["num_seqs"]) == (NUM_TOKENS, NUM_SEQS)
    if ranks > 1:
        assert (bound["rank"], bound["program"]) == (RANK, PROGRAM)
        assert bound["peers"].tolist() == TABLE.tolist()


class Driver:
    """The driver's functions; a launch reads the table of arguments as a GPU would."""

    def __init__(self, kernel: KernelSpec) -> None:
        self.kernel = kernel
        self.launched: list[dict[str, int]] = []
        self.grids: list[tuple[int, int, int]] = []
        self.CUlaunchAttribute = lambda: SimpleNamespace(value=SimpleNamespace())
        self.CUlaunchAttributeID = SimpleNamespace(
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=1
        )
        self.CUlaunchConfig = SimpleNamespace

    def cuModuleLoadData(self, cubin: bytes) -> tuple[int, int]:
        return 0, 1

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, int]:
        return 0, 1

    def cuLaunchKernelEx(self, config: Any, function: int, address: int, extra: int) -> tuple[int]:
        table = (ctypes.c_void_p * (len(self.kernel.params) + 2)).from_address(address)
        values = {}
        for param, place in zip(self.kernel.params, table, strict=False):
            assert place is not None
            kind = ctypes.c_uint64 if param.tensor.shape else ctypes.c_int32
            values[param.name] = kind.from_address(place).value
        scratch = [ctypes.c_uint64.from_address(place or 0).value for place in table[-2:]]
        assert scratch == [0, 0]
        self.launched.append(values)
        self.grids.append((config.gridDimX, config.gridDimY, config.gridDimZ))
        return (0,)


def cuda_backend(kernel: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[CudaKernels, Driver]:
    driver = Driver(kernel)
    monkeypatch.setattr(cuda_kernels, "find_driver", lambda: driver)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    binary = Binary(
        kernel=kernel.name, sm=90, cubin_sha256="", registers=1, spill_bytes=0, shared_bytes=0
    )
    return CudaKernels({kernel.name: binary}, {kernel.name: b""}), driver


@pytest.mark.parametrize("ranks", [1, 2])
def test_cuda_binds_all_parameters_in_order(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, peers = make_kernel(ranks), make_peers()
    backend, driver = cuda_backend(kernel, monkeypatch)
    tensors = make_tensors(kernel)
    launcher = backend.launcher(kernel, RANK, NUM_TOKENS, NUM_SEQS, peers, PROGRAM)
    launcher({}, *tensors)
    wanted = {p.name: x.data_ptr() for p, x in zip(kernel.tensors, tensors, strict=True)}
    wanted |= {"expert_start": 7, "row_start": 10, "num_tokens": 3, "num_seqs": 2}
    if ranks > 1:
        wanted |= {"peers": peers.table.data_ptr(), "rank": RANK, "program": PROGRAM}
    assert driver.launched == [wanted]


def test_an_argument_that_is_missing_is_no_shorter_launch() -> None:
    kernel = make_kernel(1)
    addresses = [x.data_ptr() for x in make_tensors(kernel)]
    with pytest.raises(ValueError, match="zip"):
        cuda_kernels._Arguments(kernel, (*addresses, 7, 10, NUM_TOKENS))


def test_a_kernel_without_its_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = make_kernel(2)
    backend, _ = cuda_backend(kernel, monkeypatch)
    with pytest.raises(PlanError, match="needs a peer_table"):
        backend.launcher(kernel, RANK, NUM_TOKENS, NUM_SEQS)


def test_launches_are_bound_once_and_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses stay; grid, tokens and sequences are those of the last size."""
    kernel = make_kernel(1)
    backend, driver = cuda_backend(kernel, monkeypatch)
    launches = backend.launches(RANK)
    tensors = [make_tensors(kernel), make_tensors(kernel)]
    calls = [launches.bind(kernel, own) for own in tensors]
    for num_tokens, num_seqs in ((5, 2), (1, 1), (5, 2)):
        driver.launched.clear()
        launches.resize(num_tokens, num_seqs)
        for call in calls:
            call({})
        for values, own in zip(driver.launched, tensors, strict=True):
            assert (values["num_tokens"], values["num_seqs"]) == (num_tokens, num_seqs)
            assert values["row_start"] == 10
            assert values["x"] == own[1].data_ptr()
        assert driver.grids[-2:] == [(num_tokens, 1, 1)] * 2
