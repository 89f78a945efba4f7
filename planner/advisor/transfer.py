"""Moving a prompt's cache from a prefill pool to a decode pool: which bytes, and when.

The sender pushes: over NVLink inside a node, by RDMA between nodes, and over TCP, with a warning,
where there is neither. Keys and values leave chunk by chunk and layer by layer, each
while the next one is computed, and the states with the last chunk. The user waits for what is left
when that is computed: the last layer's part, or more where the link is slower than the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.memory_model import MemoryModel
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.machines.hardware import HardwareSpec

Transport = Literal["nvlink", "rdma", "tcp"]
# The share of the nominal rate that a large copy reaches: 49 of 64 GB/s by CUDA IPC over PCIe 5
# (vLLM #52607).
LINK_SHARE = 0.8
MIN_NVLINK_BYTES_PER_S = 1e11  # slower links are PCIe
TCP_BYTES_PER_S = 0.5e9  # NIXL without RDMA (vLLM #52607)
HANDSHAKE_US = {"nvlink": 15.0, "rdma": 30.0, "tcp": 300.0}


@dataclass(frozen=True, slots=True)
class LayerTransfer:
    """The bytes of one layer, and when they leave, counted from the start of the last chunk."""

    layer: int
    size_bytes: int
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """The schedule of one prompt; `exposed_us` comes after all of it is computed."""

    transport: Transport
    bytes_per_s: float
    size_bytes: int
    layers: tuple[LayerTransfer, ...]
    exposed_us: float


def transport_of(hardware: HardwareSpec, num_gpus: int) -> Transport:
    """How two pools with so many GPUs in all reach each other."""
    if num_gpus > hardware.gpus_per_node:
        return "rdma"
    if hardware.link_bytes_per_s > MIN_NVLINK_BYTES_PER_S:
        return "nvlink"
    return "tcp"


def plan_transfer(
    memory: MemoryModel,
    candidate: Candidate,
    new_tokens: float,
    sent_tokens: float,
    prompt: StepTime,
) -> Transfer:
    """The schedule of an average later turn: what the other pool lacks, and the recurrent state.

    Args:
        memory: of the prefill pool.
        candidate: the deployment.
        new_tokens: tokens of the prompt that it computes.
        sent_tokens: the last ones of them, which the decode pool does not have.
        prompt: the time of its prefill.
    """
    hardware = memory.steps.hardware
    transport = transport_of(hardware, candidate.num_gpus)
    bytes_per_s = rate_of(hardware, transport)
    kv_bytes, state_bytes = memory.layer_bytes(candidate.knobs)
    handshake_us = HANDSHAKE_US[transport]
    chunks = max(new_tokens / candidate.knobs.prefill_chunk, 1.0)
    last_tokens = min(new_tokens / chunks, sent_tokens)
    last_chunk_us = prompt.total_us / chunks
    layer_types = memory.steps.config.layer_types
    sizes = []
    for kind in layer_types:
        size = state_bytes
        if kind == "full_attention":
            size = int(kv_bytes * last_tokens)
        sizes.append(size)
    layers = tuple(_layers(sizes, last_chunk_us, handshake_us, bytes_per_s))
    earlier_bytes = int((sent_tokens - last_tokens) * kv_bytes)
    total_bytes = sum(sizes) + earlier_bytes * layer_types.count("full_attention")
    exposed_us = max(layers[-1].end_us - last_chunk_us, 0.0) + handshake_us
    return Transfer(transport, bytes_per_s, total_bytes, layers, exposed_us)


def rate_of(hardware: HardwareSpec, transport: Transport) -> float:
    """Bytes a second that a rank pushes."""
    if transport == "nvlink":
        return hardware.link_bytes_per_s * LINK_SHARE
    if transport == "rdma":
        return hardware.nic_bytes_per_s * LINK_SHARE
    return TCP_BYTES_PER_S


def _layers(
    sizes: list[int], chunk_us: float, handshake_us: float, bytes_per_s: float
) -> Iterator[LayerTransfer]:
    """One layer after the other, once it is computed and the link is free.

    Layers take equal parts of the chunk.
    """
    free_us = handshake_us
    for layer, size in enumerate(sizes):
        start_us = max(chunk_us * (layer + 1) / len(sizes), free_us)
        free_us = start_us + size / bytes_per_s * 1e6
        yield LayerTransfer(layer, size, start_us, free_us)
