"""Decode at batch 1 on one GPU: a plan's engine against others, with random bf16 weights.

    python benchmarks/gpu.py DIR [--context 1024] [--tokens 128] [--peers eager,compile,vllm]

Each contestant runs in a process of its own, one after the other on the same GPU, and generates
`--tokens` greedy tokens after a prompt; the figure is the time of a token after the first. Ours is
the whole engine with its scheduler; plan it with `speculation: off`, for the others do not draft
either. transformers runs with a static cache, its experts as grouped products, eagerly and with the
decode step compiled (`torch.compile(mode="reduce-overhead")`, CUDA graphs); where
flash-linear-attention is installed it uses it. vLLM runs in its process too, compiled and with CUDA
graphs, with FlashAttention 3 and Triton's delta rule, the text model alone; `vllm-h100` lends it
the tiles of experts that it ships for an H100, where it has none for the GPU at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

WARM_UP = 8  # tokens that are not counted
TIME_LIMIT_S = 600
REPEATS = 3
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1}  # never built
VLLM = {  # in one process, without a network, without what compiles kernels while it runs
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
VLLM_MODEL = {  # a folder with a config and no weights, as text, with what is there of its kernels
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "language_model_only": True,
    "dtype": "bfloat16",
    "attention_backend": "FLASH_ATTN",
    "gdn_prefill_backend": "triton",
}
KEPT_IN_BF16 = (  # of a layer, in the published FP8 files
    "linear_attn.conv1d",
    "linear_attn.in_proj_a",
    "linear_attn.in_proj_b",
    "mlp.gate",
    "mlp.shared_expert_gate",
)
Step = Callable[[torch.Tensor], torch.Tensor]


def ours(bundle: Path, context: int, tokens: int) -> dict[str, Any]:
    """Figures of the engine with random weights, in milliseconds."""
    from tokenspeed_plan.planner.commands.engines import freeze_gc
    from tokenspeed_plan.plans.bundle import load_plan
    from tokenspeed_plan.runtime import Engine, SamplingParams
    from tokenspeed_plan.runtime.execution.arenas import Arenas
    from tokenspeed_plan.runtime.execution.backend import ReferenceBackend, load_kernels
    from tokenspeed_plan.runtime.execution.executor import Executor
    from tokenspeed_plan.runtime.execution.graphs import GraphLaunch
    from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
    from tokenspeed_plan.runtime.loading.engine_loader import make_backend
    from tokenspeed_plan.runtime.loading.weights import random_weights

    plan = load_plan(bundle)
    arenas = Arenas(plan.pool.arenas, "cuda")
    weights = random_weights(plan, arenas)
    backend = make_backend(plan, ReferenceBackend(plan), load_kernels(plan, bundle))
    engine = Engine(plan, Executor(PlanMemory(plan, arenas, weights), backend, GraphLaunch()))
    prompt = prompt_ids(plan.model.vocab_size, context)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    engine.generate([prompt], params)
    freeze_gc()  # as the commands do: a full collection holds a step up for 0.1 s
    (done,) = engine.generate([prompt], params)
    drafts = plan.pool.limits.max_depth  # 0 in a fair comparison: the others do not draft
    return {
        "tpot_ms": done.decode_s / (tokens - 1) * 1e3,
        "ttft_ms": done.ttft_s * 1e3,
        "drafts": drafts,
    }


def prompt_ids(vocab_size: int, count: int) -> list[int]:
    """Random token ids, the same for every contestant."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (count,), generator=random).tolist()


def transformers_model(config: Path) -> Any:
    """The text model of a config.json, with random weights, on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = json.loads(config.read_text())["text_config"]
    made = AutoConfig.for_model(text.pop("model_type"), **text)
    with torch.device("cuda"):
        options: dict[str, Any] = {}
        if "num_experts" in text:
            options["experts_implementation"] = "grouped_mm"
        return AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, **options).eval()


@torch.inference_mode()
def peer(config: Path, context: int, tokens: int, compiled: bool) -> dict[str, Any]:
    """Figures of transformers in milliseconds: prefill, then one token a step."""
    from transformers import StaticCache

    model = transformers_model(config)
    cache = StaticCache(config=model.config, max_cache_len=context + tokens + WARM_UP)
    prompt = torch.tensor([prompt_ids(model.config.vocab_size, context)], device="cuda")

    def step(ids: torch.Tensor) -> torch.Tensor:
        # By position: transformers 5.24 gives the cache another name.
        return (
            model(ids, None, None, cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1:]
            .argmax(-1)
        )

    begun = time.perf_counter()
    token = step(prompt)
    torch.cuda.synchronize()
    ttft = time.perf_counter() - begun
    run: Step = torch.compile(step, mode="reduce-overhead") if compiled else step
    taken = [timed(run, token) for _ in range(WARM_UP + tokens - 1)]
    return {
        "tpot_ms": statistics.median(taken[WARM_UP:]) * 1e3,
        "ttft_ms": ttft * 1e3,
        "ttft_is": "cold",
    }


def timed(run: Step, token: torch.Tensor) -> float:
    """Seconds of a step, which replaces `token` by the next one."""
    begun = time.perf_counter()
    token.copy_(run(token))
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def vllm_config(config: Path, folder: str, weights: str = "bf16") -> dict[str, Any]:
    """Write a preset as vLLM wants it into a folder; returns the text model's part.

    Args:
        config: the preset's config.json.
        folder: where it is written.
        weights: `bf16`, or `fp8` as in the published files.
    """
    made = json.loads(config.read_text())
    text: dict[str, Any] = made["text_config"]
    made["architectures"] = [f"Qwen3_5{'Moe' * ('num_experts' in text)}ForConditionalGeneration"]
    made |= {
        "vision_config": VISION | {"out_hidden_size": text["hidden_size"]},
        "dtype": "bfloat16",
    }
    if weights == "fp8":
        made["quantization_config"] = fp8_blocks(text)
    Path(folder, "config.json").write_text(json.dumps(made))
    return text


def fp8_blocks(text: dict[str, Any]) -> dict[str, Any]:
    """What the published FP8 files say of their weights: blocks, and what stays in bf16."""
    kept = ["lm_head", "model.language_model.embed_tokens"]
    for layer in range(text["num_hidden_layers"]):
        kept += [f"model.language_model.layers.{layer}.{part}" for part in KEPT_IN_BF16]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": kept,
    }


def vllm_peer(config: Path, context: int, tokens: int, borrow: bool) -> dict[str, Any]:
    """Figures of vLLM in milliseconds: the time of `tokens` tokens less that of one token."""
    os.environ.update(VLLM)
    with tempfile.TemporaryDirectory() as folder:
        text = vllm_config(config, folder)
        if borrow:
            os.environ["VLLM_TUNED_CONFIG_FOLDER"] = borrowed_tiles(text, folder)
        from vllm import LLM, SamplingParams

        engine = LLM(
            folder,
            **VLLM_MODEL,
            max_model_len=context + tokens + 64,
            max_num_seqs=8,
            enable_prefix_caching=False,
            compilation_config={
                "cudagraph_capture_sizes": [1, 2, 4, 8],
                "max_cudagraph_capture_size": 8,
            },
        )

        def taken(count: int) -> float:
            params = SamplingParams(
                temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            begun = time.perf_counter()
            engine.generate(
                [{"prompt_token_ids": prompt_ids(text["vocab_size"], context)}],
                params,
                use_tqdm=False,
            )
            return time.perf_counter() - begun

        taken(tokens)
        pairs = [(taken(1), taken(tokens)) for _ in range(REPEATS)]
    tpot = statistics.median((long - short) / (tokens - 1) for short, long in pairs)
    return {"tpot_ms": tpot * 1e3, "ttft_ms": statistics.median(short for short, _ in pairs) * 1e3}


def borrowed_tiles(text: dict[str, Any], folder: str) -> str:
    """A folder with vLLM's tiles for an H100 under this GPU's name."""
    from vllm.model_executor.layers import fused_moe

    name = f"E={text['num_experts']},N={text['moe_intermediate_size']},device_name="
    shipped = Path(fused_moe.__file__).parent / "configs" / f"{name}NVIDIA_H100_80GB_HBM3.json"
    target = Path(folder, "tiles", f"{name}{torch.cuda.get_device_name().replace(' ', '_')}.json")
    target.parent.mkdir()
    target.write_text(shipped.read_text())
    return str(target.parent)


def contest(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A contestant's figures, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIME_LIMIT_S} s"}
    lines = (done.stdout.strip() or "{}").splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}


def find_distribution(name: str) -> bool:
    """Whether a package is installed."""
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


PEERS = {
    "eager": "transformers, eager",
    "compile": "transformers, compiled",
    "vllm": "vLLM",
    "vllm-h100": "vLLM with an H100's tiles",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peers", default="eager,compile")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(figures(options)))
        return
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"{options.context} tokens of context"
    )
    mine = contest("ours", options)
    print(f"ours: {json.dumps(mine)}", flush=True)
    for name in filter(None, options.peers.split(",")):
        found = contest(name, options)
        ratio = float("nan")
        if "tpot_ms" in found and "tpot_ms" in mine:
            ratio = found["tpot_ms"] / mine["tpot_ms"]
        print(f"{PEERS[name]}: {json.dumps(found)} = {ratio:.2f} x the time of ours", flush=True)


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one contestant, measured in this process."""
    if options.only == "ours":
        return ours(options.bundle, options.context, options.tokens)
    from tokenspeed_plan.plans.bundle import load_plan

    root, name = Path(__file__).parent.parent, options.only
    config = root / "planner/models/presets" / f"{load_plan(options.bundle).model.name}.json"
    measure = vllm_peer if name.startswith("vllm") else peer
    found = measure(config, options.context, options.tokens, name in ("compile", "vllm-h100"))
    packages = ("transformers", "vllm", "flash-linear-attention")
    return found | {package: version(package) for package in packages if find_distribution(package)}


if __name__ == "__main__":
    main()
