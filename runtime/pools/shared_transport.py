"""The transport `shm`: pools of one host write each other's memory.

On a CPU the arenas of the pool that receives lie in memory that both processes map. On GPUs they
are opened through CUDA's handles for other processes, and copies go over NVLink or PCIe, on a
stream of their own that waits for what was launched before.
"""

# `cuda.bindings` is of an extra that not every checkout has.
# pyright: reportMissingImports=false

from __future__ import annotations

import base64
import binascii
import ctypes
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime.pools.blocks import Copy

_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
_HINT = "`shm` is for pools of one host, of one user and in one container: `--transport nixl`"


class SharedTransport:
    """Writes the arenas of peers on this host.

    Args:
        arenas: of this rank, u8 each, by name.
        paths: of those in shared memory: a file that other processes can map.
    """

    name = "shm"
    settle_s = 0.0  # a process that is gone writes no more

    def __init__(self, arenas: Mapping[str, Tensor], paths: Mapping[str, str]) -> None:
        self._arenas = arenas
        self._paths = paths

    def describe(self) -> dict[str, Any]:
        """Where the arenas are: a file, or a handle of CUDA and the offset in it."""
        found: dict[str, Any] = {}
        for name, arena in self._arenas.items():
            place: dict[str, Any] = {"path": self._paths.get(name, "")}
            if arena.is_cuda:
                place = _handle(arena)
            found[name] = place | {"bytes": arena.numel()}
        return found

    def reach(self, description: dict[str, Any]) -> SharedRoute:
        """Map the arenas of a peer."""
        opened: dict[str, Tensor] = {}
        try:
            for name, arena in self._arenas.items():
                place = description[name]
                opened[name] = _open(place, arena.device)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, binascii.Error) as error:
            raise PoolError(
                f"the memory of a peer cannot be opened here: {type(error).__name__}: {error}",
                _HINT,
            ) from error
        return SharedRoute(self._arenas, opened)


@dataclass(frozen=True, slots=True)
class _Copied:
    """A push; `event` is recorded after its last copy on a GPU."""

    event: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Whether the copies are over; those on a CPU are from the start."""
        return self.event is None or self.event.query()


class SharedRoute:
    """The arenas of one peer, mapped into this process."""

    def __init__(self, arenas: Mapping[str, Tensor], remote: Mapping[str, Tensor]) -> None:
        self._arenas = arenas
        self._remote = remote
        self._stream: torch.cuda.Stream | None = None
        if any(arena.is_cuda for arena in arenas.values()):
            self._stream = torch.cuda.Stream()

    def push(self, parts: Sequence[Copy]) -> _Copied:
        """Copy, on a GPU after everything that was launched so far."""
        if self._stream is None:
            for part in parts:
                self._copy(part)
            return _Copied(None)
        self._stream.wait_stream(torch.cuda.current_stream())
        for part in parts:
            self._launch(part, self._stream.cuda_stream)
        done = torch.cuda.Event()
        done.record(self._stream)
        return _Copied(done)

    def _copy(self, part: Copy) -> None:
        size = (part.rows, part.width)
        here, there = self._arenas[part.arena], self._remote[part.arena]
        source = here.as_strided(size, (part.source_pitch, 1), part.source)
        there.as_strided(size, (part.target_pitch, 1), part.target).copy_(source)

    def _launch(self, part: Copy, stream: int) -> None:
        """Launch a copy through CUDA: PyTorch's, between two GPUs, take events for each."""
        from cuda.bindings import runtime

        here, there = (arenas[part.arena].data_ptr() for arenas in (self._arenas, self._remote))
        source, target = here + part.source, there + part.target
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        if part.rows == 1:
            _done(*runtime.cudaMemcpyAsync(target, source, part.width, kind, stream))
            return
        pitches = (target, part.target_pitch, source, part.source_pitch)
        _done(*runtime.cudaMemcpy2DAsync(*pitches, part.width, part.rows, kind, stream))

    def close(self) -> None:
        """Wait for the copies."""
        if self._stream is not None:
            self._stream.synchronize()
        self._remote = {}


def _open(place: dict[str, Any], device: torch.device) -> Tensor:
    size_bytes = int(place["bytes"])
    if device.type == "cuda":
        return _opened_handle(place, size_bytes)
    with open(place["path"], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), size_bytes)
    return torch.from_numpy(np.frombuffer(mapped, np.uint8))


def _handle(arena: Tensor) -> dict[str, Any]:
    """The handle of the allocation that an arena lies in, and where."""
    from cuda.bindings import driver, runtime

    address = arena.data_ptr()
    base, _ = _done(*driver.cuMemGetAddressRange(address))
    (handle,) = _done(*runtime.cudaIpcGetMemHandle(address))
    content = ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)
    return {
        "handle": base64.b64encode(content).decode(),
        "offset": address - int(base),
        "gpu": _gpu(arena.device.index or 0),
    }


def _gpu(index: int) -> str:
    """A GPU by a name that all processes have for it."""
    return str(torch.cuda.get_device_properties(index).uuid)


class _Mapped:
    """Bytes at an address of a device, as PyTorch takes them over without a copy."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _opened_handle(place: dict[str, Any], size_bytes: int) -> Tensor:
    from cuda.bindings import runtime

    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    handle = runtime.cudaIpcMemHandle_t()
    content = base64.b64decode(place["handle"])
    if len(content) != _HANDLE_BYTES:
        raise ValueError("no handle of CUDA")
    ctypes.memmove(handle.getPtr(), content, _HANDLE_BYTES)
    flags = runtime.cudaIpcMemLazyEnablePeerAccess
    gpu = gpus.index(place["gpu"])
    if gpu != torch.cuda.current_device():
        _allow(gpu)
    with torch.cuda.device(gpu):  # where it lies, not where it is written from
        torch.cuda.current_stream().synchronize()  # there is a context from now on
        (base,) = _done(*runtime.cudaIpcOpenMemHandle(handle, flags))
        return torch.as_tensor(_Mapped(int(base) + int(place["offset"]), size_bytes))


def _allow(gpu: int) -> None:
    """Let copies go straight to another GPU; where that cannot be, they go through the host."""
    from cuda.bindings import runtime

    (can_access,) = _done(*runtime.cudaDeviceCanAccessPeer(torch.cuda.current_device(), gpu))
    if not can_access:
        return
    (status,) = runtime.cudaDeviceEnablePeerAccess(gpu, 0)
    if status == runtime.cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
        runtime.cudaGetLastError()  # else the next call of somebody else reports it
    else:
        _done(status)


def _done(status: Any, *values: Any) -> tuple[Any, ...]:
    """The results of a call of CUDA.

    Raises:
        RuntimeError: it failed.
    """
    if int(status):
        raise RuntimeError(f"CUDA says {status!r}")
    return values
