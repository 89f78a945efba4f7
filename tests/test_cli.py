"""The command line: every path a user takes, and that what goes wrong is one error and one hint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import ROOT, make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import load_plan

SURFACE = {
    "plan": {"spec", "out", "check", "no_compile"},
    "show": {"bundle", "as_json", "kernels"},
    "diff": {"old", "new"},
    "check": {"bundle", "weights", "canary"},
    "run": {"bundle", "source", "output", "prompt", "max_tokens", "temperature", "seed", "weights", "errors", "summary",
            "order", "max_errors", "limit", "shard", "max_concurrency", "no_canary", "quiet",
            "bodies", "check", "no_cache"},
    "bench": {"bundle", "weights", "batch", "context", "prefill", "workload", "first_turn", "turn", "turns", "outputs",
              "users", "seed", "as_json"},
}  # fmt: skip


def cli(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def is_clean(result: Result, code: int, says: str = "") -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("error: ") == 1
    assert result.stderr.count("\nhint: ") == 1
    assert "Traceback" not in result.output
    assert says in result.stderr


@pytest.fixture(scope="module")
def bundle(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    spec = make_spec(checkpoint("moe")).model_dump(mode="json", exclude_none=True)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert cli("plan", folder / "spec.yaml", "-o", folder / "plan").exit_code == 0
    return folder / "plan"


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions",
             "body": {"prompt": f"def f{i}(", "max_tokens": 4, "temperature": 0}} for i in range(5)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_surface_is_what_the_readme_says() -> None:
    assert {name: {param.name for param in command.params} for name, command in main.commands.items()} == SURFACE


def test_show_json_holds_the_contract(bundle: Path) -> None:
    data = json.loads(cli("show", bundle, "--json").stdout)
    assert {"digest", "num_layers", "layout", "programs", "memory_bytes_per_rank"} <= set(data)
    wanted = {"phase", "bucket", "launches", "launches_per_layer", "predicted_us"}
    assert all(wanted <= set(program) for program in data["programs"])
    assert {"weights", "kv_cache", "state", "activations", "total"} <= set(data["memory_bytes_per_rank"])
    assert data["num_layers"] == 4


def test_show_check_and_diff(bundle: Path, tmp_path: Path) -> None:
    assert "launches" in cli("show", bundle, "--kernels").stdout
    assert "rules and digest hold" in cli("check", bundle).stdout
    assert "48 tokens agree" in cli("check", bundle, "--canary").stdout
    assert cli("diff", bundle, bundle).output == ""
    spec = yaml.safe_load((bundle.parent / "spec.yaml").read_text())
    spec["workload"]["concurrency"] = 4
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    cli("plan", tmp_path / "spec.yaml", "-o", tmp_path / "plan")
    result = cli("diff", bundle, tmp_path / "plan")
    assert result.exit_code == 1
    assert "~ limits.max_seqs                    8 -> 4" in result.stdout
    assert "- program decode/8" in result.stdout


def test_plan_check_sees_a_stale_plan(bundle: Path, tmp_path: Path) -> None:
    spec = bundle.parent / "spec.yaml"
    assert cli("plan", spec, "-o", bundle, "--check").exit_code == 0
    copy = Path(shutil.copytree(bundle, tmp_path / "plan"))
    text = (copy / "plan.json").read_text()
    (copy / "plan.json").write_text(text.replace('"predicted_us":', '"predicted_us": '))
    is_clean(cli("plan", spec, "-o", copy, "--check"), 1, "is not what")
    assert (copy / "plan.json").read_text() != text


def test_two_processes_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    texts = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, "-c", "from tokenspeed_plan.planner.cli import main; main()", "plan"]
        subprocess.run(
            [*command, bundle.parent / "spec.yaml", "-o", out], env={"PYTHONHASHSEED": seed}, check=True, cwd=tmp_path
        )
        texts.append((out / "plan.json").read_bytes())
    assert texts[0] == texts[1] == (bundle / "plan.json").read_bytes()


def test_run_a_prompt(bundle: Path) -> None:
    result = cli("run", bundle, "--prompt", "def fibonacci(n):", "--max-tokens", 5)
    assert result.exit_code == 0
    assert "5 tokens (length)" in result.stderr


def test_run_a_batch(bundle: Path, batch: Path, tmp_path: Path) -> None:
    out, summary = tmp_path / "out.jsonl", tmp_path / "s.json"
    assert cli("run", bundle, "--input", batch, "--output", out, "--summary", summary, "--quiet").exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"c{i}" for i in range(5)]
    startup = json.loads(summary.read_text())["startup_s"]
    assert set(startup) == {"read_plan_s", "read_weights_s", "canary_s"}
    alone = cli("run", bundle, "--prompt", "def f3(", "--max-tokens", 4, "--quiet").stdout
    assert lines[3]["response"]["body"]["choices"][0]["text"] + "\n" == alone


def test_chat_uses_the_models_template(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    row = {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, "max_tokens": 2},
    }
    path.write_text(json.dumps(row))
    assert cli("run", bundle, "--input", path, "--output", tmp_path / "o.jsonl", "--quiet").exit_code == 0
    (line,) = [json.loads(text) for text in (tmp_path / "o.jsonl").read_text().splitlines()]
    from tokenspeed_plan.runtime.tokenizer import Codec

    codec = Codec.load(Path(line_model(bundle)))
    wanted = len(codec.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    assert line["response"]["body"]["usage"]["prompt_tokens"] == wanted


def line_model(bundle: Path) -> str:
    return str(json.loads((bundle / "plan.json").read_text())["model"]["location"])


def test_usage_errors(bundle: Path, batch: Path) -> None:
    for args in (["run", bundle], ["run", bundle, "--input", batch], ["run", bundle, "--prompt", "x", "--output", "o"]):
        assert cli(*args).exit_code == 2
    is_clean(cli("run", bundle, "--input", batch, "--output", "-", "--shard", "5/4"), 2, "--shard 5/4")


def test_what_is_not_there(bundle: Path, tmp_path: Path) -> None:
    is_clean(cli("plan", tmp_path / "no.yaml", "-o", tmp_path / "o"), 2, "cannot read")
    is_clean(cli("show", tmp_path), 2, "cannot read")
    is_clean(cli("run", bundle, "--prompt", "x", "--weights", tmp_path / "no"), 2, "there is no folder")
    is_clean(cli("run", bundle, "--input", tmp_path / "no", "--output", "-"), 2, "there is no file")
    (tmp_path / "file").write_text("")
    is_clean(cli("plan", bundle.parent / "spec.yaml", "-o", tmp_path / "file" / "x"), 2, "Not a directory")


def test_wrong_tokens_are_not_served(bundle: Path, checkpoint: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoint("moe"), tmp_path / "model"))
    for path in folder.glob("*.safetensors"):
        save_file(
            {name: t + 0.3 if name.endswith("layernorm.weight") else t for name, t in load_file(path).items()}, path
        )
    is_clean(cli("run", bundle, "--prompt", "x", "--weights", folder), 2, "canary prompt 0")
    assert cli("run", bundle, "--prompt", "x", "--max-tokens", 1, "--weights", folder, "--no-canary").exit_code == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_plan_is_refused(data: st.DataObject, bundle: Path, tmp_path: Path) -> None:
    text = (bundle / "plan.json").read_text()
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from(["", "0", "9", "-", "x", '"', "{", "]", ",", "null", "é"]))
    damaged = text[:at] + new + text[at + 1 :]
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    (tmp_path / "plan.json").write_text(damaged)
    result = cli("check", tmp_path)
    if json_or_none(damaged) == json.loads(text):
        assert result.exit_code == 0
    else:
        is_clean(result, 2)


def json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1}', "[" * 10_000, "\x00"]
)
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    is_clean(cli("show", tmp_path), 2)


def test_a_batch_shares_its_prefixes_and_says_so(bundle: Path, tmp_path: Path) -> None:
    """Rows of two kinds, mixed; the answers are as without a cache.

    What the first two rows share is computed once. The other kind's first row begins before its second is there, which
    then leaves the checkpoint where they part: it is computed twice.
    """
    path, outs = tmp_path / "in.jsonl", [tmp_path / "with.jsonl", tmp_path / "without.jsonl"]
    begins = [[5, 6, 7, 8] * 20, [9, 10] * 40]
    bodies = [{"prompt": [*begins[i % 2], i, i], "max_tokens": 1 + i % 4, "temperature": 0} for i in range(12)]
    rows = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": b} for i, b in enumerate(bodies)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [
        cli("run", bundle, "--input", path, "--output", out, "--no-canary", "--max-concurrency", 2, *flags).stderr
        for out, flags in zip(outs, ([], ["--no-cache"]), strict=True)
    ]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert f"prefix cache: {9 * 80} tokens in ({9 * 80 / (12 * 82):.1%})" in shown[0]
    assert "prefix cache" not in shown[1]


def test_the_lean_path_does_not_load_pytorch(bundle: Path) -> None:
    """Looking at a plan, and refusing a bad batch, are quick."""
    code = "import sys; from tokenspeed_plan.planner.cli import main\n"
    code += "main(['check', sys.argv[1]], standalone_mode=False)\n"
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, bundle], check=True, capture_output=True)


def test_bench_measures_every_kernel(bundle: Path) -> None:
    done = cli("bench", bundle, "--context", 20, "--batch", 2, "--prefill", 30, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    decode, prefill = found["programs"]
    plan = load_plan(bundle)
    assert [decode["phase"], decode["batch"], prefill["phase"], prefill["tokens"]] == ["decode", 2, "prefill", 30]
    program = next(p for p in plan.programs if (p.phase, p.bucket) == ("decode", decode["bucket"]))
    assert sum(row["calls"] for row in decode["kernels"]) == program.launches == decode["launches"]
    # Every weight but the table of tokens is read once; of 8 experts, 2 tokens hit 2 to 4 in each of 4 layers.
    held = {weight.name: weight.tensor for weight in plan.weights}
    experts = sum(spec.size_bytes() for spec in held.values() if len(spec.shape) == 3 and spec.shape[0] == 8)
    table = max(spec.size_bytes() for name, spec in held.items() if "embed" in name)
    rest = sum(spec.size_bytes() for spec in held.values()) - experts - table
    assert rest + experts * 2 / 8 <= decode["floor_bytes"] <= 1.2 * (rest + experts * 4 / 8)
    assert decode["floor_us"] > 0 and decode["measured_us"] > 0
    assert "share" in cli("bench", bundle, "--context", 20).stdout


def test_bench_holds_an_agents_conversations(bundle: Path) -> None:
    asked = ["--workload", "agentic", "--first-turn", 200, "--turn", 8, "--turns", 8, "--outputs", 4, "--users", 2]
    done = cli("bench", bundle, *asked, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["ttft_ms"]) == len(found["turn_time_ms"]) == 8
    known = sum(200 + 12 * turn - 8 - 1 for turn in range(1, 8))  # but the new words and the last token of an answer
    assert found["hit_rate"] == known / sum(200 + 12 * turn for turn in range(8)) > 0.8
    assert found["metrics"]["computed_tokens"] == 2 * (200 + 7 * 9)
    assert found["tpot_ms"] > 0 and found["host_us_per_step"] > 0
    assert "were in the cache" in cli("bench", bundle, *asked).stdout
    is_clean(cli("bench", bundle, *asked[:2], "--first-turn", 10**6), 2, "a conversation has")


def test_bench_refuses_what_the_plan_cannot_hold(bundle: Path, tmp_path: Path) -> None:
    is_clean(cli("bench", bundle, "--context", 10**6), 2, "cannot hold")
    is_clean(cli("bench", bundle, "--batch", 10**4), 2, "no decode program")
    is_clean(cli("bench", tmp_path), 2)
    is_clean(cli("bench", bundle, "--weights", tmp_path / "nothing"), 2)
    is_clean(cli("bench", ROOT / "plans/frozen/qwen3.5-35b-h200"), 2, "there is none here")
