"""Compiles the project's Triton kernels to machine code for a GPU that need not be there."""

import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.ssd import ssd, ssd_state, triton_backward_kernels, triton_blocks, triton_kernels
from pallas_kernels.ssd import triton as implementation

_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}


def shapes(
    head_dim: int, state_dim: int, dtype: Any, groups: int = 16, batch: int = 2
) -> dict[str, jax.ShapeDtypeStruct]:
    """Arguments of `ssd`, without values."""
    length, heads = 8192, 16
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    return {
        "x": shape(batch, length, heads, head_dim, dtype=dtype),
        "dt": shape(batch, length, heads),
        "a": shape(heads),
        "b": shape(batch, length, groups, state_dim, dtype=dtype),
        "c": shape(batch, length, groups, state_dim, dtype=dtype),
        "d": shape(heads),
        "initial_state": shape(batch, heads, head_dim, state_dim),
    }


def gradient(arguments: dict[str, Any]) -> Any:
    """Gradients of a sum of y."""
    return jax.grad(lambda some: jnp.sum(ssd(**some, implementation="triton")[0].astype(jnp.float32)))(arguments)


def state_gradient(arguments: dict[str, Any]) -> Any:
    """Gradients of a sum of the final state."""
    some = {name: arguments[name] for name in ("x", "dt", "a", "b", "initial_state")}
    return jax.grad(lambda some: jnp.sum(ssd_state(**some, implementation="triton")))(some)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as a call launches it."""

    kernel: str
    pointers: tuple[str, ...]
    stages: int
    constants: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """Name the kernel and its flags."""
        flags = [name for name, value in self.constants if value is True]
        return " ".join([self.kernel, *flags])


def launches(function: Any, arguments: dict[str, jax.ShapeDtypeStruct]) -> list[Launch]:
    """Every different kernel that a call launches."""
    found: dict[Launch, None] = {}

    def record(kernel: str, operands: Any, results: Any, grid: Any, stages: int, constants: dict[str, Any]) -> Any:
        del grid
        pointers = tuple(_POINTERS[value.dtype.name] for value in (*operands, *results))
        found[Launch(kernel, pointers, stages, tuple(constants.items()))] = None
        return [jnp.zeros(result.shape, result.dtype) for result in results]

    jax.clear_caches()  # a function traced before launches nothing
    with mock.patch.multiple(implementation, _missing=list, _launch=record):
        jax.eval_shape(function, arguments)
    return list(found)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What machine code takes of a GPU: registers of a thread, bytes it spills, bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def compile_for(launch: Launch, capability: int) -> Usage:
    """Compile a kernel for a compute capability (times ten)."""
    module = triton_kernels if hasattr(triton_kernels, launch.kernel) else triton_backward_kernels
    function = getattr(module, launch.kernel)
    constants = dict(launch.constants)
    pointers = [name for name in function.arg_names if name not in constants]
    source = ASTSource(
        function,
        dict.fromkeys(function.arg_names, "constexpr") | dict(zip(pointers, launch.pointers, strict=True)),
        {(function.arg_names.index(name),): value for name, value in constants.items()},
        {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": triton_blocks.WARPS, "num_stages": launch.stages}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):  # jax-triton empties it; and nothing is left behind
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        output = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)
