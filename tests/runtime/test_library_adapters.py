"""The adapters of libraries: what they hand over, with the operators in PyTorch on a CPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flashinfer_double import install_flashinfer
from torch import Tensor

from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.schema import KernelSpec, Param, Part
from tokenspeed_plan.plans.types import TensorSpec
from tokenspeed_plan.runtime.compare import difference
from tokenspeed_plan.runtime.execution.fp8_blocks import dequantise, parts_of
from tokenspeed_plan.runtime.execution.kernels import Launcher, prepare_batch
from tokenspeed_plan.runtime.libraries import cublas, fa3, flashinfer
from tokenspeed_plan.runtime.libraries.sample_batch import sample_batch
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES

HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES = 4, 2, 16, 64, 8
ATTRS = {
    "mode": "prefill",
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "page_size": PAGE,
}
# Of the operator that the package `tokenspeed-fa3` registers, those arguments that we give.
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, Tensor? page_table=None, float? softmax_scale=None, "
    "bool is_causal=False) -> Tensor(out!)"
)


def tensor(*shape: Any, dtype: Any = "bf16") -> TensorSpec:
    return TensorSpec.of(shape=shape, dtype=dtype)


def attention_kernel(gated: bool) -> KernelSpec:
    """Attention of prompts, with its gate or without."""
    rows = tensor("num_tokens", HEADS * HEAD_DIM)
    inputs = {
        "q": rows,
        "page_table": tensor("num_seqs", PAGES, dtype="i32"),
        "context_lens": tensor("num_seqs", dtype="i32"),
        "cu_seqlens": tensor("num_seqs+1", dtype="i32"),
    }
    parts = [Part(kind="attention", operands=(*inputs, "cache"), outputs=("y",), attrs=dict(ATTRS))]
    if gated:
        inputs["g"] = rows
        parts.append(Part(kind="sigmoid_gate", operands=("y", "g"), outputs=("z",), attrs={}))
    params = [Param(name=name, role="input", tensor=spec) for name, spec in inputs.items()]
    cache = tensor(PAGES, 2, PAGE, KV_HEADS, HEAD_DIM)
    params.append(Param(name="cache", role="state", tensor=cache))
    result = parts[-1].outputs[0]
    params.append(Param(name=result, role="output", tensor=rows, access="write"))
    return KernelSpec(name="attention", params=tuple(params), parts=tuple(parts))


NAMES = re.findall(r"(\w+)=", FORWARD)  # after q, k and v


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """FlashAttention-3's forward pass by its documentation: causal from the end of each context."""
    given = dict(zip(NAMES, rest, strict=False))
    assert given["is_causal"]
    assert given["max_seqlen_q"] >= given["cu_seqlens_q"].diff().max()
    out: Tensor = given["out"]
    for i, (start, end) in enumerate(pairwise(given["cu_seqlens_q"].tolist())):
        length = int(given["seqused_k"][i])
        pages = given["page_table"][i].long()
        keys, values = (each[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for each in (k, v))
        first = length - (end - start)
        seen = torch.arange(length) <= torch.arange(first, length)[:, None]
        scale = given["softmax_scale"]
        queries = q[start:end].transpose(0, 1)[None]
        y = F.scaled_dot_product_attention(
            queries, keys, values, seen, scale=scale, enable_gqa=True
        )
        out[start:end] = y[0].transpose(0, 1)
    return out


@pytest.fixture
def forward_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator of the package, as importing it registers it."""
    package, module = ModuleType("flash_attn_3"), ModuleType("flash_attn_3._C")
    monkeypatch.setitem(sys.modules, "flash_attn_3", package)
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", module)
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        library.define(FORWARD)
        library.impl("fwd", forward, "CPU")
        yield


def compared(kernel: KernelSpec, run: Launcher, **batch: Any) -> float:
    """The difference of an adapter from the references on a batch, over all results."""
    tensors = sample_batch(kernel, torch.device("cpu"), **batch)
    values = {p.name: x.clone() for p, x in zip(kernel.tensors, tensors, strict=True)}
    for part in kernel.parts:
        results = REFERENCE_BODIES[part.kind](part.attrs, *(values[x] for x in part.operands))
        values |= dict(zip(part.outputs, results, strict=True))
    with torch.inference_mode():
        prepare_batch(run, tensors)
        run({}, *tensors)
    found = zip(kernel.tensors, tensors, strict=True)
    return max(difference(x, values[p.name]) for p, x in found if p.role == "output")


BATCHES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "one token": {"new_tokens": (1, 1), "contexts": (1, 128)},
    "at pages' ends": {"new_tokens": (64, 65, 63), "contexts": (64, 65, 127)},
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_attention_is_given_what_it_needs(forward_op: Any, gated: bool, batch: Any) -> None:
    kernel = attention_kernel(gated)
    assert compared(kernel, fa3.attention_prefill(kernel), **batch) < 2e-2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_flashinfer_is_given_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gated: bool, batch: Any
) -> None:
    install_flashinfer(monkeypatch, tmp_path)
    kernel = attention_kernel(gated)
    assert compared(kernel, flashinfer.PagedPrefill(kernel), **batch) < 2e-2


def test_a_missing_package_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_3", None)
    with pytest.raises(ImportError):
        fa3.attention_prefill(attention_kernel(True))


def test_products_share_out_the_rows_of_the_weight() -> None:
    """Each result has its own rows, also where they are few."""
    widths = (24, 8, 1)
    params = [
        Param(name="x", role="input", tensor=tensor("num_tokens", 32)),
        Param(name="w", role="weight", tensor=tensor(sum(widths), 32)),
        *(
            Param(name=f"y{i}", role="output", tensor=tensor("num_tokens", n), access="write")
            for i, n in enumerate(widths)
        ),
    ]
    attrs = {"splits": widths}
    part = Part(kind="linear", operands=("x", "w"), outputs=("y0", "y1", "y2"), attrs=attrs)
    kernel = KernelSpec(name="linear", params=tuple(params), parts=(part,))
    assert compared(kernel, cublas.linear(kernel)) < 1e-2


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: Any, out: Tensor
) -> None:
    """cuBLAS' product by its documentation: factors of tokens and of the depth in fours."""
    assert len(a) % 4 == 0 and scale_a.stride(0) == 1 and scale_b.stride(0) == 1
    assert scale_b.shape[0] % 4 == 0 and out.is_contiguous() and out.dtype == out_dtype
    runs = a.float().unflatten(1, (-1, 128)) * scale_a[:, :, None]
    scales = scale_b.t()[:, : runs.shape[1]].repeat_interleave(128, 0)
    blocks = b.t().float().unflatten(1, (-1, 128)) * scales[:, :, None]
    out.copy_(runs.flatten(1) @ blocks.flatten(1).t())


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("depth", "num_tokens"), [(640, 74), (512, 76)])
def test_products_of_fp8(
    depth: int, num_tokens: int, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and blocks that are multiples of four, and others; each result has whole blocks."""
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    widths = (256, 128)[: 2 - adds]
    outputs = tuple(f"y{i}" for i, _ in enumerate(widths))
    x = TensorSpec(shape=("num_tokens", depth), format=FP8_ROWS)
    w = TensorSpec(shape=(sum(widths), depth), format=FP8)
    results = dict(zip(outputs, (tensor("num_tokens", n) for n in widths), strict=True))
    attrs = {"splits": widths, "dtype": "bf16"}
    parts = [Part(kind="linear", operands=("x", "w"), outputs=outputs, attrs=attrs)]
    inputs = {"x": x}
    if adds:
        inputs["r"] = results["y0"]
        parts.append(Part(kind="add", operands=("y0", "r"), outputs=("z",), attrs={}))
        results = {"z": results["y0"]}
    params = [Param(name=name, role="input", tensor=spec) for name, spec in inputs.items()]
    params.append(Param(name="w", role="weight", tensor=w))
    for name, spec in results.items():
        params.append(Param(name=name, role="output", tensor=spec, access="write"))
    kernel = KernelSpec(name="linear", params=tuple(params), parts=tuple(parts))
    tensors = sample_batch(kernel, torch.device("cpu"), (num_tokens,))
    found = {p.name: t for p, t in zip(kernel.tensors, tensors, strict=True)}
    cublas.linear_fp8(kernel)({}, *tensors)
    product = dequantise(parts_of(found["x"], x), torch.float32) @ (
        dequantise(parts_of(found["w"], w), torch.float32).t()
    )
    wanted = product.split(widths, 1)
    if adds:
        wanted = (product + found["r"].float(),)
    for name, values in zip(results, wanted, strict=True):
        assert difference(found[name], values.to(torch.bfloat16)) < 1e-2
