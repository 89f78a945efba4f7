"""The command line: the ways a user takes, and one error with one hint for what goes wrong."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import FREEZE, ROOT, make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands.engines import EngineOptions, ready_engine
from tokenspeed_plan.planner.commands.option_types import Chances
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.plans.bundle import check_cubins, load_plan, save_plan, seal
from tokenspeed_plan.plans.canon import answer_digest
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.figures import plain, without_exponents
from tokenspeed_plan.plans.report import as_text
from tokenspeed_plan.plans.schema import SCHEMA_VERSION, BatchSize, Binary, KernelCall, Program
from tokenspeed_plan.runtime.bench.clock import RUNS
from tokenspeed_plan.runtime.bench.machine import Machine
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.bench.replay import Replay

ENGINE_FILE = ROOT / "benchmarks/engines/sglang.yaml"
SIGNERS = {"allowed_signers", "signer"}
SURFACE = {
    "spec": {"schema", "key"},
    "plan": {"spec", "out", "check", "dry_run", "no_compile"},
    "show": {"bundle", "as_json", "kernels", "field", "html"},
    "predict": {"spec", "changes", "engines", "as_json"},
    "measure-routing": {"folder", "batch", "out"},
    "simulate": {
        "bundle",
        "requests",
        "users",
        "turns_per_s",
        "think_s",
        "recorded",
        "ttft_ms",
        "tpot_ms",
        "most",
        "in_time",
        "acceptance",
        "trace",
        "html",
        "seed",
        "as_json",
    },
    "sweep": {"spec", "gpus", "counts", "changes", "reserved", "rows", "deadline", "as_json"},
    "calibrate": {"out", "base", "device", "from_history", "from_samples", "plans", "samples"},
    "diff": {"old", "new", "as_json"},
    "check": {"bundle", "weights", "canary", *SIGNERS},
    "sign": {"bundle", "key"},
    "run": {
        "bundle",
        "source",
        "output",
        "prompt",
        "max_tokens",
        "temperature",
        "seed",
        "weights",
        "errors",
        "summary",
        "order",
        "max_errors",
        "limit",
        "shard",
        "lease",
        "ray",
        "workers",
        "plans",
        "leave_last",
        "shards",
        "lease_timeout_s",
        "max_concurrency",
        "no_canary",
        "verify_weights",
        *SIGNERS,
        "rank_timeout_s",
        "no_cache",
        "quiet",
        "backend",
        "check",
    },
    "serve": {
        "bundle",
        "replicas",
        "ray",
        "kv_events",
        "kv_topic",
        "rank_timeout_s",
        "write_timeout_s",
        "stall_s",
        "max_connections",
        "metrics_port",
        "header_timeout_s",
        "host",
        "port",
        "api_key",
        "model_name",
        "max_requests",
        "max_body_bytes",
        "body_timeout_s",
        "drain_s",
        "drops_billing",
        "weights",
        "backend",
        "no_canary",
        "verify_weights",
        *SIGNERS,
        "pool",
        "listen",
        "peers",
        "peer_token",
        "peer_timeout_s",
        "transport",
    },
    "chat": {
        "bundle",
        "system",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "weights",
        "backend",
        "no_canary",
        "verify_weights",
        *SIGNERS,
    },
    "bench": {
        "bundle",
        "workload",
        "weights",
        "batch",
        "context",
        "prefill",
        "as_json",
        "conversations",
        "turns",
        "first_turn_tokens",
        "turn_tokens",
        "output_tokens",
        "seed",
        "acceptance",
        "rows",
        "prompt",
        "out",
        "lengths",
        "shared",
    },
    "lengths": {"batch", "out", "answers", "model"},
    "quantize": {"source", "target", "weights"},
}


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
    rows = [
        {
            "custom_id": f"c{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"def f{i}(", "max_tokens": 4, "temperature": 0},
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_surface_is_what_the_readme_says() -> None:
    assert {
        name: {param.name for param in command.params} for name, command in main.commands.items()
    } == SURFACE


def test_show_json_holds_the_contract(bundle: Path) -> None:
    data = json.loads(cli("show", bundle, "--json").stdout)
    assert {"digest", "num_layers", "layout", "programs", "memory_bytes_per_rank"} <= set(data)
    wanted = {"phase", "bucket", "launches", "launches_per_layer", "predicted_us"}
    assert all(wanted <= set(program) for program in data["programs"])
    assert {"weights", "kv_cache", "state", "activations", "total"} <= set(
        data["memory_bytes_per_rank"]
    )
    assert data["num_layers"] == 2
    contract = {
        "ttft_ms",
        "tpot_ms",
        "turn_time_ms",
        "tokens_per_s_user",
        "tokens_per_s_gpu",
        "cost_per_million_tokens_usd",
        "cache_hit_rate",
    }
    assert contract <= set(data["predicted"]) and contract <= set(data["predicted"]["definitions"])
    for name in contract:
        low, high = data["predicted"]["interval"][name]
        assert low <= data["predicted"][name] <= high
    assert {"max_seqs", "max_seq_len", "largest_concurrency", "largest_context_tokens"} <= set(
        data["limits"]
    )
    assert 0 < len(data["top_costs"]) <= 5


@pytest.mark.slow
def test_show_is_one_screen_and_says_why(bundle: Path) -> None:
    for folder in (bundle, ROOT / "plans/frozen/qwen3.5-397b-b200x8"):
        lines = as_text(load_plan(folder)).splitlines()
        assert len(lines) <= 45 and max(map(len, lines)) <= 140
    assert "(nvfp4, fp8 and bf16, 60 layers) on 8 x B200" in lines[0]
    text = cli("show", ROOT / "plans/frozen/qwen3.5-397b-b200x8", "--why", "parallelism").stdout
    assert "because" in text and "next" in text and "turn_time_ms" in text
    assert "TTFT is not in it" in cli("show", bundle, "--why", "tpot_ms").stdout
    is_clean(cli("show", bundle, "--why", "paralelism"), 2, "no decision called `paralelism`")


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
    assert any(
        line.startswith("~ memory.kv_cache ") and "%" in line for line in result.stdout.splitlines()
    )
    assert any(line.startswith("~ predicted.") for line in result.stdout.splitlines())
    assert len(result.stdout.splitlines()) < 60


SPEC_397B = ROOT / "examples/qwen3.5-397b-b200x8/spec.yaml"
SMALL = ("--set", "model.preset=qwen3.5-9b", "--set", "target.count=2")


def test_predict_takes_any_stated_layout() -> None:
    data = json.loads(
        cli(
            "predict",
            SPEC_397B,
            *SMALL,
            "--set",
            "parallelism.attention={tp: 1, dp: 2}",
            "--set",
            "speculation.depth=2",
            "--set",
            "serving.prefill_chunk=1024",
            "--json",
        ).stdout
    )
    assert (data["layout"]["attention_tp"], data["layout"]["attention_dp"]) == (1, 2)
    assert (data["knobs"]["depth"], data["knobs"]["prefill_chunk"]) == (2, 1024)
    assert not data["replayed"]
    assert data["not_replayed_yet"] == ["attention data parallelism"]
    assert data["predicted"]["tpot_ms"] > 0 and data["memory_bytes_per_rank"]["total"] > 9e9
    today = ("--set", "speculation=off", "--set", "disaggregation=off")
    text = cli("predict", SPEC_397B, *SMALL, *today, "--set", "parallelism.attention.tp=2").stdout
    assert "can freeze this" in text and "not replayed yet" not in text


@pytest.mark.slow
def test_plan_says_what_it_does_not_keep(bundle: Path, tmp_path: Path) -> None:
    """Missed levels, where the plan is made; `--why` shows them, and the time of a prompt."""
    text = (bundle.parent / "spec.yaml").read_text() + "slo: {tpot_ms: 0.001}\n"
    spec, out = tmp_path / "spec.yaml", tmp_path / "plan"
    spec.write_text(text)
    said = cli("plan", spec, "-o", out, "--no-compile").stderr
    assert "warning: missed: tpot_ms" in said and "at most 0.001" in said
    assert "missed" in cli("show", out, "--why", "service_levels").stdout
    why = cli("show", out, "--why", "ttft_ms").stdout
    assert "prompt" in why and "tokens in" in why and "step  " not in why
    spec.write_text(text.replace("slo: {tpot_ms: 0.001}", "slo: {tpot_ms: 1000.0}"))
    assert "warning" not in cli("plan", spec, "-o", out, "--no-compile").stderr


def test_predict_models_another_engine(tmp_path: Path) -> None:
    """More launches take longer, by just the launches; the difference is told by term."""
    engines, times, terms = [], [], {}
    small = {"delta": 2, "attention": 2, "experts": 2, "dense": 2, "quantised": 0, "step": 0}
    for count in (2, 20):
        profile = {**yaml.safe_load(ENGINE_FILE.read_text()), "prices": None}
        profile["small_kernels"] = {**small, "dense": count}
        engines.append(tmp_path / f"engine{count}.yaml")
        engines[-1].write_text(yaml.safe_dump(profile))
    fixed = ("--set", "speculation=off", "--set", "parallelism={attention: {tp: 2}}")
    command = ("predict", SPEC_397B, *SMALL, *fixed)
    for engine in engines:
        data = json.loads(cli(*command, "--engine", engine, "--json").stdout)
        times.append(data["predicted"]["decode_step_us"])
    assert times[1]["small"] - times[0]["small"] == 18 * 32
    hardware = find_hardware("B200")
    each_us = hardware.launch_us + hardware.waits_us["rows"]
    assert times[1]["total"] - times[0]["total"] == pytest.approx(18 * 32 * each_us, rel=1e-3)
    both = ("--engine", engines[0], "--engine", engines[1])
    terms = json.loads(cli(*command, *both, "--json").stdout)["terms"]
    less, more = terms["decode_step_us"]
    assert more["small kernels"] - less["small kernels"] == pytest.approx(
        18 * 32 * each_us, rel=1e-2
    )
    assert more["memory"] == less["memory"]
    said = cli(*command, *both).stdout
    assert "nobody calibrated a B200" in said and "small kernels" in said
    assert "tokenspeed-plan" in cli(*command, "--engine", engines[0]).stdout
    for text, says in (("[", "is not YAML"), ("name: x", "version"), ("- 1", "the file")):
        engines[0].write_text(text)
        is_clean(cli("predict", SPEC_397B, "--engine", engines[0]), 2, says)
    is_clean(cli("predict", SPEC_397B, "--engine", tmp_path / "no.yaml"), 2, "cannot read")
    is_clean(cli("predict", SPEC_397B, *both, "--engine", engines[1]), 2, "given 3 times")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("target", "is not key=value"),
        ("target..gpu=H200", "is not key=value"),
        ("target.gpu=[", "is not YAML"),
        ("target.gpo=H200", "unknown key `target.gpo`"),
        ("target.gpu=H200000", "no GPU called"),
        ("model.weights=fp4", "`model.weights`"),
        ("target.count=1", "no layout of the model is legal and fits"),
        ("target={gpu: H200, count: 8, x: 1}", "unknown key `target.x`"),
    ],
)
def test_predict_refuses_in_one_line(change: str, says: str) -> None:
    is_clean(cli("predict", SPEC_397B, "--set", change), 2, says)


def test_nvfp4_needs_a_machine_that_knows_fp8() -> None:
    is_clean(
        cli("predict", SPEC_397B, "--set", "target.gpu=A100", "--set", "model.weights=nvfp4"),
        2,
        "no matrix rate",
    )


@pytest.mark.slow
def test_sweep_names_a_winner_or_a_reason_for_each_machine() -> None:
    rows = json.loads(
        cli(
            "sweep",
            SPEC_397B,
            "--set",
            "model.preset=qwen3.5-27b",
            "--set",
            "model.weights=bf16",
            "--gpus",
            "H200,RTX5090,a100-80g",
            "--count",
            "1,2",
            "--json",
        ).stdout
    )
    assert [(row["gpu"], row["count"]) for row in rows] == [
        (g, n) for g in ("H200", "RTX5090", "A100") for n in (1, 2)
    ]
    assert all(("predicted" in row) != ("error" in row) for row in rows)
    assert "needs" in rows[2]["error"] and rows[0]["predicted"]["cost_per_million_tokens_usd"] > 0
    table = cli("sweep", SPEC_397B, *SMALL, "--gpus", "H200", "--count", "1").stdout
    assert "USD/M" in table and "attention tp 1" in table
    is_clean(cli("sweep", SPEC_397B, "--gpus", "H200", "--count", "1,x"), 2, "--count 1,x")
    is_clean(cli("sweep", SPEC_397B, "--gpus", "X200"), 2, "no GPU called")


def test_a_plan_removes_only_what_the_plan_before_it_wrote(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "plan")
    mine = tmp_path / "plan/kernels/mine.py"
    mine.write_text("my own\n")
    plan = load_plan(bundle)
    save_plan(
        plan.model_copy(update={"kernels": plan.kernels[:1]}),
        tmp_path / "plan",
        {plan.kernels[0].name: "x"},
    )
    left = {path.name for path in mine.parent.iterdir()}
    assert left == {"mine.py", f"{plan.kernels[0].name}.py"}


def test_check_looks_at_cubins_and_asks_for_a_canary(bundle: Path, tmp_path: Path) -> None:
    plan = load_plan(bundle)
    shutil.copytree(bundle, tmp_path / "plan")
    kernel = next(kernel.name for kernel in plan.kernels if kernel.launch)
    binary = Binary(
        kernel=kernel, sm=90, cubin_sha256="0" * 64, registers=1, spill_bytes=0, shared_bytes=0
    )
    (tmp_path / "cubin").mkdir()
    (tmp_path / f"cubin/{kernel}.sm90.cubin").write_bytes(b"garbage")
    with pytest.raises(PlanError, match="is not the plan's binary"):
        check_cubins(plan.model_copy(update={"binaries": (binary,)}), tmp_path)
    save_plan(
        seal(plan.model_copy(update={"canary": ()})),
        tmp_path / "plan",
        {k.name: (bundle / f"kernels/{k.name}.py").read_text() for k in plan.kernels},
    )
    is_clean(cli("check", tmp_path / "plan", "--canary"), 2, "has no canary")
    assert cli("run", bundle, "--check", "--prompt", "x").exit_code == 2


def test_text_that_is_not_unicode(bundle: Path, tmp_path: Path) -> None:
    is_clean(cli("run", bundle, "--no-canary", "--prompt", "\udcff"), 2, "not Unicode")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(PlanError, match="not UTF-8"):
        ChatTemplate.load(tmp_path)


@pytest.mark.slow
def test_plan_check_sees_a_stale_plan(bundle: Path, tmp_path: Path) -> None:
    spec = bundle.parent / "spec.yaml"
    assert cli("plan", spec, "-o", bundle, "--check").exit_code == 0
    copy = Path(shutil.copytree(bundle, tmp_path / "plan"))
    text = (copy / "plan.json").read_text()
    (copy / "plan.json").write_text(text.replace('"predicted_us":', '"predicted_us": '))
    done = cli("plan", spec, "-o", copy, "--check")
    is_clean(done, 1, "is not what")
    assert "only the binaries differ" not in done.output
    assert (copy / "plan.json").read_text() != text
    version = f'"schema_version": {SCHEMA_VERSION}'
    assert version in text
    (copy / "plan.json").write_text(text.replace(version, '"schema_version": 5'))
    is_clean(cli("plan", spec, "-o", copy, "--check"), 1, "is not what")


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    """The other one made the bundle, with a hash order of its own."""
    command = [sys.executable, "-c", MAIN, "plan", bundle.parent / "spec.yaml", "-o", tmp_path]
    subprocess.run(command, env={"PYTHONHASHSEED": "1"}, check=True, cwd=tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == (bundle / "plan.json").read_bytes()


def test_run_a_prompt(bundle: Path) -> None:
    result = cli("run", bundle, "--prompt", "def fibonacci(n):", "--max-tokens", 5)
    assert result.exit_code == 0
    assert "5 tokens (length)" in result.stderr


def test_engines_of_commands_are_spared_by_the_collector(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "freeze", FREEZE)
    engine = ready_engine(bundle, EngineOptions(backend="reference", canary=False))
    assert gc.is_tracked(engine)
    assert all(found is not engine for found in gc.get_objects())


def test_an_option_that_was_renamed_names_the_new_one(bundle: Path) -> None:
    for command in ("run", "serve", "chat"):
        result = cli(command, bundle, "--bodies", "reference")
        is_clean(result, 2, "the option `--bodies` was renamed\n\nhint: use `--backend`")
    unknown = cli("run", bundle, "--bodices", "reference")
    assert unknown.exit_code == 2 and "No such option" in unknown.stderr


def test_run_a_batch(bundle: Path, batch: Path, tmp_path: Path) -> None:
    out, summary = tmp_path / "out.jsonl", tmp_path / "s.json"
    assert (
        cli(
            "run", bundle, "--input", batch, "--output", out, "--summary", summary, "--quiet"
        ).exit_code
        == 0
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"c{i}" for i in range(5)]
    startup = json.loads(summary.read_text())["startup_s"]
    assert set(startup) == {"read_plan_s", "read_weights_s", "prepare_s", "canary_s"}
    alone = cli("run", bundle, "--prompt", "def f3(", "--max-tokens", 4, "--quiet").stdout
    assert lines[3]["response"]["body"]["choices"][0]["text"] + "\n" == alone


@pytest.mark.slow
def test_an_output_is_resumed_with_a_plan_of_other_binaries(
    bundle: Path, batch: Path, tmp_path: Path
) -> None:
    """The id of a line holds what decides the answer, so not the bytes of binaries."""
    plan, texts = load_plan(bundle), {}
    facts = {"cubin_sha256": "0" * 64, "registers": 1, "spill_bytes": 0, "shared_bytes": 0}
    binaries = tuple(Binary(kernel=kernel.name, sm=90, **facts) for kernel in plan.kernels)
    assert answer_digest(plan.model_copy(update={"binaries": binaries})) == answer_digest(plan)
    for kernel in plan.kernels:
        texts[kernel.name] = (bundle / f"kernels/{kernel.name}.py").read_text()
    limits = plan.pool.limits.model_copy(update={"default_max_tokens": 7})
    plans = {
        "one": plan.model_copy(update={"kernel_compiler": "one", "canary": ()}),
        "two": plan.model_copy(update={"kernel_compiler": "two"}),
        "other": plan.with_pool(limits=limits),
    }
    out, summary, skipped = tmp_path / "out.jsonl", tmp_path / "s.json", []
    args = ("--input", batch, "--summary", summary, "--no-canary", "--quiet", "--output")
    answers = []
    for name, changed in plans.items():
        save_plan(seal(changed), tmp_path / name, texts)
        if name == "other":
            is_clean(cli("run", tmp_path / name, *args, out), 2, "answers of another plan")
            assert out.read_bytes() == answers[0]
            out = tmp_path / "other.jsonl"
        assert cli("run", tmp_path / name, *args, out).exit_code == 0
        skipped.append(json.loads(summary.read_text())["rows"]["skipped"])
        answers.append(out.read_bytes())
    assert skipped == [0, 5, 0]
    assert answers[0] == answers[1] != answers[2]


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
    assert (
        cli("run", bundle, "--input", path, "--output", tmp_path / "o.jsonl", "--quiet").exit_code
        == 0
    )
    (line,) = [json.loads(text) for text in (tmp_path / "o.jsonl").read_text().splitlines()]
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(line_model(bundle)))
    wanted = len(tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    assert line["response"]["body"]["usage"]["prompt_tokens"] == wanted


def line_model(bundle: Path) -> str:
    return str(json.loads((bundle / "plan.json").read_text())["model"]["location"])


def test_the_numbers_of_all_options_are_finite() -> None:
    """Comparisons with NaN are false, so that no bound refuses it."""
    found = [
        (option.opts[0], option.type)
        for command in main.commands.values()
        for option in command.params
        if isinstance(option.type, click.types.FloatParamType | Chances)
    ]
    assert len(found) > 15
    for name, kind in found:
        for word in ("nan", "inf", "-inf", "1e400", "0.5,nan"):
            with pytest.raises(click.BadParameter):
                pytest.fail(f"{name} takes {kind.convert(word, None, None)}")


@pytest.mark.parametrize("text", ["", "2", "-0.1", "0.5,", "x"])
def test_what_is_no_list_of_chances(text: str) -> None:
    with pytest.raises(click.BadParameter, match="from 0 to 1"):
        Chances().convert(text, None, None)


def test_usage_errors(bundle: Path, batch: Path) -> None:
    for args in (
        ["run", bundle],
        ["run", bundle, "--input", batch],
        ["run", bundle, "--prompt", "x", "--output", "o"],
    ):
        assert cli(*args).exit_code == 2
    is_clean(
        cli("run", bundle, "--input", batch, "--output", "-", "--shard", "5/4"), 2, "--shard 5/4"
    )


def test_a_kind_of_node_has_one_plan(bundle: Path, batch: Path, tmp_path: Path) -> None:
    plans = ["--plan", f"mine={bundle}", "--plan", f"mine={tmp_path}"]
    words = ["run", "--input", str(batch), "--output", str(tmp_path / "out"), "--ray", "auto"]
    result = cli(*words, *plans)
    assert result.exit_code == 2
    assert "`mine` has two plans" in result.output


def test_what_is_not_there(bundle: Path, tmp_path: Path) -> None:
    is_clean(cli("plan", tmp_path / "no.yaml", "-o", tmp_path / "o"), 2, "cannot read")
    is_clean(cli("show", tmp_path), 2, "cannot read")
    is_clean(
        cli("run", bundle, "--prompt", "x", "--weights", tmp_path / "no"), 2, "there is no folder"
    )
    is_clean(cli("run", bundle, "--input", tmp_path / "no", "--output", "-"), 2, "there is no file")
    (tmp_path / "file").write_text("")
    is_clean(
        cli("plan", bundle.parent / "spec.yaml", "-o", tmp_path / "file" / "x"),
        2,
        "Not a directory",
    )


def test_wrong_tokens_are_not_served(
    bundle: Path, checkpoint: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The bytes of small weights are compared first; the canary looks at those of large ones."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoint("moe"), tmp_path / "model"))
    for path in folder.glob("*.safetensors"):
        save_file(
            {
                name: t + 0.3 if name.endswith("layernorm.weight") else t
                for name, t in load_file(path).items()
            },
            path,
        )
    command = ("run", bundle, "--prompt", "x", "--weights", folder)
    is_clean(cli(*command), 2, "was changed after planning")
    monkeypatch.setattr("tokenspeed_plan.plans.weight_digests.SMALL_BYTES", 0)
    is_clean(cli(*command), 2, "canary prompt 0")
    is_clean(cli(*command, "--no-canary", "--verify-weights"), 2, "was changed after planning")
    assert cli(*command, "--max-tokens", 1, "--no-canary").exit_code == 0


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_a_plan_is_refused(data: st.DataObject, bundle: Path, tmp_path: Path) -> None:
    text = (bundle / "plan.json").read_text()
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from(["", "0", "9", "-", "x", '"', "{", "]", ",", "null", "é"]))
    damaged = text[:at] + new + text[at + 1 :]
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    (tmp_path / "plan.json").write_text(damaged)
    result = cli("check", tmp_path)
    if damaged == text:
        assert result.exit_code == 0
    else:  # also where only its spelling is another
        is_clean(result, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"schema_version": 99}',
        '{"schema_version": 1}',
        "[" * 10_000,
        "\x00",
    ],
)
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    is_clean(cli("show", tmp_path), 2)


def test_the_lean_path_does_not_load_pytorch(bundle: Path) -> None:
    """Looking at a plan, and refusing a bad batch, are quick."""
    code = "import sys; from tokenspeed_plan.planner.cli import main\n"
    code += "main(['check', sys.argv[1]], standalone_mode=False)\n"
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, bundle], check=True, capture_output=True)


@pytest.mark.parametrize("module", ["tokenspeed_plan", "tokenspeed_plan.planner.cli"])
def test_a_module_is_the_command(module: str) -> None:
    command = [sys.executable, "-m", module]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version("tokenspeed-plan") in done.stdout
    failed = subprocess.run([*command, "show", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ")


def test_a_command_loads_only_what_it_needs() -> None:
    """Workers begin by the thousand: `run` does not load what makes plans."""
    code = "import sys; from tokenspeed_plan.planner.cli import main\n"
    code += "main(['run', '--help'], standalone_mode=False)\n"
    code += "heavy = {'torch', 'jinja2', 'yaml', 'networkx'} & sys.modules.keys()\n"
    code += "sys.exit(' '.join([*heavy, *(n for n in sys.modules if '.advisor' in n)]) or None)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_floor_of_the_demo_plan_is_its_weights_and_states() -> None:
    """Counted from what the plan holds: weights but the table, the experts hit, states, keys."""
    plan = load_plan(ROOT / "plans/frozen/demo-cpu")
    program = next(p for p in plan.pool.programs if p.name == "decode/4")
    calls = [step for step in program.steps if isinstance(step, KernelCall)]
    batch = BatchSize(num_tokens=4, num_seqs=4, context_tokens=100, experts_hit=5)
    weights = {weight.name: weight.tensor for weight in plan.pool.weights}
    floor = 0.0
    for name, spec in weights.items():
        if "embed" in name:
            floor += 4 * spec.size_bytes() / spec.bind(0, 0)[0]
        elif len(spec.shape) == 3 and spec.shape[1] != 1:  # not a convolution
            floor += 5 / 8 * spec.size_bytes()
        else:
            floor += spec.size_bytes()
    for buffer in plan.pool.buffers:
        one = buffer.tensor.size_bytes() / max(buffer.tensor.bind(0, 0)[0], 1)
        if buffer.arena == "state":
            # Of a ring of inputs all but one are read, and that one is written.
            floor += 4 * (1 if "conv" in buffer.name else 2) * one
        elif buffer.arena == "kv_cache":
            floor += 4 * (100 + 1) * one / plan.pool.limits.page_size
    assert sum(call.cost.at(batch).floor_bytes for call in calls) == floor


@pytest.mark.slow
def test_bench_refuses_before_it_measures(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(device: str) -> None:
        raise AssertionError("measured something")

    monkeypatch.setattr("tokenspeed_plan.runtime.bench.replay.measure_machine", measured)
    done = cli("bench", bundle, "--context", 20, "--prefill", 99999)
    assert done.exit_code == 2, done.output
    assert "error: no prefill program takes 99999 tokens" in done.stderr


@pytest.mark.slow
def test_bench_measures_every_kernel(bundle: Path) -> None:
    done = cli("bench", bundle, "--context", 20, "--batch", 2, "--prefill", 30, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    decode, prefill = found["programs"]
    plan = load_plan(bundle)
    assert [decode["phase"], decode["batch"], prefill["phase"], prefill["tokens"]] == [
        "decode",
        2,
        "prefill",
        30,
    ]
    program = next(
        p for p in plan.pool.programs if (p.phase, p.bucket) == ("decode", decode["bucket"])
    )
    assert sum(row["calls"] for row in decode["kernels"]) == program.launches == decode["launches"]
    # Every weight but the table of tokens is read once; of 8 experts, 2 tokens hit 2 to 4 in each
    # of 4 layers.
    held = {weight.name: weight.tensor for weight in plan.pool.weights}
    experts = sum(
        spec.size_bytes() for spec in held.values() if len(spec.shape) == 3 and spec.shape[0] == 8
    )
    table = max(spec.size_bytes() for name, spec in held.items() if "embed" in name)
    rest = sum(spec.size_bytes() for spec in held.values()) - experts - table
    assert rest + experts * 2 / 8 <= decode["floor_bytes"] <= 1.2 * (rest + experts * 4 / 8)
    assert decode["floor_us"] > 0 and decode["measured_us"] > 0
    assert "share" in cli("bench", bundle, "--context", 20).stdout


@pytest.mark.slow
def test_bench_counts_what_was_asked_for_and_stays_there(
    bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A captured program runs padded, and each run of decode makes the sequences longer."""
    plan = load_plan(bundle)
    captured = tuple(
        program.model_copy(update={"captured": True}) for program in plan.pool.programs
    )
    plan = plan.with_pool(programs=captured)
    executor = prepare(plan, bundle, None)
    replay = Replay(plan, executor, "decode", 3, 1, 40)
    assert replay.program.captured and replay.program.max_seqs > 3
    longest = []
    run = executor.run

    def watched(program: Program, *size: int) -> None:
        run(program, *size)
        longest.append(int(executor.buffer("context_lens", *size).max()))

    monkeypatch.setattr(executor, "run", watched)
    found = replay.measure(Machine("none", 1e9, 1.0, 1e9))
    assert (found["batch"], found["tokens"], found["context"]) == (3, 3, 40)
    assert max(longest) <= 40 + RUNS
    limit = plan.pool.limits.max_seq_len
    Replay(plan, executor, "decode", 1, 1, limit - RUNS).measure(Machine("none", 1e9, 1.0, 1e9))
    is_clean(cli("bench", bundle, "--context", limit), 2, f"cannot hold 1 x {limit + RUNS} tokens")


@pytest.mark.slow
def test_bench_refuses_what_the_plan_cannot_hold(bundle: Path, tmp_path: Path) -> None:
    is_clean(cli("bench", bundle, "--context", 10**6), 2, "cannot hold")
    is_clean(cli("bench", bundle, "--batch", 10**4), 2, "no decode program")
    is_clean(cli("bench", tmp_path), 2)
    is_clean(cli("bench", bundle, "--weights", tmp_path / "nothing"), 2)
    is_clean(cli("bench", ROOT / "plans/frozen/qwen3.5-35b-h200"), 2, "there is none here")


POOR_LOCALE = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "latin-1",
    "OMP_NUM_THREADS": "1",
}
MAIN = "from tokenspeed_plan.planner.cli import main; main()"


def in_a_poor_locale(*args: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-c", MAIN, *map(os.fspath, args)]
    return subprocess.run(command, env=os.environ | POOR_LOCALE, capture_output=True, cwd=ROOT)


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    plan = load_plan(ROOT / "plans/frozen/demo-cpu")
    model = plan.model.model_copy(update={"name": "\U0001f600"})
    save_plan(seal(plan.model_copy(update={"model": model})), tmp_path / "plan")
    done = in_a_poor_locale("show", tmp_path / "plan")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"\U0001f600 (")
    is_clean(cli("predict", "a\udcff\x1b[31m.yaml"), 2, r"a\udcff\x1b[31m.yaml")


@pytest.mark.slow
def test_a_batch_is_the_same_in_every_locale(tmp_path: Path) -> None:
    """The demo's tokenizer has bytes over 127, which other encodings read otherwise."""
    body = {"prompt": "na\u00efve \u65e5\u672c \U0001f600", "max_tokens": 8, "temperature": 0}
    row = {"custom_id": "\u00e9", "method": "POST", "url": "/v1/completions", "body": body}
    rows, here, there = (tmp_path / name for name in ("in.jsonl", "a.jsonl", "b.jsonl"))
    rows.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    args = ("run", ROOT / "plans/frozen/demo-cpu", "--input", rows, "--no-canary", "--output")
    assert cli(*args, here).exit_code == 0
    done = in_a_poor_locale(*args, there)
    assert done.returncode == 0, done.stderr
    assert here.read_bytes() == there.read_bytes()


def changed_spec(bundle: Path, folder: Path) -> Path:
    """The bundle's spec for half as many sequences."""
    spec = yaml.safe_load((bundle.parent / "spec.yaml").read_text(encoding="utf-8"))
    spec["workload"]["concurrency"] = 4
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_plan_is_compared_without_being_written(bundle: Path, tmp_path: Path) -> None:
    spec = changed_spec(bundle, tmp_path)
    copy = Path(shutil.copytree(bundle, tmp_path / "plan"))
    before = (copy / "plan.json").read_bytes()
    dry = cli("plan", spec, "-o", copy, "--dry-run")
    assert dry.exit_code == 0 and "limits.max_seqs" in dry.stdout and "8 -> 4" in dry.stdout
    checked = cli("plan", spec, "-o", copy, "--check")
    is_clean(checked, 1, "is not what")
    assert all(line in checked.stderr for line in dry.stdout.splitlines())
    assert (copy / "plan.json").read_bytes() == before
    new = cli("plan", spec, "-o", tmp_path / "new", "--dry-run")
    assert new.exit_code == 0 and "a new one would be written" in new.stdout
    assert not (tmp_path / "new").exists()
    assert (
        "would not change"
        in cli("plan", bundle.parent / "spec.yaml", "-o", bundle, "--dry-run").stdout
    )
    assert cli("plan", spec, "-o", copy, "--dry-run", "--check").exit_code == 2


def test_diff_and_why_as_json(bundle: Path) -> None:
    other = ROOT / "plans/frozen/demo-cpu"
    done = cli("diff", bundle, other, "--json")
    lines = cli("diff", bundle, other).stdout.splitlines()
    changes = json.loads(done.stdout)
    assert done.exit_code == 1 and len(changes) == len(lines) > 10
    assert changes[0].keys() == {"sign", "what", "detail"}
    assert json.loads(cli("diff", bundle, bundle, "--json").stdout) == []
    reason = json.loads(cli("show", bundle, "--why", "parallelism", "--json").stdout)
    assert reason["name"] == "parallelism" and reason["reason"]
    number = json.loads(cli("show", bundle, "--why", "ttft_ms", "--json").stdout)
    shown = json.loads(cli("show", bundle, "--json").stdout)["predicted"]
    assert number["value"] == shown["ttft_ms"]
    assert number["interval"] == shown["interval"]["ttft_ms"]
    two = ("--why", "parallelism", "--why", "ttft_ms")
    assert json.loads(cli("show", bundle, *two, "--json").stdout) == [reason, number]
    both = [cli("show", bundle, "--why", name).stdout for name in ("parallelism", "ttft_ms")]
    assert cli("show", bundle, *two).stdout == "".join(both)
    is_clean(cli("show", bundle, "--why", "ttft", "--json"), 2, "no decision")


@pytest.mark.slow
def test_a_pipe_gets_whole_lines_and_plain_numbers() -> None:
    folder = ROOT / "plans/frozen/qwen3.5-397b-b200x8"
    plan, text = load_plan(folder), cli("show", folder).stdout
    assert all(f"{each.value}: {each.reason}" in text for each in plan.decisions)
    assert "..." in as_text(plan) and "..." not in text
    assert "workload agentic: " in text and "turns 12" in text
    slow = ("--set", "target={gpu: cpu}", "--set", "workload.turns=1", "--set", "speculation=off")
    model = ("--set", "model.preset=qwen3-4b", "--set", "workload.first_turn_tokens=30000")
    text = cli("predict", SPEC_397B, *model, *slow).stdout
    assert "turn_time_ms" in text and not re.search(r"\de[+-]\d", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(14831.2, "14830"), (703.31, "703.3"), (0.0, "0"), (1.5e-5, "0.000015"), (2e9, "2000000000")],
)
def test_a_number_has_no_exponent(value: float, text: str) -> None:
    assert plain(value) == text
    assert without_exponents(f"x {value:.4g} ms, 1e23f") == f"x {text} ms, 1e23f"


@pytest.mark.slow
def test_bench_without_options_works_on_a_small_plan(bundle: Path) -> None:
    assert load_plan(bundle).pool.limits.max_seq_len < 1024
    data = json.loads(cli("bench", bundle, "--json").stdout)
    assert data["programs"][0]["measured_us"] > 0


def test_a_profile_is_found_beside_its_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    profile = (ROOT / "planner/machines/profiles/cpu.yaml").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(profile.replace("name: cpu", "name: mine"), encoding="utf-8")
    (folder / "spec.yaml").write_text(
        "{version: 1, model: {preset: qwen3-0.6b}, target: {gpu: mine.yaml},"
        " workload: {first_turn_tokens: 64, output_tokens: 16}, speculation: off}",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    assert cli("predict", "specs/spec.yaml").stdout.startswith("qwen3-0.6b on 1 x mine\n")
    (folder / "mine.yaml").unlink()
    is_clean(cli("predict", "specs/spec.yaml"), 2, "cannot read `mine.yaml`")


def test_hints_name_the_command_that_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for called in ("tokenspeed", ".venv/bin/tokenspeed"):
        monkeypatch.setattr(sys, "argv", [called])
        is_clean(cli("show", tmp_path), 2, f"name a folder that `{called} plan` wrote")


def test_a_dense_model_has_no_words_of_experts() -> None:
    text = cli("predict", SPEC_397B, *SMALL, "--set", "speculation=off").stdout
    assert "ffn tp 2" in text and "moe" not in text and " ep " not in text


@pytest.mark.parametrize("workload", ["x", None, [1], {"turns": "many"}, {"kind": 3}])
def test_a_plan_whose_spec_is_none_is_shown_and_run(
    workload: Any, bundle: Path, batch: Path, tmp_path: Path
) -> None:
    plan = load_plan(bundle)
    texts = {k.name: (bundle / f"kernels/{k.name}.py").read_text() for k in plan.kernels}
    changed = plan.model_copy(update={"spec": {"workload": workload}})
    save_plan(seal(changed), tmp_path / "plan", texts)
    assert cli("show", tmp_path / "plan").exit_code == 0
    if workload != "x":
        return
    args = ("--input", batch, "--output", tmp_path / "out.jsonl", "--no-canary")
    assert cli("run", tmp_path / "plan", *args).exit_code == 0
