"""Sums and concatenations over GPUs by NCCL, on the current stream, so that graphs capture them.

It calls the library that PyTorch has loaded. Without torch.distributed's process group around it
there is no thread that watches a stream, and nothing that waits for graphs when a process ends.

R ranks. Source: docs.nvidia.com/deeplearning/nccl/user-guide, "Communicator Creation and
Management Functions", "Collective Communication Functions".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import RankError

_ID_BYTES = 128
_SUM = 0
_TYPES = {torch.float32: 7, torch.float64: 8, torch.bfloat16: 9, torch.int32: 2, torch.int64: 4}
_HINT = "set NCCL_DEBUG=WARN to see why; `nvidia-smi topo -m` shows how the GPUs are linked"


class _Id(ctypes.Structure):
    """What the ranks of a communicator have in common."""

    _fields_ = (("bytes", ctypes.c_ubyte * _ID_BYTES),)


class NcclCollectives:
    """Collectives of GPUs.

    All ranks get the same bits: each element is added up once, in one order, and then sent around.

    Args:
        rank: of this process.
        world: number of ranks.
        share_id: gives all ranks the bytes that rank 0 has; every rank calls it.

    Raises:
        RankError: the ranks cannot be joined.
    """

    def __init__(self, rank: int, world: int, share_id: Callable[[bytes], bytes]) -> None:
        self._world = world
        self._library = _load()
        self._communicator = ctypes.c_void_p()
        own = _Id()
        if rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(own))
        shared = _Id.from_buffer_copy(share_id(bytes(own.bytes)))
        self._call(
            "ncclCommInitRank",
            ctypes.byref(self._communicator),
            ctypes.c_int(world),
            shared,
            ctypes.c_int(rank),
        )

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks; both are contiguous."""
        self._collect("ncclAllReduce", source, target, ctypes.c_int(_SUM))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """target = the columns of all ranks, side by side; both are contiguous."""
        columns = source.shape[-1]
        rows = source.numel() // columns
        if rows == 1:
            self._collect("ncclAllGather", source, target)
            return
        parts = source.new_empty(self._world, rows, columns)
        self._collect("ncclAllGather", source, parts)
        target.view(rows, self._world, columns).copy_(parts.transpose(0, 1))

    def _collect(self, name: str, source: Tensor, target: Tensor, *operation: ctypes.c_int) -> None:
        assert source.is_contiguous() and target.is_contiguous()
        stream = torch.cuda.current_stream().cuda_stream
        self._call(
            name,
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_void_p(target.data_ptr()),
            ctypes.c_size_t(source.numel()),
            ctypes.c_int(_TYPES[source.dtype]),
            *operation,
            self._communicator,
            ctypes.c_void_p(stream),
        )

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._library, name)(*args)
        if code != 0:
            reason = self._library.ncclGetErrorString(code).decode()
            raise RankError(f"NCCL cannot join the GPUs, `{name}`: {reason}", _HINT)


def _load() -> ctypes.CDLL:
    """The library, which PyTorch has loaded already.

    Raises:
        RankError: this PyTorch was built without it.
    """
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise RankError(
            f"this PyTorch has no NCCL: {error}", "install a PyTorch for CUDA, on Linux"
        ) from error
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = (ctypes.c_void_p, ctypes.c_int, _Id, ctypes.c_int)
    return library
