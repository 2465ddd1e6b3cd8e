"""What the forward and the backward GPU kernel share: operands in shared memory, products, decays of one chunk.

A thread block of one warpgroup walks one row, one head and `values` of its P columns, in chunks of 64 tokens. Columns
of x are heads of their own that share dt, l, b and c, so a head may be cut into several blocks: y, dx and states are
cut with it, the gradients of what is shared are parts that the caller sums.

The tensor cores of a Hopper multiply bfloat16, or float32 with the ten bits of tf32. So a float32 operand is split into
three bfloat16 pieces of eight bits each, which together are all its bits, and a product of two operands is the six
products of pieces that are not below 2^-22 of it. bfloat16 operands are one piece.

States are [N, P]. wgmma writes 64 rows at a time: N = 96 is computed as rows 0..63 and 32..95, so no array is padded.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd import decay
from pallas_kernels.ssd.pallas_gpu.block_sizes import GPU_CHUNK, GpuBlocks

CHUNK = GPU_CHUNK
ROWS = 64
"""Rows of a product of one warpgroup."""

MATRIX = plgpu.Layout.WGMMA
DOWN, ALONG = MATRIX.reduce(1), MATRIX.reduce(0)
"""Layouts of a vector that goes down the rows of a matrix, and of one that goes along its columns."""

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
    pieces: int
    forward: GpuBlocks
    backward: GpuBlocks

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.length // CHUNK

    @property
    def row_starts(self) -> tuple[int, ...]:
        """First rows of the products that write a state."""
        return tuple(sorted({0, self.state_dim - ROWS}))

    def grid(self, blocks: GpuBlocks) -> dict[str, Any]:
        """Thread blocks: a head's parts side by side, so that the second finds b and c in the cache."""
        parts = self.head_dim // blocks.values
        return {"grid": (self.batch, self.num_heads, parts), "grid_names": ("row", "head", "part")}

    def cell(self, blocks: GpuBlocks) -> "Cell":
        """Where the running thread block stands."""
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

    def piece_row(self, piece: int) -> jax.Array:
        """Row of one piece in an array whose first axis is pieces times batch."""
        return self.row + piece * self.tiles.batch


def tokens(chunk: jax.Array) -> Any:
    """Tokens of a chunk."""
    return pl.ds(chunk * CHUNK, CHUNK)


def _tiled(width: int, itemsize: int) -> tuple[Any, ...]:
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def operand(tiles: Tiles, blocks: GpuBlocks, rows: int, width: int, copies: int = 1) -> Any:
    """Shared memory for an operand of a product, [copies * pieces, rows, width]; all operands have one swizzle."""
    common = math.gcd(ROWS, blocks.values, tiles.state_dim)
    return plgpu.SMEM((copies * tiles.pieces, rows, width), jnp.bfloat16, transforms=_tiled(common, 2))


def matrix(rows: int, width: int, dtype: Any) -> Any:
    """Shared memory for a matrix that is copied or kept, [1, rows, width]."""
    return plgpu.SMEM((1, rows, width), dtype, transforms=_tiled(width, jnp.dtype(dtype).itemsize))


ZERO = plgpu.SMEM((128,), jnp.int32)
"""Shared memory for `unseen_zero`; as many elements as a warpgroup can store."""


def unseen_zero(scratch: dict[str, Any]) -> jax.Array:
    """Return a zero that the compiler cannot tell from another number, to be added to the index of a buffer.

    Addresses in shared memory and descriptors of operands (two registers each, eight of them a product) do not depend
    on the chunk. Seeing that, the compiler works all of them out before the loop, or keeps those of one product for a
    later one, and spills what no longer fits into registers. Behind this zero they are worked out where they are used.
    """
    return scratch["zero"][0]


def refs_of(tiles: Tiles, ref: Any, slot: Any = 0) -> list[Any]:
    """Refs of the pieces of an operand in one of its slots."""
    return [ref.at[slot * tiles.pieces + piece] for piece in range(tiles.pieces)]


def refs_here(tiles: Tiles, scratch: dict[str, Any], name: str, slot: Any = 0) -> list[Any]:
    """`refs_of` an operand, its addresses worked out here (`unseen_zero`)."""
    return refs_of(tiles, scratch[name], slot + unseen_zero(scratch))


def transposed(refs: Sequence[Any]) -> list[Any]:
    """Transpose every piece."""
    return [ref.transpose((1, 0)) for ref in refs]


def columns_of(refs: Sequence[Any], columns: Any) -> list[Any]:
    """Cut columns out of every piece."""
    return [ref.at[:, columns] for ref in refs]


def rows_of(refs: Sequence[Any], rows: Any) -> list[Any]:
    """Cut rows out of every piece."""
    return [ref.at[rows] for ref in refs]


def column_parts(width: int) -> list[Any]:
    """Cut columns into parts of at most 64."""
    return [pl.ds(start, min(ROWS, width - start)) for start in range(0, width, ROWS)]


def dot(left: Sequence[Any], right: Sequence[Any]) -> jax.Array:
    """Multiply two operands in shared memory, given as their pieces: float32, one row of the result per row of left."""
    kept = max(len(left), len(right))

    def body(accumulator: Any) -> jax.Array:
        for i, left_piece in enumerate(left):
            for right_piece in right[: kept - i]:
                plgpu.wgmma(accumulator, left_piece, right_piece)
        return accumulator[...]

    return pl.run_scoped(body, plgpu.ACC((left[0].shape[0], right[0].shape[1]), jnp.float32))


def split(value: jax.Array, pieces: int) -> list[jax.Array]:
    """Split float32 into bfloat16 pieces whose sum it is (3 pieces), or round it (1 piece).

    By masking bits: a compiler may drop the rounding from a float32 that goes to bfloat16 and back.
    """
    parts = []
    for _ in range(pieces - 1):
        bits = jax.lax.bitcast_convert_type(value, jnp.int32) & jnp.int32(-65536)
        top = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(top.astype(jnp.bfloat16))
        value = value - top
    return [*parts, value.astype(jnp.bfloat16)]


def store(refs: Sequence[Any], value: jax.Array) -> None:
    """Write float32 into an operand."""
    for ref, piece in zip(refs, split(value, len(refs)), strict=True):
        ref[...] = piece


def load(refs: Sequence[Any]) -> jax.Array:
    """Read an operand as float32."""
    return functools.reduce(jnp.add, [plgpu.load(ref, layout=MATRIX).astype(jnp.float32) for ref in refs])


def down(vector: jax.Array, width: int) -> jax.Array:
    """[Q] (layout DOWN) -> [Q, width]: one value a row."""
    return jax.lax.broadcast_in_dim(vector, (vector.shape[0], width), [0])


def along(vector: jax.Array, height: int) -> jax.Array:
    """[Q] (layout ALONG) -> [height, Q]: one value a column."""
    return jax.lax.broadcast_in_dim(vector, (height, vector.shape[0]), [1])


def indices() -> tuple[jax.Array, jax.Array]:
    """Row and column of every element of a [Q, Q] matrix."""
    shape = (CHUNK, CHUNK)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX) for axis in (0, 1))
    return row, column


def scalar_rows(dt: jax.Array, log_decay: jax.Array) -> jax.Array:
    """[B, T, H] twice -> [B, H, chunks, 3, Q]: dt and the sums of l inside the chunk in two parts (`decay.py`)."""
    batch, length, num_heads = dt.shape
    coarse, fine = decay.split(log_decay)
    rows = jnp.stack([dt, coarse, fine]).reshape(3, batch, length // CHUNK, CHUNK, num_heads).transpose(1, 4, 2, 0, 3)
    return jnp.concatenate([rows[..., :1, :], jnp.cumsum(rows[..., 1:, :], axis=-1)], axis=-2)


class Decays:
    """Decays inside a chunk, from the [3, Q] that `scalar_rows` gives, in shared memory."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.dt, self._coarse, self._fine = (self._vector(k, DOWN) for k in range(3))
        last_coarse, last_fine = rows[1, CHUNK - 1], rows[2, CHUNK - 1]
        self.from_start = jnp.exp(self._coarse + self._fine)
        """exp(s_i) [Q]."""
        self.to_end = jnp.exp((last_coarse - self._coarse) + (last_fine - self._fine))
        """exp(s_Q - s_j) [Q]."""
        self.whole = jnp.exp(last_coarse + last_fine)
        """exp(s_Q)."""

    def _vector(self, k: int, layout: Any) -> jax.Array:
        return plgpu.load(self._rows.at[k], layout=layout, optimized=False)

    def dt_along(self) -> jax.Array:
        """dt_j at [i, j]."""
        return along(self._vector(0, ALONG), CHUNK)

    def _differences(self) -> jax.Array:
        """s_row - s_column [Q, Q]."""
        coarse, fine = (self._vector(k, ALONG) for k in (1, 2))
        return (down(self._coarse, CHUNK) - along(coarse, CHUNK)) + (down(self._fine, CHUNK) - along(fine, CHUNK))

    def pairs(self) -> jax.Array:
        """exp(s_i - s_j) at [i, j] for i >= j, else 0. Masked before the exponential, which could overflow."""
        row, column = indices()
        return jnp.exp(jnp.where(row >= column, self._differences(), -jnp.inf))

    def pairs_transposed(self) -> jax.Array:
        """exp(s_i - s_j) at [j, i] for i >= j, else 0."""
        row, column = indices()
        return jnp.exp(jnp.where(row <= column, -self._differences(), -jnp.inf))


def multiply_adds(tiles: Tiles, blocks: GpuBlocks, outputs: bool) -> tuple[int, int]:
    """FLOPs of the products of the forward and the backward kernel, all pieces."""
    state, values, rows = tiles.state_dim, blocks.values, ROWS * len(tiles.row_starts)
    cells = tiles.batch * tiles.length * tiles.num_heads * (tiles.head_dim // values)
    forward, backward = rows * values, 2 * state * values
    if outputs:
        forward += CHUNK * (state + values) + state * values
        backward += CHUNK * (3 * state + 2 * values + CHUNK) + state * values + rows * values
    repeats = tiles.pieces * (tiles.pieces + 1) // 2
    return 2 * cells * forward * repeats, 2 * cells * backward * repeats


def cost(flops: int, exponentials: int, arrays: Iterable[Any]) -> dict[str, Any]:
    """Tell XLA what a kernel costs that reads or writes these arrays: keywords of `plgpu.kernel`; jax 0.11 has none."""
    if jax.__version_info__ < (0, 12):
        return {}
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return {"cost_estimate": pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=exponentials)}
