"""The forward GPU kernel: outputs, final state and, for the backward pass, the state before every chunk.

For a chunk of Q tokens with h [N, P] the state before it, s_i the running sum of l and i >= j:

    y_i = sum_j (c_i . b_j) exp(s_i - s_j) dt_j x_j + exp(s_i) c_i h + d x_i
    h'  = exp(s_Q) h + sum_j b_j^T exp(s_Q - s_j) dt_j x_j

The float32 state stays in registers from the first chunk to the last; its copy in shared memory, for the matmul with
c, is also saved for the backward pass.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.pallas_gpu import wgmma
from pallas_kernels.ssd.pallas_gpu.decays import Decays
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK, PARAMS, ROWS, Cell, Tiles, cost, matmul_flops, tokens
from pallas_kernels.varying import align_varying_axes


def _copies(cell: Cell, refs: dict[str, Any], scratch: dict[str, Any], chunk: Any, slot: Any) -> list[tuple[Any, Any]]:
    """Return source and destination of every copy that a chunk needs."""
    pairs = [(refs["rows"].at[cell.row, cell.head, chunk], scratch["rows"].at[slot])]
    for term in range(cell.tiles.terms):
        row, to = cell.term_row(term), slot * cell.tiles.terms + term
        pairs.append((refs["x"].at[row, tokens(chunk), cell.head, cell.columns], scratch["x"].at[to]))
        for name in ("b", "c"):
            if name in refs:
                pairs.append((refs[name].at[row, tokens(chunk), cell.group], scratch[name].at[to]))
    return pairs


def stream(stages: int, chunks: int, copies: Any, barrier: Any, body: Any, carry: Any) -> Any:
    """Run `body(step, slot, carry)` for every step, its copies (`copies(step, slot)`) `stages` steps ahead."""
    stages = min(stages, chunks)

    def start(step: Any, slot: Any) -> None:
        for source, destination in copies(step, slot):
            plgpu.copy_gmem_to_smem(source, destination, barrier.at[slot])

    for step in range(stages):
        start(jnp.int32(step), jnp.int32(step))

    def run(step: jax.Array, carry: Any) -> Any:
        slot = jax.lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(barrier.at[slot])
        carry = body(step, slot, carry)
        plgpu.commit_smem()  # orders what was read before the copy that replaces it
        pl.when(step + stages < chunks)(lambda: start(step + stages, slot))
        return carry

    return jax.lax.fori_loop(0, chunks, run, carry)


def _parts(tiles: Tiles) -> list[tuple[Any, Any]]:
    """Rows and columns of the parts in which a state is kept in registers, 64 rows of at most 64 columns each."""
    columns = wgmma.column_parts(tiles.forward.values)
    return list(itertools.product((pl.ds(start, ROWS) for start in tiles.row_starts), columns))


def _load_state(tiles: Tiles, source: Any, scratch: dict[str, Any]) -> tuple[jax.Array, ...]:
    """Read a float32 state [N, values], 64 rows at a time."""
    parts = []
    for start in tiles.row_starts:
        buffer = scratch["state"].at[0]
        plgpu.copy_gmem_to_smem(source(pl.ds(start, ROWS)), buffer, scratch["state_barrier"])
        plgpu.barrier_wait(scratch["state_barrier"])
        columns = wgmma.column_parts(tiles.forward.values)
        parts += [plgpu.load(buffer.at[:, part], layout=wgmma.MATRIX) for part in columns]
        plgpu.commit_smem()
    return tuple(parts)


def _store_state(tiles: Tiles, state: tuple[jax.Array, ...], target: Any, scratch: dict[str, Any]) -> None:
    parts = iter(state)
    for start in tiles.row_starts:
        buffer = scratch["state"].at[0]
        for columns in wgmma.column_parts(tiles.forward.values):
            buffer[:, columns] = next(parts)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target(pl.ds(start, ROWS)))
        plgpu.wait_smem_to_gmem(0)


def _output(scratch: dict[str, Any], decays: Decays, skip: Any, slot: Any, tiles: Tiles) -> None:
    """Compute y of a chunk into shared memory. The state before the chunk is in `h`."""
    here = functools.partial(wgmma.refs_here, tiles, scratch)
    scores = wgmma.dot(here("c", slot), wgmma.transposed(here("b", slot))) * decays.segsum() * decays.dt_along()
    wgmma.store(here("weights"), scores)
    plgpu.commit_smem()
    for columns in wgmma.column_parts(tiles.forward.values):
        y = wgmma.dot(here("c", slot), wgmma.columns_of(here("h"), columns)) * wgmma.down(
            decays.from_start, columns.size
        )
        x = wgmma.columns_of(here("x", slot), columns)
        y += wgmma.dot(here("weights"), x)
        y += skip * wgmma.load(x)
        scratch["y"][0, :, columns] = y.astype(scratch["y"].dtype)


def _kernel(*refs: Any, names: tuple[str, ...], tiles: Tiles, **scratch: Any) -> None:
    """Walk the chunks of one row and head."""
    named = dict(zip(names, refs, strict=True))
    blocks = tiles.forward
    cell = tiles.cell(blocks)
    here = functools.partial(wgmma.refs_here, tiles, scratch)
    skip = named["skip"][cell.head] if "y" in named else None

    def chunk(step: jax.Array, slot: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        decays = Decays(scratch["rows"].at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if "y" in named or "saved" in named:
            for (rows, columns), part in zip(_parts(tiles), state, strict=True):
                wgmma.store(wgmma.columns_of(wgmma.rows_of(here("h"), rows), columns), part)
        for columns in wgmma.column_parts(tiles.state_dim):
            scale = wgmma.down(decays.dt * decays.to_end, columns.size)
            b = wgmma.load(wgmma.columns_of(here("b", slot), columns))
            wgmma.store(wgmma.columns_of(here("dtb"), columns), b * scale)
        plgpu.commit_smem()
        if "saved" in named:
            for term, ref in enumerate(wgmma.refs_of(tiles, scratch["h"])):
                plgpu.copy_smem_to_gmem(ref, named["saved"].at[cell.term_row(term), cell.head, step, :, cell.columns])
        if "y" in named:
            _output(scratch, decays, skip, slot, tiles)
            plgpu.commit_smem()
            place = (cell.row, tokens(step), cell.head, cell.columns)
            plgpu.copy_smem_to_gmem(scratch["y"].at[0], named["y"].at[place])
        following = []
        for (rows, columns), part in zip(_parts(tiles), state, strict=True):
            dtb = wgmma.transposed(wgmma.columns_of(here("dtb"), rows))
            following.append(decays.whole * part + wgmma.dot(dtb, wgmma.columns_of(here("x", slot), columns)))
        return tuple(following)

    scratch["zero"][...] = jnp.zeros(scratch["zero"].shape, jnp.int32)
    place = lambda ref: lambda rows: ref.at[cell.row, cell.head, rows, cell.columns]
    state = _load_state(tiles, place(named["initial"]), scratch)
    copies = functools.partial(_copies, cell, named, scratch)
    state = stream(blocks.stages, tiles.chunks, copies, scratch["barrier"], chunk, state)
    plgpu.wait_smem_to_gmem(0)
    _store_state(tiles, state, place(named["final"]), scratch)


def _scratch(tiles: Tiles, outputs: bool, io_dtype: Any) -> dict[str, Any]:
    blocks = tiles.forward
    operand = functools.partial(wgmma.operand, tiles, blocks)
    arrivals = 1 + tiles.terms * (3 if outputs else 2)
    scratch = {
        "rows": plgpu.SMEM((blocks.stages, 3, CHUNK), jnp.float32),
        "x": operand(CHUNK, blocks.values, blocks.stages),
        "b": operand(CHUNK, tiles.state_dim, blocks.stages),
        "dtb": operand(CHUNK, tiles.state_dim),
        "h": operand(tiles.state_dim, blocks.values),
        "zero": wgmma.ZERO,
        "state": wgmma.matrix(ROWS, blocks.values, jnp.float32),
        "barrier": plgpu.Barrier(num_arrivals=arrivals, num_barriers=blocks.stages),
        "state_barrier": plgpu.Barrier(),
    }
    if outputs:
        scratch["c"] = operand(CHUNK, tiles.state_dim, blocks.stages)
        scratch["weights"] = operand(CHUNK, CHUNK)
        scratch["y"] = wgmma.matrix(CHUNK, blocks.values, io_dtype)
    return scratch


def run_forward(
    tiles: Tiles,
    x: jax.Array,
    rows: jax.Array,
    b: jax.Array,
    c: jax.Array | None,
    skip: jax.Array | None,
    initial: jax.Array,
    io_dtype: Any,
    save: bool,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Run the kernel.

    x [terms B, T, H, P], b and c [terms B, T, G, N] bfloat16, rows as `scalar_rows` gives them, skip float32 [H],
    initial float32 [B, H, N, P]; c and skip None: the state alone.

    Returns:
        y [B, T, H, P] in `io_dtype` or None, the final state float32 [B, H, N, P], and with `save` the states
        before the chunks, bfloat16 terms [terms B, H, chunks, N, P], else None.
    """
    outputs = c is not None
    operands: dict[str, Any] = {
        "x": x,
        "rows": rows,
        "b": b,
        **({"c": c, "skip": skip} if outputs else {}),
        "initial": initial,
    }
    heads = (tiles.num_heads, tiles.chunks, tiles.state_dim, tiles.head_dim)
    results = {"final": jax.ShapeDtypeStruct(initial.shape, jnp.float32)}
    if outputs:
        results["y"] = jax.ShapeDtypeStruct((tiles.batch, *x.shape[1:]), io_dtype)
    if save:
        results["saved"] = jax.ShapeDtypeStruct((tiles.terms * tiles.batch, *heads), jnp.bfloat16)
    flops = matmul_flops(tiles, tiles.forward, outputs)[0]
    exponentials = tiles.batch * tiles.length * tiles.num_heads * (CHUNK if outputs else 2)
    values = plgpu.kernel(
        functools.partial(_kernel, names=(*operands, *results), tiles=tiles),
        out_type=tuple(results.values()),
        scratch_types=_scratch(tiles, outputs, io_dtype),
        compiler_params=PARAMS,
        kernel_name="ssd_forward" if outputs else "ssd_state_forward",
        **cost(flops, exponentials, (*operands.values(), *results.values())),
        **tiles.grid(tiles.forward),
    )(*operands.values())
    # The kernel's results come without the mesh axes over which they vary.
    named = dict(zip(results, align_varying_axes(x, *values)[1:], strict=True))
    return named.get("y"), named["final"], named.get("saved")
