"""Configs and graphs of the families: what is read, what is refused, what can be planned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import make_spec
from families import tiny_config

from tokenspeed_plan.planner.advisor.legality import check_stated
from tokenspeed_plan.planner.compile import Model, compile_plan
from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.config import ModelConfig, load_preset
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.passes.limits import CapacityOptions, plan_capacity
from tokenspeed_plan.planner.spec import Spec, WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError

# Parameters as published (model cards and safetensors totals), without the MTP layer.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-next-80b-a3b": 79_674_391_296,
}
NEXT_MTP_PARAMETERS = 1_650_471_424
# GPUs that each size is planned for.
TARGETS = {"qwen3-235b-a22b": ("H200", 8), "qwen3-next-80b-a3b": ("H200", 2)}


def graph_of(name: str, depth: int = 0) -> OpGraph:
    config, _ = load_preset(name)
    limits = plan_capacity(
        WorkloadSpec(concurrency=1), config, find_hardware("B200"), CapacityOptions(depth=depth)
    )
    context = BuildContext(config, "bf16", limits, config.vocab_size, lambda prefix: False)
    return build(context, "prefill", depth)


def num_parameters(graph: OpGraph) -> int:
    total = 0
    for weight in graph.weights.values():
        width = 4 if weight.spec.dtype == "fp32" else 2
        total += weight.spec.size_bytes() // width
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_count(name: str) -> None:
    assert num_parameters(graph_of(name)) == PUBLISHED[name]


def test_the_mtp_layer_of_qwen3_next_is_counted() -> None:
    with_drafts = num_parameters(graph_of("qwen3-next-80b-a3b", 1))
    assert with_drafts - PUBLISHED["qwen3-next-80b-a3b"] == NEXT_MTP_PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_can_be_planned(name: str) -> None:
    gpu, count = TARGETS.get(name, ("H200", 1))
    config, _ = load_preset(name)
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": name},
            "target": {"gpu": gpu, "count": count},
            "workload": {"concurrency": 4, "first_turn_tokens": 1000, "output_tokens": 100},
            "speculation": "off",
        }
    )
    plan = compile_plan(spec, Model(config, None, None, {}, {}))
    assert all(kernel.launch for kernel in plan.kernels), "every kernel has a Triton body"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_next", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn"}}, "`factor` is missing"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 1e9}}, "the most is 65536"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": True}}, "`factor` is True"),
        ("qwen3", {"rope_scaling": "yarn"}, "`rope_scaling` is 'yarn', not an object"),
        ("qwen3", {"rope_scaling": {"mrope_section": [1, 2]}}, "`mrope_section` is"),
        ("qwen3", {"rope_theta": None}, "rope_theta"),
        ("qwen3", {"rope_theta": float("nan")}, "rope_theta"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("qwen3_next", {"partial_rotary_factor": 0.27}, "turns 0.27 x 64 channels"),
        ("qwen3_next", {"partial_rotary_factor": None}, "`partial_rotary_factor` is None"),
        ("qwen3", {"tie_word_embeddings": "false"}, "`tie_word_embeddings` is 'false'"),
        ("qwen3", {"text_config": {}}, "`text_config` inside"),
        ("qwen3", {"per_layer_config": {"0": {}}}, "per_layer_config"),
        ("qwen3", {"transformers_weights": "x.safetensors"}, "transformers_weights"),
        ("qwen3", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ("qwen3", {"quantization_config": {}}, "quant_method"),
        ("qwen3", {"num_key_value_heads": None}, "num_key_value_heads"),
        ("qwen3_moe", {"num_local_experts": 4}, "`num_experts` is 8 and `num_local_experts` is 4"),
        ("qwen3", {"model_type": "qwen2"}, "qwen2"),
    ],
)
def test_what_is_not_planned_is_refused(family: str, change: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ModelConfig.from_hf(tiny_config(family, **change))


def test_a_wrapped_family_needs_its_wrapper() -> None:
    """transformers would take its own defaults for every size."""
    _, text = load_preset("qwen3.5-0.8b")
    flat = json.loads(text)["text_config"] | {"model_type": "qwen3_5"}
    with pytest.raises(SpecError, match="`text_config` is missing"):
        ModelConfig.from_hf(flat)


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rope_theta", "vocab_size"])
def test_what_is_missing_is_not_guessed(key: str) -> None:
    config = tiny_config("qwen3")
    del config[key]
    with pytest.raises(SpecError, match=f"`{key}` is missing"):
        ModelConfig.from_hf(config)


def test_yarn_makes_positions() -> None:
    """The published recipe adds the factor alone; other configs have the product already."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for stated, wanted in ((512, 2048), (2048, 2048), (4096, 4096)):
        config = tiny_config("qwen3", max_position_embeddings=stated, rope_scaling=yarn)
        assert ModelConfig.from_hf(config).max_positions == wanted


def test_drafts_with_a_table_of_their_own_are_left_out() -> None:
    _, text = load_preset("qwen3.5-0.8b")
    config = json.loads(text)
    config["text_config"]["mtp_use_dedicated_embeddings"] = True
    found = ModelConfig.from_hf(config)
    assert found.num_mtp_layers == 0 and "embeddings" in found.no_drafts_reason


def test_experts_that_are_not_normalised_by_default_are_refused() -> None:
    config = tiny_config("qwen3_moe")
    del config["norm_topk_prob"]
    with pytest.raises(SpecError, match="norm_topk_prob"):
        ModelConfig.from_hf(config)


def test_a_config_that_transformers_saved_again_is_the_same() -> None:
    config = tiny_config("qwen3_moe")
    again = dict(config)
    del again["rope_scaling"]
    again["num_local_experts"] = again.pop("num_experts")
    again["rope_parameters"] = {"rope_type": "default", "rope_theta": again.pop("rope_theta")}
    assert ModelConfig.from_hf(again) == ModelConfig.from_hf(config)


def test_families_differ_where_they_should() -> None:
    dense, moe, packed = (
        ModelConfig.from_hf(tiny_config(name)) for name in ("qwen3", "qwen3_moe", "qwen3_next")
    )
    assert dense.plain_norms and moe.plain_norms and not packed.plain_norms
    assert not dense.attention.gated and packed.attention.gated
    assert dense.attention.rotary_dim == 64 and packed.attention.rotary_dim == 16
    assert dense.delta_net is None and packed.delta_net is not None and packed.delta_net.packed
    assert moe.moe is not None and moe.moe.shared_intermediate_size == 0
    assert not dense.has_state and packed.has_state


@pytest.mark.parametrize("checkpoint_tokens", [None, 0, 256])
@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen3.5-0.8b"])
def test_no_checkpoints_are_refused_where_pages_need_none(
    preset: str, checkpoint_tokens: int | None
) -> None:
    """Such a model's prefix cache keeps pages, so that the plan would not do what was asked."""
    spec = make_spec(preset, serving={"checkpoint_tokens": checkpoint_tokens})
    config, _ = load_preset(preset)
    if config.has_state or checkpoint_tokens != 0:
        check_stated(spec, config)
        return
    with pytest.raises(SpecError, match=f"`{config.name}` has no recurrent state") as caught:
        check_stated(spec, config)
    assert "--no-cache" in caught.value.hint
