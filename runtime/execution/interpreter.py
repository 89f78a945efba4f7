"""Triton's interpreter: kernels on a machine without a GPU.

It runs the programs of a kernel one after the other in Python. As Triton ships it, it spends most
of its time on work that it repeats for every operation: types and shapes are made again, each call
of a device function patches `triton.language` again, and each integer sum is checked in 64 bits.
Without that the kernels of the tests run six times as fast, and write the same bytes.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.fp8_format import E4M3_MAX


def interpret() -> None:
    """Run kernels in Triton's interpreter from now on, before anything else loads Triton.

    Raises:
        PlanError: Triton is not there, or is loaded already, to compile.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl
        import triton.language.extra.cuda as cuda
        from triton.runtime import JITFunction, interpreter
    except ImportError as error:
        raise PlanError(
            "Triton is not installed", "install `triton`, or run with `--backend reference`"
        ) from error
    if isinstance(tl.sum, JITFunction):
        raise PlanError(
            "Triton is loaded in this process already, to compile",
            "set TRITON_INTERPRET=1 at its start",
        )
    # The interpreter runs programs one after the other: there is nothing to wait for.
    cuda.gdc_wait = cuda.gdc_launch_dependents = _nothing
    if not hasattr(interpreter, "_tokenspeed"):
        interpreter._tokenspeed = True
        _allow_tensor_bounds(interpreter)
        _widen_products(interpreter)
        _round_to_fp8(interpreter)
        _patch_language_once(interpreter)
        _share_types(interpreter)
        _skip_overflow_checks(interpreter)


def _nothing(*args: object, **kwargs: object) -> None:
    """No operation."""


def _allow_tensor_bounds(interpreter: Any) -> None:
    """Let `range` take a loaded scalar.

    The interpreter holds it as an array of one element, which NumPy 2.4 refuses as an index.
    """
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index


def _widen_products(interpreter: Any) -> None:
    """Let `tl.dot` take bf16, which the interpreter would multiply as 16-bit integers."""
    builder = interpreter.InterpreterBuilder
    product = builder.create_dot

    def widened(handle: Any) -> Any:
        if not handle.dtype.scalar.is_bf16():
            return handle
        wide = (handle.data.view("uint16").astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def with_bf16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widened(a), widened(b), *rest)

    builder.create_dot = with_bf16


def _round_to_fp8(interpreter: Any) -> None:
    """Convert fp32 to e4m3 as a GPU does, to nearest and saturating.

    The interpreter loses the carry into the exponent: 31.9 becomes 16, not 32.
    """
    builder, fp8 = interpreter.InterpreterBuilder, interpreter.tl.float8e4nv
    convert = builder.create_fp_to_fp

    def rounded(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.scalar != fp8 or source.dtype.scalar != interpreter.tl.float32:
            return convert(self, source, target, mode)
        values = torch.from_numpy(np.array(source.data)).clamp(-E4M3_MAX, E4M3_MAX)
        data = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(data, target.scalar)

    builder.create_fp_to_fp = rounded


def _patch_language_once(interpreter: Any) -> None:
    """Call device functions without patching the modules that they use once more.

    The launch of a kernel patches `tl` for all that runs in it. Functions of Triton's own library
    use `tl.core` instead, which the first of them patches for good.
    """
    function, tl = interpreter.InterpretedFunction, interpreter.tl
    patch_and_call = function.__call__
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__globals__.get("tl") is not tl and "core" not in patched:
            patched.add("core")
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    function.__call__ = call


def _share_types(interpreter: Any) -> None:
    """Make each type of a block, the shape of its tensors, and its type in NumPy once."""
    core = interpreter.tl.core
    make_block_type = core.block_type.__init__

    def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
        sizes = core.tuple([core.constexpr(size) for size in shape])
        return sizes, core.constexpr(math.prod(shape))

    @cache
    def block_type(element_ty: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        made = object.__new__(core.block_type)
        make_block_type(made, element_ty, list(shape))
        return {**vars(made), "tensor_sizes": sizes(shape)}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if isinstance(shape, core.tuple) else shape
        ints = tuple([core._unwrap_if_constexpr(size) for size in values])
        vars(self).update(block_type(element_ty, ints))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.tensor_sizes

    core.dtype.tensor_sizes = sizes(())
    core.block_type.__init__, core.tensor.__init__ = init_block_type, init_tensor
    # They compare by value, and lost the hash of their base in that.
    core.block_type.__hash__ = core.pointer_type.__hash__ = core.dtype.__hash__
    interpreter._get_np_dtype = cache(interpreter._get_np_dtype)


def _skip_overflow_checks(interpreter: Any) -> None:
    """Add integers as a GPU does: compiled kernels do not check them either."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
