"""Checkpoints whose files contradict each other: transformers' greedy ids, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, VOCAB, write_checkpoint
from conftest import make_spec
from families import oracle_ids, write_family
from safetensors.torch import load_file, save_file

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.loading.preflight import find_weights

NUM_TOKENS = 6
INDEX = "model.safetensors.index.json"
WRAPPED, FLAT = "model.language_model.", "model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """base("dense") -> the folder of a checkpoint that is right, with its weights in one file."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("bases") / name
        if name in KINDS:
            write_checkpoint(folder, KINDS[name])
        else:
            write_family(folder, name)
        save_weights(folder, weights_of(folder))
        return folder

    return make


def weights_of(folder: Path) -> Tensors:
    weights: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def save_weights(folder: Path, weights: Tensors) -> None:
    """All in one file."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_weights(folder, change(weights_of(folder)))


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(data) or data), encoding="utf-8")


def edit_text(folder: Path, **fields: Any) -> None:
    """Fields of the text config; None takes one out."""

    def change(config: dict[str, Any]) -> None:
        text = config.get("text_config", config)
        text.update(fields)
        for key in [key for key, value in fields.items() if value is None]:
            del text[key]

    edit_json(folder, "config.json", change)


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB - 20, (40,), generator=random).tolist()]


def ours(folder: Path) -> list[list[int]]:
    spec = make_spec(folder)
    engine = Engine.from_plan(compile_plan(spec, find_model(spec)), folder, cache=False)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return [list(done.token_ids) for done in engine.generate(prompts(), params)]


def theirs(folder: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return oracle_ids(model.eval(), prompts(), NUM_TOKENS)


def test_the_oracle_itself(base: Any) -> None:
    assert ours(base("qwen3")) == theirs(base("qwen3"))


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """Begins the names that begin with `old` with `new`."""

    def rename(weights: Tensors) -> Tensors:
        made = {}
        for name, value in weights.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
            made[name] = value
        return made

    return lambda folder: edit_weights(folder, rename)


def without(*begins: str) -> Callable[[Path], None]:
    def drop(weights: Tensors) -> Tensors:
        return {name: x for name, x in weights.items() if not name.startswith(begins)}

    return lambda folder: edit_weights(folder, drop)


def with_experts_apart(folder: Path) -> None:
    def part(weights: Tensors) -> Tensors:
        made: Tensors = {}
        for name, value in weights.items():
            stem, _, last = name.rpartition(".")
            if last == "gate_up_proj":
                for expert, both in enumerate(value):
                    gate, up = both.chunk(2)
                    made[f"{stem}.{expert}.gate_proj.weight"] = gate.clone()
                    made[f"{stem}.{expert}.up_proj.weight"] = up.clone()
            elif stem.endswith("experts"):
                for expert, down in enumerate(value):
                    made[f"{stem}.{expert}.down_proj.weight"] = down.clone()
            else:
                made[name] = value
        return made

    edit_weights(folder, part)


def with_experts_joined(folder: Path) -> None:
    def join(weights: Tensors) -> Tensors:
        made = dict(weights)
        for layer in range(3):
            stem = f"model.layers.{layer}.mlp.experts"
            rows = {"gate": [], "up": [], "down": []}
            for expert in range(8):
                for key, values in rows.items():
                    values.append(made.pop(f"{stem}.{expert}.{key}_proj.weight"))
            gate, up, down = (torch.stack(values) for values in rows.values())
            made[f"{stem}.gate_up_proj"] = torch.cat([gate, up], 1)
            made[f"{stem}.down_proj"] = down
        return made

    edit_weights(folder, join)


def claims_to_be_tied(folder: Path) -> None:
    edit_text(folder, tie_word_embeddings=True)
    edit_json(folder, "config.json", lambda config: config.update(tie_word_embeddings=True))


def made_flat(folder: Path) -> None:
    edit_json(folder, "config.json", lambda config: config["text_config"])


def with_stray_files(folder: Path) -> None:
    """Names before and after the model's own; one is an index of something else."""
    for name in ("adapter_model", "consolidated", "model-00001-of-00002", "zz"):
        save_file({"model.norm.weight": torch.zeros(128)}, folder / f"{name}.safetensors")
    index = {"weight_map": {"model.norm.weight": "zz.safetensors"}}
    (folder / "zz.safetensors.index.json").write_text(json.dumps(index))
    (folder / INDEX).write_text(json.dumps(index))


def in_shards(folder: Path, **elsewhere: str) -> None:
    """Two files and an index; `elsewhere` says where the index puts tensors besides."""
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shard_of = {name: f"{index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in ("0.safetensors", "1.safetensors"):
        part = {name: weights[name] for name in names if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shard_of | elsewhere}
    (folder / INDEX).write_text(json.dumps(index))


def with_shards_and_strays(folder: Path) -> None:
    in_shards(folder)
    save_file({"model.norm.weight": torch.zeros(128)}, folder / "2.safetensors")


def rope(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit_text(folder, rope_scaling=settings)


def with_rope_parameters(folder: Path) -> None:
    edit_text(folder, rope_scaling=None, rope_theta=None)
    edit_text(folder, rope_parameters=YARN | {"rope_theta": 1e6})


def with_share_outside(folder: Path) -> None:
    """`partial_rotary_factor` beside the rotary settings, where it is read, not in them."""

    def change(config: dict[str, Any]) -> None:
        del config["text_config"]["rope_parameters"]["partial_rotary_factor"]
        config["text_config"]["partial_rotary_factor"] = 0.5

    edit_json(folder, "config.json", change)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QUICK = {"tied-but-own-head", "stray-files", "names-of-the-wrapper"}
AS_TRANSFORMERS = {
    "tied-but-own-head": ("qwen3", claims_to_be_tied),
    "tied-but-own-head-wrapped": ("dense", claims_to_be_tied),
    "tied-in-the-text-config": (
        "tied",
        lambda folder: edit_json(
            folder, "config.json", lambda config: config.update(tie_word_embeddings=False)
        ),
    ),
    "names-of-the-wrapper": ("dense", made_flat),
    "names-without-the-wrapper": ("dense", renamed(WRAPPED, FLAT)),
    "names-without-a-prefix": ("qwen3", renamed(FLAT, "")),
    "no-mtp-tensors": ("dense", without("mtp.")),
    "experts-apart": ("moe", with_experts_apart),
    "experts-joined": ("qwen3_moe", with_experts_joined),
    "stray-files": ("qwen3", with_stray_files),
    "shards-and-strays": ("qwen3", with_shards_and_strays),
    "yarn-in-rope-scaling": ("qwen3", rope(**YARN)),
    "yarn-under-its-old-name": ("qwen3", rope(type="yarn", factor=4.0)),
    "yarn-in-rope-parameters": ("qwen3", with_rope_parameters),
    "share-outside": ("dense", with_share_outside),
    "interval-against-layer-types": (
        "dense",
        lambda folder: edit_text(folder, full_attention_interval=2),
    ),
    "layer-types-by-interval": (
        "dense",
        lambda folder: edit_text(folder, layer_types=None, full_attention_interval=2),
    ),
    "more-layers-in-the-files": ("qwen3", lambda folder: edit_text(folder, num_hidden_layers=2)),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in AS_TRANSFORMERS
    ],
)
def test_the_answer_is_transformers(name: str, base: Any, tmp_path: Path) -> None:
    kind, change = AS_TRANSFORMERS[name]
    folder = Path(shutil.copytree(base(kind), tmp_path / "model"))
    change(folder)
    assert ours(folder) == theirs(folder)


# Where stop tokens are named -> in which config; ids differ, so that the place is known.
PLACES = {
    "generation": ("generation_config.json", lambda data: data.update(eos_token_id=[501, 500])),
    "outer": ("config.json", lambda data: data.update(eos_token_id=[502])),
    "text": ("config.json", lambda data: data["text_config"].update(eos_token_id=503)),
}


@pytest.mark.parametrize(
    "named",
    [
        ("text",),
        pytest.param(("outer",), marks=pytest.mark.slow),
        pytest.param(("outer", "text"), marks=pytest.mark.slow),
        ("generation", "outer", "text"),
        pytest.param(("generation",), marks=pytest.mark.slow),
    ],
)
def test_stop_tokens_are_transformers(named: tuple[str, ...], base: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(base("dense"), tmp_path / "model"))
    edit_text(folder, eos_token_id=None)
    for place in named:
        file, change = PLACES[place]
        if file == "generation_config.json":
            (folder / file).write_text("{}")
        edit_json(folder, file, change)
    wanted = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    if isinstance(wanted, int):
        wanted = [wanted]
    assert find_model(make_spec(folder)).config.eos_token_ids == tuple(sorted(wanted))


def test_the_folder_of_the_weights_may_be_the_users(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` in a spec and in `--weights`."""
    monkeypatch.setenv("HOME", str(base("qwen3").parent))
    spec = make_spec(f"~/{base('qwen3').name}")
    plan = compile_plan(spec, find_model(spec))
    given = Path("~") / base("qwen3").name
    for folder in (find_weights(plan, tmp_path, None), find_weights(plan, tmp_path, given)):
        assert folder.samefile(base("qwen3"))
