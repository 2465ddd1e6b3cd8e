"""Compiles the project's Triton kernels to machine code for GPUs that need not be there: every variant of each.

`test_triton.py` checks that they fit; `benchmarks/gpu/triton_compile.py` prints their resources.
"""

import dataclasses
import functools
import itertools
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

from pallas_kernels.ssd import ssd, ssd_state
from pallas_kernels.ssd.triton import backward, block_sizes, forward, implementation

_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}

CAPABILITIES = (80, 90)
"""Compute capabilities times ten: A100, and Hopper."""

DIMS = (64, 96, 128)
DTYPES = ("bfloat16", "float32")

_SHARED_MEMORY = 99 * 1024
"""Bytes a program may have on a GPU of compute capability 8.6 or 8.9; 8.0 has 163 KB, 9.0 has 227 KB."""

_SPILLED = {("walk REVERSE FROM_FIRST SAVE", 90): 8, ("group_gradients", 80): 8, ("group_gradients OUTPUTS", 80): 8}
"""Bytes of a thread's stack that a kernel may take; others none. The compiler takes 8 where it stops, unasked, at 48 or
168 registers of 255, and in one variant in float32 that sums up heads."""

_HEADS = 8
_CALLS = ((32, _HEADS), (1, _HEADS // 4))
"""Rows and groups: rows that fill a GPU; one row, cut into segments, with heads that are summed in a program."""

_COUNTS = ("GROUPS", "TOTAL", "SEGMENTS", "CHUNKS")
"""Constants that are strides or ends of loops and change no code: of variants that differ in them alone one counts."""


def shapes(head_dim: int, state_dim: int, dtype: str, rows: int, groups: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Arguments of `ssd`, without values."""
    batch, length, heads = rows, 16384, _HEADS
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


@functools.cache
def variants(head_dim: int, state_dim: int, dtype: str) -> list[Launch]:
    """Every variant of the kernels for values and gradients of `ssd` and `ssd_state` with these dimensions."""
    found: dict[Launch, Launch] = {}
    for (rows, groups), function in itertools.product(_CALLS, (gradient, state_gradient)):
        for launch in launches(function, shapes(head_dim, state_dim, dtype, rows, groups)):
            constants = tuple((name, value) for name, value in launch.constants if name not in _COUNTS)
            found.setdefault(dataclasses.replace(launch, constants=constants), launch)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of a kernel: registers and bytes spilled of a thread, bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def compile_for(launch: Launch, capability: int) -> Usage:
    """Compile a kernel for a compute capability (times ten)."""
    module = backward if launch.kernel.endswith("_gradients") else forward
    function = getattr(module, launch.kernel)
    constants = dict(launch.constants)
    pointers = [name for name in function.arg_names if name not in constants]
    source = ASTSource(
        function,
        dict.fromkeys(function.arg_names, "constexpr") | dict(zip(pointers, launch.pointers, strict=True)),
        {(function.arg_names.index(name),): value for name, value in constants.items()},
        {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": block_sizes.WARPS, "num_stages": launch.stages}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):  # jax-triton empties it; and nothing is left behind
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        output = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def complaints(launch: Launch, capability: int, usage: Usage) -> list[str]:
    """Say what a kernel takes that it may not: registers that spill, more shared memory than the smallest GPU has."""
    spilled = _SPILLED.get((str(launch), capability), 0)
    found = []
    if usage.spilled > spilled:
        found.append(f"{launch} spills {usage.spilled} bytes, more than {spilled}: {capability}, {launch.constants}")
    if usage.shared > _SHARED_MEMORY:
        taken = f"{usage.shared} bytes of shared memory, more than {_SHARED_MEMORY}"
        found.append(f"{launch} takes {taken}: {capability}, {launch.constants}")
    return found
