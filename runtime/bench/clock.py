"""How long something takes: on a GPU by events around graph replays, on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

ROUNDS = 5
RUNS = 10  # in a round
LIBRARY = "library"  # what all kernels of a library are called


def time_us(
    work: Callable[[], object],
    device: str,
    count: int = RUNS,
    reset: Callable[[], object] = lambda: None,
) -> float:
    """Microseconds of one run: the median over rounds of the mean of `count` runs.

    One run comes first and is not counted. `reset` is called before each round.
    """
    reset()
    work()
    rounds = []
    for _ in range(ROUNDS):
        reset()
        rounds.append(_round_us(work, device, count))
    return statistics.median(rounds)


def _round_us(work: Callable[[], object], device: str, count: int) -> float:
    if device == "cpu":
        begun = time.perf_counter()
        for _ in range(count):
            work()
        return (time.perf_counter() - begun) / count * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / count * 1e3


def captured(work: Callable[[], object], device: str) -> Callable[[], object]:
    """The work as one CUDA graph; itself on a CPU."""
    if device == "cpu":
        return work
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], object] = graph.replay
    return replay


def kernel_times_us(
    replay: Callable[[], object], names: set[str], count: int = 5
) -> list[tuple[str, float]]:
    """(name, microseconds) of the kernels of a replay, in order; the median of `count` replays.

    In the first one a kernel that adds up ranks waits for the rank that begins last. Where
    `LIBRARY` is one of the names, kernels of other names between ours are one call of it.
    """
    from torch.profiler import ProfilerActivity, profile

    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            replay()
        torch.cuda.synchronize()
    gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = sorted(
        (event for event in profiler.events() if event.device_type == gpu),
        key=lambda event: event.time_range.start,
    )
    times = _merged(((event.name, event.time_range.elapsed_us()) for event in events), names)
    length = len(times) // count
    rounds = [times[i * length : (i + 1) * length] for i in range(count)]
    return [
        (same[0][0], statistics.median(time_us for _, time_us in same))
        for same in zip(*rounds, strict=True)
    ]


def _merged(events: Iterable[tuple[str, float]], names: set[str]) -> list[tuple[str, float]]:
    """The events of these names in order; those between them, if asked for, as `LIBRARY`."""
    times: list[tuple[str, float]] = []
    for name, time_us in events:
        if name in names:
            times.append((name, time_us))
        elif LIBRARY not in names or name.startswith(("Memcpy", "Memset")):
            continue
        elif times and times[-1][0] == LIBRARY:
            times[-1] = (LIBRARY, times[-1][1] + time_us)
        else:
            times.append((LIBRARY, time_us))
    return times
