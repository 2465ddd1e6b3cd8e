"""Tiling shared by the forward and backward GPU kernels: grid, thread blocks and their cost.

A thread block of one warpgroup walks one row, one head and `values` of its P columns, in chunks of 64 tokens. Columns
of x are heads of their own that share dt, l, b and c, so a head may be split into several blocks. y, dx and states are
split with it; the gradients of what is shared are parts that the caller sums.

States are [N, P]. wgmma writes 64 rows at a time: N = 96 is computed as rows 0..63 and 32..95, so no array is padded.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.pallas_gpu.block_sizes import GPU_CHUNK, GpuBlocks

CHUNK = GPU_CHUNK

ROWS = 64
"""Rows of a matmul of one warpgroup."""

# Explicit layouts and automatic barriers around every access to shared memory. The search for layouts that the other
# semantics run ("Warpgroup") does not end on these kernels.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Shapes of a call, T a multiple of the chunk, and how its kernels are cut."""

    batch: int
    length: int
    num_heads: int
    groups: int
    head_dim: int
    state_dim: int
    terms: int
    forward: GpuBlocks
    backward: GpuBlocks

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.length // CHUNK

    @property
    def row_starts(self) -> tuple[int, ...]:
        """First rows of the matmuls that update a state."""
        return tuple(sorted({0, self.state_dim - ROWS}))

    def grid(self, blocks: GpuBlocks) -> dict[str, Any]:
        """Thread blocks: a head's parts side by side, so that the second finds b and c in the cache."""
        parts = self.head_dim // blocks.values
        return {"grid": (self.batch, self.num_heads, parts), "grid_names": ("row", "head", "part")}

    def cell(self, blocks: GpuBlocks) -> "Cell":
        """Return the position of the running thread block."""
        row, head, part = (jax.lax.axis_index(name) for name in ("row", "head", "part"))
        ratio = self.num_heads // self.groups
        group = jax.lax.div(head, jnp.int32(ratio)) if ratio > 1 else head
        return Cell(self, row, head, group, part, pl.ds(part * blocks.values, blocks.values))


@dataclasses.dataclass(frozen=True)
class Cell:
    """A thread block's place in the arrays."""

    tiles: Tiles
    row: jax.Array
    head: jax.Array
    group: jax.Array
    part: jax.Array
    columns: Any
    """Its part of P."""

    def term_row(self, term: int) -> jax.Array:
        """Row of one term in an array whose first axis is terms times batch."""
        return self.row + term * self.tiles.batch


def tokens(chunk: jax.Array) -> Any:
    """Tokens of a chunk."""
    return pl.ds(chunk * CHUNK, CHUNK)


def matmul_flops(tiles: Tiles, blocks: GpuBlocks, outputs: bool) -> tuple[int, int]:
    """Count the matmul FLOPs of the forward and the backward kernel, all terms."""
    state, values, rows = tiles.state_dim, blocks.values, ROWS * len(tiles.row_starts)
    cells = tiles.batch * tiles.length * tiles.num_heads * (tiles.head_dim // values)
    forward, backward = rows * values, 2 * state * values
    if outputs:
        forward += CHUNK * (state + values) + state * values
        backward += CHUNK * (3 * state + 2 * values + CHUNK) + state * values + rows * values
    repeats = tiles.terms * (tiles.terms + 1) // 2
    return 2 * cells * forward * repeats, 2 * cells * backward * repeats


def cost(flops: int, exponentials: int, arrays: Iterable[Any]) -> dict[str, Any]:
    """Return the cost estimate of a kernel over these arrays as keywords of `plgpu.kernel`; jax 0.11 has none."""
    if jax.__version_info__ < (0, 12):  # remove when jax >= 0.12 is required
        return {}
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return {"cost_estimate": pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=exponentials)}
