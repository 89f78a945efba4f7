"""Runs each kernel of a small program alone, on random inputs, and compares it with its reference.

On a machine with a GPU the kernels are compiled and run there; elsewhere Triton's interpreter runs
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from checkpoints import KINDS, Kind, text_config
from families import FAMILIES, tiny_config
from torch import Tensor

from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.plans.encodings import NVFP4, Encoding
from tokenspeed_plan.plans.fp8_format import BLOCK, FP8, FP8_ROWS, blocks, is_fp8_matrix
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import STOP_IDS
from tokenspeed_plan.plans.schema import GridDim, KernelSpec, Limits, Param
from tokenspeed_plan.plans.types import DType, Phase, TensorSpec
from tokenspeed_plan.runtime.compare import FP8_STEP, difference
from tokenspeed_plan.runtime.execution import fp4_words
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES
from tokenspeed_plan.runtime.execution.block_scaled import dequantise
from tokenspeed_plan.runtime.execution.fp8_blocks import flat_run, quantise_blocks, quantise_rows
from tokenspeed_plan.runtime.execution.interpreter import interpret
from tokenspeed_plan.runtime.execution.triton_kernels import TritonKernels
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    interpret()

# Largest error over the largest value. bf16 products of a kernel are added up in fp32, those of the
# reference are rounded to bf16 between its parts.
TOLERANCE = {"fp32": 1e-5 if DEVICE == "cpu" else 1e-4, "bf16": 3e-2}
PAGE = 16
ONE_RANK = ParallelLayout(1, 1, 1)
FEW_HEADS = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 64,
}
# Matrices in whole blocks of 128 x 128; three of them in the depth of a product.
IN_BLOCKS = {
    "hidden_size": 384,
    "head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "mrope_section": [6, 5, 5],
}
EXPERTS_IN_BLOCKS = {
    "moe_intermediate_size": 384,
    "shared_expert_intermediate_size": 128,
    "num_experts": 4,
}
WIDE_EXPERTS = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 4}
WIDE_IN_BLOCKS = {  # and for two ranks
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LAB_KINDS = KINDS | {
    "wide experts": Kind(sizes=WIDE_EXPERTS),  # tiles of 256 lines, four steps deep
    "wide experts in blocks": Kind(sizes=IN_BLOCKS | WIDE_EXPERTS | WIDE_IN_BLOCKS),
    "blocks": Kind(sizes=IN_BLOCKS | EXPERTS_IN_BLOCKS),
    "dense blocks": Kind(moe=False, sizes=IN_BLOCKS | {"intermediate_size": 384}),
    "odd": Kind(sizes={"vocab_size": 700, "hidden_size": 64}),  # tokens: no multiple of a block
    "few heads": Kind(moe=False, sizes=FEW_HEADS),  # the smallest delta rule, for broken kernels
}


@dataclass(frozen=True)
class Case:
    """A batch: for each sequence, tokens to compute, and tokens before them.

    With a depth, a decode step computes `depth + 1` tokens of each. Its plan may have programs that
    draft `deeper` tokens more, and may keep inputs instead of a snapshot after each token. Without
    drafts it writes the state slot that it reads, but for each third sequence, which reads another.
    """

    phase: Phase
    lengths: tuple[int, ...]
    before: tuple[int, ...]
    dtype: DType = "fp32"
    kind: str = "moe"
    gpu: str = "cpu"
    layout: ParallelLayout = ONE_RANK
    depth: int = 0
    deeper: int = 0
    forced: tuple[float, ...] = (0.0,)  # simulated acceptance of each draft
    recomputes: bool = False
    two_slots: bool = False  # even without drafts
    max_seq_len: int = 512
    fp8: bool = False  # its matrices are in blocks of FP8
    grammar: bool = False  # two of three sequences have a mask
    penalties: bool = False  # and penalties
    quantises: bool | None = False  # its activations, too, where products read them
    fp8_keys: bool = False  # keys and values are in FP8
    key_scales: tuple[float, float] = (1.0, 1.0)  # of keys, of values
    stored_state: DType | None = None
    fp4: str = ""  # what is in NVFP4: `all` matrices, or `experts`, with the others as `fp8` says

    def encoding(self, name: str) -> Encoding | None:
        if not is_fp8_matrix(name):
            return None
        if self.fp4 == "all" or (self.fp4 and ".mlp.experts." in name):
            return "nvfp4"
        return "fp8_blocks" if self.fp8 else None

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @property
    def kept_inputs(self) -> int:
        return self.depth + self.deeper + 1 if self.recomputes else 0

    @property
    def state_slots_per_seq(self) -> int:
        if self.recomputes or self.two_slots:
            return 2
        deepest = self.depth + self.deeper
        return deepest + 2 if deepest else 1


def config_of(kind: str) -> ModelConfig:
    if kind in FAMILIES:
        return ModelConfig.from_hf(tiny_config(kind), "lab")
    return ModelConfig.from_hf(text_config(LAB_KINDS[kind]), "lab")


def built_graph(case: Case) -> OpGraph:
    seqs, slots = case.num_seqs, case.state_slots_per_seq
    limits = Limits(
        max_seqs=seqs,
        max_seq_len=case.max_seq_len,
        max_tokens=max(case.num_tokens, seqs),
        page_size=PAGE,
        num_pages=seqs * case.max_seq_len // PAGE,
        state_slots_per_seq=slots,
        num_state_slots=2 + max(slots, 2) * seqs,
        default_max_tokens=8,
        interleaved_tokens=max(case.num_tokens, seqs),
        checkpoint_interval=PAGE,
        min_checkpoint_tokens=PAGE,
        num_checkpoints=0,
        kept_inputs=case.kept_inputs,
    )
    context = BuildContext(
        config_of(case.kind),
        case.dtype,
        limits,
        500,
        lambda prefix: True,
        grammar=case.grammar,
        penalties=case.penalties,
        encoding=case.encoding,
        kv_dtype="fp8" if case.fp8_keys else None,
        key_scales=lambda _: case.key_scales,
        stored_state=case.stored_state,
    )
    return build(context, case.phase, case.depth)


def graph_of(case: Case, until: Stage = Stage.RECOMPUTED) -> OpGraph:
    """The graph of a case at a stage, on one stream."""
    sizes = (case.num_tokens, case.num_seqs)
    context = PassContext(
        case.layout,
        find_hardware(case.gpu),
        *sizes,
        Load(*sizes, 64),
        options=PassOptions(num_streams=1, quantises=case.quantises),
    )
    return run(built_graph(case), context, until)


@cache
def kernels_of(case: Case) -> list[Built]:
    """The distinct kernels of the program for this batch, each in its best tiling.

    They are built once for all tests.
    """
    candidates = graph_of(case, Stage.LOWERED).candidates
    return [tilings[0] for _, tilings in sorted(candidates.items())]


def tiled(case: Case, kind: str, tile: Tile) -> Built:
    """The kernel of a kind, in a tile that its rule would not take."""
    built = next(each for each in kernels_of(case) if kind_of(each.kernel) == kind)
    params = tuple(param for param in built.kernel.params if param.role != "scratch")
    plain = built.kernel.model_copy(update={"name": "", "launch": None, "params": params})
    sizes = (case.num_tokens, case.num_seqs)
    return build_kernel(kind, plain, sizes, find_hardware("H200"), pdl=False, tile=tile)[0]


class Inputs:
    """Random tensors of the right kind for each parameter of a kernel."""

    def __init__(self, case: Case, seed: int = 0, rank: int = 0) -> None:
        self.case = case
        self.rank = rank
        self.random = torch.Generator().manual_seed(seed)
        lengths = torch.tensor(case.lengths)
        self.cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        self.contexts = lengths + torch.tensor(case.before)

    def of(self, kernel: KernelSpec) -> list[Tensor]:
        made = []
        for param in kernel.tensors:
            shape = param.tensor.bind(self.case.num_tokens, self.case.num_seqs)
            if param.tensor.format == FP8:
                made.append(self._in_blocks(shape))
                continue
            if param.tensor.format == NVFP4:
                made.append(self._in_words(shape, param.tensor))
                continue
            if param.tensor.format == FP8_ROWS:
                made.append(quantise_rows(self.normal(*shape)))
                continue
            made.append(
                self._make(kernel, param, shape)
                .to(TORCH_DTYPES[param.tensor.dtype])
                .reshape(shape)
                .contiguous()
            )
        return made

    def _in_blocks(self, shape: tuple[int, ...]) -> Tensor:
        """A random matrix in FP8 whose blocks have very different factors: a flat run of bytes."""
        factors = torch.exp(self.normal(*blocks(shape)))
        large = factors.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
        return flat_run(quantise_blocks(self.normal(*shape) * large / math.sqrt(shape[-1])))

    def _in_words(self, shape: tuple[int, ...], spec: TensorSpec) -> Tensor:
        """Random bits of elements, scales and factors of very different sizes: a flat run."""
        run = torch.zeros(spec.size_bytes() // 4, dtype=torch.int32)
        parts = fp4_words.parts_of(run, spec)
        parts.elements.copy_(self.integers(256, tuple(parts.elements.shape)))
        sizes = torch.exp(self.normal(*parts.factors.shape))
        parts.factors.copy_(sizes / (16 * math.sqrt(shape[-1])))
        sizes = torch.exp2(self.integers(15, tuple(parts.scales.shape)) - 9.0)  # and subnormal ones
        parts.scales.copy_((sizes * (1 + self.normal(*sizes.shape).abs())) / 8)
        return run

    @property
    def pending(self) -> list[int]:
        """Kept inputs of each sequence that were accepted: none, one, ..., all."""
        return [(3 * s + 2) % (self.case.kept_inputs + 1) for s in range(self.case.num_seqs)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, high, shape, generator=self.random)

    def _make(self, kernel: KernelSpec, param: Param, shape: tuple[int, ...]) -> Tensor:
        for ending, rule in self._rules(kernel, shape).items():
            if param.name == ending or param.name.endswith("_" + ending):
                return rule()
        if param.role == "scratch":
            return torch.zeros(shape)
        if param.role == "weight":
            return self.normal(*shape) / (math.sqrt(shape[-1]) if len(shape) > 1 else 2.0)
        if param.role == "state":
            return self.normal(*shape) * 0.5
        return self.normal(*shape)

    def _rules(self, kernel: KernelSpec, shape: tuple[int, ...]) -> dict[str, Any]:
        case, kind = self.case, kind_of(kernel)
        slots = torch.arange(case.num_seqs) * max(case.state_slots_per_seq, 2)
        first = self._accepting(shape) if kind in ("accept", "advance_rows") else {}
        rules: dict[str, Any] = {
            "cu_seqlens": lambda: self.cu_seqlens,
            "context_lens": lambda: self.contexts,
            "page_table": lambda: self._pages(shape),
            "positions": lambda: self.integers(case.max_seq_len, shape),
            "slot_mapping": lambda: torch.randperm(
                case.num_seqs * case.max_seq_len, generator=self.random
            )[: shape[0]],
            "src_state_slots": lambda: self._src_slots() * (torch.tensor(case.before) > 0),
            "dst_state_slots": lambda: (
                slots[:, None] + torch.arange(2, max(case.state_slots_per_seq, 2) + 1)
            ),
            "state_lens": lambda: torch.tensor(
                [n - min(n, p) for n, p in zip(case.before, self.pending, strict=True)]
            ),
            "token_ids": lambda: self.integers(512, shape),
            "a_log": lambda: self.normal(*shape).abs(),
            "ids": lambda: self._ids(shape),
            "order": lambda: self._sorted(kernel)[0],
            "bounds": lambda: self._sorted(kernel)[1],
            "lse": lambda: self._lse(shape),
            "temperature": lambda: torch.tensor([0.0, 0.7, 1.0, 1.5]).repeat(shape[0])[: shape[0]],
            "top_p": lambda: torch.tensor([1.0, 0.9, 1.0, 0.5, 0.99]).repeat(shape[0])[: shape[0]],
            "top_k": lambda: torch.tensor([0, 0, 5, 40, 0, 1]).repeat(shape[0])[: shape[0]],
            "seed": lambda: self.integers(1 << 40, shape),
            "rng_offset": lambda: self.integers(1000, shape),
            "logits": lambda: self.normal(*shape) * 3,
            "is_masked": lambda: torch.tensor([1, 0, 1]).repeat(shape[0])[: shape[0]],
            "is_adjusted": lambda: torch.tensor([1, 0, 1]).repeat(shape[0])[: shape[0]],
            "presence_penalty": lambda: self.normal(*shape),
            "frequency_penalty": lambda: self.normal(*shape),
            "repetition_penalty": lambda: self.normal(*shape).abs() + 0.5,
            "adjustments": lambda: self._adjustments(shape),
            "min_p": lambda: torch.tensor([0.0, 0.2, 0.05, 1.0]).repeat(shape[0])[: shape[0]],
            "token_mask": lambda: self.integers(1 << 32, shape) - (1 << 31),
            "next_tokens": lambda: self.integers(512, shape),
            "following": lambda: torch.tensor([7, -1, -1]).repeat(shape[0])[: shape[0]],
            "accepted": lambda: (case.depth - torch.arange(shape[0])) % (case.depth + 1),
            "lens": lambda: self.contexts,
            "earlier": lambda: self.integers(512, shape),
        }
        if kind in ("gates_delta_chunk", "delta_scan"):
            rules |= {
                "k": lambda: self._unit(shape),
                "q": lambda: self._unit(shape),
                "total": lambda: self._total(shape),
            }
        return {**first, **{name: rule for name, rule in rules.items() if name not in first}}

    def _adjustments(self, shape: tuple[int, ...]) -> Tensor:
        """Of some tokens, the first hundred among them: drafts are those of a case's tokens."""
        vocab = config_of(self.case.kind).vocab_size
        words = torch.zeros(shape, dtype=torch.int32)
        for s in range(shape[0]):
            number = min((shape[1] - 1) // 3, vocab) * (s + 1) // shape[0]
            entries = words[s, 1 : 1 + 3 * number].view(-1, 3)
            entries[:, 0] = torch.randperm(vocab, generator=self.random)[:number]
            entries[:, 1] = self.integers(6, (number,))
            entries[:, 2] = self.normal(number).float().view(torch.int32)
            words[s, 0] = number
        return words

    def _src_slots(self) -> Tensor:
        number = torch.arange(self.case.num_seqs)
        if self.case.state_slots_per_seq > 1:
            return number * self.case.state_slots_per_seq + 1
        return number * 2 + 2 - (number % 3 == 1).long()

    def _accepting(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Any number of accepted drafts; of three, one samples a stop token and one has no room."""
        case, random = self.case, torch.Generator().manual_seed(2)
        tokens_SQ, verified_SQ = (
            torch.randint(0, 512, (case.num_seqs, case.depth + 1), generator=random)
            for _ in range(2)
        )
        stops_SN = torch.full((case.num_seqs, STOP_IDS), -1)
        room_S = torch.full((case.num_seqs,), 20)
        for s in range(case.num_seqs):
            right = (case.depth - s // 3) % (case.depth + 1)
            verified_SQ[s, :right] = tokens_SQ[s, 1 : 1 + right]
            if s % 3 == 1:
                stops_SN[s, s % STOP_IDS] = verified_SQ[s, case.depth // 2]
            if s % 3 == 2:
                room_S[s] = s // 3
        return {
            "token_ids": lambda: tokens_SQ,
            "next_tokens": lambda: verified_SQ,
            "stop_ids": lambda: stops_SN,
            "max_lens": lambda: torch.tensor(case.before) + room_S,
            "accept_counts": lambda: self.integers(1000, shape),
            "forced_accept": lambda: torch.tensor(case.forced).repeat(shape[0])[: shape[0]],
            "drafts": lambda: self.integers(512, shape),
            # Some positions have no page.
            "positions": lambda: self.integers(case.max_seq_len + 4 * PAGE, shape),
        }

    def _pages(self, shape: tuple[int, ...]) -> Tensor:
        """Any pages will do past the longest sequence, where only drafts go."""
        pages = self.case.max_seq_len // PAGE
        beyond = shape[1] - pages
        own = torch.randperm(shape[0] * pages, generator=self.random).view(-1, pages)
        return torch.cat((own, own[:, :beyond]), 1)

    def _unit(self, shape: tuple[int, ...]) -> Tensor:
        heads = self.normal(*shape).unflatten(-1, (-1, config_of(self.case.kind).delta_net.key_dim))
        return torch.nn.functional.normalize(heads, dim=-1).flatten(1)

    def _total(self, shape: tuple[int, ...]) -> Tensor:
        steps, out = -self.normal(*shape).abs() * 0.3, []
        for length in self.case.lengths:
            chunks, steps = steps[:length].split(64), steps[length:]
            out += [chunk.cumsum(0) for chunk in chunks]
        return torch.cat(out)

    def _ids(self, shape: tuple[int, ...]) -> Tensor:
        """Distinct experts for each token, the last one never hit; the same on every call."""
        experts = config_of(self.case.kind).moe
        assert experts is not None
        random = torch.Generator().manual_seed(1)
        return torch.stack(
            [
                torch.randperm(experts.num_experts - 1, generator=random)[: shape[1]]
                for _ in range(shape[0])
            ]
        )

    def _sorted(self, kernel: KernelSpec) -> tuple[Tensor, ...]:
        shape = next(p for p in kernel.params if p.name == "order").tensor.bind(
            self.case.num_tokens, self.case.num_seqs
        )
        return REFERENCE_BODIES["expert_sort"](
            {**kernel.parts[0].attrs, **_starts(kernel, self.rank)}, self._ids(shape).int()
        )

    def _lse(self, shape: tuple[int, ...]) -> Tensor:
        lse = self.normal(*shape)
        lse[:, shape[1] // 2 :] = float("-inf")  # splits without a key
        return lse


def _starts(kernel: KernelSpec, rank: int) -> dict[str, int]:
    return {
        name: shift.at(rank) for part in kernel.parts for name, shift in part.rank_attrs.items()
    }


def reference(kernel: KernelSpec, tensors: list[Tensor], rank: int = 0) -> None:
    """Run the parts in order, and write the outputs and states among the tensors."""
    values = {param.name: x for param, x in zip(kernel.tensors, tensors, strict=True)}
    dtype = torch.float32
    if any(x.dtype == torch.bfloat16 for x in tensors):
        dtype = torch.bfloat16
    if any(param.tensor.format == FP8_ROWS for param in kernel.tensors):
        dtype = torch.float32
    for param in kernel.tensors:
        if param.tensor.format.block and param.role != "output":
            values[param.name] = plain(values[param.name], param, dtype)
    outputs = {param.name for param in kernel.params if param.role == "output"}
    for part in kernel.parts:
        attrs = {**part.attrs, **{name: shift.at(rank) for name, shift in part.rank_attrs.items()}}
        results = REFERENCE_BODIES[part.kind](attrs, *[values[name] for name in part.operands])
        for name, result in zip(part.outputs, results, strict=True):
            if name in outputs:
                values[name].copy_(result)
            else:
                values[name] = result


def plain(stored: Tensor, param: Param, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose blocks are dequantised."""
    if not param.tensor.format.block:
        return stored
    return dequantise(stored, param.tensor, dtype)


Programs = tuple[Sequence[int], ...]  # along each dimension of a grid
Around = Callable[[KernelSpec, list[Tensor], Case], AbstractContextManager[None]]


def run_kernel(
    built: Built,
    tensors: list[Tensor],
    case: Case,
    rank: int = 0,
    around: Around = lambda *_: nullcontext(),
    programs: Programs = (),
) -> list[Tensor]:
    """The tensors after the kernel ran inside of `around`; outputs start as NaN, or odd numbers."""
    own = [x.clone().to(DEVICE) for x in tensors]
    for param, x in zip(built.kernel.tensors, own, strict=True):
        if param.role == "output":
            x.view(torch.uint8).fill_(_unwritten(x))
    with around(built.kernel, own, case), _only(built.kernel, programs) as kernel:
        _loaded(built.kernel.name, built.source or "").launcher(
            kernel, rank, case.num_tokens, case.num_seqs
        )({}, *own)
    return [x.cpu() for x in own]


# Of so many programs along a dimension of the grid all run; of more, some of the first, some of the
# last, which may have small outputs of their own, and some between them.
MOST_PROGRAMS, FIRST, LAST, BETWEEN = 20, 4, 8, 8


def some_programs(kernel: KernelSpec, case: Case) -> Programs:
    """The programs of a launch that suffice, along each dimension; empty where all have to run.

    Programs that share nothing do the same with other rows of a weight, and the interpreter runs
    one after the other.
    """
    shared = [p for p in kernel.params if p.role in ("scratch", "symmetric")]
    states = [p for p in kernel.params if p.role == "state" and p.access != "read"]
    outputs = [p.tensor for p in kernel.params if p.role == "output"]
    are_plain = not any(x.format.block for x in outputs)
    are_alone = are_plain and not shared and not states
    if DEVICE != "cpu" or not are_alone or kernel.launch is None:
        return ()
    grid = [dim.at(case.num_tokens, case.num_seqs) for dim in kernel.launch.grid]
    are_rows = [dim.fixed == count for dim, count in zip(kernel.launch.grid, grid, strict=True)]
    if not any(rows and n > MOST_PROGRAMS for rows, n in zip(are_rows, grid, strict=True)):
        return ()
    return tuple(_some(n) if rows else range(n) for rows, n in zip(are_rows, grid, strict=True))


def _some(count: int) -> Sequence[int]:
    if count <= MOST_PROGRAMS:
        return range(count)
    between = range(FIRST, count - LAST, (count - FIRST - LAST) // BETWEEN)
    return [*range(FIRST), *between, *range(count - LAST, count)]


def num_programs(kernel: KernelSpec, case: Case) -> int:
    """All programs of a launch."""
    assert kernel.launch is not None
    return math.prod(dim.at(case.num_tokens, case.num_seqs) for dim in kernel.launch.grid)


@contextmanager
def _only(kernel: KernelSpec, programs: Programs) -> Iterator[KernelSpec]:
    """The kernel with a grid of these programs, which the interpreter takes for their places."""
    if not programs:
        yield kernel
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    assert kernel.launch is not None
    grid = tuple(GridDim(fixed=len(each)) for each in programs)
    whole = [each[-1] + 1 for each in programs] + [1] * (3 - len(programs))
    places = [*programs, *[range(1)] * (3 - len(programs))]
    with pytest.MonkeyPatch.context() as patch:
        move, size = builder.set_grid_idx, builder.set_grid_dim
        patch.setattr(builder, "set_grid_dim", lambda *_: size(*whole))
        patch.setattr(
            builder,
            "set_grid_idx",
            lambda *at: move(*(each[i] for each, i in zip(places, at, strict=True))),
        )
        yield kernel.model_copy(update={"launch": kernel.launch.model_copy(update={"grid": grid})})


def filled_up(
    kernel: KernelSpec, got: list[Tensor], wanted: list[Tensor], programs: Programs, count: int
) -> list[Tensor]:
    """Outputs with what is right in the places of programs that did not run, of `count` in all.

    The others have written their share, the first and the last place among it; NaN otherwise.
    """
    are_outputs = [param.role == "output" for param in kernel.tensors]
    masks = [_is_written(x) if out else None for x, out in zip(got, are_outputs, strict=True)]
    found = [mask.flatten() for mask in masks if mask is not None]
    share = math.prod(map(len, programs)) / count
    is_whole = any(mask[0] for mask in found) and any(mask[-1] for mask in found)
    is_whole &= bool(torch.cat(found).float().mean() >= 0.9 * share) and all(map(torch.any, found))
    return [
        mine if mask is None else torch.where(mask, mine, right if is_whole else torch.nan)
        for mine, right, mask in zip(got, wanted, masks, strict=True)
    ]


def _is_written(x: Tensor) -> Tensor:
    return (x.view(torch.uint8).view(*x.shape, -1) != _unwritten(x)).any(-1)


def _unwritten(x: Tensor) -> int:
    """Each byte of an output before the kernel runs."""
    return 0xFF if x.is_floating_point() else 0x5A


@lru_cache(maxsize=512)
def _loaded(name: str, text: str) -> TritonKernels:
    """A kernel, whose function is made of its text once."""
    return TritonKernels({name: text})


def errors(built: Built, case: Case, seed: int = 0, rank: int = 0) -> Iterator[tuple[str, float]]:
    """(parameter, error) of all tensors that a kernel writes, and of its counters."""
    tensors = Inputs(case, seed, rank).of(built.kernel)
    programs = some_programs(built.kernel, case)
    got = run_kernel(built, tensors, case, rank, programs=programs)
    reference(built.kernel, tensors, rank)
    if programs:
        got = filled_up(built.kernel, got, tensors, programs, num_programs(built.kernel, case))
    for param, mine, wanted in zip(built.kernel.tensors, got, tensors, strict=True):
        if param.role == "output" or (param.role == "state" and param.access != "read"):
            error = difference(plain(mine, param), plain(wanted, param))
            if param.role == "state" and param.tensor.dtype == "fp8":
                error = max(error - FP8_STEP, 0.0)  # what is rounded late may be a step apart
            yield param.name, error
        if param.role == "scratch" and param.name.endswith("counters"):
            yield param.name, float(mine.count_nonzero())  # the next launch counts from zero


def allowed(case: Case, name: str) -> float:
    """The largest error of a parameter: bf16 that is rounded otherwise may be one step of e4m3."""
    if name == "quantise_q" and case.dtype == "bf16":
        return FP8_STEP
    return TOLERANCE[case.dtype]


def broken(built: Built, old: str, new: str) -> Built:
    """The kernel with a piece of its text replaced, and the digest of the new text."""
    from tokenspeed_plan.codegen.render import source_digest

    assert built.source is not None
    assert built.kernel.launch is not None
    assert old in built.source, old
    text = built.source.replace(old, new)
    launch = built.kernel.launch.model_copy(update={"source_sha256": source_digest(text)})
    return replace(built, kernel=built.kernel.model_copy(update={"launch": launch}), source=text)


def is_caught(case: Case, kind: str, old: str, new: str) -> bool:
    """Whether a kernel of a kind gives wrong results with a piece of its text replaced."""
    chosen = [
        kernel
        for kernel in kernels_of(case)
        if kind_of(kernel.kernel) == kind and old in (kernel.source or "")
    ]
    assert chosen, "the piece to break is in no kernel"
    return any(_differs(broken(kernel, old, new), case) for kernel in chosen)


def _differs(built: Built, case: Case) -> bool:
    # Triton must be loaded after `interpret`.
    from triton.runtime.errors import InterpreterError

    try:
        return any(not error <= allowed(case, name) for name, error in errors(built, case))
    except InterpreterError:  # nonsense that NumPy itself refuses
        return True
