"""The forward TPU kernel: y and the final state, or the final state alone, in one pass over x, b and c.

With an output start, earlier chunks update the state alone: the Memory Converter and the SSM after it.

Of a chunk of Q tokens, with s the running sum of l and h [N, P] the state before it (kept in VMEM from cell to cell):

    y_i = sum_{j <= i} (c_i . b_j) exp(s_i - s_j) dt_j x_j + exp(s_i) c_i h + d x_i
    h'  = exp(s_Q) h + sum_j b_j^T exp(s_Q - s_j) dt_j x_j
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import varying
from pallas_kernels.ssd.pallas_tpu.tiles import (
    Chunk,
    Decays,
    Tiles,
    bytes_accessed,
    dot,
    kernel_name,
    matmul_flops,
    part,
)
from pallas_kernels.ssd.protocol import SsdInputs


def next_state(h: jax.Array, x: jax.Array, b: jax.Array, decays: Decays, head: int) -> jax.Array:
    """State [N, P] of one head after the chunk, from the one before it, x [Q, P] and b [Q, N]."""
    at = slice(head, head + 1)
    dtx = x.astype(jnp.float32) * (decays.dt[:, at] * decays.to_end[:, at])
    return decays.whole[at] * h + dot(b, dtx, x.dtype, left_axis=0)


def _chunk(tiles: Tiles, chunk: Chunk, x_ref, dt_ref, l_ref, b_ref, c_ref, skip_ref, y_ref, h_ref) -> None:
    """Process one chunk: store its y if there is one, update the state."""
    decays = Decays.make(chunk.read_rows(dt_ref), chunk.read_rows(l_ref))
    x_all, b_all, h_all = chunk.read(x_ref), chunk.read(b_ref), h_ref[...]
    c_all = None if c_ref is None else chunk.read(c_ref)
    dtype = x_all.dtype
    outputs, states = [], []
    heads_of_group = tiles.blocks.heads // tiles.cell_groups
    for group in range(tiles.cell_groups):
        b = part(b_all, group, tiles.state_dim)
        if c_all is not None:
            c = part(c_all, group, tiles.state_dim)
            scores = dot(c, b, dtype, right_axis=1)
        for head in range(group * heads_of_group, (group + 1) * heads_of_group):
            x, h = part(x_all, head, tiles.head_dim), part(h_all, head, tiles.head_dim)
            states.append(next_state(h, x, b, decays, head))
            if c_all is not None:
                at = slice(head, head + 1)
                # dt on the values, not on the scores: the scores' columns j are lanes.
                dtx = x.astype(jnp.float32) * decays.dt[:, at]
                y = dot(scores * decays.segsum(head), dtx, dtype)
                outputs.append(y + decays.from_start[:, at] * dot(c, h, dtype))
    h_ref[...] = jnp.concatenate(states, axis=1)
    if c_all is not None:
        y_all = jnp.concatenate(outputs, axis=1) + skip_ref[...] * x_all.astype(jnp.float32)
        y_ref[chunk.tokens, :] = y_all.astype(dtype)


def _kernel(*refs, tiles: Tiles, outputs: bool, save: bool) -> None:
    given = iter(refs)
    x_ref, dt_ref, l_ref, b_ref = (next(given) for _ in range(4))
    c_ref, skip_ref = (next(given), next(given)) if outputs else (None, None)
    initial_ref = next(given)
    y_ref = next(given) if outputs else None
    final_ref = next(given)
    saved_ref = next(given) if save else None
    h_ref = next(given)
    token_block = pl.program_id(2)

    @pl.when(token_block == 0)
    def _() -> None:
        h_ref[...] = initial_ref[...]

    if saved_ref is not None:
        saved_ref[...] = h_ref[...]

    chunks = tiles.blocks.tokens // tiles.blocks.chunk

    def body(k: jax.Array, carry: None) -> None:
        run = functools.partial(_chunk, tiles, Chunk(tiles, token_block, k), x_ref, dt_ref, l_ref, b_ref)
        with_outputs = lambda: run(c_ref, skip_ref, y_ref, h_ref)
        if tiles.first_chunk:
            before = token_block * chunks + k < tiles.first_chunk
            pl.when(before)(lambda: run(None, None, None, h_ref))
            pl.when(jnp.logical_not(before))(with_outputs)
        else:
            with_outputs()
        return carry

    jax.lax.fori_loop(0, chunks, body, None)

    @pl.when(token_block == tiles.grid[2] - 1)
    def _() -> None:
        final_ref[...] = h_ref[...]


def run_forward(tiles: Tiles, inputs: SsdInputs, save: bool) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Return y (None without c), the final state and, with `save`, the state before each block of tokens.

    Every array is a view of `tiles`. y before the first chunk with outputs is uninitialised.
    """
    x, dt, log_decay, b, c, skip, h = inputs
    outputs = c is not None
    operands: list[Any] = [x, dt, log_decay, b, *((c, skip) if outputs else ()), h]
    x_spec, b_spec = tiles.token_spec(tiles.by_head), tiles.token_spec(tiles.by_group)
    y_spec, c_spec = tiles.token_spec(tiles.by_head, outputs=True), tiles.token_spec(tiles.by_group, outputs=True)
    row_spec, state_spec = tiles.row_spec(), tiles.state_spec()
    in_specs = [x_spec, row_spec, row_spec, b_spec, *((c_spec, tiles.skip_spec()) if outputs else ()), state_spec]

    final = varying.out_struct_like(x, tiles.state_shape(tiles.batch), jnp.float32)
    saved = varying.out_struct_like(x, tiles.state_shape(tiles.batch, tiles.grid[2]), jnp.float32)
    y_struct = [varying.out_struct_like(x, x.shape, x.dtype)] if outputs else []
    out_shape = [*y_struct, final, *([saved] if save else [])]
    out_specs = [*([y_spec] if outputs else []), state_spec, *([tiles.saved_spec()] if save else [])]
    late = (*([c] if outputs else []), *y_struct)
    others = [value for value in (*operands, *out_shape) if not any(value is one for one in late)]
    chunk_pairs = tiles.batch * tiles.padded_length * tiles.num_heads * tiles.blocks.chunk
    results: Any = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, outputs=outputs, save=save),
        grid=tiles.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((tiles.state_dim, tiles.by_head.block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=matmul_flops(tiles, outputs)[0],
            bytes_accessed=bytes_accessed(tiles, *others, outputs=late),
            transcendentals=chunk_pairs if outputs else 2 * chunk_pairs // tiles.blocks.chunk,
        ),
        name=kernel_name(tiles, "ssd_forward") if outputs else "ssd_state_forward",
    )(*operands)
    results = list(results)
    y = results.pop(0) if outputs else None
    return y, results[0], (results[1] if save else None)
