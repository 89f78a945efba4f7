"""Evaluations and load generators against `tokenspeed serve`; see docs/clients.md.

python tests/clients/check_loads.py FOLDER [NAME ...]

The server runs in this environment (extras `serve` and `test`), with the demo model. FOLDER has an
environment for each client, since their requirements do not agree with each other:

    python -m venv FOLDER/lm-eval && FOLDER/lm-eval/bin/pip install 'lm-eval[api]' transformers
    python -m venv FOLDER/guidellm && FOLDER/guidellm/bin/pip install guidellm
    python -m venv FOLDER/aiperf && FOLDER/aiperf/bin/pip install aiperf
    python -m venv FOLDER/vllm && FOLDER/vllm/bin/pip install aiohttp numpy pandas pillow \
        pybase64 regex tqdm transformers
    FOLDER/vllm/bin/pip download --no-deps -d FOLDER/vllm 'vllm==0.25.1'
    unzip -q FOLDER/vllm/vllm-*.whl 'vllm/benchmarks/*' 'vllm-*/METADATA' -d FOLDER/vllm

No model hub is asked and no data set loaded: tasks are made here, tokenizers are the demo model's.
Each line of the output is a client, its version, and what it did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE.parent / "support")]

from serving import KEY, serving  # noqa: E402

BUNDLE, MODEL = ROOT / "plans/frozen/demo-cpu", ROOT / "examples/demo/model"
NUM_REQUESTS, STREAMS, PROMPT, OUT = 12, 4, 64, 24
TIMEOUT_S = 250
MAX_ERROR = 2e-3  # of a log probability, in nats a token
DOCS: list[dict[str, Any]] = [
    {"prompt": "def add(a, b):\n", "choices": ["    return a + b", "    import a"], "label": 0},
    {"prompt": "import os\nimport ", "choices": ["return", "sys"], "label": 1},
    {"prompt": "for i in range(", "choices": ["10):", "class", ")))"], "label": 0},
    {"prompt": "with open(path) as ", "choices": ["while", "f:"], "label": 1},
]
TASKS = {
    "pairs": """task: pairs
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "whole": """task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: bits_per_byte}]
""",
    "goes_on": """task: goes_on
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def run(command: list[Any], folder: Path, **more: str) -> str:
    """What a client says, with more variables of its environment.

    Raises:
        AssertionError: it fails.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment = os.environ | offline | {"OPENAI_API_KEY": KEY, "HOME": str(folder)} | more
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said


def version(venv: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run(
        [venv / "bin/python", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def lm_eval(venv: Path, url: str, folder: Path) -> str:
    """Its loglikelihoods are transformers', with the tokenizer of the server and with its own."""
    (folder / "docs.json").write_text("\n".join(map(json.dumps, DOCS)), encoding="utf-8")
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.json}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{text}{data}test_split: test\n", encoding="utf-8")
    worst = 0.0
    for backend in ("remote", f"huggingface,tokenizer={MODEL}"):
        out = folder / backend[:6]
        options = f"base_url={url}/v1/completions,model=demo,max_length=1024,auth_token={KEY}"
        words = ["run", "--model", "local-completions", "--include_path", folder, "--tasks"]
        words += [",".join(TASKS), "--model_args", f"{options},tokenizer_backend={backend}"]
        run([venv / "bin/lm-eval", *words, "--log_samples", "--output_path", out], folder)
        worst = max(worst, *errors_of(out))
    assert worst < MAX_ERROR, worst
    return f"lm-eval {version(venv, 'lm-eval')}: off by {worst:.0e} nats a token"


def errors_of(out: Path) -> Iterator[float]:
    """How far each loglikelihood is from transformers', in nats a token."""
    samples = {name: lines_of(only(out, f"samples_{name}_*.jsonl")) for name in TASKS}
    for sample in samples["pairs"]:
        for choice, ((value, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            yield error_of(sample["doc"]["prompt"], choice, float(value))
    for sample in samples["whole"]:
        ((value,),) = sample["resps"]
        yield error_of("", sample["doc"]["prompt"], float(value))
    assert all(sample["resps"][0][0] for sample in samples["goes_on"])


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def error_of(before: str, text: str, found: float) -> float:
    """Without a text before, one begins after the token that ends a text.

    Space at the end of the text before belongs to the text, as it does in lm-eval.
    """
    tokenizer, model = oracle()
    context = before.rstrip()
    first = tokenizer(context)["input_ids"]
    rest = tokenizer(before + text)["input_ids"][len(first) :]
    ids = [*(first or [tokenizer.eos_token_id]), *rest]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    begin = len(ids) - len(rest) - 1
    wanted = sum(float(logprobs[at, token]) for at, token in enumerate(rest, begin))
    return abs(found - wanted) / len(rest)


@cache
def oracle() -> tuple[Any, Any]:
    """transformers' tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenizer, AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def guidellm(venv: Path, url: str, folder: Path) -> str:
    for number, path in enumerate(("/v1/completions", "/v1/chat/completions", "/v1/responses")):
        out = folder / f"{number}.json"
        backend = f"kind=openai_http,target={url},model=demo,api_key={KEY},request_format={path}"
        words = ["run", "--backend", backend, "--disable-console"]
        words += ["--profile", f"kind=concurrent,streams={STREAMS}"]
        words += ["--constraint", f"kind=max_requests,count={NUM_REQUESTS}"]
        words += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUT}"]
        words += ["--tokenizer", f"kind=huggingface_auto,model={MODEL}"]
        run([venv / "bin/guidellm", *words, "--output", f"kind=json,path={out}"], folder)
        (found,) = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
        requests = found["requests"]
        assert not requests["errored"], requests["errored"][0]
        tokens = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
        assert tokens == [OUT] * NUM_REQUESTS, tokens
    return f"guidellm {version(venv, 'guidellm')}: {NUM_REQUESTS} requests of three APIs"


def aiperf(venv: Path, url: str, folder: Path) -> str:
    for kind in ("completions", "chat"):
        out = folder / kind
        words = ["profile", "--model", "demo", "--url", url, "--endpoint-type", kind]
        words += ["--streaming", "--tokenizer", MODEL, "--api-key", KEY, "--ui", "none"]
        words += ["--concurrency", STREAMS, "--request-count", NUM_REQUESTS]
        words += ["--prompt-input-tokens-mean", PROMPT, "--prompt-output-tokens-mean", OUT]
        words += ["--use-server-token-count", "--no-gpu-telemetry"]
        words += ["--per-chunk-usage"] * (kind == "chat")
        words += ["--extra-inputs", "ignore_eos:true", "--output-artifact-dir", out]
        # Offline it looks for tokenizers in the hub's cache alone, and not for a folder.
        run([venv / "bin/aiperf", *words], folder, HF_HUB_OFFLINE="", TRANSFORMERS_OFFLINE="")
        found = json.loads(only(out, "profile_export_aiperf.json").read_text(encoding="utf-8"))
        assert found["request_count"]["avg"] == NUM_REQUESTS, found
        assert found["output_sequence_length"]["avg"] == OUT, found
    return f"aiperf {version(venv, 'aiperf')}: {NUM_REQUESTS} requests of two APIs"


def vllm(venv: Path, url: str, folder: Path) -> str:
    for kind, path in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
        words = ["--backend", kind, "--base-url", url, "--endpoint", path, "--model", MODEL]
        words += ["--served-model-name", "demo", "--dataset-name", "random", "--ignore-eos"]
        words += ["--random-input-len", PROMPT, "--random-output-len", OUT, "--save-result"]
        words += ["--num-prompts", NUM_REQUESTS, "--max-concurrency", STREAMS]
        words += ["--result-filename", f"{kind}.json"]
        said = run([venv / "bin/python", HERE / "vllm_bench.py", venv, *words], folder)
        found = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        counts = found["completed"], found["failed"], found["total_output_tokens"]
        assert counts == (NUM_REQUESTS, 0, NUM_REQUESTS * OUT), (counts, said[-2000:])
    metadata = only(venv, "vllm-*.dist-info/METADATA").read_text(encoding="utf-8")
    (number,) = re.findall(r"^Version: (.*)$", metadata, re.MULTILINE)
    return f"vLLM's bench client {number}: {NUM_REQUESTS} requests of two APIs"


CLIENTS: dict[str, Callable[[Path, str, Path], str]] = {
    "lm-eval": lm_eval,
    "guidellm": guidellm,
    "aiperf": aiperf,
    "vllm": vllm,
}


def check(name: str, venv: Path, url: str) -> bool:
    """Run one client; returns whether it did what it should."""
    try:
        with tempfile.TemporaryDirectory(prefix="loads-") as folder:
            print(CLIENTS[name](venv, url, Path(folder)), flush=True)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        print(f"{name}: {error}", flush=True)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *CLIENTS])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loads-") as name:
        options = ("--api-key", KEY, "--model-name", "demo")
        with serving(BUNDLE, Path(name), *options) as server:
            found = [
                check(client, args.folder.absolute() / client, server.url)
                for client in args.names or CLIENTS
            ]
            assert 'status="5' not in server.http.get("/metrics").text, server.text()
    return int(not all(found))


if __name__ == "__main__":
    sys.exit(main())
