"""Matmuls of one warpgroup (wgmma) on operands in shared memory.

The tensor cores of a Hopper multiply bfloat16, or float32 with the ten mantissa bits of tf32. So a float32 operand is
split into three bfloat16 terms of eight bits each, which together hold all its bits, and a matmul of two operands is
the six matmuls of terms that are not below 2^-22 of it. A bfloat16 operand is one term.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.pallas_gpu.block_sizes import GpuBlocks
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK, ROWS, Tiles

MATRIX = plgpu.Layout.WGMMA

DOWN, ALONG = MATRIX.reduce(1), MATRIX.reduce(0)
"""Layouts of a vector that goes down the rows of a matrix, and of one that goes along its columns."""


def _tiled(width: int, itemsize: int) -> tuple[Any, ...]:
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def operand(tiles: Tiles, blocks: GpuBlocks, rows: int, width: int, copies: int = 1) -> Any:
    """Shared memory for an operand of a matmul, [copies * terms, rows, width]; all operands have one swizzle."""
    common = math.gcd(ROWS, blocks.values, tiles.state_dim)
    return plgpu.SMEM((copies * tiles.terms, rows, width), jnp.bfloat16, transforms=_tiled(common, 2))


def matrix(rows: int, width: int, dtype: Any) -> Any:
    """Shared memory for a matrix that is copied or stored, [1, rows, width]."""
    return plgpu.SMEM((1, rows, width), dtype, transforms=_tiled(width, jnp.dtype(dtype).itemsize))


ZERO = plgpu.SMEM((128,), jnp.int32)
"""Shared memory for `unseen_zero`; as many elements as a warpgroup can store."""


def unseen_zero(scratch: dict[str, Any]) -> jax.Array:
    """Return a zero that the compiler cannot tell from another number, to be added to the index of a buffer.

    Addresses in shared memory and descriptors of operands (two registers each, eight of them per matmul) do not depend
    on the chunk. Seeing that, the compiler works all of them out before the loop, or keeps those of one matmul for a
    later one, and spills what no longer fits into registers. Behind this zero they are worked out where they are used.
    """
    return scratch["zero"][0]


def refs_of(tiles: Tiles, ref: Any, slot: Any = 0) -> list[Any]:
    """Refs of the terms of an operand in one of its slots."""
    return [ref.at[slot * tiles.terms + term] for term in range(tiles.terms)]


def refs_here(tiles: Tiles, scratch: dict[str, Any], name: str, slot: Any = 0) -> list[Any]:
    """`refs_of` an operand, its addresses worked out here (`unseen_zero`)."""
    return refs_of(tiles, scratch[name], slot + unseen_zero(scratch))


def transposed(refs: Sequence[Any]) -> list[Any]:
    """Transpose every term."""
    return [ref.transpose((1, 0)) for ref in refs]


def columns_of(refs: Sequence[Any], columns: Any) -> list[Any]:
    """Slice columns of every term."""
    return [ref.at[:, columns] for ref in refs]


def rows_of(refs: Sequence[Any], rows: Any) -> list[Any]:
    """Slice rows of every term."""
    return [ref.at[rows] for ref in refs]


def column_parts(width: int) -> list[Any]:
    """Split columns into parts of at most 64."""
    return [pl.ds(start, min(ROWS, width - start)) for start in range(0, width, ROWS)]


def dot(left: Sequence[Any], right: Sequence[Any]) -> jax.Array:
    """Multiply two operands in shared memory, given as their terms: float32, one row of the result per row of left."""
    highest = max(len(left), len(right))

    def body(accumulator: Any) -> jax.Array:
        for i, left_term in enumerate(left):
            for right_term in right[: highest - i]:
                plgpu.wgmma(accumulator, left_term, right_term)
        return accumulator[...]

    return pl.run_scoped(body, plgpu.ACC((left[0].shape[0], right[0].shape[1]), jnp.float32))


def split(value: jax.Array, terms: int) -> list[jax.Array]:
    """Split float32 into bfloat16 terms whose sum it is (3 terms), or round it (1 term).

    By masking bits: a compiler may drop the rounding from a float32 that goes to bfloat16 and back.
    """
    parts = []
    for _ in range(terms - 1):
        bits = jax.lax.bitcast_convert_type(value, jnp.int32) & jnp.int32(-65536)
        top = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(top.astype(jnp.bfloat16))
        value = value - top
    return [*parts, value.astype(jnp.bfloat16)]


def store(refs: Sequence[Any], value: jax.Array) -> None:
    """Write float32 into an operand."""
    for ref, term in zip(refs, split(value, len(refs)), strict=True):
        ref[...] = term


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
