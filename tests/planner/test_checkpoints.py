"""A model's folder is read as transformers reads it, or refused with one error and one hint."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from checkpoints import KINDS, write_checkpoint
from conftest import make_spec
from families import tiny_config, write_family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from tokenspeed_plan.planner.compile import Model, compile_plan, find_model
from tokenspeed_plan.planner.models.config import ModelConfig, load_model_config
from tokenspeed_plan.planner.models.folder import find_folder, model_name
from tokenspeed_plan.planner.models.tensor_header import read_header
from tokenspeed_plan.plans.errors import CheckpointError, SpecError, TokenspeedError
from tokenspeed_plan.plans.weight_files import INDEX_FILE, weight_files

FUZZ = int(os.environ.get("TOKENSPEED_FUZZ", "1"))
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    7,
    64,
    10**7,
    2**31,
    2**63,
    10**30,
    10**400,
    0.0,
    0.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "4",
    "x",
    "\ud800",
    "\x1b[2J",
    [],
    [1, 2],
    [10**30],
    {},
    {"a": {"a": {"a": 1}}},
    {"rope_type": "yarn", "factor": 4.0},
]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "moe", KINDS["moe"])


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed), encoding="utf-8")


def refusal(folder: Path) -> TokenspeedError:
    """The error of a folder: one line, one hint, and nothing that a terminal cannot print."""
    with pytest.raises(TokenspeedError) as caught:
        find_model(make_spec(folder))
    error = caught.value
    assert error.hint and "\n" not in error.message + error.hint
    assert error.message.isprintable() and len(error.message) < 600
    return error


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "model-0.safetensors", "b": "no.safetensors"}, "no.safetensors` is missing"),
        ({"a": "model-0.safetensors"}, "has no tensor `a`"),
        ({"a": "../model-0.safetensors"}, "not a safetensors file beside it"),
        ({"a": "/etc/model.safetensors"}, "not a safetensors file beside it"),
        ({"a": "x\\model.safetensors"}, "not a safetensors file beside it"),
        ({"a": "sub/model.safetensors"}, "not a safetensors file beside it"),
        ({"a": "pytorch_model.bin"}, "not a safetensors file beside it"),
        ({"a": "\ud800.safetensors"}, "not a safetensors file beside it"),
        ({"a": 10**30}, "not a safetensors file beside it"),
        ({"a": None}, "not a safetensors file beside it"),
        ({}, "no `weight_map`"),
        ([], "no `weight_map`"),
    ],
)
def test_bad_indexes_are_refused(weight_map: Any, says: str, wrapped: Path, tmp_path: Path) -> None:
    folder = copy(wrapped, tmp_path)
    edit(folder / INDEX_FILE, lambda data: data | {"weight_map": weight_map})
    assert says in refusal(folder).message


@pytest.mark.parametrize("text", ["", "[]", "1", "[" * 100_000, '{"a": ' * 50_000, "\xff"])
@pytest.mark.parametrize("name", [INDEX_FILE, "config.json", "generation_config.json"])
def test_what_is_not_json_is_refused(name: str, text: str, wrapped: Path, tmp_path: Path) -> None:
    folder = copy(wrapped, tmp_path)
    (folder / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(folder).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.gguf", "consolidated.safetensors"])
def test_weights_in_another_form_are_refused(name: str, qwen3: Path, tmp_path: Path) -> None:
    folder = copy(qwen3, tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    assert name in refusal(folder).message


def test_an_adapter_beside_the_weights_is_refused(qwen3: Path, tmp_path: Path) -> None:
    folder = copy(qwen3, tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(folder).message


def test_a_tensor_in_two_files_is_refused(wrapped: Path, tmp_path: Path) -> None:
    folder = copy(wrapped, tmp_path)
    shutil.copy(folder / "model-0.safetensors", folder / "model-2.safetensors")
    edit(
        folder / INDEX_FILE,
        lambda data: data["weight_map"].update({"lm_head.weight": "model-2.safetensors"}),
    )
    assert "so has another file" in refusal(folder).message


def test_files_of_a_snapshot_are_links(qwen3: Path, tmp_path: Path) -> None:
    """Hugging Face's cache has the bytes elsewhere."""
    folder = copy(qwen3, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert [file.path.name for file in weight_files(folder)] == ["model.safetensors"]


def test_drafts_need_all_their_tensors(wrapped: Path, tmp_path: Path) -> None:
    """Without one of them a plan has no drafts and says why; who asks for drafts is refused."""
    folder = copy(wrapped, tmp_path)
    removed = "mtp.norm.weight"
    (name,) = [path for path in folder.glob("*.safetensors") if removed in read_header(path)]
    rewrite_header(name, lambda header: header.update({"mtp.other": header.pop(removed)}))
    edit(folder / INDEX_FILE, lambda data: data["weight_map"].pop(removed) and None)
    spec = make_spec(folder, speculation="auto")
    plan = compile_plan(spec, find_model(spec))
    (decision,) = [each for each in plan.decisions if each.name == "speculation"]
    assert decision.value == "off" and removed in decision.reason
    spec = make_spec(folder, speculation={"depth": 1})
    with pytest.raises(SpecError, match=removed) as caught:
        compile_plan(spec, find_model(spec))
    assert "speculation: off" in caught.value.hint


def rewrite_header(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the JSON of a safetensors file; its tensors' bytes stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("hidden_size", 10**30),
        ("vocab_size", 10**30),
        ("num_attention_heads", 2**31),
        ("num_key_value_heads", 10**9),
        ("head_dim", 10**400),
        ("intermediate_size", 2**63),
        ("max_position_embeddings", 10**30),
        ("rope_theta", 10**30),
        ("rms_norm_eps", 1e300),
    ],
)
def test_numbers_have_bounds(key: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"`{key}` is .*the most is ") as caught:
        ModelConfig.from_hf(tiny_config("qwen3", **{key: value}))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("value", [10**12, -1, 1.5, True, "1", [2, 10**12], [None], [[1]], {}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_stop_tokens_are_of_the_model(name: str, value: Any, qwen3: Path, tmp_path: Path) -> None:
    """Also where another place would win."""
    folder = copy(qwen3, tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    edit(folder / name, lambda data: data.update(eos_token_id=value))
    assert "`eos_token_id` is" in refusal(folder).message


def test_the_tokenizer_names_the_stop_token_that_no_config_names(
    qwen3: Path, tmp_path: Path
) -> None:
    folder = copy(qwen3, tmp_path)
    edit(folder / "config.json", lambda data: data.pop("eos_token_id") and None)

    def decided() -> tuple[tuple[int, ...], str]:
        plan = compile_plan(make_spec(folder), find_model(make_spec(folder)))
        (decision,) = [each for each in plan.decisions if each.name == "stop_tokens"]
        return plan.model.eos_token_ids, decision.value

    ids, said = decided()
    assert not ids and "none" in said
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    (wanted,) = [token["id"] for token in tokens if token["content"] == "<|im_end|>"]
    added = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    for token in ("<|im_end|>", added):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert decided() == ((wanted,), str(wanted))


HASH = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/plain", "plain"),
        (f"models--Org--Name/snapshots/{HASH}", "Org/Name"),
        (f"models--gpt2/snapshots/{HASH}", "gpt2"),
        (f"datasets--Org--Name/snapshots/{HASH}", HASH),
    ],
)
def test_a_model_is_called_after_its_folder(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / path
    (folder / "inside").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert model_name(folder) == model_name(Path()) == model_name(folder / "inside/..") == name
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_folder(f"~/{path}", None)
    assert found is not None and found.samefile(folder)


CONFIG_FIELDS = [
    *sorted(tiny_config("qwen3")),
    "rope_parameters",
    "num_local_experts",
    "text_config",
    "quantization_config",
    "partial_rotary_factor",
    "dtype",
    "layer_types",
]


def read_by_transformers(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except Exception:  # of many kinds; it refuses the config
        return None


def check_numbers(config: ModelConfig, folder: Path) -> None:
    """What is planned is what transformers reads, if it reads the config at all."""
    theirs = read_by_transformers(folder)
    if theirs is None:
        return
    rope = theirs.rope_parameters
    attention = config.attention
    assert config.num_layers == theirs.num_hidden_layers
    assert list(config.layer_types) == getattr(theirs, "layer_types", config.layer_types)
    assert config.hidden_size == theirs.hidden_size
    assert config.vocab_size == theirs.vocab_size
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert attention.num_qo_heads == theirs.num_attention_heads
    assert attention.num_kv_heads == theirs.num_key_value_heads
    assert attention.head_dim == theirs.head_dim
    assert attention.rope_theta == rope["rope_theta"]
    assert attention.rope_factor == (rope.get("factor") or 1.0)
    assert (rope["rope_type"] == "yarn") == ("factor" in rope)
    if rope["rope_type"] == "yarn":
        assert attention.rope_original_max_positions == rope["original_max_position_embeddings"]
    share = rope.get("partial_rotary_factor", 1.0)
    assert attention.rotary_dim == int(theirs.head_dim * share)
    if config.moe:
        assert config.moe.num_experts == theirs.num_experts
        assert config.moe.num_experts_per_token == theirs.num_experts_per_tok
        assert config.moe.intermediate_size == theirs.moe_intermediate_size
    else:
        assert config.intermediate_size == theirs.intermediate_size


@pytest.mark.slow
@settings(
    max_examples=25 * FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_config_is_refused_or_transformers(
    data: st.DataObject, qwen3: Path, wrapped: Path, tmp_path: Path
) -> None:
    """A few fields of a config with odd values, in any object of it."""
    source = data.draw(st.sampled_from([qwen3, wrapped]))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = config
        while data.draw(st.booleans()):
            inner = [value for value in at.values() if isinstance(value, dict) and value]
            if not inner:
                break
            at = inner[0]
        key = data.draw(st.sampled_from(sorted(at) + CONFIG_FIELDS))
        if data.draw(st.integers(0, 4)):
            at[key] = deepcopy(data.draw(st.sampled_from(ODD)))
        else:
            at.pop(key, None)
    folder = linked(source, tmp_path / source.name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused_or(lambda: check_numbers(find_model(make_spec(folder)).config, folder))
    refused_or(lambda: plan_without_weights(folder))


def linked(source: Path, to: Path) -> Path:
    """A folder with links to a model's files, and without its config."""
    if not to.is_dir():
        to.mkdir()
        for path in source.iterdir():
            if path.name != "config.json":
                (to / path.name).symlink_to(path)
    return to


def plan_without_weights(folder: Path) -> None:
    """Where no tensor contradicts the numbers."""
    read = load_model_config(folder)
    check_numbers(read, folder)
    if read.num_layers < 9:
        compile_plan(make_spec(folder), Model(read, None, None, {}, {}))


def refused_or(work: Callable[[], None]) -> None:
    try:
        work()
    except TokenspeedError as error:
        assert error.hint and "\n" not in error.message
        assert error.message.isprintable() and len(error.message) < 2000


@settings(
    max_examples=60 * FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_header_is_refused_or_read_by_safetensors(
    data: st.DataObject, qwen3: Path, tmp_path: Path
) -> None:
    """Odd values in the JSON, or bytes of it that were lost or changed."""
    path = tmp_path / "model.safetensors"
    small = {"a": ([2, 3], "F32", 24), "b": ([4], "BF16", 8), "c": ([0], "I8", 0)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype, size) in small.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if data.draw(st.booleans()):
        entry = header[data.draw(st.sampled_from(sorted(small)))]
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        entry[key] = data.draw(
            st.sampled_from([*ODD, [2, True], [2, 3.0], [-2, -3], [0, 24], [24, 0], "F16", "F99"])
        )
    text = json.dumps(header).encode()
    at = data.draw(st.integers(0, len(text) - 1))
    if data.draw(st.booleans()):
        text = text[:at] + data.draw(st.binary(max_size=2)) + text[at + 1 :]
    length = data.draw(st.sampled_from([len(text)] * 3 + [0, len(text) - 1, 2**40, 2**63]))
    body = bytes(data.draw(st.sampled_from([end] * 3 + [0, end - 1, end + 1])))
    path.write_bytes(struct.pack("<Q", length) + text + body)
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert error.hint and error.message.isprintable()
        return
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        assert shapes == {name: tensor.shape for name, tensor in found.items()}
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what was read: {error}") from error
