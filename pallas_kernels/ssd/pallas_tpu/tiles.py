"""Layouts shared by the forward and backward TPU kernels: blocks of arrays, and the decays of one chunk.

The grid is (batch, blocks of heads, blocks of tokens); the last axis is walked in order. Arrays have the memory
layout of the model, [B, T, H P] and [B, T, G N], whole heads side by side in the lanes: no lane is padding, nothing is
transposed. Scalars per token and head (dt, l and their gradients) are [B, head blocks, heads, T], tokens in the lanes.
States are [N, H P]. Below, "rows" are [heads, Q] and "columns" [Q, 1].
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ssd import decay
from pallas_kernels.ssd.pallas_tpu.block_sizes import Blocks, whole_lanes

HIGHEST = jax.lax.Precision.HIGHEST


class Lanes(NamedTuple):
    """Blocking of the last axes of an array: H, P of x, y and states by heads, G, N of b and c by groups."""

    parts: int
    """Heads or groups of a block."""
    width: int
    """P or N."""
    total: int
    """Heads or groups of the array."""
    sharing: int
    """Neighbouring cells that read the same block."""

    @property
    def block(self) -> int:
        """Lanes of a block."""
        return self.parts * self.width

    @property
    def flat(self) -> bool:
        """True if blocks can be sliced from the array without a transposed copy."""
        return whole_lanes(self.block, self.total * self.width)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Shapes of a call and its block sizes."""

    batch: int
    length: int
    num_heads: int
    groups: int
    head_dim: int
    state_dim: int
    blocks: Blocks
    output_start: int = 0
    """First token with an output. Chunks before its own update the state alone."""

    @property
    def first_chunk(self) -> int:
        """First chunk of a row with outputs."""
        return self.output_start // self.blocks.chunk

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells: (batch, blocks of heads, blocks of tokens)."""
        return self.batch, self.num_heads // self.blocks.heads, pl.cdiv(self.length, self.blocks.tokens)

    @property
    def ratio(self) -> int:
        """Heads of one group."""
        return self.num_heads // self.groups

    @property
    def cell_groups(self) -> int:
        """Groups of one cell."""
        return max(1, self.blocks.heads // self.ratio)

    @property
    def cells_per_group(self) -> int:
        """Head blocks that share one group."""
        return max(1, self.ratio // self.blocks.heads)

    @property
    def ragged(self) -> bool:
        """True if the last block of tokens extends past the end of the row."""
        return self.length % self.blocks.tokens != 0

    @property
    def padded_length(self) -> int:
        """Tokens of all blocks."""
        return self.grid[2] * self.blocks.tokens

    @property
    def by_head(self) -> Lanes:
        """Lanes of x, y and states."""
        return Lanes(self.blocks.heads, self.head_dim, self.num_heads, 1)

    @property
    def by_group(self) -> Lanes:
        """Lanes of b and c."""
        return Lanes(self.cell_groups, self.state_dim, self.groups, self.cells_per_group)

    def view(self, value: jax.Array, lanes: Lanes) -> jax.Array:
        """[B, T, H, P] -> [B, 1, T, H P], or [B, blocks, T, heads P] where blocks are not whole lanes."""
        batch, length = value.shape[:2]
        if lanes.flat:
            return value.reshape(batch, 1, length, -1)
        return value.reshape(batch, length, -1, lanes.block).transpose(0, 2, 1, 3)

    def unview(self, value: jax.Array, lanes: Lanes) -> jax.Array:
        """Undo `view`."""
        batch, _, length, _ = value.shape
        return value.transpose(0, 2, 1, 3).reshape(batch, length, -1, lanes.width)

    def view_state(self, state: jax.Array) -> jax.Array:
        """[B, H, P, N] -> the view of [B, N, H, P]."""
        return self.view(state.transpose(0, 3, 1, 2), self.by_head)

    def unview_state(self, state: jax.Array) -> jax.Array:
        """Undo `view_state`."""
        return self.unview(state, self.by_head).transpose(0, 2, 3, 1)

    def view_rows(self, value: jax.Array) -> jax.Array:
        """[B, T, H] -> [B, blocks, heads, T], zeros beyond the end: dt = 0 and l = 0 leave the state as it is."""
        value = jnp.pad(value, ((0, 0), (0, self.padded_length - self.length), (0, 0)))
        return value.transpose(0, 2, 1).reshape(self.batch, self.grid[1], self.blocks.heads, self.padded_length)

    def unview_rows(self, value: jax.Array) -> jax.Array:
        """Undo `view_rows`."""
        return value.reshape(self.batch, self.num_heads, self.padded_length).transpose(0, 2, 1)[:, : self.length]

    def token_spec(self, lanes: Lanes, reverse: bool = False, outputs: bool = False) -> pl.BlockSpec:
        """Block of `view`: [tokens, heads P] or [tokens, groups N].

        With `outputs`, of an array that only tokens with an output have: earlier cells map to its first block, which
        is not copied again.
        """
        sharing, flat, last = lanes.sharing, lanes.flat, self.grid[2] - 1
        first = self.output_start // self.blocks.tokens if outputs else 0

        def index(b, h, t):
            h = jax.lax.div(h, jnp.int32(sharing)) if sharing > 1 else h  # `//` asks the default backend for its kind
            t = last - t if reverse else t
            t = jnp.maximum(t, first) if first else t
            return (b, 0, t, h) if flat else (b, h, t, 0)

        return pl.BlockSpec((None, None, self.blocks.tokens, lanes.block), index)

    def partial_spec(self) -> pl.BlockSpec:
        """Block [tokens, N] of [B, head blocks, T, N], walked in reverse: a group's gradient, cell by cell."""
        last = self.grid[2] - 1
        return pl.BlockSpec((None, None, self.blocks.tokens, self.state_dim), lambda b, h, t: (b, h, last - t, 0))

    def row_spec(self, reverse: bool = False) -> pl.BlockSpec:
        """Block of `view_rows`: [heads, tokens]."""
        last = self.grid[2] - 1
        return pl.BlockSpec(
            (None, None, self.blocks.heads, self.blocks.tokens),
            lambda b, h, t: (b, h, 0, last - t if reverse else t),
        )

    def state_spec(self, rows: int | None = None) -> pl.BlockSpec:
        """Block [N, heads P] of `view_state`, one for all blocks of tokens; `rows` instead of N."""
        flat = self.by_head.flat
        width = self.by_head.block
        index = lambda b, h, _: (b, 0, 0, h) if flat else (b, h, 0, 0)
        return pl.BlockSpec((None, None, rows or self.state_dim, width), index)

    def skip_spec(self) -> pl.BlockSpec:
        """Block [1, heads P] of the view of the skip [1, 1, H, P]: the same for every row of the batch."""
        flat = self.by_head.flat
        width = self.by_head.block
        return pl.BlockSpec((None, None, 1, width), lambda _, h, __: (0, 0, 0, h) if flat else (0, h, 0, 0))

    def saved_spec(self, reverse: bool = False) -> pl.BlockSpec:
        """Block [N, heads P] of the states saved before each block of tokens, [B, token blocks, ...]."""
        flat, last = self.by_head.flat, self.grid[2] - 1

        def index(b, h, t):
            t = last - t if reverse else t
            return (b, t, 0, 0, h) if flat else (b, t, h, 0, 0)

        return pl.BlockSpec((None, None, None, self.state_dim, self.by_head.block), index)

    def state_shape(self, *lead: int, rows: int | None = None) -> tuple[int, ...]:
        """Shape of `view_state`, after the axes of `lead`; `rows` instead of N."""
        rows = rows or self.state_dim
        if self.by_head.flat:
            return (*lead, 1, rows, self.num_heads * self.head_dim)
        return (*lead, self.grid[1], rows, self.by_head.block)


def dot(left: jax.Array, right: jax.Array, dtype: jnp.dtype, left_axis: int = 1, right_axis: int = 0) -> jax.Array:
    """Multiply two matrices over the given axes: in bfloat16 in one pass, in float32 exactly, sums in float32."""
    precision = HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _grid_of(chunk: int) -> tuple[jax.Array, jax.Array]:
    rows = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    return rows, jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)


def sums_upto(values: jax.Array) -> jax.Array:
    """[heads, Q] -> at k the sum over i <= k."""
    row, lane = _grid_of(values.shape[1])
    return dot(values, (row <= lane).astype(jnp.float32), jnp.dtype(jnp.float32))


def sums_before(values: jax.Array) -> jax.Array:
    """[heads, Q] -> at k the sum over j < k."""
    row, lane = _grid_of(values.shape[1])
    return dot(values, (row < lane).astype(jnp.float32), jnp.dtype(jnp.float32))


def sums_since(values: jax.Array) -> jax.Array:
    """[heads, Q] -> at k the sum over i >= k."""
    row, lane = _grid_of(values.shape[1])
    return dot(values, (row >= lane).astype(jnp.float32), jnp.dtype(jnp.float32))


class Decays(NamedTuple):
    """Decays inside a chunk, as rows [heads, Q] and as columns [Q, heads], from running sums s = coarse + fine of l."""

    coarse: jax.Array
    fine: jax.Array
    coarse_columns: jax.Array
    fine_columns: jax.Array
    from_start: jax.Array
    """exp(s_i) as columns."""
    dt: jax.Array
    """dt_j as columns."""
    to_end: jax.Array
    """exp(s_Q - s_j) as columns."""
    whole: jax.Array
    """exp(s_Q) [heads, 1]."""

    @classmethod
    def make(cls, dt: jax.Array, log_decay: jax.Array) -> "Decays":
        """Sum l [heads, Q] in two parts, so that differences keep their precision (see `decay.py`)."""
        coarse, fine = (sums_upto(part) for part in decay.split(log_decay))
        to_end = jnp.exp((coarse[:, -1:] - coarse) + (fine[:, -1:] - fine))
        from_start = jnp.exp(coarse + fine)
        columns = jnp.concatenate([coarse, fine, from_start, dt, to_end], axis=0).T
        heads = dt.shape[0]
        parts = [columns[:, k * heads : (k + 1) * heads] for k in range(5)]
        return cls(coarse, fine, parts[0], parts[1], parts[2], parts[3], parts[4], from_start[:, -1:])

    def segsum(self, head: int) -> jax.Array:
        """exp(s_i - s_j) at [i, j] for i >= j, else 0: [Q, Q]. Masked before the exponential, which could overflow."""
        at = slice(head, head + 1)
        row, lane = _grid_of(self.coarse.shape[1])
        exponent = (self.coarse_columns[:, at] - self.coarse[at]) + (self.fine_columns[:, at] - self.fine[at])
        return jnp.exp(jnp.where(row >= lane, exponent, -jnp.inf))

    def segsum_transposed(self, head: int) -> jax.Array:
        """exp(s_i - s_j) at [j, i] for i >= j, else 0: [Q, Q]."""
        at = slice(head, head + 1)
        row, lane = _grid_of(self.coarse.shape[1])
        exponent = (self.coarse[at] - self.coarse_columns[:, at]) + (self.fine[at] - self.fine_columns[:, at])
        return jnp.exp(jnp.where(row <= lane, exponent, -jnp.inf))


class Chunk:
    """Load the tokens of one chunk from a cell's blocks; tokens past the end of a row are 0."""

    def __init__(self, tiles: Tiles, token_block: jax.Array, k: jax.Array) -> None:
        size = tiles.blocks.chunk
        self.start = pl.multiple_of(k * size, size)
        self.tokens = pl.ds(self.start, size)
        self._remaining = None
        if tiles.ragged:
            self._remaining = tiles.length - token_block * tiles.blocks.tokens - self.start

    def read(self, ref) -> jax.Array:
        """[Q, width] of a block [tokens, width]."""
        value = ref[self.tokens, :]
        if self._remaining is None:
            return value
        # Memory beyond the end of an array holds anything, also NaN: dt = 0 alone would not silence it.
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) < self._remaining, value, 0)

    def read_rows(self, ref) -> jax.Array:
        """[heads, Q] of a block [heads, tokens]."""
        return ref[:, self.tokens]


def part(value: jax.Array, index: int, width: int) -> jax.Array:
    """Columns of one head or group."""
    return value[:, index * width : (index + 1) * width]


def matmul_flops(tiles: Tiles, outputs: bool) -> tuple[int, int]:
    """Count the matmul FLOPs of the forward and the backward kernel."""
    chunk, state, head = tiles.blocks.chunk, tiles.state_dim, tiles.head_dim
    heads = tiles.batch * tiles.padded_length * tiles.num_heads
    forward = heads * 2 * state * head
    backward = heads * 3 * 2 * state * head
    if outputs:
        tokens = tiles.batch * (tiles.padded_length - tiles.first_chunk * chunk)
        heads, groups = tokens * tiles.num_heads, tokens * tiles.grid[1] * tiles.cell_groups
        forward += groups * 2 * chunk * state + heads * (2 * chunk * head + 2 * state * head)
        backward += groups * 3 * 2 * chunk * state + heads * (2 * 2 * chunk * head + 2 * 2 * state * head)
    return forward, backward


def bytes_accessed(tiles: Tiles, *arrays: jax.Array | jax.ShapeDtypeStruct, outputs: tuple[Any, ...] = ()) -> int:
    """Count the bytes of operands and results; of `outputs`, those of blocks from the first output on."""
    size = lambda values: sum(value.size * value.dtype.itemsize for value in values)
    before = tiles.output_start // tiles.blocks.tokens
    return size(arrays) + size(outputs) * (tiles.grid[2] - before) // tiles.grid[2]


def kernel_name(tiles: Tiles, kernel: str) -> str:
    """Name a kernel: `ssd_forward`, or `ssd_forward_from_1024` where the chunks before have no outputs."""
    before = tiles.first_chunk * tiles.blocks.chunk
    return f"{kernel}_from_{before}" if before else kernel
