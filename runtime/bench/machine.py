"""What this machine can do: read, launch, multiply, copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.runtime.bench.clock import captured, time_us

READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
MATRIX = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}
LAUNCHES = 200
HOST_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates. `launch_us`: from one empty kernel to the next, inside a graph on a GPU."""

    name: str
    read_bytes_per_s: float
    launch_us: float
    matrix_flops_per_s: float


def this_machine(device: str | None = None) -> tuple[str, str]:
    """The device to measure and its name. By default it is the GPU, where there is one.

    Raises:
        PlanError: a GPU is asked for, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "there is no GPU here to measure", "leave `--device` out, or say `--device cpu`"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, "cpu" if device == "cpu" else torch.cuda.get_device_name()


def sizes(device: str) -> dict[str, int]:
    """Multiprocessors and bytes of memory of a GPU; empty for a CPU, which shares its memory."""
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {"num_sms": properties.multi_processor_count, "memory_bytes": properties.total_memory}


def num_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def provenance(device: str) -> dict[str, str]:
    """The versions and the memory that a measurement was made with."""
    found = {"torch": str(torch.__version__)}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "cuda": str(torch.version.cuda),
            "free_bytes": str(free),
            "total_bytes": str(total),
        }
    return found


def used_bytes(device: str) -> int | None:
    """Bytes of GPU memory in use: tensors, context, loaded kernels, graphs. None on a CPU."""
    if device == "cpu":
        return None
    release()
    free, total = torch.cuda.mem_get_info()
    return total - free


def release() -> None:
    """Return cached memory to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def host_bytes_per_s(device: str) -> float:
    """What a large copy from pinned memory of the host to the device reaches."""
    source = torch.ones(HOST_BYTES, dtype=torch.uint8)
    if device == "cuda":
        source = source.pin_memory()
    target = torch.empty_like(source, device=device)
    taken = time_us(lambda: target.copy_(source, non_blocking=True), device)
    return HOST_BYTES / taken * 1e6


def measure_machine(device: str) -> Machine:
    """Measure a sum over a large buffer, a chain of tiny kernels, and a large matrix product."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    return Machine(name, _read(device), _launch(device), _matrix(device))


def _read(device: str) -> float:
    buffer = torch.ones(READ_BYTES[device] // 4, device=device)
    taken = time_us(captured(buffer.sum, device), device)
    return READ_BYTES[device] / taken * 1e6


def _launch(device: str) -> float:
    tiny = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(LAUNCHES):
            tiny.add_(1.0)

    return time_us(captured(chain, device), device) / LAUNCHES


def _matrix(device: str) -> float:
    size, dtype = MATRIX[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / time_us(captured(lambda: a @ b, device), device) * 1e6
