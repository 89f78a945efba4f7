"""The graph: complete, counted right, unchanged in meaning by fusion, checked between passes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, oracle_config
from conftest import make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_graphs import context

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.compile import Model
from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import preset_names
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.passes.cost import Load, expected_hits, op_cost
from tokenspeed_plan.planner.passes.fuse import FUSIONS, Fusion
from tokenspeed_plan.planner.passes.grammar import GraphError, check
from tokenspeed_plan.planner.passes.pipeline import (
    DEFAULT_OPTIONS,
    PassContext,
    PassOptions,
    run,
)
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES

# Parameters of the text model and of the MTP layer, as published (and matched with published file
# sizes).
PUBLISHED = {
    "397b-a17b": (396_346_350_336, 6_595_568_128),
    "122b-a10b": (122_111_526_912, 2_523_679_232),
    "35b-a3b": (34_660_610_688, 844_640_768),
    "27b": (26_895_998_464, 424_699_392),
    "9b": (8_953_803_264, 243_290_624),
    "4b": (4_205_751_296, 120_599_552),
    "2b": (1_881_825_088, 60_828_160),
    "0.8b": (752_393_024, 20_452_864),
}
ACTIVE = {"397b-a17b": 16_331_922_176, "35b-a3b": 2_946_429_568, "9b": 7_936_684_544}


def one_rank(graph: OpGraph, until: Stage, fusions: tuple[Fusion, ...] = FUSIONS) -> OpGraph:
    """The graph of one rank at a stage, for one token."""
    options = PassOptions(fusions=fusions)
    layout = ParallelLayout(1, 1, 1)
    return run(graph, PassContext(layout, find_hardware("B200"), options=options), until)


def num_parameters(graph: OpGraph) -> int:
    return sum(
        weight.spec.size_bytes() // (4 if weight.spec.dtype == "fp32" else 2)
        for weight in graph.weights.values()
    )


def test_all_published_sizes_are_presets() -> None:
    own = [name for name in preset_names() if name.startswith("qwen3.5-")]
    assert own == sorted(f"qwen3.5-{name}" for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_count(name: str) -> None:
    text, mtp = PUBLISHED[name]
    assert num_parameters(build(context(name), "decode")) == text
    drafting = context(name, 3)
    assert (
        num_parameters(build(drafting, "decode", 3))
        == num_parameters(build(drafting, "prefill", 1))
        == text + mtp
    )


@pytest.mark.parametrize("name", ACTIVE)
def test_bytes_of_a_decode_step_are_the_active_parameters(name: str) -> None:
    graph = one_rank(build(context(name), "decode"), Stage.SHARDED)
    load = Load(1, 1, 1024)
    moved = sum(op_cost(graph, op, load).weight_bytes for op in graph.ops if op.kind != "embed")
    assert moved == pytest.approx(2 * ACTIVE[name], rel=2e-3)
    flops = sum(
        op_cost(graph, op, load).flops
        for op in graph.ops
        if op.kind in ("linear", "experts_up", "experts_down")
    )
    assert flops == pytest.approx(2 * ACTIVE[name], rel=2e-3)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("tokens, seqs, length", [(1, 1, 0), (12, 3, 4096), (500, 2, 77)])
def test_terms_count_what_a_batch_moves(phase: Phase, tokens: int, seqs: int, length: int) -> None:
    """Bytes of each operator at several loads, from shapes bound to that batch."""
    graph = one_rank(build(context("35b-a3b"), phase), Stage.SHARDED)
    for op in graph.ops:
        work = op_cost(graph, op, Load(tokens, seqs, length))
        names = {*op.inputs, *op.outputs}
        rows = seqs if op.kind == "last_token" else tokens  # that are read of those there are
        sizes = [graph.tensors[name].spec.size_bytes(rows, seqs) for name in names]
        assert work.activation_bytes == sum(sizes)
        weights = [graph.weights[name].spec for name in op.weights]
        if op.kind == "linear":
            rows = graph.tensors[op.inputs[0]].spec.bind(tokens, seqs)[0]
            assert work.weight_bytes == sum(spec.size_bytes() for spec in weights)
            assert work.flops == 2.0 * rows * math.prod(weights[0].bind(0, 0))
        if op.kind == "experts_up":
            hits = expected_hits(256, 8, tokens)
            assert work.weight_bytes == pytest.approx(hits * weights[0].size_bytes() / 256)
        if op.kind == "attention":
            assert work.flops == 4.0 * tokens * length * 16 * 256
            assert work.state_bytes == seqs * length * 2 * 2 * 256 * 2


def test_state_bytes_of_the_headline() -> None:
    graph = one_rank(build(context("397b-a17b"), "decode"), Stage.SHARDED)
    delta = sum(
        op_cost(graph, op, Load(1, 1, 0)).state_bytes for op in graph.ops if op.kind == "delta_rule"
    )
    assert delta == 2 * 188_743_680  # the recurrent state of 45 layers, read and written
    cached = sum(
        op_cost(graph, op, Load(1, 1, 0)).state_bytes for op in graph.ops if op.kind == "kv_write"
    )
    assert cached == 30_720


def test_every_operator_has_a_body() -> None:
    from tokenspeed_plan.plans.ops import OPS

    assert set(OPS) == set(REFERENCE_BODIES) | {"all_reduce"}  # that one is the collectives'


def test_a_grammar_stands_between_the_passes() -> None:
    built = build(context("35b-a3b"), "decode")
    sharded = one_rank(built, Stage.SHARDED)
    fused = one_rank(built, Stage.FUSED)
    for graph in (built, sharded, fused):
        assert check(graph) is graph
    with pytest.raises(GraphError, match="not allowed when built"):
        check(replace(built, ops=fused.ops))
    with pytest.raises(GraphError, match="not cut yet"):
        check(replace(built, stage=sharded.stage))
    with pytest.raises(GraphError, match="not declared"):
        check(replace(built, tensors={}))
    with pytest.raises(GraphError, match="no steps"):
        check(replace(fused, stage=fused.stage.__class__("scheduled")))


def greedy(plan: Plan, model: Model) -> list[tuple[int, ...]]:
    assert model.folder is not None
    engine = Engine.from_plan(plan, model.folder)
    done = engine.generate(
        [[1, 2, 3], list(range(70))], SamplingParams(max_tokens=4, num_logprobs=3, ignore_eos=True)
    )
    return [tuple((s.token_id, round(s.logprob, 9)) for s in item.logprobs) for item in done]  # type: ignore[misc]


@cache
def answers_with(folder: Path, options: PassOptions) -> list[tuple[int, ...]]:
    """In fp64, which shows each difference; those that are compared with are computed once."""
    spec = make_spec(folder)
    model = find_model(spec)
    return greedy(compile_plan(spec, model, "fp64", options), model)


@pytest.mark.slow
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chosen=st.sets(st.sampled_from(range(len(FUSIONS)))))
def test_fusion_never_changes_a_result(chosen: set[int], checkpoint: Any) -> None:
    some = PassOptions(fusions=tuple(FUSIONS[index] for index in sorted(chosen)))
    assert answers_with(checkpoint("moe"), some) == answers_with(checkpoint("moe"), DEFAULT_OPTIONS)


def test_fusion_saves_launches() -> None:
    sharded = one_rank(build(context("35b-a3b"), "decode"), Stage.SHARDED)
    unfused, fused = one_rank(sharded, Stage.FUSED, ()), one_rank(sharded, Stage.FUSED)
    assert len(unfused.ops) > 1.5 * len(fused.ops)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_the_draft_layer_equals_transformers(kind: str, checkpoint: Any) -> None:
    """The MTP graph on the reference bodies equals transformers' decoder layer."""
    from draft_oracle import draft_logits_of_graph, draft_logits_of_transformers

    folder = checkpoint(kind)
    torch.manual_seed(0)
    hidden, ids = torch.randn(9, 128), torch.arange(9)
    ours = draft_logits_of_graph(folder, hidden, ids)
    wanted = draft_logits_of_transformers(
        folder, oracle_config(KINDS[kind]), KINDS[kind], hidden, ids
    )
    assert (ours - wanted).abs().max() < 1e-3
