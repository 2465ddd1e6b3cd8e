"""Cost the TPU kernels of SSD by their compiled programs, without a TPU: `python -m benchmarks.tpu.compile`.

One table over shapes, passes and chips, bfloat16, a group per head, nothing in it typed in by hand but the rates:

- bytes: what a kernel's operands and results move, from the grid, block shapes and index maps of its `pallas_call` (a
  block whose index stays the same from one cell to the next is not copied again), over the fused minimum per token and
  head: io (2P + 2N) + 4 forward, io (3P + 4N) + 8 backward, io = 2.
- VMEM: all blocks twice (double buffering) and scratch, padded to whole registers.
- FLOPs: every matmul in the kernel's own program, over 2Q (N + P) + 4NP forward, 2Q (3N + 2P) + 10NP backward, at
  the chunk Q that the kernels take on the chip.
- largest: elements of the largest array of the compiled program over those of the larger of x and b.
- time: one operation of the compiled program after another, each max(bytes / bandwidth, FLOPs / peak). Bytes are those
  that move to or from HBM (`tpu_program.py`), FLOPs those of the kernels, padded to the edge of the matrix unit and
  counted once for each of its passes.
- over portable: that time over the same of the "associative" implementation, of whose bytes and FLOPs only the longer
  counts, as if the other hid behind it. It is compiled for the same chip at --portable-tokens tokens, and scaled.

Then the goals: the worst row of each, and whether it is met. Exits with 1 where one is not. Compiling the portable form
takes minutes.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks import timing
from benchmarks.tpu import program as tpu_program
from pallas_kernels import target
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.pallas_tpu.block_sizes import CHUNK, LANES, choose_chunk
from transmamba_jax.runtime import hardware

PASSES = ("forward", "forward+backward")
SHAPES = ((2, 8192, 16, 96, 96), (8, 8192, 16, 64, 64), (1, 32768, 16, 64, 128), (1, 131072, 16, 96, 96))

GOALS = {"bytes": 1.15, "VMEM MiB": 12.0, "FLOPs": 1.15, "largest": 2.0}
"""Largest size allowed in a row: twice x or b, so neither T T nor T N P elements per row and head."""

OVER_PORTABLE = {"forward": 0.55, "forward+backward": 0.35}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet: bfloat16 FLOP/s, bytes/s of memory; edge of the matrix unit."""

    topology: str
    peak: float
    bandwidth: float
    edge: int

    @functools.cached_property
    def device(self) -> jax.Device:
        """One of them, which need not be there."""
        return topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices[0]


CHIPS = {
    name: Chip(topology, hardware.CHIPS[kind].peak_flops, hardware.CHIPS[kind].bandwidth, edge)
    for name, topology, kind, edge in (
        ("v5e", "v5e:2x2", "TPU v5 lite", 128),
        ("v5p", "v5p:2x2x1", "TPU v5", 128),
        ("v6e", "v6e:2x2", "TPU v6 lite", 256),
    )
}

Shape = tuple[int, int, int, int, int]


def functions(shape: Shape, implementation: str) -> dict[str, Callable[..., Any]]:
    """Forward, and forward + backward, of (x, dt, a, b, c, d) with x, b, c [B, T, H P] as a model has them."""
    batch, length, heads, head_dim, state_dim = shape

    def forward(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        by_head = lambda value, width: value.reshape(batch, length, heads, width)
        arguments = (by_head(x, head_dim), dt, a, by_head(b, state_dim), by_head(c, state_dim), d)
        y, state = ssd(*arguments, chunk_size=CHUNK, implementation=implementation)
        return y.reshape(x.shape), state

    def both(*arguments: Any) -> Any:
        result, pullback = jax.vjp(forward, *arguments[:6])
        return result, pullback(arguments[6:])

    return {"forward": forward, "forward+backward": both}


def arguments_of(shape: Shape, kind: str, sharding: Any) -> list[jax.ShapeDtypeStruct]:
    """Abstract arguments of `functions`."""
    batch, length, heads, head_dim, state_dim = shape
    value, key = ((batch, length, heads * width) for width in (head_dim, state_dim))
    shapes: list[tuple[tuple[int, ...], Any]] = [(value, jnp.bfloat16), ((batch, length, heads), jnp.float32)]
    shapes += [((heads,), jnp.float32), (key, jnp.bfloat16), (key, jnp.bfloat16), ((heads,), jnp.float32)]
    if kind != "forward":
        shapes += [(value, jnp.bfloat16), ((batch, heads, head_dim, state_dim), jnp.float32)]
    return [jax.ShapeDtypeStruct(size, dtype, sharding=sharding) for size, dtype in shapes]


def _inner(equation: Any) -> Iterator[tuple[Any, int]]:
    """Programs inside an equation, with how often each runs."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner, equation.params["length"] if equation.primitive.name == "scan" else 1


def find(jaxpr: Any, primitive: str, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Equations of a primitive in a program and those inside it, each with how often it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation, times
            continue
        for inner, repeat in _inner(equation):
            yield from find(inner, primitive, times * repeat)


def _registers(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes in VMEM: the last axis padded to 128 lanes, the one before to a register's rows."""
    itemsize = jnp.dtype(dtype).itemsize
    rows = 8 * 4 // itemsize
    *lead, second, last = (1, 1, *shape)
    return math.prod(lead) * -(-second // rows) * rows * -(-last // LANES) * LANES * itemsize


Matmul = tuple[int, int, int, int, int]
"""M, K, N, passes, times."""


def padded_flops(matmuls: Iterable[Matmul], edge: int) -> int:
    """Return the FLOPs that the matrix unit spends: its sides are K and N, padded to its edge, once for each pass."""
    pad = lambda size: -(-size // edge) * edge
    return sum(2 * m * pad(k) * pad(n) * passes * times for m, k, n, passes, times in matmuls)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One `pallas_call`: its name, bytes accessed, VMEM of a cell, and matmuls."""

    name: str
    bytes_accessed: int
    vmem: int
    matmuls: tuple[Matmul, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matmuls."""
        return sum(2 * m * k * n * times for m, k, n, _, times in self.matmuls)


def _moves(mapping: Any, grid: tuple[int, ...]) -> int:
    """Bytes that one operand or result moves: its block, each time the index changes from cell to cell."""
    cells = np.stack(np.meshgrid(*(np.arange(size, dtype=np.int32) for size in grid), indexing="ij"), -1)
    index = jax.vmap(jaxpr_as_fun(mapping.index_map_jaxpr))(*cells.reshape(-1, len(grid)).T)
    indices = np.stack([np.broadcast_to(np.asarray(part), (math.prod(grid),)) for part in index], -1)
    changes = 1 + int(np.any(indices[1:] != indices[:-1], axis=1).sum())
    aval = mapping.block_aval.inner_aval
    return changes * math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize


_PASSES = {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}
"""Of the bfloat16 matrix unit, for float32 operands; one by default."""


def _matmul(equation: Any, times: int) -> Matmul:
    (left_axes, _), (batch_axes, _) = equation.params["dimension_numbers"]
    left, right = (variable.aval for variable in equation.invars)
    k, batch = (math.prod(left.shape[axis] for axis in axes) for axes in (left_axes, batch_axes))
    precision = equation.params["precision"]
    passes = _PASSES.get(precision and precision[0], 1) if left.dtype == jnp.float32 else 1
    return left.size // (k * batch), k, right.size // (k * batch), passes, times * batch


def kernel_of(equation: Any) -> Kernel:
    """Read a `pallas_call`."""
    mapping, program = equation.params["grid_mapping"], equation.params["jaxpr"]
    blocks = [block.block_aval.inner_aval for block in mapping.block_mappings]
    scratch = [variable.aval for variable in program.invars[len(program.invars) - mapping.num_scratch_operands :]]
    vmem = sum(2 * _registers(aval.shape, aval.dtype) for aval in blocks)
    vmem += sum(_registers(aval.shape, aval.dtype) for aval in scratch)
    cells = math.prod(mapping.grid)
    return Kernel(
        name=str(equation.params["name"]),
        bytes_accessed=sum(_moves(block, mapping.grid) for block in mapping.block_mappings),
        vmem=vmem,
        matmuls=tuple(_matmul(found, cells * times) for found, times in find(program, "dot_general")),
    )


def _minimum(shape: Shape, chunk: int, backward: bool) -> tuple[int, int]:
    """Bytes and FLOPs of the whole call that nothing fused can go below, chunk by chunk."""
    batch, length, heads, head, state = shape
    tokens = batch * length * heads
    if backward:
        return tokens * (2 * (3 * head + 4 * state) + 8), tokens * (
            2 * chunk * (3 * state + 2 * head) + 10 * state * head
        )
    return tokens * (2 * (2 * head + 2 * state) + 4), tokens * (2 * chunk * (state + head) + 4 * state * head)


def compile_for(chip: Chip, shape: Shape, kind: str, implementation: str) -> str:
    """Compile a pass for a chip; return the program's text."""
    arguments = arguments_of(shape, kind, SingleDeviceSharding(chip.device))
    return jax.jit(functions(shape, implementation)[kind]).lower(*arguments).compile().as_text()


def largest_array(text: str) -> int:
    """Elements of the largest array in a compiled program."""
    sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(math.prod(map(int, size.split(","))) for size in sizes)


def program_of(shape: Shape, kind: str, implementation: str) -> Any:
    """Trace a pass."""
    return jax.make_jaxpr(functions(shape, implementation)[kind])(*arguments_of(shape, kind, None)).jaxpr


def seconds(text: str, kernels: list[Kernel], chip: Chip) -> float:
    """Predict the time of a compiled program: its operations one after another.

    Raises:
        RuntimeError: the program does not run every kernel once.
    """
    total, found = 0.0, []
    for operation, moved in tpu_program.traffic(text):
        flops = 0
        for kernel in kernels:
            if operation.kind == "custom-call" and kernel.name in operation.name:
                flops = padded_flops(kernel.matmuls, chip.edge)
                found.append(kernel.name)
        total += max(moved / chip.bandwidth, flops / chip.peak)
    if sorted(found) != sorted(kernel.name for kernel in kernels):
        raise RuntimeError(f"expected {[kernel.name for kernel in kernels]} in the compiled program, found {found}")
    return total


@functools.cache
def portable_seconds(chip: Chip, shape: Shape, kind: str) -> float:
    """Predict the time of the portable form per token and head, the longer of memory and matrix unit."""
    batch, length, heads, *_ = shape
    moved = sum(moved for _, moved in tpu_program.traffic(compile_for(chip, shape, kind, "associative")))
    matmuls = [_matmul(found, times) for found, times in find(program_of(shape, kind, "associative"), "dot_general")]
    longest = max(moved / chip.bandwidth, padded_flops(matmuls, chip.edge) / chip.peak)
    return longest / (batch * length * heads)


def measure(chip: Chip, shape: Shape, kind: str, portable_tokens: int) -> dict[str, float]:
    """Return one row; without `portable_tokens` nothing of the portable form."""
    batch, length, heads, head, state = shape
    with jax.set_mesh(Mesh(np.array([chip.device]), "data")):  # says what chip it is for
        program = program_of(shape, kind, "pallas_tpu")
        text = compile_for(chip, shape, kind, "pallas_tpu")
        chunk = choose_chunk(length, jnp.dtype(jnp.bfloat16).itemsize, target.device_kind())
    kernels = [kernel_of(equation) for equation, _ in find(program, "pallas_call")]
    minima = [_minimum(shape, chunk, "backward" in kernel.name) for kernel in kernels]
    each = seconds(text, kernels, chip) / (batch * length * heads)
    row = {
        "bytes": max(kernel.bytes_accessed / least[0] for kernel, least in zip(kernels, minima, strict=True)),
        "VMEM MiB": max(kernel.vmem for kernel in kernels) / 2**20,
        "FLOPs": max(kernel.flops / least[1] for kernel, least in zip(kernels, minima, strict=True)),
        "largest": largest_array(text) / (batch * length * heads * max(head, state)),
        "ns": each * 1e9,
    }
    if portable_tokens:
        rows = max(1, min(batch, portable_tokens // length))
        small = (rows, min(length, portable_tokens), heads, head, state)
        row["over portable"] = each / portable_seconds(chip, small, kind)
    return row


def goals(rows: dict[tuple[Shape, str, str], dict[str, float]]) -> Iterator[tuple[str, bool]]:
    """Compare the worst row with every goal, as lines with whether it is met."""
    wanted = [(name, kind, limit) for name, limit in GOALS.items() for kind in PASSES]
    wanted += [("over portable", kind, limit) for kind, limit in OVER_PORTABLE.items()]
    for name, kind, limit in wanted:
        found = {key: row[name] for key, row in rows.items() if key[2] == kind and name in row}
        if found:
            worst = max(found, key=lambda key: found[key])
            met = found[worst] <= limit
            line = f"{'met' if met else 'NOT MET':>8}  {name}, {kind}: at most {limit:g}, worst {found[worst]:.3f} at "
            yield line + f"{worst[0]} on {worst[1]}", met


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    indices = range(len(SHAPES))
    parser.add_argument("--shapes", nargs="+", type=int, choices=indices, default=indices, help="indices of SHAPES")
    parser.add_argument("--portable-tokens", type=int, default=16384, help="tokens of the portable form at most (B T)")
    parser.add_argument("--no-portable", action="store_true", help="leave the portable form out")
    return parser.parse_args()


def main() -> None:
    """Print the table, then the goals."""
    args = _arguments()
    print(timing.heading("jax", "libtpu"))
    columns = ["bytes", "VMEM MiB", "FLOPs", "largest", "ns", *([] if args.no_portable else ["over portable"])]
    print(f"{'(B, T, H, P, N)':>24} {'chip':>4} {'pass':>16}" + "".join(f"{name:>14}" for name in columns), flush=True)
    rows = {}
    for shape in (SHAPES[index] for index in args.shapes):
        for kind in PASSES:
            for name in args.chips:
                row = measure(CHIPS[name], shape, kind, 0 if args.no_portable else args.portable_tokens)
                rows[shape, name, kind] = row
                line = f"{shape!s:>24} {name:>4} {kind:>16}"
                print(line + "".join(f"{row[column]:>14.3f}" for column in columns), flush=True)
    found = list(goals(rows))
    print(*(line for line, _ in found), sep="\n")
    sys.exit(int(not all(met for _, met in found)))


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    main()
