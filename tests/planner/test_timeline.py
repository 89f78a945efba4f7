"""The model of a machine with streams: by hand, and against what must hold of any schedule."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_spec

from tokenspeed_plan.planner import find_model
from tokenspeed_plan.planner.compile import plan_parts
from tokenspeed_plan.planner.graph import OpGraph, ScheduledOp, ScheduledStep
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.passes.cost import Load, OpTime, op_time
from tokenspeed_plan.planner.passes.pipeline import PassOptions
from tokenspeed_plan.planner.passes.schedule import schedule
from tokenspeed_plan.planner.passes.simulate import EVENT_US, MIN_GAIN, schedule_best, simulate_us
from tokenspeed_plan.plans.schema import RecordEvent, WaitEvent


def kernel(name: str, stream: int = 0) -> ScheduledStep:
    return ScheduledOp(name, stream)


TIMES = {"a": OpTime(1.0, 4.0), "b": OpTime(2.0, 4.0), "c": OpTime(1.0, 10.0)}


def test_one_stream_is_a_sum() -> None:
    assert simulate_us([kernel("a"), kernel("b"), kernel("c")], 1, TIMES) == pytest.approx(22.0)


def test_two_streams_share_the_machine_but_not_the_waiting() -> None:
    """a works alone for 1 us, both for 6 (a's other 3 and 3 of b's 4), b alone for 1."""
    assert simulate_us([kernel("a"), kernel("b", 1)], 2, TIMES) == pytest.approx(9.0)


def test_an_event_costs_who_waits() -> None:
    steps = [
        kernel("a"),
        RecordEvent(event=0, stream=0),
        WaitEvent(event=0, stream=1),
        kernel("b", 1),
    ]
    assert simulate_us(steps, 2, TIMES) == pytest.approx(5.0 + EVENT_US + 6.0)
    early = [
        WaitEvent(event=0, stream=1),
        kernel("b", 1),
        kernel("a"),
        RecordEvent(event=0, stream=0),
    ]
    assert simulate_us(early, 2, TIMES) == pytest.approx(5.0 + EVENT_US + 6.0)


@pytest.fixture(scope="module")
def graphs(checkpoint: Any) -> list[OpGraph]:
    """Graphs with nothing fused, so with many branches."""
    spec = make_spec(checkpoint("moe"))
    parts = plan_parts(spec, find_model(spec), options=PassOptions(fusions=()))
    return [program.graph for program in parts.programs]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["H200", "B200"])
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_no_schedule_beats_the_critical_path_or_the_work(
    gpu: str, streams: int, graphs: list[OpGraph]
) -> None:
    hardware = find_hardware(gpu)
    for graph in graphs:
        load = Load(64, 1, 64)
        times = {op.name: op_time(graph, op, load, hardware) for op in graph.ops}
        made = schedule(graph, streams, {name: time.total_us for name, time in times.items()})
        assert sum(isinstance(step, ScheduledOp) for step in made.steps) == len(graph.ops)
        taken = simulate_us(made.steps, made.num_streams, times)
        ends: dict[str, float] = {}
        for op in graph.ordered():
            before = max((ends[name] for name in graph.nx.predecessors(op.name)), default=0.0)
            time = times[op.name]
            ends[op.name] = before + time.latency_us + time.busy_us
        assert taken >= max(ends.values()) - 1e-6
        assert taken >= sum(time.busy_us for time in times.values()) - 1e-6
        if streams == 1:
            assert taken == pytest.approx(
                sum(time.latency_us + time.busy_us for time in times.values())
            )


def test_streams_stay_only_where_they_pay(graphs: list[OpGraph]) -> None:
    """Unfused branches are worth streams, and the shortest schedule is taken; a CPU has one."""
    load = Load(64, 1, 64)
    for graph in graphs:
        best = schedule_best(graph, load, find_hardware("H200"))
        assert best.runner_up_us is not None
        if best.num_streams == 1:
            assert best.runner_up_us >= (1 - MIN_GAIN) * best.time_us
        else:
            assert best.time_us <= best.runner_up_us
        assert schedule_best(graph, load, find_hardware("cpu")).num_streams == 1
        held = schedule_best(graph, load, find_hardware("H200"), max_streams=1)
        assert held.num_streams == 1 and (
            best.num_streams == 1 or held.runner_up_us == best.time_us
        )
    assert any(
        schedule_best(graph, load, find_hardware("H200")).num_streams > 1 for graph in graphs
    )
