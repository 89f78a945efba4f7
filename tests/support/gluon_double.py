"""Gluon kernels without a GPU: partitions of warps as threads, barriers as conditions.

The text of a kernel imports this in the place of Gluon. Tensors are PyTorch's; layouts say nothing.
What the device does later is done as late as it may be: products when their result is waited for,
copies when their barrier is told. Programs run one after the other.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

WARP_THREADS = 32
DEADLOCK_S = 20.0  # so long nobody waits for a barrier that will be told
Value = Tensor | int


@dataclass
class Place:
    """The program that runs, and of how many."""

    program: int = 0
    programs: int = 1


PLACE, OWN = Place(), threading.local()  # of a thread: its warps, copies and products to come


@dataclass(frozen=True)
class Pointer:
    """Elements of a flat tensor."""

    memory: Tensor
    offsets: Value = 0

    def __add__(self, other: Value) -> Pointer:
        return Pointer(self.memory, self.offsets + other)

    def to(self, dtype: torch.dtype) -> Pointer:
        """To elements of another type, up to the end of the memory that was allocated."""
        stored = torch.empty(0, dtype=torch.uint8).set_(self.memory.untyped_storage())
        begin = (self.memory.storage_offset() + int(self.offsets)) * self.memory.itemsize
        end = begin + (len(stored) - begin) // dtype.itemsize * dtype.itemsize
        return Pointer(stored[begin:end].view(dtype))


class Barrier:
    """Completes a phase when it was told `count` times."""

    def __init__(self) -> None:
        self.count, self.missing, self.phase = 0, 0, 0
        self.changed = threading.Condition()

    def arrive(self, count: int) -> None:
        with self.changed:
            self.missing -= count
            assert self.missing >= 0, "a barrier was told too often"
            if not self.missing:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != parity, DEADLOCK_S)
        assert done, "a partition waits for what never comes"


@dataclass(frozen=True)
class Shared:
    """A part of shared memory."""

    data: Tensor

    def index(self, i: Value) -> Shared:
        return Shared(self.data[int(i)])

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        return Shared(self.data.view(dtype).view(shape))


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, count: int) -> None:
        self._all = [Barrier() for _ in range(count)]

    def index(self, i: Value) -> Barrier:
        return self._all[int(i)]


@dataclass(frozen=True)
class Layout:
    """Where elements are kept, which this double ignores."""

    args: tuple[object, ...] = field(default=())


def layout(*args: object) -> Layout:
    return Layout(args)


class BarrierLayout(Layout):
    """That of barriers."""


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> Shared | Barriers:
    if isinstance(layout, BarrierLayout):
        return Barriers(shape[0])
    if dtype.is_floating_point:
        return Shared(torch.full(list(shape), float("nan")).to(dtype))
    return Shared(torch.full(list(shape), -1, dtype=dtype))


def load(pointer: Pointer, mask: Value | None = None, other: Value = 0) -> Tensor:
    offsets = torch.as_tensor(pointer.offsets).long()
    if pointer.memory.dtype == torch.float8_e4m3fn:  # PyTorch chooses among its bytes only
        found = load(Pointer(pointer.memory.view(torch.uint8), offsets), mask, other)
        return found.view(torch.float8_e4m3fn)
    if mask is None:
        return pointer.memory[offsets]
    ok, offsets = torch.broadcast_tensors(torch.as_tensor(mask), offsets)
    found = pointer.memory[offsets.where(ok, torch.zeros_like(offsets))]
    return found.where(ok, torch.full_like(found, other))


def store(pointer: Pointer, value: Value, mask: Value | None = None) -> None:
    offsets = torch.as_tensor(pointer.offsets).long()
    values = torch.as_tensor(value).to(pointer.memory.dtype).expand(offsets.shape)
    if mask is None:
        pointer.memory[offsets] = values
        return
    ok = torch.as_tensor(mask).expand(offsets.shape)
    pointer.memory[offsets[ok]] = values[ok]


def atomic_add(pointer: Pointer, value: int) -> Tensor:
    before = pointer.memory[int(pointer.offsets)].clone()
    pointer.memory[int(pointer.offsets)] += value
    return before


def total(x: Tensor, axis: int) -> Tensor:
    return x.sum(axis, dtype=x.dtype)


def scan(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.stack(list(accumulate(x.unbind(axis), combine)), axis)


def where(condition: Tensor, x: Value, y: Value) -> Tensor:
    return torch.where(condition, x, y)


def copy(target: Shared, source: Pointer, mask: Tensor | None = None) -> None:
    """Rows without a mask become zero."""
    OWN.copies.append(lambda: target.store(load(source, mask)))


def arrive_behind_copies(barrier: Barrier, increment_count: bool) -> None:
    """All threads of the partition tell the barrier once their copies are done."""
    assert not increment_count
    while OWN.copies:
        OWN.copies.pop(0)()
    barrier.arrive(OWN.warps * WARP_THREADS)


def multiply(a: Shared, b: Shared, acc: Tensor, is_async: bool, use_acc: bool = True) -> Tensor:
    assert is_async
    kept = float(use_acc)
    OWN.products.append(lambda: acc.mul_(kept).add_(a.data.float() @ b.data.float()))
    return acc


def wait_for_products(outstanding: int, deps: tuple[Tensor]) -> Tensor:
    while len(OWN.products) > outstanding:
        OWN.products.pop(0)()
    return deps[0]


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def wait(barrier: Barrier, parity: Value, pred: Value = True) -> None:
    if pred:
        barrier.wait(int(parity))


def arrive(barrier: Barrier, count: int = 1, pred: Value = True) -> None:
    if pred:
        barrier.arrive(count)


def warp_specialize(
    partitions: Sequence[tuple[Any, tuple[Any, ...]]],
    worker_warps: Sequence[int],
    worker_registers: Sequence[int],
) -> None:
    """Run all partitions at once; the first has the four warps of the program."""
    assert len(partitions) == len(worker_warps) + 1 == len(worker_registers) + 1
    failures: list[BaseException] = []

    def run(function: Any, args: tuple[Any, ...], warps: int) -> None:
        OWN.warps, OWN.copies, OWN.products = warps, [], []
        try:
            function(*args)
            assert not OWN.copies
            assert not OWN.products
        except BaseException as failure:
            failures.append(failure)

    threads = [
        threading.Thread(target=run, args=(*partition, warps), daemon=True)
        for partition, warps in zip(partitions, (4, *worker_warps), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def pointer_or_scalar(x: Value) -> Pointer | int:
    if isinstance(x, Tensor):
        return Pointer(x.view(-1))
    return x


class Function:
    """What `gluon.jit` makes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def is_gluon(self) -> bool:
        return True

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            values = [pointer_or_scalar(x) for x in args]
            PLACE.programs = math.prod(grid)
            for program in range(PLACE.programs):
                PLACE.program = program
                self.function(*values)

        return launch


LANGUAGE: dict[str, Any] = {
    "constexpr": object,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8e4nv": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int64": torch.int64,
    "pointer_type": lambda dtype: dtype,
    "static_range": range,
    "to_tensor": int,
    "program_id": lambda axis: PLACE.program,
    "num_programs": lambda axis: PLACE.programs,
    "arange": lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
    "full": lambda shape, value, dtype, layout: torch.full(shape, int(value), dtype=dtype),
    "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    "allocate_shared_memory": allocate,
    "load": load,
    "store": store,
    "atomic_add": atomic_add,
    "sum": total,
    "associative_scan": scan,
    "where": where,
    "exp": torch.exp,
    "reshape": torch.reshape,
    "permute": torch.permute,
    "split": lambda x: x.unbind(-1),
    "convert_layout": lambda x, layout: x,
    "warp_specialize": warp_specialize,
    "BlockedLayout": layout,
    "SliceLayout": layout,
    "NVMMADistributedLayout": layout,
    "NVMMASharedLayout": layout,
    "SwizzledSharedLayout": layout,
}
HOPPER = {
    "async_copy": SimpleNamespace(
        async_copy_global_to_shared=copy, mbarrier_arrive=arrive_behind_copies
    ),
    "fence_async_shared": lambda: None,
    "mbarrier": SimpleNamespace(init=init, wait=wait, arrive=arrive, MBarrierLayout=BarrierLayout),
    "warpgroup_mma": multiply,
    "warpgroup_mma_wait": wait_for_products,
}


@contextmanager
def in_place_of_gluon() -> Iterator[None]:
    """Let kernels that are loaded meanwhile import this."""
    experimental, gluon = ModuleType("experimental"), ModuleType("gluon")
    language, hopper = ModuleType("language"), ModuleType("hopper")
    vars(language).update(LANGUAGE)
    vars(hopper).update(HOPPER)
    vars(gluon).update(jit=Function, language=language)
    vars(experimental).update(gluon=gluon)
    root = "triton.experimental"
    doubles = {
        root: experimental,
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": language,
        f"{root}.gluon.language.nvidia": ModuleType("nvidia"),
        f"{root}.gluon.language.nvidia.hopper": hopper,
    }
    before = {name: sys.modules.get(name) for name in doubles}
    sys.modules.update(doubles)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
