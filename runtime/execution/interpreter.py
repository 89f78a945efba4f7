"""Triton's interpreter: kernels on a machine without a GPU.

It runs the programs of a kernel one after the other in Python. As Triton ships it, it spends most
of its time on work that it repeats for every operation: types and shapes are made again, each
launch and each call of a device function patches `triton.language` again, each integer sum is
checked in 64 bits, and numbers of 8 and 16 bits are converted bit by bit. Without that the kernels
of the tests run many times as fast. They write the same bytes, but where numbers are rounded: that
is done as a GPU does it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.fp8_format import E4M3_MAX

Shape = tuple[int, ...]


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
        _convert_numbers(interpreter)
        _patch_language_once(interpreter)
        _call_builtins_directly(interpreter)
        _unwrap_fast(interpreter)
        _share_types(interpreter)
        _lighten_handles(interpreter)
        _broadcast_in_numpy(interpreter)
        _check_types_briefly(interpreter)
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


def _convert_numbers(interpreter: Any) -> None:
    """Convert between fp32, bf16 and e4m3 as a GPU does: to nearest, and e4m3 saturating.

    The interpreter takes each number apart; it cuts off what bf16 has no bits for, and in e4m3 it
    loses the carry into the exponent: 31.9 becomes 16, not 32.
    """
    tl, convert = interpreter.tl, interpreter._convert_float
    fp32, bf16, fp8 = tl.float32, tl.bfloat16, tl.float8e4nv
    known: dict[tuple[Any, Any], Callable[[Any], Any]] = {
        (bf16, fp32): lambda data: data.astype(np.uint32) << 16,
        (fp32, bf16): _rounded_to_bf16,
        (fp32, fp8): _saturated,
        (fp8, fp32): _every_e4m3(torch.float32).take,
        (fp8, bf16): _every_e4m3(torch.bfloat16).take,
        (fp8, tl.float16): _every_e4m3(torch.float16).take,
    }

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        how = known.get((source.scalar, target.scalar))
        if how is None:
            return convert(data, source, target, mode)
        return how(data)

    interpreter._convert_float = converted


def _rounded_to_bf16(data: Any) -> Any:
    """The bits of fp32 numbers in bf16: to nearest, of two the even one; NaN stays NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _saturated(data: Any) -> Any:
    """The bits of fp32 numbers in e4m3; what is larger than its largest number becomes that."""
    limited = torch.from_numpy(np.clip(data, -E4M3_MAX, E4M3_MAX))
    return _bits(limited.to(torch.float8_e4m3fn))


def _every_e4m3(dtype: torch.dtype) -> Any:
    """The bits of each of the 256 numbers of e4m3 in a larger format."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return _bits(every.to(dtype))


def _bits(x: torch.Tensor) -> Any:
    """A tensor as integers of its size, which NumPy has for each format."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()


def _patch_language_once(interpreter: Any) -> None:
    """Patch the modules that kernels and device functions use at the first use, and for good.

    Kernels see `tl`, functions of Triton's own library see `tl.core`. Nothing is restored: this
    process compiles no kernels.
    """
    patch, tl = interpreter._patch_lang, interpreter.tl
    patched: set[bool] = set()

    def patch_once(function: Any) -> Any:
        sees_tl = function.__globals__.get("tl") is tl
        if sees_tl not in patched:
            patched.add(sees_tl)
            patch(function)
        return interpreter._LangPatchScope()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch_once(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.__call__ = call


def _call_builtins_directly(interpreter: Any) -> None:
    """Call a builtin as it is, without the function that checks for the compiler's argument."""

    def patch(module: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        bare, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return bare(*args, **kwargs)

        scope.set_attr(module, name, call)

    interpreter._patch_attr = patch


def _unwrap_fast(interpreter: Any) -> None:
    """Tell at once that a tensor or a number of Python is no constant of Triton's."""
    core = interpreter.tl.core
    unwrap, as_they_are = core._unwrap_if_constexpr, (core.tensor, int, float, str, type(None))

    def unwrapped(value: Any) -> Any:
        if type(value) in as_they_are:
            return value
        return unwrap(value)

    core._unwrap_if_constexpr = unwrapped


def _share_types(interpreter: Any) -> None:
    """Make each type of a block, the shape of its tensors, and its type in NumPy once."""
    core = interpreter.tl.core
    block_type, make = core.block_type, core.block_type.__init__

    def sizes(shape: Shape) -> tuple[Any, Any]:
        sizes = core.tuple([core.constexpr(size) for size in shape])
        return sizes, core.constexpr(math.prod(shape))

    def block_of(element_ty: Any, shape: Shape) -> Any:
        known = vars(element_ty).setdefault("blocks", {})
        if shape not in known:
            made = object.__new__(block_type)
            make(made, element_ty, list(shape))
            made.ints, made.tensor_sizes = shape, sizes(shape)
            known[shape] = made
        return known[shape]

    def new_block_type(cls: Any, element_ty: Any, shape: Any) -> Any:
        values = shape.values if isinstance(shape, core.tuple) else shape
        return block_of(element_ty, tuple([core._unwrap_if_constexpr(size) for size in values]))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.tensor_sizes

    core.dtype.tensor_sizes = sizes(())
    block_type.of = staticmethod(block_of)
    block_type.__new__, block_type.__init__ = new_block_type, _nothing
    block_type.with_element_ty = lambda self, element_ty: block_of(element_ty, self.ints)
    block_type.to_ir = lambda self, builder: self
    core.tensor.__init__ = init_tensor
    # They compare by value, and lost the hash of their base in that.
    core.block_type.__hash__ = core.pointer_type.__hash__ = core.dtype.__hash__
    interpreter._get_np_dtype = cache(interpreter._get_np_dtype)


def _lighten_handles(interpreter: Any) -> None:
    """Make the handle of a tensor, and find the type of an operation, without more Python."""
    interpreter.tl.pointer_type.primitive_bitwidth = 64

    def init(self: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
        if data.itemsize > 1 and 8 * data.itemsize > dtype.primitive_bitwidth:
            raise ValueError(f"{data.dtype} does not fit into {dtype}")
        self.data, self.dtype = data, dtype
        self.attr = {} if attr is None else attr

    interpreter.TensorHandle.__init__ = init
    semantic = interpreter.TritonSemantic
    semantic.computation_type_impl = cache(semantic.computation_type_impl)


def _broadcast_in_numpy(interpreter: Any) -> None:
    """Let NumPy stretch the operands of an operation, of which only the types are made here.

    What is loaded and stored is stretched for good; a number that stands for what is masked is
    converted before that.
    """
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    block_of = core.block_type.of
    get_item, load = core.tensor.__getitem__, semantic._load_legacy

    def stretched(x: Any, shape: Shape) -> Any:
        if x.type.is_block() and x.type.ints == shape:
            return x
        data = np.broadcast_to(x.handle.data, shape)
        return core.tensor(interpreter.TensorHandle(data, x.dtype), block_of(x.dtype, shape))

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        shape = _common_shape(lhs.type, rhs.type)
        if shape is None:
            return lhs, rhs
        return stretched(lhs, shape), stretched(rhs, shape)

    def item(self: Any, places: Any) -> Any:
        if not isinstance(places, tuple):
            places = (places,)
        is_new = tuple([place is None for place in places])
        others = [place for place in places if place is not None and place != slice(None)]
        if others or not self.type.is_block() or is_new.count(False) > len(self.type.ints):
            return get_item(self, places, _semantic=interpreter.interpreter_semantic)
        index, shape = _with_new_dims(self.type.ints, is_new)
        handle = interpreter.TensorHandle(self.handle.data[index], self.dtype)
        return core.tensor(handle, block_of(self.dtype, shape))

    def loaded(self: Any, address: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if mask is not None and other is not None and not other.type.is_block():
            other = self.cast(other, address.dtype.element_ty)
        return load(self, address, mask, other, *rest)

    semantic.broadcast_impl_value = broadcast
    core.tensor.__getitem__ = item
    semantic._load_legacy = loaded


@cache
def _with_new_dims(shape: Shape, is_new: tuple[bool, ...]) -> tuple[Any, Shape]:
    """How NumPy indexes an array to get new dimensions of one, and the shape that it has then."""
    left = list(shape)
    sizes = [1 if new else left.pop(0) for new in is_new]
    return tuple([None if new else slice(None) for new in is_new]), (*sizes, *left)


def _common_shape(one: Any, other: Any) -> Shape | None:
    """The shape of an operation on two types; None for two scalars."""
    shape: Shape | None = None
    if one.is_block():
        shape = one.ints
    if other.is_block():
        if shape is not None and shape != other.ints:
            return _stretched_shape(shape, other.ints)
        shape = other.ints
    return shape


@cache
def _stretched_shape(one: Shape, other: Shape) -> Shape:
    rank = max(len(one), len(other))
    pairs = zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other, strict=True)
    shape = []
    for left, right in pairs:
        if left != right and 1 not in (left, right):
            raise ValueError(f"shapes {one} and {other} do not fit each other")
        shape.append(max(left, right))
    return tuple(shape)


def _check_types_briefly(interpreter: Any) -> None:
    """Find the operands of an operation at once where no type has to change.

    They are two tensors of one type, an address and an offset, or a tensor and a number of Python.
    """
    tl, semantic = interpreter.tl, interpreter.TritonSemantic
    check, block_of = semantic.binary_op_type_checking_impl, tl.core.block_type.of
    constants: dict[tuple[str, Any], Any] = {}

    def filled(self: Any, value: Any, other: Any) -> Any:
        """A number of Python as a tensor of the other operand's type."""
        if not isinstance(other, tl.tensor) or not _holds(other.dtype.name, value):
            return value
        key = (other.dtype.name, value)
        if key not in constants:
            constants[key] = self.scalar_constant(value, other.dtype)
        return constants[key]

    def shaped(x: Any, shape: Shape | None) -> Any:
        if shape is None or (x.type.is_block() and x.type.ints == shape):
            return x
        return tl.tensor(x.handle, block_of(x.dtype, shape))

    def checked(self: Any, lhs: Any, rhs: Any, takes_address: bool = False, *rest: bool) -> Any:
        one, other = filled(self, lhs, rhs), filled(self, rhs, lhs)
        are_tensors = isinstance(one, tl.tensor) and isinstance(other, tl.tensor)
        if not are_tensors or not _fit(one.dtype, other.dtype, takes_address):
            return check(self, lhs, rhs, takes_address, *rest)
        shape = _common_shape(one.type, other.type)
        return shaped(one, shape), shaped(other, shape)

    semantic.binary_op_type_checking_impl = checked


BITS = {"int32": 31, "int64": 63}  # of a number without its sign


def _holds(dtype: str, value: Any) -> bool:
    """Whether a number of Python becomes one of this type."""
    if dtype == "fp32":
        return type(value) in (int, float)
    limit = 1 << BITS.get(dtype, 0)
    return type(value) is int and limit > 1 and -limit <= value < limit


def _fit(one: Any, other: Any, takes_address: bool) -> bool:
    """Whether operands of these types stay as they are."""
    if one.is_ptr():
        return takes_address and other.name in BITS
    return one is other and (one.name in BITS or one.name in ("fp32", "int1"))


def _skip_overflow_checks(interpreter: Any) -> None:
    """Add integers as a GPU does: compiled kernels do not check them either."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
