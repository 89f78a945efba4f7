"""Moving a prompt's cache from a prefill pool to a decode pool: which bytes, when, and what hides them.

The sender pushes: inside a node over NVLink, between nodes by RDMA, and where there is neither over
TCP, with a warning. A layer's keys and values can leave as soon as that layer of the last chunk is
done, and those of earlier chunks before that; what is left after the last layer is what the first
token's user waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.memory_model import MemoryModel
from tokenspeed_plan.planner.advisor.step_model import StepModel, StepTime

Transport = Literal["nvlink", "rdma", "tcp"]
# of the nominal rate that a large copy reaches (vLLM #52607: 49 of 64 GB/s by CUDA IPC over PCIe 5)
LINK_SHARE = 0.8
TCP_BYTES_PER_S = 0.5e9  # NIXL without RDMA (vLLM #52607)
HANDSHAKE_US = {"nvlink": 15.0, "rdma": 30.0, "tcp": 300.0}


@dataclass(frozen=True, slots=True)
class LayerTransfer:
    """One layer: bytes from a sender, when they can start after the last chunk's begin, and when they have left."""

    layer: int
    size_bytes: int
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """The schedule of one prompt. `exposed_us` comes after the last layer is computed."""

    transport: Transport
    bytes_per_s: float
    size_bytes: int
    layers: tuple[LayerTransfer, ...]
    exposed_us: float


def transport_of(steps: StepModel, num_gpus: int) -> Transport:
    """Push over NVLink while both pools are in a node; the 5090 and the CPU have none."""
    hardware = steps.hardware
    if num_gpus > hardware.gpus_per_node:
        return "rdma"
    return "nvlink" if hardware.link_bytes_per_s > 1e11 else "tcp"


def plan_transfer(
    steps: StepModel, candidate: Candidate, new_tokens: float, prompt: StepTime
) -> Transfer:
    """The hand-over of an average later turn: its new tokens, and the whole recurrent state."""
    assert candidate.prefill is not None
    transport = transport_of(steps, candidate.num_gpus)
    hardware = steps.hardware
    rates = {"nvlink": hardware.link_bytes_per_s, "rdma": hardware.nic_bytes_per_s}
    rate = rates[transport] * LINK_SHARE if transport in rates else TCP_BYTES_PER_S
    memory = MemoryModel(steps, candidate.prefill)
    kv_bytes, state_bytes = memory.layer_bytes(candidate.knobs)
    chunks = max(new_tokens / candidate.knobs.prefill_chunk, 1.0)
    last_chunk_us, last_tokens = prompt.total_us / chunks, new_tokens / chunks
    layers: list[LayerTransfer] = []
    free_us = HANDSHAKE_US[transport]
    kinds = steps.config.layer_types
    for index, kind in enumerate(kinds):
        size = int(kv_bytes * last_tokens) if kind == "full_attention" else state_bytes
        ready_us = last_chunk_us * (index + 1) / len(kinds)
        start_us = max(ready_us, free_us)
        free_us = start_us + size / rate * 1e6
        layers.append(LayerTransfer(index, size, start_us, free_us))
    total = sum(layer.size_bytes for layer in layers) + int(
        (new_tokens - last_tokens) * kv_bytes
    ) * kinds.count("full_attention")
    exposed = max(free_us - last_chunk_us, 0.0) + HANDSHAKE_US[transport]
    return Transfer(transport, rate, total, tuple(layers), exposed)
