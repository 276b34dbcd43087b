"""Triton's interpreter, made trustworthy, as what runs the kernels in place of a GPU.

    with interpreted():
        out = model(x)          # x on the CPU, backend="triton"

Triton 3.6's own interpreter multiplies and adds the bit patterns of bfloat16, truncates casts to it, does not shorten
float32 operands to tf32, and cannot index with loaded bounds under NumPy 2.4. That is repaired here. It knows nothing
of races, shared memory or power-of-two shapes: every kernel that is interpreted is compiled too (`offline.py`). And it
reads and writes any address: `guards.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.jit import JITFunction

from .guards import guarded
from .runners import instead

ARCH = 90  # whose launch choices are taken

_Handle, _Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
_cast, _binary, _unary = _Builder.cast_impl, _Builder.binary_op, _Builder.unary_op
_patch = interpreter._patch_lang_tensor


class Interpreted:
    """An `_launch.Instead`. `launches` counts the kernels run by name."""

    arch = ARCH

    def __init__(self):
        self.launches: dict[str, int] = {}

    def __call__(self, kernel, programs: int, args: tuple, options: dict) -> None:
        self.launches[kernel.fn.__name__] = self.launches.get(kernel.fn.__name__, 0) + 1
        with guarded(args, "cpu", kernel.fn.__name__) as between_margins:
            _function(kernel).run(*between_margins, grid=(programs,), warmup=False, **options)


@contextmanager
def interpreted() -> Iterator[Interpreted]:
    """Inside, the Triton set serves the CPU, and its kernels are interpreted."""
    _repair()
    try:
        with instead(Interpreted()) as runner:
            yield runner
    finally:
        _restore()


# Repairs -----------------------------------------------------------------------------------------------------


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to nearest even; NaN kept."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """What a matrix unit reads of float32: the low 13 bits dropped."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle) -> np.ndarray:
    return from_bfloat16(handle.data) if _is_bfloat16(handle) else handle.data


def _cast_impl(self, source, to):
    before, after = source.dtype.scalar, to.scalar
    if tl.bfloat16 not in (before, after) or before == after:
        return _cast(self, source, to)
    values = _values(source).astype(np.float32)
    if after == tl.bfloat16:
        return _Handle(to_bfloat16(values), tl.bfloat16)
    return _Handle(values.astype(interpreter._get_np_dtype(to)), after)


def _binary_op(self, left, right, op):
    if not (_is_bfloat16(left) and _is_bfloat16(right)) or op in _BITWISE:
        return _binary(self, left, right, op)
    result = op(_values(left), _values(right))
    return _Handle(result, tl.int1) if op in _COMPARISONS else _Handle(to_bfloat16(result), tl.bfloat16)


def _unary_op(self, operand, op):
    if not _is_bfloat16(operand):
        return _unary(self, operand, op)
    return _Handle(to_bfloat16(op(_values(operand))), tl.bfloat16)


def _create_dot(self, left, right, acc, precision, _):
    def read(handle):
        if handle.dtype.scalar == tl.float32 and str(precision).endswith("TF32"):
            return cut_to_tf32(handle.data)
        return _values(handle).astype(np.float32)

    return _Handle(read(left) @ read(right) + acc.data, acc.dtype.scalar)


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _device_function(self, *args, **kwargs):
    scope = interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _call(self, *args, **kwargs):
    """A @triton.jit helper called from an interpreted kernel."""
    return _function(self)(*args, **kwargs)


_functions: dict = {}


def _function(kernel):
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return _functions.setdefault(kernel.fn, interpreter.InterpretedFunction(kernel.fn))


_REPAIRS = (
    (_Builder, "cast_impl", _cast_impl), (_Builder, "binary_op", _binary_op), (_Builder, "unary_op", _unary_op),
    (_Builder, "create_dot", _create_dot), (interpreter, "_patch_lang_tensor", _patch_lang_tensor),
    (interpreter.InterpretedFunction, "__call__", _device_function), (JITFunction, "__call__", _call),
)  # fmt: skip
_originals = [(owner, name, vars(owner)[name]) for owner, name, _ in _REPAIRS]


def _repair() -> None:
    for owner, name, repaired in _REPAIRS:
        setattr(owner, name, repaired)


def _restore() -> None:
    for owner, name, original in _originals:
        setattr(owner, name, original)
