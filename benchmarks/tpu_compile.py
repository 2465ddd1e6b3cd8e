"""What the TPU kernels of SSD cost, from their compiled programs, without a TPU: `python -m benchmarks.tpu_compile`.

One table over shapes, passes and chips, bfloat16, a group per head, nothing in it typed in by hand but the rates:

- bytes: what a kernel's operands and results move, from the grid, block shapes and index maps of its `pallas_call` (a
  block whose index stays the same from one cell to the next is not moved again), over the fused minimum a token and
  head: io (2P + 2N) + 4 forwards, io (3P + 4N) + 8 backwards, io = 2.
- VMEM: all blocks twice (double buffering) and scratch, padded to whole registers.
- FLOPs: every product in the kernel's own program, over 2Q (N + P) + 4NP forwards, 2Q (3N + 2P) + 10NP backwards.
- largest: elements of the largest array of the compiled program over those of the larger of x and b.
- time: max(bytes / bandwidth, padded FLOPs / peak), padded to the edge of the matrix unit and counted once for each of
  its passes. Bytes are what XLA's cost analysis gives for the whole compiled program, copies and prefetches included.
- over portable: that time over the same of the "associative" implementation, whose FLOPs are counted unpadded and in
  one pass. XLA's count of its bytes includes traffic that may stay on the chip; "over floor" is the ratio when every
  array that the compiler allocated for it is written and read once, and nothing else moves. Compiling it takes minutes.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import jaxpr_as_fun
from jax.sharding import SingleDeviceSharding

from benchmarks import timing
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.block_sizes import CHUNK, LANES

SHAPES = ((2, 8192, 16, 96, 96), (8, 8192, 16, 64, 64), (1, 32768, 16, 64, 128), (1, 131072, 16, 96, 96))


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet: bfloat16 FLOP/s, bytes/s of memory; edge of the matrix unit."""

    topology: str
    peak: float
    bandwidth: float
    edge: int


CHIPS = {
    "v5e": Chip("v5e:2x2", 197e12, 0.819e12, 128),
    "v5p": Chip("v5p:2x2x1", 459e12, 2.765e12, 128),
    "v6e": Chip("v6e:2x2", 918e12, 1.640e12, 256),
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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One `pallas_call`: its name, bytes moved, VMEM of a cell, and products as (M, K, N, passes, times)."""

    name: str
    moved: int
    vmem: int
    products: tuple[tuple[int, int, int, int, int], ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products."""
        return sum(2 * m * k * n * times for m, k, n, _, times in self.products)

    def padded_flops(self, edge: int) -> int:
        """What the matrix unit spends: its sides are K and N, padded to its edge, once for each pass."""
        pad = lambda size: -(-size // edge) * edge
        return sum(2 * m * pad(k) * pad(n) * passes * times for m, k, n, passes, times in self.products)


def _moves(mapping: Any, grid: tuple[int, ...]) -> int:
    """Bytes that one operand or result moves: its block, each time the index changes from cell to cell."""
    cells = np.stack(np.meshgrid(*(np.arange(size, dtype=np.int32) for size in grid), indexing="ij"), -1)
    index = jax.vmap(jaxpr_as_fun(mapping.index_map_jaxpr))(*cells.reshape(-1, len(grid)).T)
    indices = np.stack([np.broadcast_to(np.asarray(part), (math.prod(grid),)) for part in index], -1)
    changes = 1 + int(np.any(indices[1:] != indices[:-1], axis=1).sum())
    aval = mapping.block_aval.inner_aval
    return changes * math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize


def _product(equation: Any, times: int) -> tuple[int, int, int, int, int]:
    ((left_axis,), (_right_axis,)), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    m, n = out.shape
    # A product of float32 matrices as exact as float32 takes six passes of the bfloat16 matrix unit.
    return m, left.shape[left_axis], n, 6 if left.dtype == jnp.float32 else 1, times


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
        moved=sum(_moves(block, mapping.grid) for block in mapping.block_mappings),
        vmem=vmem,
        products=tuple(_product(found, cells * times) for found, times in find(program, "dot_general")),
    )


def _minimum(shape: Shape, backward: bool) -> tuple[int, int]:
    """Bytes and FLOPs of the whole call that nothing fused can go below, chunk by chunk."""
    batch, length, heads, head, state = shape
    tokens = batch * length * heads
    if backward:
        return tokens * (2 * (3 * head + 4 * state) + 8), tokens * (
            2 * CHUNK * (3 * state + 2 * head) + 10 * state * head
        )
    return tokens * (2 * (2 * head + 2 * state) + 4), tokens * (2 * CHUNK * (state + head) + 4 * state * head)


def compile_for(chip: Chip, shape: Shape, kind: str, implementation: str) -> Any:
    """Compile a pass for a chip."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices
    arguments = arguments_of(shape, kind, SingleDeviceSharding(devices[0]))
    return jax.jit(functions(shape, implementation)[kind]).lower(*arguments).compile()


def largest_array(text: str) -> int:
    """Elements of the largest array in a compiled program."""
    sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(math.prod(map(int, size.split(","))) for size in sizes)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of a compiled program by XLA's count and at least, and FLOPs."""

    moved: float
    floor: float
    flops: float

    @classmethod
    def of(cls, compiled: Any) -> "Cost":
        """Ask the compiler."""
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        floor = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
        return cls(analysis["bytes accessed"], floor, analysis["flops"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", type=int, default=[0, 1, 2, 3], help="indices of SHAPES")
    parser.add_argument("--portable-chip", choices=CHIPS, default="v5e", help="chip to compile the portable form for")
    parser.add_argument("--portable-tokens", type=int, default=16384, help="tokens of the portable form at most (B T)")
    parser.add_argument("--no-portable", action="store_true", help="leave the portable form out")
    args = parser.parse_args()
    print(timing.heading("jax", "libtpu"))
    portable: dict[tuple[int, int, str], tuple[Cost, int]] = {}
    columns = ("bytes", "VMEM MiB", "FLOPs", "largest", "ns", "over portable", "over floor")
    print(f"{'(B, T, H, P, N)':>24} {'chip':>4} {'pass':>16}" + "".join(f"{name:>14}" for name in columns), flush=True)
    for shape in (SHAPES[index] for index in args.shapes):
        batch, length, heads, head, state = shape
        for kind, function in functions(shape, "pallas_tpu").items():
            program = jax.make_jaxpr(function)(*arguments_of(shape, kind, None)).jaxpr
            kernels = [kernel_of(equation) for equation, _ in find(program, "pallas_call")]
            if not args.no_portable and (head, state, kind) not in portable:
                rows = max(1, min(batch, args.portable_tokens // length))
                small: Shape = (rows, min(length, args.portable_tokens), heads, head, state)
                cost = Cost.of(compile_for(CHIPS[args.portable_chip], small, kind, "associative"))
                portable[head, state, kind] = cost, small[0] * small[1]
            minima = [_minimum(shape, "backward" in kernel.name) for kernel in kernels]
            moved = max(kernel.moved / least[0] for kernel, least in zip(kernels, minima, strict=True))
            flops = max(kernel.flops / least[1] for kernel, least in zip(kernels, minima, strict=True))
            vmem = max(kernel.vmem for kernel in kernels) / 2**20
            for name in args.chips:
                chip = CHIPS[name]
                compiled = compile_for(chip, shape, kind, "pallas_tpu")
                largest = largest_array(compiled.as_text()) / (batch * length * heads * max(head, state))
                padded = sum(kernel.padded_flops(chip.edge) for kernel in kernels)
                seconds = max(Cost.of(compiled).moved / chip.bandwidth, padded / chip.peak)
                line = f"{shape!s:>24} {name:>4} {kind:>16}{moved:>14.3f}{vmem:>14.2f}{flops:>14.3f}{largest:>14.2f}"
                line += f"{seconds / (batch * length * heads) * 1e9:>14.3f}"
                if not args.no_portable:
                    cost, tokens = portable[head, state, kind]
                    share = batch * length / tokens
                    for size in (cost.moved, cost.floor):
                        other = share * max(size / chip.bandwidth, cost.flops / chip.peak)
                        line += f"{seconds / other:>14.3f}"
                print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    main()
