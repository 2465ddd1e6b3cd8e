"""The backward TPU kernel: every gradient in one pass over x, b, c and dy, from the last token to the first.

A cell starts from the state before its block of tokens, which the forward pass saved, walks the chunks forward once to
get the states before each of them, then backward. With dh [N, P] the gradient of the state after the chunk (kept in
VMEM from cell to cell), W_ji = exp(s_i - s_j) for i >= j, S_ji = b_j . c_i and G_ji = x_j . dy_i:

    dx_j = dt_j sum_i S_ji W_ji dy_i + dt_j exp(s_Q - s_j) b_j dh + d dy_j
    db_j = sum_i dt_j G_ji W_ji c_i + dt_j exp(s_Q - s_j) x_j dh^T
    dc_i = sum_j dt_j G_ji W_ji b_j + exp(s_i) dy_i h^T
    dh'  = exp(s_Q) dh + sum_i c_i^T exp(s_i) dy_i

The gradient of l_k is the sum over everything whose decay spans token k: pairs j < k <= i, reads of h at i >= k, writes
into the next state from j < k, and h to the next state. Sums only add; a difference of running sums loses the gradient
under strong decay.

Chunks before the first output have a gradient through the state alone, and that of c there is 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import varying
from pallas_kernels.ssd.pallas_tpu.forward import next_state
from pallas_kernels.ssd.pallas_tpu.tiles import (
    Chunk,
    Decays,
    Tiles,
    bytes_accessed,
    dot,
    kernel_name,
    matmul_flops,
    part,
    sums_before,
    sums_since,
)
from pallas_kernels.ssd.protocol import SsdInputs


def _spanning(pairs: jax.Array) -> jax.Array:
    """Pairs [Q, Q] at [j, i], j <= i -> column [Q, 1], at k the sum over j <= k < i."""
    row = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 1)
    shift = 1
    while shift < pairs.shape[0]:  # running sums over j by doubling
        pairs = pairs + jnp.where(row >= shift, pltpu.roll(pairs, shift, 0), 0.0)
        shift *= 2
    return jnp.sum(jnp.where(lane > row, pairs, 0.0), axis=1, keepdims=True)


def _row_sums(value: jax.Array) -> jax.Array:
    return jnp.sum(value, axis=1, keepdims=True)


class _Head(NamedTuple):
    """Gradients of one head of a chunk: tiles, and columns [Q, 1] of one scalar per token."""

    dx: jax.Array
    dh: jax.Array
    db: jax.Array
    dc: jax.Array | None
    dscores: jax.Array | None
    """Gradient of S, [Q, Q]."""
    ddt: jax.Array
    writes: jax.Array
    spans: jax.Array | None
    reads: jax.Array | None
    through: jax.Array


def _head(
    decays: Decays,
    head: int,
    x: jax.Array,
    b: jax.Array,
    h: jax.Array,
    dh: jax.Array,
    outputs: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> _Head:
    """Differentiate one head of a chunk; `outputs` are c [Q, N], dy [Q, P] and S [Q, Q] where there is a y."""
    at, dtype = slice(head, head + 1), x.dtype
    dt, to_end, from_start = decays.dt[:, at], decays.to_end[:, at], decays.from_start[:, at]
    x32 = x.astype(jnp.float32)
    ddtx = to_end * dot(b, dh, dtype)
    ddt = _row_sums(ddtx * x32)
    writes = dt * ddt
    db = dot(x32 * (dt * to_end), dh, dtype, right_axis=1)
    dh_decayed = decays.whole[at] * dh
    through = decays.whole[at] * jnp.sum(h * dh, keepdims=True)
    if outputs is None:
        return _Head(dt * ddtx, dh_decayed, db, None, None, ddt, writes, None, None, through)
    c, dy, scores = outputs
    weights = decays.segsum_transposed(head)
    cross = dot(x, dy, dtype, right_axis=1) * weights
    pairs = cross * scores
    ddtx += dot(scores * weights, dy, dtype)
    dy_start = dy.astype(jnp.float32) * from_start
    dc = dot(dy_start, h, dtype, right_axis=1)
    return _Head(
        dx=dt * ddtx,
        dh=dh_decayed + dot(c, dy_start, dtype, left_axis=0),
        db=db,
        dc=dc,
        dscores=dt * cross,
        ddt=ddt + _row_sums(pairs),
        writes=writes,
        spans=_spanning(dt * pairs),
        reads=_row_sums(dc * c.astype(jnp.float32)),
        through=through,
    )


def _total(heads: list[_Head], name: str) -> jax.Array:
    """Sum one result over the heads of a group, which share b and c."""
    return functools.reduce(jnp.add, (getattr(head, name) for head in heads))


class _Refs(NamedTuple):
    """Blocks of a cell, by name."""

    x: Any
    dt: Any
    log_decay: Any
    b: Any
    c: Any
    skip: Any
    dy: Any
    saved: Any
    dfinal: Any
    dx: Any
    ddt: Any
    dlog_decay: Any
    db: Any
    dc: Any
    dskip: Any
    dinitial: Any
    states: Any
    dh: Any

    @classmethod
    def make(cls, refs, outputs: bool) -> "_Refs":
        """Name the refs of a kernel; those of y are missing without outputs."""
        missing = () if outputs else ("c", "skip", "dy", "dc", "dskip")
        given = iter(refs)
        return cls(*(None if name in missing else next(given) for name in cls._fields))


def _store_rows(refs: _Refs, chunk: Chunk, heads: list[_Head]) -> None:
    """Store the gradients of dt and l of a chunk."""
    outputs = heads[0].spans is not None
    names = ("ddt", "writes", "spans", "reads") if outputs else ("ddt", "writes")
    columns = jnp.concatenate([getattr(head, name) for name in names for head in heads], axis=1)
    rows = dict(zip(names, jnp.split(columns.T, len(names)), strict=True))
    refs.ddt[:, chunk.tokens] = rows["ddt"]
    through = jnp.concatenate([head.through for head in heads], axis=0)
    dlog_decay = through + sums_before(rows["writes"])
    if outputs:
        # spans is at k - 1 and 0 at the last position, which the roll brings to the first.
        dlog_decay += sums_since(rows["reads"]) + pltpu.roll(rows["spans"], 1, 1)
    refs.dlog_decay[:, chunk.tokens] = dlog_decay


def _chunk(tiles: Tiles, refs: _Refs, chunk: Chunk, k: jax.Array) -> None:
    """Differentiate one chunk: store its gradients, update that of the state."""
    decays = Decays.make(chunk.read_rows(refs.dt), chunk.read_rows(refs.log_decay))
    x_all, b_all, h_all, dh_all = chunk.read(refs.x), chunk.read(refs.b), refs.states[k], refs.dh[...]
    dtype, has_outputs = x_all.dtype, refs.c is not None
    if has_outputs:
        c_all, dy_all = chunk.read(refs.c), chunk.read(refs.dy)
    heads_of_group = tiles.blocks.heads // tiles.cell_groups
    heads: list[_Head] = []
    db_all, dc_all = [], []
    for group in range(tiles.cell_groups):
        b = part(b_all, group, tiles.state_dim)
        if has_outputs:
            c = part(c_all, group, tiles.state_dim)
            scores = dot(b, c, dtype, right_axis=1)
        members = []
        for head in range(group * heads_of_group, (group + 1) * heads_of_group):
            x, h, dh = (part(value, head, tiles.head_dim) for value in (x_all, h_all, dh_all))
            outputs = (c, part(dy_all, head, tiles.head_dim), scores) if has_outputs else None
            members.append(_head(decays, head, x, b, h, dh, outputs))
        db = _total(members, "db")
        if has_outputs:
            dscores = _total(members, "dscores")
            db += dot(dscores, c, dtype)
            dc_all.append(_total(members, "dc") + dot(dscores, b, dtype, left_axis=0))
        db_all.append(db)
        heads += members
    dx = jnp.concatenate([head.dx for head in heads], axis=1)
    if has_outputs:
        dy32 = dy_all.astype(jnp.float32)
        dx += refs.skip[...] * dy32
        refs.dskip[...] += jnp.sum(dy32 * x_all.astype(jnp.float32), axis=0, keepdims=True)
        refs.dc[chunk.tokens, :] = jnp.concatenate(dc_all, axis=1).astype(refs.dc.dtype)
    refs.dx[chunk.tokens, :] = dx.astype(dtype)
    refs.db[chunk.tokens, :] = jnp.concatenate(db_all, axis=1).astype(refs.db.dtype)
    refs.dh[...] = jnp.concatenate([head.dh for head in heads], axis=1)
    _store_rows(refs, chunk, heads)


def _chunk_before(tiles: Tiles, refs: _Refs, chunk: Chunk, k: jax.Array) -> None:
    """Differentiate a chunk without outputs in a kernel that has some."""
    refs.dc[chunk.tokens, :] = jnp.zeros((tiles.blocks.chunk, refs.dc.shape[1]), refs.dc.dtype)
    _chunk(tiles, refs._replace(c=None, skip=None, dy=None, dc=None, dskip=None), chunk, k)


def _walk_states(tiles: Tiles, refs: _Refs, token_block: jax.Array) -> None:
    """Fill `states` with the state before each chunk of the cell."""
    refs.states[0] = refs.saved[...]

    def body(k: jax.Array, carry: None) -> None:
        chunk = Chunk(tiles, token_block, k)
        decays = Decays.make(chunk.read_rows(refs.dt), chunk.read_rows(refs.log_decay))
        x_all, b_all, h_all = chunk.read(refs.x), chunk.read(refs.b), refs.states[k]
        heads_of_group = tiles.blocks.heads // tiles.cell_groups
        states = [
            next_state(
                part(h_all, head, tiles.head_dim),
                part(x_all, head, tiles.head_dim),
                part(b_all, head // heads_of_group, tiles.state_dim),
                decays,
                head,
            )
            for head in range(tiles.blocks.heads)
        ]
        refs.states[k + 1] = jnp.concatenate(states, axis=1)
        return carry

    jax.lax.fori_loop(0, tiles.blocks.tokens // tiles.blocks.chunk - 1, body, None)


def _kernel(*refs, tiles: Tiles, outputs: bool) -> None:
    named = _Refs.make(refs, outputs)
    step, chunks = pl.program_id(2), tiles.blocks.tokens // tiles.blocks.chunk
    token_block = tiles.grid[2] - 1 - step

    @pl.when(step == 0)
    def _() -> None:
        named.dh[...] = named.dfinal[...]
        if outputs:
            named.dskip[...] = jnp.zeros_like(named.dskip)

    _walk_states(tiles, named, token_block)

    def body(step_back: jax.Array, carry: None) -> None:
        k = chunks - 1 - step_back
        chunk = Chunk(tiles, token_block, k)
        if tiles.first_chunk:
            before = token_block * chunks + k < tiles.first_chunk
            pl.when(before)(lambda: _chunk_before(tiles, named, chunk, k))
            pl.when(jnp.logical_not(before))(lambda: _chunk(tiles, named, chunk, k))
        else:
            _chunk(tiles, named, chunk, k)
        return carry

    jax.lax.fori_loop(0, chunks, body, None)

    @pl.when(step == tiles.grid[2] - 1)
    def _() -> None:
        named.dinitial[...] = named.dh[...]


def _results(
    tiles: Tiles, x: jax.Array, dt: jax.Array, b: jax.Array, dfinal: jax.Array, outputs: bool
) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """Shapes and blocks of the gradients by name, in the order of `_Refs`."""
    if tiles.cells_per_group > 1:
        partial = (tiles.batch, tiles.grid[1], tiles.length, tiles.state_dim)
        of_group = (varying.out_struct_like(x, partial, jnp.float32), tiles.partial_spec())
    else:
        of_group = (varying.out_struct_like(x, b.shape, b.dtype), tiles.token_spec(tiles.by_group, reverse=True))
    of_skip = (
        varying.out_struct_like(x, tiles.state_shape(tiles.batch, rows=1), jnp.float32),
        tiles.state_spec(rows=1),
    )
    of_rows = (varying.out_struct_like(x, dt.shape, jnp.float32), tiles.row_spec(reverse=True))
    outs = {
        "x": (varying.out_struct_like(x, x.shape, x.dtype), tiles.token_spec(tiles.by_head, reverse=True)),
        "dt": of_rows,
        "log_decay": of_rows,
        "b": of_group,
    }
    outs |= {"c": of_group, "d": of_skip} if outputs else {}
    return outs | {"initial_state": (varying.out_struct_like(x, dfinal.shape, jnp.float32), tiles.state_spec())}


def run_backward(
    tiles: Tiles, inputs: SsdInputs, saved: jax.Array, dy: jax.Array | None, dfinal: jax.Array
) -> SsdInputs:
    """Return the gradients of the views, from the cotangents of y (with c) and of the final state.

    Those of b and c are [B, head blocks, T, N] float32, to be summed, where several head blocks share a group.
    """
    x, dt, log_decay, b, c, skip, _ = inputs
    outputs = c is not None
    x_spec, b_spec = (tiles.token_spec(lanes, reverse=True) for lanes in (tiles.by_head, tiles.by_group))
    dy_spec, c_spec = (tiles.token_spec(lanes, reverse=True, outputs=True) for lanes in (tiles.by_head, tiles.by_group))
    row_spec, state_spec = tiles.row_spec(reverse=True), tiles.state_spec()
    operands: list[Any] = [x, dt, log_decay, b, *((c, skip, dy) if outputs else ()), saved, dfinal]
    in_specs = [x_spec, row_spec, row_spec, b_spec]
    in_specs += [*((c_spec, tiles.skip_spec(), dy_spec) if outputs else ()), tiles.saved_spec(reverse=True), state_spec]
    late = (c, dy) if outputs else ()
    others = [value for value in operands if not any(value is one for one in late)]

    outs = _results(tiles, x, dt, b, dfinal, outputs)
    out_shape, out_specs = ([out[place] for out in outs.values()] for place in (0, 1))

    width, chunk = tiles.by_head.block, tiles.blocks.chunk
    results = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, outputs=outputs),
        grid=tiles.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((tiles.blocks.tokens // chunk, tiles.state_dim, width), jnp.float32),
            pltpu.VMEM((tiles.state_dim, width), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=matmul_flops(tiles, outputs)[1],
            bytes_accessed=bytes_accessed(tiles, *others, *out_shape, outputs=late),
            transcendentals=tiles.batch * tiles.padded_length * tiles.num_heads * (chunk if outputs else 4),
        ),
        name=kernel_name(tiles, "ssd_backward") if outputs else "ssd_state_backward",
    )(*operands)
    return SsdInputs(**dict(zip(outs, results, strict=True)))
