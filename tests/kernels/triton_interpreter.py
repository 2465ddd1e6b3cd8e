"""Runs the project's Triton kernels on a CPU, in Triton's own interpreter, from inside jitted JAX programs.

Four things differ from what TRITON_INTERPRET=1 does, and none of them is in the kernels. Arrays are numpy's, with
guards of NaN around every one: the interpreter wants torch's. Matmuls of bfloat16 are computed from the values: the
interpreter multiplies their bits as integers. float32 becomes bfloat16 by rounding to the nearest, as on a GPU: the
interpreter cuts bits off. Matmuls of float32 round as the three TF32 matmuls of a GPU do.
"""

import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

import pallas_kernels.ssd

_MODULES = ("forward", "backward")
_GUARD = 4096
"""Numbers before and after every array."""


def _library() -> dict[str, Any]:
    """Return the functions of Triton's library that the kernels use.

    Its own, interpreted, would leave the language patched for good.
    """
    combine = tl.standard._sum_combine
    return {
        "zeros": lambda shape, dtype: tl.full(shape, 0, dtype),
        "sum": lambda value, axis: tl.reduce(value, axis, combine),
        "cumsum": lambda value, axis: tl.associative_scan(value, axis, combine),
    }


@contextmanager
def _interpreting() -> Iterator[None]:
    """Make `triton.jit` and what the kernels use of Triton's library interpreted functions."""
    triton.knobs.runtime.interpret = True
    try:
        with mock.patch.multiple(tl, **_library()):
            yield
    finally:
        triton.knobs.runtime.interpret = False


def _load(name: str) -> ModuleType:
    folder = Path(pallas_kernels.ssd.__file__).parent / "triton"
    spec = importlib.util.spec_from_file_location(f"pallas_kernels.ssd.triton.{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the backward kernels take their helpers from here
    spec.loader.exec_module(module)
    return module


@functools.cache
def modules() -> tuple[ModuleType, ...]:
    """Return copies of the modules, with interpreted kernels."""
    with _interpreting(), mock.patch.dict(sys.modules):
        found = tuple(_load(name) for name in _MODULES)
        for module in found:
            for name, function in list(vars(module).items()):
                # As plain functions: called as themselves they patch the whole language again every time.
                if name.startswith("_") and isinstance(function, interpreter.InterpretedFunction):
                    setattr(module, name, function.rewrite())
    return found


class _Array:
    """A numpy array between guards, as the interpreter takes it: an address and a dtype."""

    def __init__(self, value: np.ndarray) -> None:
        self._buffer = np.full(value.size + 2 * _GUARD, np.nan, value.dtype)
        self.value = self._buffer[_GUARD : _GUARD + value.size].reshape(value.shape)
        self.value[...] = value
        self.dtype = value.dtype.name

    def data_ptr(self) -> int:
        return self.value.ctypes.data

    def check(self) -> None:
        guards = np.concatenate([self._buffer[:_GUARD], self._buffer[-_GUARD:]]).astype(np.float32)
        assert np.isnan(guards).all(), "a kernel wrote outside of its array"


class _Executor(interpreter.GridExecutor):
    """Takes arrays of a CPU as they are."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        return list(args_dev), dict(kwargs)

    def _restore_args_dev(self, *_: Any) -> None:
        pass


def _tf32(value: np.ndarray) -> np.ndarray:
    """Round float32 to the 10 bits of mantissa of TF32."""
    return ((value.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def _product(left: np.ndarray, right: np.ndarray, precision: str) -> np.ndarray:
    if precision != "TF32x3":
        return left @ right
    left_high, right_high = _tf32(left), _tf32(right)
    # The unit cuts off what it does not read of a low part.
    left_low, right_low = (
        ((value - high).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        for value, high in ((left, left_high), (right, right_high))
    )
    return (left_low @ right_high + left_high @ right_low) + left_high @ right_high


def _dot(_: Any, a: Any, b: Any, d: Any, input_precision: Any, __: Any) -> Any:
    """Replace `create_dot` of the interpreter."""
    left, right = (
        value.data.view(ml_dtypes.bfloat16).astype(np.float32) if value.dtype == tl.bfloat16 else value.data
        for value in (a, b)
    )
    product = _product(np.ascontiguousarray(left), np.ascontiguousarray(right), str(input_precision).split(".")[-1])
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _convert(value: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
    """Replace `_convert_float` of the interpreter; both give bits."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return value.astype(ml_dtypes.bfloat16).view(np.uint16)
    return _CONVERT(value, source, target, mode)


_CONVERT = interpreter._convert_float
_LOCK = threading.Lock()
"""The interpreter has global state, and a program may run two kernels at once."""


def run(kernel: str, operands: Sequence[np.ndarray], results: Any, grid: tuple[int, ...], constants: Any) -> Any:
    """Run one kernel; what it leaves unwritten of its results is NaN."""
    with _LOCK:
        return _run(kernel, operands, results, grid, constants)


def _run(kernel: str, operands: Sequence[np.ndarray], results: Any, grid: tuple[int, ...], constants: Any) -> Any:
    function = next(getattr(module, kernel) for module in modules() if hasattr(module, kernel))
    arrays = [_Array(np.asarray(operand)) for operand in operands]
    outs = [_Array(np.full(result.shape, np.nan, result.dtype)) for result in results]
    rounding = mock.patch.object(interpreter, "_convert_float", _convert)
    dot = mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot)
    with _interpreting(), rounding, dot:
        _Executor(function.rewrite(), function.arg_names, grid)(*arrays, *outs, **constants)
    for array in (*arrays, *outs):
        array.check()
    return [out.value for out in outs]


def launch(
    kernel: str, operands: Sequence[jax.Array], results: Any, grid: tuple[int, ...], stages: int, constants: dict
) -> Any:
    """Replace `triton._launch`."""
    del stages
    callback: Callable[..., Any] = lambda *arrays: run(kernel, arrays, results, grid, constants)
    return jax.pure_callback(callback, list(results), *operands)
