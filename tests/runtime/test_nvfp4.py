"""NVFP4 checkpoints: made, planned, loaded and computed; transformers and our own fp32 path judge.

transformers computes with weights that this file dequantises by itself, element by element.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import KINDS, Kind, load_oracle, oracle_greedy, write_checkpoint
from conftest import Once, make_spec
from planning import planned
from quantised_models import (
    ALL,
    BLOCKS,
    DEMO,
    NUM_TOKENS,
    Tensors,
    fuse_experts,
    held_out_ids,
    ids_of,
    loss_of,
    prompts,
    quantize,
    weights_of,
)
from safetensors.torch import save_file

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.plans.encodings import NVFP4
from tokenspeed_plan.plans.errors import SpecError, TokenspeedError
from tokenspeed_plan.plans.report import as_text
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.runtime.execution import fp4_words
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.block_scaled import dequantise
from tokenspeed_plan.runtime.loading.weights import load_weights

LAYER = "model.language_model.layers.0."
EXPERT = f"{LAYER}mlp.experts.2.down_proj.weight"
WORDS = ("nvfp4", "nvfp4-mixed")


@pytest.fixture(scope="module")
def folders(once: Once) -> Any:
    """folders("moe", "nvfp4") -> a checkpoint in fp32, in NVFP4, and that one dequantised."""

    def make(name: str, word: str) -> tuple[Path, Path, Path]:
        base = once(f"{word}-{name}", lambda to: write_three(to, ALL[name], word))
        return base / "source", base / "quantised", base / "plain"

    return cache(make)


def write_three(base: Path, kind: Kind, word: str) -> None:
    source = write_checkpoint(base / "source", kind)
    made = quantize(source, base / "quantised", "--to", word)
    assert made.exit_code == 0, made.output
    write_plain(source, base / "quantised", base / "plain")


def write_plain(source: Path, quantised: Path, target: Path, experts: int = 4) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = dequantised(weights_of(quantised), experts)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def dequantised(stored: Tensors, num_experts: int = BLOCKS["num_experts"]) -> Tensors:
    """All weights in fp32 and with the experts of the decoder fused, as the source has them."""
    plain: Tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale") or name.endswith("_scale_2"):
            continue
        if tensor.dtype == torch.uint8:
            tensor = values_of(tensor, stored[f"{name}_scale"], stored[f"{name}_scale_2"])
        elif tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.float() * stored[f"{name}_scale"]
        plain[name] = tensor
    return fuse_experts(plain, num_experts)


def values_of(packed: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """w[i, j] = e2m1(code) * scale[i, j // 16] * factor, from the bits; even j in the low half."""
    data = packed.numpy().astype(np.int64)
    code = np.empty((data.shape[0], 2 * data.shape[1]), np.int64)
    code[:, 0::2], code[:, 1::2] = data & 15, data >> 4
    sign, exponent, fraction = 1 - 2 * (code >> 3), (code >> 1) & 3, code & 1
    values = sign * np.where(
        exponent == 0, fraction / 2, (1 + fraction / 2) * 2.0 ** (exponent - 1)
    )
    groups = np.repeat(scales.float().numpy(), 16, 1)
    return torch.from_numpy((values * groups).astype(np.float32)) * factor


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ALL)
def test_weights_give_the_tokens_of_transformers_on_dequantised_ones(
    name: str, word: str, folders: Any
) -> None:
    _, quantised, plain = folders(name, word)
    oracle = load_oracle(plain, ALL[name])
    wanted = [oracle_greedy(oracle, prompt, NUM_TOKENS) for prompt in prompts()]
    assert ids_of(quantised) == wanted
    changes = {"speculation": {"depth": 2, "acceptance": 0.9}}
    assert ids_of(quantised, **changes) == wanted


def formats_of(folder: Path) -> dict[str, str]:
    spec = make_spec(folder, model={"weights": "auto"})
    plan = planned(spec)
    return {weight.name: str(weight.tensor.format) for weight in plan.pool.weights}


@pytest.mark.parametrize(
    ("word", "stored"), [("nvfp4", "nvfp4 and fp32"), ("nvfp4-mixed", "fp8, nvfp4 and fp32")]
)
def test_its_title_says_how_it_is_stored(word: str, stored: str, folders: Any) -> None:
    """Not the dtype of activations; the format of most bytes comes first."""
    spec = make_spec(folders("moe", word)[1], model={"weights": "auto"})
    title, *_ = as_text(compile_plan(spec, find_model(spec))).splitlines()
    assert f"({stored}, " in title


def test_a_plan_says_what_it_reads(folders: Any) -> None:
    formats = formats_of(folders("moe", "nvfp4-mixed")[1])
    assert formats["L0.experts_up.weight"] == "fp4[1x16]:fp8:fp32"
    assert formats["L0.shared_gate_up.weight"] == "fp8[128x128]:fp32"
    assert formats["L0.in_proj.weight"] == "fp8[128x128]:fp32"
    assert formats["L0.in_proj_ba.weight"] == formats["head.weight"] == "fp32"
    formats = formats_of(folders("moe", "nvfp4")[1])
    assert formats["L0.experts_down.weight"] == "fp4[1x16]:fp8:fp32"
    assert formats["L0.in_proj.weight"] == formats["L0.shared_down.weight"] == "fp32"


def test_the_layout_is_the_published_one(folders: Any) -> None:
    """Names, dtypes and shapes as in the files of nvidia/Qwen3.5-122B-A10B-NVFP4."""
    _, quantised, _ = folders("moe", "nvfp4")
    stored = weights_of(quantised)
    elements, scales = stored[EXPERT], stored[f"{EXPERT}_scale"]
    assert (elements.dtype, elements.shape) == (torch.uint8, (256, 64))
    assert (scales.dtype, scales.shape) == (torch.float8_e4m3fn, (256, 8))
    factor = stored[f"{EXPERT}_scale_2"]
    assert (factor.dtype, factor.shape) == (torch.float32, ())
    up, gate = (EXPERT.replace("down", key) for key in ("up", "gate"))
    assert stored[f"{up}_scale_2"] == stored[f"{gate}_scale_2"]
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["group_size"]) == ("modelopt", 16)
    assert {"lm_head", "mtp.fc", f"{LAYER}linear_attn.in_proj_qkv"} <= set(config["ignore"])


def test_rounding_is_to_nearest() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 256, generator=random) * torch.logspace(-4, 1, 256)
    matrix[3] = 0.0
    stored = fp4_words.quantise(matrix, float(matrix.abs().max()))
    unit = (stored.scales.float() * stored.factor).repeat_interleave(16, -1)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    sizes = torch.where(unit > 0, (matrix / unit).abs(), 0.0)
    nearest = (sizes[..., None] - grid).abs().amin(-1)
    values = values_of(stored.elements, stored.scales, stored.factor)
    got = torch.where(unit > 0, (values / unit).abs(), 0.0)
    assert torch.allclose((got - sizes).abs(), nearest, atol=1e-5)
    assert (values * matrix >= 0).all()
    group_max = matrix.abs().unflatten(-1, (-1, 16)).amax(-1)
    error = (values - matrix).abs().unflatten(-1, (-1, 16)).amax(-1)
    normal = stored.scales.float() > 2**-6
    assert (error[normal] <= group_max[normal] * 0.24).all()


def test_halves_round_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, *[0.0] * 8]) * 448
    values = fp4_words.quantise(ties[None], 6.0 * 448)
    got = values_of(values.elements, values.scales, values.factor)
    assert (got[0, :8] / 448).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_words_hold_a_group_at_one_shift() -> None:
    """Element 16 j + i of a run is in bits 4 j of word i, and nothing is lost on the way."""
    random = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (3, 128), generator=random, dtype=torch.uint8)
    words = fp4_words.to_words(stored).view(torch.int32).numpy()
    code = torch.stack((stored & 15, stored >> 4), -1).flatten(-2).numpy()
    for k in range(256):
        group, place = k % 128 // 16, k % 16
        assert ((words[:, k // 128 * 16 + place] >> 4 * group) & 15 == code[:, k]).all()
    spec = TensorSpec(shape=(3, 256), format=NVFP4)
    run = torch.cat((torch.from_numpy(words).flatten(), torch.zeros(15, dtype=torch.int32)))
    parts = fp4_words.parts_of(run, spec)
    parts.factors.fill_(2.0)
    parts.scales.fill_(0.5)
    wanted = values_of(stored, torch.ones(3, 16), torch.tensor(1.0))
    assert torch.equal(dequantise(run, spec, torch.float32), wanted)


def loaded(folder: Path, word: str, rank: int) -> Tensors:
    """The weights of one of two ranks, in fp32."""
    spec = make_spec(folder, model={"weights": word}, target={"count": 2})
    plan = planned(spec)
    _, weights = load_weights(plan, folder, lambda: Arenas(plan.pool.arenas), rank)
    for weight in plan.pool.weights:
        if weight.tensor.format.block:
            weights[weight.name] = dequantise(weights[weight.name], weight.tensor, torch.float32)
    return weights


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_part(rank: int, tmp_path: Path) -> None:
    wide = {"shared_expert_intermediate_size": 256, "moe_intermediate_size": 256}
    source = write_checkpoint(tmp_path / "source", Kind(sizes=KINDS["kernel"].sizes | wide))
    assert quantize(source, tmp_path / "fp4", "--to", "nvfp4-mixed").exit_code == 0
    write_plain(source, tmp_path / "fp4", tmp_path / "plain", experts=8)
    ours = loaded(tmp_path / "fp4", "auto", rank)
    theirs = loaded(tmp_path / "plain", "fp32", rank)
    for name, weight in theirs.items():
        if ".in_proj" in name:
            gates = ours[name.replace(".in_proj", ".in_proj_ba")]
            ours[name] = torch.cat((ours[name], gates))
        assert torch.equal(ours[name], weight), name


def test_halves_that_are_read_together_may_have_other_factors(folders: Any, tmp_path: Path) -> None:
    gate, up = (EXPERT.replace("down", key) for key in ("gate", "up"))

    def change(weights: Tensors) -> None:
        weights[f"{up}_scale_2"] *= 3.0

    folder = rewritten(folders("moe", "nvfp4")[1], tmp_path / "other", change, {})
    spec = make_spec(folder, model={"weights": "auto"})
    plan = planned(spec)
    _, weights = load_weights(plan, folder, lambda: Arenas(plan.pool.arenas))
    (made,) = (each for each in plan.pool.weights if each.name == "L0.experts_up.weight")
    stored = weights_of(folder)
    wanted = [
        values_of(stored[name], stored[f"{name}_scale"], stored[f"{name}_scale_2"])
        for name in (gate, up)
    ]
    got = dequantise(weights[made.name], made.tensor, torch.float32)[2]
    assert torch.equal(got, torch.cat(wanted))


Change = Callable[[Tensors], None]


def rewritten(source: Path, target: Path, change: Change, config: dict[str, Any]) -> Path:
    """A copy of a checkpoint with other tensors, and another `quantization_config`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = weights_of(source)
    change(weights)
    save_file(weights, target / "model.safetensors")
    path = target / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"] |= config
    path.write_text(json.dumps(data))
    return target


def pack(weights: Tensors) -> None:
    """As compressed-tensors writes them: other names, and the reciprocal of the factor."""
    for name in [name for name in weights if weights[name].dtype == torch.uint8]:
        weights[name.replace(".weight", ".weight_packed")] = weights.pop(name)
        factor = weights.pop(f"{name}_scale_2")
        weights[name.replace(".weight", ".weight_global_scale")] = (1 / factor).reshape(1)
        module = name.removesuffix(".weight")
        weights[f"{module}.input_global_scale"] = torch.tensor([3.0])


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16, "symmetric": True},
        }
    },
}
OTHERS = [
    "lm_head",
    r"re:.*linear_attn.*",
    r"re:.*self_attn.*",
    r"re:.*shared_expert\b.*",
    "re:mtp",
]


@pytest.mark.slow
def test_other_writers_say_the_same(folders: Any, tmp_path: Path) -> None:
    """compressed-tensors, and ModelOpt in a file of its own, with scales of activations."""
    _, quantised, _ = folders("moe", "nvfp4")
    wanted = ids_of(quantised)
    packed = rewritten(quantised, tmp_path / "packed", pack, COMPRESSED | {"ignore": OTHERS})
    assert ids_of(packed) == wanted
    own = rewritten(quantised, tmp_path / "own", lambda _: None, {})
    data = json.loads((own / "config.json").read_text())
    said = data.pop("quantization_config")
    (own / "config.json").write_text(json.dumps(data))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": said["ignore"]}
    (own / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    spec = make_spec(own, model={"weights": "auto"})
    assert find_model(spec).weights == "nvfp4"


def drop(ending: str) -> Change:
    def change(weights: Tensors) -> None:
        del weights[f"{EXPERT}{ending}"]

    return change


def put(ending: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(weights: Tensors) -> None:
        weights[f"{EXPERT}{ending}"] = make(weights[f"{EXPERT}{ending}"]).contiguous()

    return change


BROKEN = {
    "no scales": (drop("_scale"), {}, f"there is no `{EXPERT}_scale`"),
    "no factor": (drop("_scale_2"), {}, f"there is no `{EXPERT}_scale_2`"),
    "scales of another shape": (
        put("_scale", lambda scale: scale[:, :4]),
        {},
        r"is \[256, 4\], rows of 128 elements in groups of 16 need \[256, 8\]",
    ),
    "scales of another dtype": (
        put("_scale", lambda scale: scale.float()),
        {},
        "is stored as F32, only F8_E4M3",
    ),
    "factors of rows": (put("_scale_2", lambda it: it.expand(256)), {}, r"is \[256\], one number"),
    "plain elements beside scales": (
        put("", lambda _: torch.zeros(256, 128)),
        {},
        f"is stored as F32, and `{EXPERT}_scale_2` is there too",
    ),
    "elements of another shape": (
        put("", lambda it: it[:, :32]),
        {},
        r"is \[256, 32\], its config says \[256, 64\]",
    ),
    "a module that is kept": (
        lambda _: None,
        {"ignore": [*OTHERS, "*mlp.experts*"]},
        "among the modules that are not converted",
    ),
    "one that is not kept": (lambda _: None, {"ignore": []}, "does not list"),
    "other groups": (lambda _: None, {"group_size": 32}, "`quantization_config.group_size` 32"),
    "another algorithm": (lambda _: None, {"quant_algo": "INT4_AWQ"}, "'INT4_AWQ', only 'NVFP4'"),
    "no layers": (
        lambda _: None,
        {"quant_algo": "MIXED_PRECISION"},
        "quantized_layers` missing, only an object",
    ),
    "a packed checkpoint": (
        lambda _: None,
        COMPRESSED | {"ignore": OTHERS},
        r"\(nvfp4\), and by `quantization_config` it is nvfp4_packed",
    ),
}


@pytest.mark.parametrize(("change", "config", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_contradictions_are_refused(
    change: Change, config: dict[str, Any], says: str, folders: Any, tmp_path: Path
) -> None:
    folder = rewritten(folders("moe", "nvfp4")[1], tmp_path / "broken", change, config)
    with pytest.raises(SpecError, match=says) as refused:
        find_model(make_spec(folder, model={"weights": "auto"}))
    assert refused.value.hint


BAD_NUMBERS = {
    "a negative scale": (
        "_scale",
        lambda it: (it.view(torch.uint8) | 128).view(torch.float8_e4m3fn),
        "has a scale that is negative or no number",
    ),
    "a scale that is no number": (
        "_scale",
        lambda it: torch.full_like(it.float(), torch.nan).to(torch.float8_e4m3fn),
        "has a scale that is negative or no number",
    ),
    "an infinite factor": ("_scale_2", lambda it: it / 0, "is inf, a scale is positive"),
}


@pytest.mark.parametrize(("ending", "make", "says"), BAD_NUMBERS.values(), ids=BAD_NUMBERS.keys())
def test_bad_scales_are_not_loaded(
    ending: str, make: Any, says: str, folders: Any, tmp_path: Path
) -> None:
    change = put(ending, make)
    folder = rewritten(folders("moe", "nvfp4")[1], tmp_path / "broken", change, {})
    spec = make_spec(folder, model={"weights": "auto"})
    plan = planned(spec)
    with pytest.raises(TokenspeedError, match=says):
        load_weights(plan, folder, lambda: Arenas(plan.pool.arenas))


def test_other_words_are_refused(folders: Any) -> None:
    source, quantised, _ = folders("moe", "nvfp4")
    for folder, word, says in (
        (quantised, "fp8", "is an NVFP4 checkpoint"),
        (quantised, "nvfp4-mixed", "is an NVFP4 checkpoint"),
        (source, "nvfp4", "are not quantised"),
    ):
        spec = make_spec(folder, model={"weights": word})
        with pytest.raises(SpecError, match=says) as refused:
            compile_plan(spec, find_model(spec))
        assert refused.value.hint


@pytest.mark.slow
def test_the_trained_model_loses_little(tmp_path: Path) -> None:
    """NVFP4 costs the demo model under 3 % of its loss on text that it has not seen."""
    assert quantize(DEMO, tmp_path / "fp4", "--to", "nvfp4").exit_code == 0
    write_plain(DEMO, tmp_path / "fp4", tmp_path / "plain", experts=8)
    ids = held_out_ids()
    before, after = loss_of(DEMO, ids), loss_of(tmp_path / "plain", ids)
    print(f"weights in NVFP4: {after / before - 1:+.3%} of {before:.3f} nats")
    assert before != after
    assert abs(after / before - 1) < 0.03
    assert ids_of(tmp_path / "fp4") == ids_of(tmp_path / "plain")
