"""What the cost model and the memory map need to know of a machine.

Nominal numbers of the vendors' data sheets, except where a line says measured. Calibrated profiles replace them later.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tokenspeed_plan.plans.errors import SpecError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """One kind of GPU (or the CPU).

    Attributes:
        sm: compute capability without its dot, 0 on a CPU.
        memory_bytes: what a rank can use. reserved_bytes: kept free for context, libraries and graphs.
        read_bytes_per_s: of its memory. matrix_flops_per_s: dense bf16 (fp32 on the CPU).
        launch_us: from one kernel to the next inside a graph.
        all_reduce_us: a small one-shot all-reduce inside a graph. link_bytes_per_s: one direction, all links.
        num_sms: multiprocessors (0: a program after the other). max_shared_bytes: shared memory of one program.
        prefill_chunk: tokens of the largest prefill program. page_size: tokens of a KV page.
    """

    name: str
    sm: int
    memory_bytes: int
    reserved_bytes: int
    read_bytes_per_s: float
    matrix_flops_per_s: float
    launch_us: float
    all_reduce_us: float
    link_bytes_per_s: float
    num_sms: int
    max_shared_bytes: int
    prefill_chunk: int
    page_size: int


# All-reduce times: 8 GPUs, 8 KB, in a CUDA graph, measured with SGLang's and TensorRT-LLM's kernels (aiconfigurator's
# tables, 2026-08). B200 reads 7.67 TB/s (pytorch/ao PR 4002). 1.3 us between kernels of a graph: Hazy Research, H100.
_TABLE = (
    HardwareSpec("cpu", 0, 16 * GIB, 0, 1.0e10, 5.0e10, 12.0, 1000.0, 1.0e9, 0, 0, 512, 16),
    HardwareSpec("A100", 80, 80 * GIB, 3 * GIB, 2.0e12, 3.12e14, 1.5, 6.0, 3.0e11, 108, 163 * 1024, 2048, 64),
    HardwareSpec("H100", 90, 80 * GIB, 3 * GIB, 3.35e12, 9.89e14, 1.3, 3.5, 4.5e11, 132, 227 * 1024, 8192, 64),
    HardwareSpec("H200", 90, 141 * 10**9, 3 * GIB, 4.8e12, 9.89e14, 1.3, 3.6, 4.5e11, 132, 227 * 1024, 8192, 64),
    HardwareSpec("B200", 100, 180 * 10**9, 3 * GIB, 7.67e12, 2.25e15, 1.3, 5.1, 9.0e11, 148, 227 * 1024, 8192, 64),
)
HARDWARE = {spec.name.lower(): spec for spec in _TABLE}


def find_hardware(name: str) -> HardwareSpec:
    """The machine called `name`, in any case.

    Raises:
        SpecError: there is no such machine in the table.
    """
    if name.lower() in HARDWARE:
        return HARDWARE[name.lower()]
    near = difflib.get_close_matches(name.lower(), HARDWARE, 1)
    known = ", ".join(spec.name for spec in _TABLE)
    raise SpecError(
        f"there is no GPU called `{name}`", f"did you mean `{HARDWARE[near[0]].name}`?" if near else f"known: {known}"
    )
