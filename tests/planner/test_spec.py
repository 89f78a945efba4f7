"""Specs and configs: what is accepted, and that everything else gets one error and one hint."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values
from transformers import Qwen3_5MoeTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenspeed_plan.codegen.attention.rotary import frequencies
from tokenspeed_plan.planner.advisor.legality import check_layout
from tokenspeed_plan.planner.advisor.search import Search
from tokenspeed_plan.planner.compile import build_bundle, compile_plan, find_model
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.models.checkpoint import num_valid_tokens, read_headers
from tokenspeed_plan.planner.models.config import ModelConfig, load_preset
from tokenspeed_plan.planner.spec import DisaggregationSpec, Spec, load_spec, parse_spec
from tokenspeed_plan.plans.errors import SpecError

EXAMPLES = sorted((ROOT / "examples").glob("*/spec.yaml"))
FULL = """
version: 1
model: {preset: qwen3.5-0.8b, weights: bf16}
target: {gpu: B200, count: 2}
parallelism: {attention: {tp: 2}}
workload:
  {kind: agentic, first_turn_tokens: 500, turn_tokens: 80, turns: 3, output_tokens: 50,
   concurrency: 2}
objective: {minimize: tpot, slo: {ttft_ms: 200, tpot_ms: 2.5}}
slo: {ttft_ms: 200}
speculation: auto
disaggregation: {prefill: 1, decode: 1}
"""
ONE_POOL = FULL.replace("{prefill: 1, decode: 1}", "auto")  # a plan cannot hold two yet


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_examples_are_specs(path: Path) -> None:
    load_spec(path)


@pytest.mark.slow
def test_every_key_is_accepted_and_resolved() -> None:
    assert parse_spec(FULL, "spec").disaggregation == DisaggregationSpec(prefill=1, decode=1)
    spec = parse_spec(ONE_POOL, "spec")
    plan = compile_plan(spec, find_model(spec))
    assert plan.pool.limits.max_seq_len == 832  # 500 + 2 * 80 + 3 * 50 = 810, in pages of 64
    decisions = {decision.name: decision for decision in plan.decisions}
    assert decisions["speculation"].value == f"depth {plan.pool.limits.max_depth}" != "depth 0"
    assert (
        "of the least time a token, by batch; with 0.89 of drafts accepted"
        in decisions["speculation"].reason
    )
    assert decisions["disaggregation"].value == "off"


@pytest.mark.slow
def test_a_depth_is_planned_as_it_is_asked() -> None:
    spec = parse_spec(
        ONE_POOL.replace("B200, count: 2", "cpu")
        .replace("speculation: auto", "speculation: {depth: 3}")
        .replace("parallelism: {attention: {tp: 2}}", ""),
        "spec",
    )
    plan = compile_plan(spec, find_model(spec))
    assert next(d.value for d in plan.decisions if d.name == "speculation") == "depth 3"
    assert plan.pool.limits.state_slots_per_seq == 5
    assert {
        (program.phase, program.depth, program.max_tokens // program.max_seqs)
        for program in plan.pool.programs
    } >= {("decode", 3, 4)}
    spec = parse_spec(ONE_POOL.replace("speculation: auto", "speculation: {depth: 3}"), "spec")
    on_gpus = compile_plan(spec, find_model(spec))
    assert {program.depth for program in on_gpus.pool.programs if program.phase == "decode"} == {3}
    assert all(kernel.launch for kernel in on_gpus.kernels)


@pytest.mark.parametrize("word", ["off", "'off'"])
def test_yaml_off_is_off(word: str) -> None:
    spec = parse_spec(
        f"version: 1\nmodel: {{preset: x}}\ntarget: {{gpu: cpu}}\nspeculation: {word}\n", "spec"
    )
    assert spec.speculation == "off"


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ({"modle": 1}, "unknown key `modle`", "did you mean `model`?"),
        (
            {"model": {"path": "x", "weigths": "bf16"}},
            "unknown key `model.weigths`",
            "did you mean `weights`?",
        ),
        (
            {"workload": {"concurency": 2}},
            "unknown key `workload.concurency`",
            "did you mean `concurrency`?",
        ),
        ({"workload": {"turns": 0}}, "`workload.turns`", "workload"),
        ({"workload": {"turns": "many"}}, "got 'many'", "workload"),
        ({"workload": {"turns": True}}, "got True", "workload"),
        ({"workload": 5}, "`workload`: it is a section with keys of its own, got 5", "workload"),
        (
            {"workload": {"first_turn_tokens": 9, "shared_prompt_tokens": 9}},
            "`first_turn_tokens` are not more than `shared_prompt_tokens`",
            "workload",
        ),
        (
            {"workload": {"kind": "agentic", "shared_prompt_tokens": 9}},
            "`shared_prompt_tokens` is for rows of a batch",
            "workload",
        ),
        ({"model": {}}, "give either `path` or `preset`", "model"),
        ({"model": {"path": "a", "preset": "b"}}, "give either `path` or `preset`", "model"),
        ({"version": 2}, "`version`", "version"),
        ({"speculation": "maybe"}, "`speculation", "speculation"),
        ({"speculation": {"depth": "many"}}, "`speculation.depth`", "speculation"),
        ({"speculation": {"acceptance": [0.9, 2]}}, "`speculation.acceptance", "speculation"),
        ({"target": {"gpu": 3}}, "`target.gpu`", "target"),
        ({"target": {"gpu": "cpu", "count": 0}}, "`target.count`", "target"),
        ({"slo": {"ttft_ms": float("nan")}}, "`slo.ttft_ms`", "slo"),
        ({"slo": {"tpot_ms": 5}, "objective": {"slo": {"tpot_ms": 6}}}, "give one", "spec"),
        ({"model": {"path": "a\0b"}}, "`model.path`: it has characters", "model.path"),
        ({"workload": {"turns": 10**7}}, "`workload.turns`", "--explain workload.turns`"),
        ({"a\nb": 1}, "unknown key `a\\nb`", "`tokenspeed spec`"),
    ],
)
def test_bad_specs(change: dict[str, Any], says: str, hint: str) -> None:
    data = {"version": 1, "model": {"preset": "qwen3.5-9b"}, "target": {"gpu": "cpu"}} | change
    with pytest.raises(SpecError) as caught:
        parse_spec(yaml.safe_dump(data), "spec")
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": {"gpu": "B20"}}, "no GPU called `B20`"),
        ({"model": {"preset": "qwen3.5-8b"}}, "no preset `qwen3.5-8b`"),
        ({"model": {"path": "no/such"}}, "no folder `no/such`"),
        ({"workload": {"first_turn_tokens": 300_000}}, "has 262144 positions"),
        ({"model": {"preset": "qwen3.5-397b-a17b"}, "target": {"gpu": "H100"}}, "GiB on each H100"),
        ({"workload": {"concurrency": 60_000}}, "GiB on each"),
        (
            {"workload": {"shared_prompt_tokens": 9}, "serving": {"checkpoint_tokens": 0}},
            "each row computes and holds them",
        ),
    ],
)
def test_what_cannot_be_planned_says_why(change: dict[str, Any], says: str) -> None:
    data = {"version": 1, "model": {"preset": "qwen3.5-9b"}, "target": {"gpu": "H200"}} | change
    spec = Spec.model_validate(data)
    with pytest.raises(SpecError) as caught:
        compile_plan(spec, find_model(spec))
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model", "gpu", "says"),
    [
        ({"preset": "qwen3.5-9b", "weights": "fp8"}, "A100", "no matrix rate for fp8 weights"),
        ({"preset": "qwen3.5-9b", "weights": "nvfp4"}, "A100", "no matrix rate for nvfp4 weights"),
        ({"preset": "qwen3.5-9b", "weights": "fp32"}, "H200", "fp32` has no kernels that fit H200"),
        ({"preset": "qwen3-0.6b", "weights": "fp32"}, "B200", "fp32` has no kernels that fit B200"),
        ({"preset": "qwen3.5-9b"}, "RTX5090", "Gated DeltaNet layers"),
    ],
)
def test_what_is_known_is_refused_before_the_search(
    model: dict[str, Any], gpu: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Minutes of a search would be lost."""
    monkeypatch.setattr(Search, "run", lambda _: pytest.fail("it searched"))
    spec = Spec.model_validate({"version": 1, "model": model, "target": {"gpu": gpu}})
    with pytest.raises(SpecError) as caught:
        build_bundle(spec, find_model(spec), tmp_path)
    assert says in caught.value.message and caught.value.hint


def test_fp8_blocks_are_not_cut() -> None:
    model = {"preset": "qwen3.5-4b", "weights": "fp8"}
    target = {"gpu": "H200", "count": 16}
    spec = Spec.model_validate({"version": 1, "model": model, "target": target})
    with pytest.raises(SpecError, match="FP8 blocks"):
        check_layout(ParallelLayout(16, 16, 1), find_model(spec).config, "fp8")
    with pytest.raises(SpecError, match="not whole runs of 128 NVFP4 elements"):
        check_layout(ParallelLayout(16, 16, 1), find_model(spec).config, "nvfp4")


def test_a_plan_that_does_not_fit_shows_its_memory_map() -> None:
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": "qwen3.5-35b-a3b"},
            "target": {"gpu": "H100"},
            "workload": {"concurrency": 500},
        }
    )
    with pytest.raises(SpecError, match=r"activations .*kv_cache .*state .*weights .*reserved"):
        compile_plan(spec, find_model(spec))


@pytest.mark.parametrize(
    "text",
    [
        "version: !!bool x",
        "version: !!timestamp x",
        f"version: 0x{'f' * 6000}",
        "[" * 5000,
        "a: &a [*a]",
        "a: *b",
    ],
)
def test_odd_yaml_is_refused(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "spec")
    assert caught.value.hint and len(caught.value.message) < 400


ANY_VALUE = json_values(st.integers(-(10**12), 10**12))
KEYS = st.sampled_from(
    ["version", "model", "target", "parallelism", "workload", "objective", "speculation", "zzz"]
)


def is_refused_or_right(text: str) -> None:
    try:
        parse_spec(text, "spec")
    except SpecError as error:
        assert error.message
        assert error.hint
        assert "\n" not in error.message


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, ANY_VALUE, max_size=6))
def test_any_mapping_is_refused_or_a_spec(data: dict[str, Any]) -> None:
    is_refused_or_right(
        yaml.safe_dump({"version": 1, "model": {"path": "x"}, "target": {"gpu": "cpu"}} | data)
    )


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60)
    | st.sampled_from(["[" * 5000, "a: *b", "!!python/object:os.system {}", "a: 1\na: 2", "%"])
)
def test_any_text_is_refused_or_a_spec(text: str) -> None:
    is_refused_or_right(text)


def published() -> dict[str, Any]:
    return json.loads(load_preset("qwen3.5-35b-a3b")[1])  # type: ignore[no-any-return]


def test_wrapped_and_flat_configs_say_the_same() -> None:
    config = published()
    wrapped = ModelConfig.from_hf(config, "m")
    flat = ModelConfig.from_hf(config["text_config"], "m")
    assert (wrapped.prefix, flat.prefix) == ("model.language_model.", "model.")
    assert wrapped.attention == flat.attention
    assert wrapped.layer_types == flat.layer_types
    assert wrapped.layer_types.count("full_attention") == 10


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "`hidden_size` is None"),
        ({"num_key_value_heads": 3}, "do not share 3 kv heads"),
        ({"linear_num_value_heads": 17}, "do not share 16 key heads"),
        ({"num_experts_per_tok": 500}, "top 500 of 256 experts"),
        ({"layer_types": ["full_attention"]}, "does not name 40 layers"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor` is 1.0"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate` is False"),
        ({"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale` is 0.7"),
        ({"rope_parameters": YARN | {"beta_fast": 8}}, "beta_fast` is 8"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "YaRN of factor 0.5"),
        ({"rope_parameters": {"type": "yarn", "rope_type": "default"}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "factor` is 4.0"),
        ({"rope_scaling": YARN}, "`rope_scaling` is"),
        ({"head_dim": 3}, "turns 0.25 x 3 channels"),
        ({"eos_token_id": True}, "`eos_token_id` is True"),
        ({"vocab_size": (1 << 20) + 1}, "the most is 1048576"),
        ({"attention_bias": True}, "biases are not planned"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method` 'awq', only 'fp8' or"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size` missing"),
        ({"quantization_config": 8}, "is 8, not an object"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**12}, "the most is 256"),
    ],
)
def test_bad_configs(change: dict[str, Any], says: str) -> None:
    config = published()
    config["text_config"] |= change
    with pytest.raises(SpecError, match=says):
        ModelConfig.from_hf(config, "m")


@pytest.mark.parametrize(
    "extra", [{}, {"beta_fast": 32, "beta_slow": 1.0, "truncate": True, "mscale": None}]
)
def test_yarn_angles_against_transformers(extra: dict[str, Any]) -> None:
    config = published()["text_config"] | {
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    }
    config["rope_parameters"] |= YARN | extra
    ours = ModelConfig.from_hf(config, "m").attention
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](Qwen3_5MoeTextConfig(**config), "cpu")
    found, found_scale = frequencies(
        ours.rotary_dim, ours.rope_theta, ours.rope_factor, ours.rope_original_max_positions
    )
    assert found == pytest.approx(theirs.tolist(), rel=1e-5)
    assert found_scale == pytest.approx(scale)


DEEP = b'{"a": ' + b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", DEEP),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -5}}}'),
        ("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP),
        (
            "model.safetensors",
            struct.pack("<Q", 34) + b'{"a": {"shape": 5, "dtype": "F32"}'[:33] + b"}}"[:1],
        ),
        ("model.safetensors", struct.pack("<Q", 38) + b'{"a": {"shape": null, "dtype": "F32"}}'),
    ],
)
def test_damaged_checkpoints(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError):
        num_valid_tokens(tmp_path, 100)
        read_headers(tmp_path)


def test_nested_aliases_are_shown_in_short() -> None:
    lines = ["a0: &a0 [x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)
    ]
    with pytest.raises(SpecError):
        parse_spec("\n".join([*lines, "version: *a29"]), "spec")


def test_other_families_are_refused() -> None:
    with pytest.raises(SpecError, match="model_type 'llama'"):
        ModelConfig.from_hf({"model_type": "llama"}, "m")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(published()["text_config"])), ANY_VALUE)
def test_any_field_value_is_refused_or_read(key: str, value: Any) -> None:
    config = published()
    config["text_config"][key] = value
    try:
        ModelConfig.from_hf(config, "m")
    except SpecError as error:
        assert error.hint


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("qwen3.5-9b", "qwen3.5-9b"),
        ("Qwen/Qwen3.5-9B", "qwen3.5-9b"),
        ("qwen3.5-397b", "qwen3.5-397b-a17b"),
        ("Qwen/Qwen3-Next-80B-A3B", "qwen3-next-80b-a3b"),
    ],
)
def test_a_preset_is_found_by_its_published_name(name: str, preset: str) -> None:
    assert load_preset(name)[0].name == preset


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3", "", "llama-3-8b", "Qwen/"])
def test_a_name_of_no_preset_or_of_several_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="no preset") as caught:
        load_preset(name)
    assert "qwen3.5-9b" in caught.value.hint
