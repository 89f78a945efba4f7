"""The transport `nixl`: NVIDIA's transfer library with UCX, over RDMA, NVLink or TCP.

The extra `pools` installs it. Memory is registered with UCX once; a push is one transfer of index
lists, and ends when the peer has the bytes.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime.pools.blocks import Copy

_MODULES = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")
_INSTALL = "install the extra `pools`: `pip install 'tokenspeed-plan[pools]'`, or `--transport shm`"
_SETTLE_S = 5.0  # in which TCP delivers what it has, or gives up
_LOOK_S = 0.0005


def load_nixl() -> Any:
    """The module of NIXL's agents.

    Raises:
        PoolError: it is not installed, or does not load here.
    """
    reasons = []
    for name in _MODULES:
        try:
            api = import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{error}")
            continue
        if "NIXL_LOG_LEVEL" not in os.environ:
            logging.getLogger("nixl").setLevel(logging.WARNING)  # else it tells of each step
        return api
    raise PoolError(f"`nixl` needs its package: {reasons[0]}", _INSTALL)


class NixlTransport:
    """Writes the arenas of peers through NIXL.

    Args:
        arenas: of this rank, u8 each, by name; they are registered here.

    Raises:
        PoolError: NIXL is not installed, or cannot register them.
    """

    name = "nixl"
    settle_s = _SETTLE_S

    def __init__(self, arenas: Mapping[str, Tensor]) -> None:
        api = load_nixl()
        self._arenas = arenas
        self._kind = "VRAM" if any(arena.is_cuda for arena in arenas.values()) else "DRAM"
        self._name = uuid.uuid4().hex
        regions = [(*_place(arena), "") for arena in arenas.values()]
        try:
            self._agent = api.nixl_agent(self._name, api.nixl_agent_config(backends=["UCX"]))
            self._registered = self._agent.register_memory(regions, self._kind)
        except Exception as error:  # NIXL's errors have no class in common
            raise PoolError(
                f"NIXL cannot register the caches: {type(error).__name__}: {error}",
                "see `UCX_TLS` and `UCX_NET_DEVICES` in UCX's manual, or `--transport shm`",
            ) from error

    def describe(self) -> dict[str, Any]:
        """The agent's metadata, and where the arenas lie."""
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        places = {name: _place(arena) for name, arena in self._arenas.items()}
        return {"agent": self._name, "kind": self._kind, "metadata": metadata, "arenas": places}

    def reach(self, description: dict[str, Any]) -> NixlRoute:
        """Connect to a peer's agent."""
        try:
            metadata = base64.b64decode(description["metadata"])
            remote = {name: (*map(int, description["arenas"][name]),) for name in self._arenas}
            agent, kind = str(description["agent"]), str(description["kind"])
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise PoolError(
                f"a peer's description is not one of `nixl`: {error!r}",
                "start both pools with the same `--transport`",
            ) from error
        _tried(lambda: self._agent.add_remote_agent(metadata))
        return NixlRoute(self._agent, agent, (self._kind, kind), self._arenas, remote)


class _Transfer:
    """A push; on a GPU it begins once what was launched before it is over.

    Args:
        agent: of this process.
        begin: posts the transfer, and returns its handle.
        after: the event that it waits for.
    """

    def __init__(
        self, agent: Any, begin: Callable[[], Any], after: torch.cuda.Event | None
    ) -> None:
        self._agent = agent
        self._begin = begin
        self._after = after
        self._handle: Any = None
        self._done = False
        self.is_done()

    def is_done(self) -> bool:
        """Whether the peer has the bytes."""
        if self._done:
            return True
        if self._handle is None:
            if self._after is not None and not self._after.query():
                return False
            self._handle = _tried(self._begin)
        state = _tried(lambda: self._agent.check_xfer_state(self._handle))
        if state == "ERR":
            raise _unreachable(RuntimeError("the transfer has failed"))
        if state == "DONE":
            self._agent.release_xfer_handle(self._handle)
            self._done = True
        return self._done


class NixlRoute:
    """The arenas of one peer.

    Args:
        agent: of this process.
        peer: the name of the peer's agent.
        kinds: of memory, here and there.
        arenas: of this process.
        remote: address, bytes and device of the peer's, by name.
    """

    def __init__(
        self,
        agent: Any,
        peer: str,
        kinds: tuple[str, str],
        arenas: Mapping[str, Tensor],
        remote: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._agent = agent
        self._peer = peer
        self._kinds = kinds
        self._here = {name: _place(arena) for name, arena in arenas.items()}
        self._remote = remote
        self._under_way: list[_Transfer] = []

    def push(self, parts: Sequence[Copy]) -> _Transfer:
        """Post one transfer of all parts."""
        kind, other = self._kinds
        sources = [(part.source, part.source_pitch) for part in parts]
        targets = [(part.target, part.target_pitch) for part in parts]
        local = self._agent.get_xfer_descs(_descriptors(self._here, parts, sources), kind)
        remote = self._agent.get_xfer_descs(_descriptors(self._remote, parts, targets), other)

        def begin() -> Any:
            handle = self._agent.initialize_xfer("WRITE", local, remote, self._peer)
            self._agent.transfer(handle)
            return handle

        after = None
        if kind == "VRAM":
            after = torch.cuda.Event()
            after.record()
        transfer = _Transfer(self._agent, begin, after)
        self._under_way = [each for each in self._under_way if not each.is_done()]
        self._under_way.append(transfer)
        return transfer

    def close(self) -> None:
        """Wait for what is under way, and leave the peer."""
        until = time.monotonic() + _SETTLE_S
        with suppress(PoolError):
            while time.monotonic() < until and not all(t.is_done() for t in self._under_way):
                time.sleep(_LOOK_S)
        with suppress(PoolError):
            _tried(lambda: self._agent.remove_remote_agent(self._peer))


def _place(arena: Tensor) -> tuple[int, int, int]:
    """Address, bytes and device."""
    return arena.data_ptr(), arena.numel(), arena.device.index or 0


def _descriptors(
    arenas: Mapping[str, Sequence[int]], parts: Sequence[Copy], ends: Sequence[tuple[int, int]]
) -> npt.NDArray[np.int64]:
    """Address, bytes and device of each row of one end of the copies.

    Args:
        arenas: of that end: address, bytes and device.
        parts: the copies.
        ends: where each begins there, and its pitch.
    """
    found = []
    for part, (begin, pitch) in zip(parts, ends, strict=True):
        address, _, device = arenas[part.arena]
        rows = np.arange(part.rows, dtype=np.int64) * pitch + address + begin
        sizes, devices = np.full_like(rows, part.width), np.full_like(rows, device)
        found.append(np.stack([rows, sizes, devices], axis=1))
    return np.concatenate(found)


def _tried(call: Callable[[], Any]) -> Any:
    """The result of a call of NIXL.

    Raises:
        PoolError: it failed.
    """
    try:
        return call()
    except Exception as error:  # NIXL's errors have no class in common
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> PoolError:
    return PoolError(
        f"NIXL does not reach a peer: {type(error).__name__}: {error}",
        "see that both use `nixl`, and `UCX_TLS` and `UCX_NET_DEVICES` in UCX's manual",
    )
