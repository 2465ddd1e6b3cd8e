"""The backward GPU kernel: every gradient in one pass over x, b, c, dy and the saved states, from the last chunk back.

With h the state before the chunk, dh [N, P] the gradient of the state after it, W_ji = exp(s_i - s_j) for i >= j,
S_ji = b_j . c_i and G_ji = x_j . dy_i:

    dx_j = dt_j sum_i S_ji W_ji dy_i + dt_j exp(s_Q - s_j) b_j dh + d dy_j
    db_j = sum_i dt_j G_ji W_ji c_i + dt_j exp(s_Q - s_j) x_j dh^T
    dc_i = sum_j dt_j G_ji W_ji b_j + exp(s_i) dy_i h^T
    dh'  = exp(s_Q) dh + sum_i c_i^T exp(s_i) dy_i

The gradient of l_k sums everything whose decay spans token k: pairs j < k <= i, which the kernel sums with a triangular
matmul, reads of h at i >= k, writes into the next state from j < k, and h to the next state, whose sums over a chunk
the caller takes. Sums only add; a difference of running sums loses the gradient under strong decay.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.pallas_gpu import wgmma
from pallas_kernels.ssd.pallas_gpu.block_sizes import squares_of
from pallas_kernels.ssd.pallas_gpu.decays import Decays
from pallas_kernels.ssd.pallas_gpu.forward import stream
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK, PARAMS, ROWS, Cell, Tiles, cost, matmul_flops, tokens
from pallas_kernels.varying import align_varying_axes

VECTORS = ("dt", "writes", "spans", "reads", "skip")
"""Scalars per token that the kernel returns: gradients of dt and of the skip, and the parts of that of l."""


def _row_sums(value: jax.Array) -> jax.Array:
    return jnp.sum(value, axis=1)


def _total(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _within(sums: jax.Array) -> jax.Array:
    """Keep, of sums over j < k at [k, i], those with i >= k."""
    row, column = wgmma.indices()
    return jnp.where(column >= row, sums, 0.0)


_PAIRS, _SCORES, _CROSS = range(3)
"""Operands [Q, Q] by number."""

_STREAMED = ("x", "b", "c", "dy", "h")


class _Chunk:
    """Differentiates one chunk: fills the shared memory that goes out, one result after another.

    Matrices are worked on 64 columns at a time, and sums are stored as soon as they are computed: a thread has 255
    registers, and a matrix of 64 columns takes 32 of them.
    """

    def __init__(self, cell: Cell, refs: dict[str, Any], scratch: dict[str, Any], slot: Any) -> None:
        self.tiles, self.cell, self.refs, self.scratch, self.slot = cell.tiles, cell, refs, scratch, slot
        self.outputs = "dy" in refs
        self.decays = Decays(scratch["rows"].at[slot])
        self._waiting: dict[int, jax.Array] = {}

    def _operand(self, name: str) -> list[Any]:
        return wgmma.refs_here(self.tiles, self.scratch, name, self.slot if name in _STREAMED else 0)

    def _square(self, number: int) -> list[Any]:
        """Terms of an operand [Q, Q]; float32 has space for one, which a waiting one replaces."""
        square = wgmma.refs_here(self.tiles, self.scratch, "squares", number % squares_of(self.tiles.terms))
        if number in self._waiting:
            wgmma.store(square, self._waiting.pop(number))
            plgpu.commit_smem()
        return square

    def _keep(self, name: str, value: jax.Array) -> None:
        """Store one scalar per token."""
        self.scratch["vectors"][VECTORS.index(name)] = value

    def _send(self, buffer: str, target: Any) -> None:
        """Start the copy of a buffer in shared memory to its place."""
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.scratch[buffer].at[0], target)

    def _fill(self, buffer: str, columns: Any, value: jax.Array) -> None:
        """Write columns of a buffer."""
        ref = self.scratch[buffer].at[wgmma.unseen_zero(self.scratch)]
        ref[:, columns] = value.astype(ref.dtype)

    def pairs(self) -> jax.Array:
        """Form S W and dt G W, [j, i], and the sums of their product; return those over i."""
        weights = self.decays.segsum_transposed()
        scores = wgmma.dot(self._operand("b"), wgmma.transposed(self._operand("c")))
        cross = wgmma.dot(self._operand("x"), wgmma.transposed(self._operand("dy"))) * weights
        pairs = cross * scores
        sums = _row_sums(pairs)
        dt = wgmma.down(self.decays.dt, CHUNK)
        self._waiting = {_PAIRS: dt * pairs, _SCORES: scores * weights, _CROSS: dt * cross}
        if squares_of(self.tiles.terms) > 1:
            for number in (_PAIRS, _SCORES, _CROSS):
                self._square(number)
        before = wgmma.dot([self.scratch["before"].at[wgmma.unseen_zero(self.scratch)]], self._square(_PAIRS))
        self._keep("spans", _row_sums(_within(before)))
        return sums

    def x_gradient(self, pair_sums: jax.Array | None, skip: Any, target: Any) -> None:
        """Form and send dx, and the sums for dt, the decay and the skip that share its operands."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sums, skips = [], []
        for columns in wgmma.column_parts(self.tiles.backward.values):
            width = columns.size
            ddtx = wgmma.dot(self._operand("b"), wgmma.columns_of(self._operand("dh_operand"), columns))
            ddtx *= wgmma.down(self.decays.to_end, width)
            x = wgmma.load(wgmma.columns_of(self._operand("x"), columns))
            sums.append(_row_sums(ddtx * x))
            dt = wgmma.down(self.decays.dt, width)
            if not self.outputs:
                self._fill("dx", columns, dt * ddtx)
                continue
            dy_refs = wgmma.columns_of(self._operand("dy"), columns)
            ddtx += wgmma.dot(self._square(_SCORES), dy_refs)
            dy = wgmma.load(dy_refs)
            skips.append(_row_sums(dy * x))
            self._fill("dx", columns, dt * ddtx + skip * dy)
            wgmma.store(
                wgmma.columns_of(self._operand("read"), columns), wgmma.down(self.decays.from_start, width) * dy
            )
        self._send("dx", target(self.refs["dx"]))
        total = _total(sums)
        self._keep("writes", self.decays.dt * total)
        self._keep("dt", total if pair_sums is None else total + pair_sums)
        if self.outputs:
            self._keep("skip", _total(skips))

    def b_gradient(self, target: Any) -> None:
        """Form and send db."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for columns in wgmma.column_parts(self.tiles.state_dim):
            db = wgmma.dot(self._operand("x"), wgmma.transposed(wgmma.rows_of(self._operand("dh_operand"), columns)))
            db *= wgmma.down(self.decays.dt * self.decays.to_end, columns.size)
            if self.outputs:
                db += wgmma.dot(self._square(_CROSS), wgmma.columns_of(self._operand("c"), columns))
            self._fill("group", columns, db)
        self._send("group", target(self.refs["db"]))

    def c_gradient(self, target: Any) -> None:
        """Form and send dc, and the sums for the decay of reads of the state."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sums = []
        for columns in wgmma.column_parts(self.tiles.state_dim):
            dc = wgmma.dot(self._operand("dy"), wgmma.transposed(wgmma.rows_of(self._operand("h"), columns)))
            dc *= wgmma.down(self.decays.from_start, columns.size)
            sums.append(_row_sums(dc * wgmma.load(wgmma.columns_of(self._operand("c"), columns))))
            dc += wgmma.dot(wgmma.transposed(self._square(_CROSS)), wgmma.columns_of(self._operand("b"), columns))
            self._fill("group", columns, dc)
        self._send("group", target(self.refs["dc"]))
        self._keep("reads", _total(sums))

    def state_gradient(self, step: Any) -> None:
        """Replace dh by the gradient of the state before the chunk; send sum_P h dh exp(s_Q) [N]."""
        starts = self.tiles.row_starts
        sums: dict[int, list[jax.Array]] = {start: [] for start in starts}
        for columns in wgmma.column_parts(self.tiles.backward.values):
            following = []
            for start in starts:
                rows = pl.ds(start, ROWS)
                gradient = self.scratch["dh"].at[wgmma.unseen_zero(self.scratch)]
                dstate = self.decays.whole * plgpu.load(gradient.at[rows, columns], layout=wgmma.MATRIX)
                h = wgmma.columns_of(wgmma.rows_of(self._operand("h"), rows), columns)
                sums[start].append(_row_sums(dstate * wgmma.load(h)))
                if self.outputs:
                    c = wgmma.transposed(wgmma.columns_of(self._operand("c"), rows))
                    dstate += wgmma.dot(c, wgmma.columns_of(self._operand("read"), columns))
                following.append(dstate)
            # After all matmuls of rows have read: where N = 96 they overlap.
            for start, value in zip(starts, following, strict=True):
                rows = pl.ds(start, ROWS)
                gradient = self.scratch["dh"].at[wgmma.unseen_zero(self.scratch)]
                gradient[rows, columns] = value
                dh = wgmma.columns_of(wgmma.rows_of(self._operand("dh_operand"), rows), columns)
                wgmma.store(dh, value)
        for start, found in sums.items():
            self.scratch["through"][pl.ds(start, ROWS)] = _total(found)
        plgpu.commit_smem()
        place = (self.cell.row, self.cell.head, self.cell.part, step)
        plgpu.copy_smem_to_gmem(self.scratch["vectors"], self.refs["vectors"].at[place])
        plgpu.copy_smem_to_gmem(self.scratch["through"], self.refs["through"].at[place])


def _copies(cell: Cell, refs: dict[str, Any], scratch: dict[str, Any], step: Any, slot: Any) -> list[tuple[Any, Any]]:
    """Return source and destination of every copy that a chunk needs; step 0 is the last chunk."""
    chunk = cell.tiles.chunks - 1 - step
    pairs = [(refs["rows"].at[cell.row, cell.head, chunk], scratch["rows"].at[slot])]
    for term in range(cell.tiles.terms):
        row, to = cell.term_row(term), slot * cell.tiles.terms + term
        pairs.append((refs["h"].at[row, cell.head, chunk, :, cell.columns], scratch["h"].at[to]))
        for name in ("x", "dy"):
            if name in refs:
                pairs.append((refs[name].at[row, tokens(chunk), cell.head, cell.columns], scratch[name].at[to]))
        for name in ("b", "c"):
            if name in refs:
                pairs.append((refs[name].at[row, tokens(chunk), cell.group], scratch[name].at[to]))
    return pairs


def _start(tiles: Tiles, cell: Cell, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Fill dh with the gradient of the final state, and `before` with 1 at [k, j] for j < k."""
    barrier = scratch["state_barrier"]
    plgpu.copy_gmem_to_smem(refs["dfinal"].at[cell.row, cell.head, :, cell.columns], scratch["dh"].at[0], barrier)
    plgpu.barrier_wait(barrier)
    scratch["zero"][...] = jnp.zeros(scratch["zero"].shape, jnp.int32)
    for start in tiles.row_starts:
        rows = pl.ds(start, ROWS)
        value = plgpu.load(scratch["dh"].at[0, rows], layout=wgmma.MATRIX)
        wgmma.store([ref.at[rows] for ref in wgmma.refs_of(tiles, scratch["dh_operand"])], value)
    if "before" in scratch:
        row, column = wgmma.indices()
        scratch["before"][0] = jnp.where(column < row, 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _kernel(*args: Any, names: tuple[str, ...], tiles: Tiles, **scratch: Any) -> None:
    """Walk the chunks of one row and head, from the last."""
    refs = dict(zip(names, args, strict=True))
    blocks = tiles.backward
    cell = tiles.cell(blocks)
    outputs = "dy" in refs
    skip = refs["skip"][cell.head] if outputs else None
    _start(tiles, cell, refs, scratch)

    def body(step: jax.Array, slot: jax.Array, carry: None) -> None:
        step = tiles.chunks - 1 - step
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        chunk = _Chunk(cell, refs, scratch, slot)
        pair_sums = chunk.pairs() if outputs else None
        place = (cell.row, tokens(step), cell.head)
        chunk.x_gradient(pair_sums, skip, lambda ref: ref.at[(*place, cell.columns)])
        chunk.b_gradient(lambda ref: ref.at[(cell.part, *place)])
        if outputs:
            chunk.c_gradient(lambda ref: ref.at[(cell.part, *place)])
        chunk.state_gradient(step)
        return carry

    copies = functools.partial(_copies, cell, refs, scratch)
    stream(blocks.stages, tiles.chunks, copies, scratch["barrier"], body, None)
    plgpu.copy_smem_to_gmem(scratch["dh"].at[0], refs["dinitial"].at[cell.row, cell.head, :, cell.columns])
    plgpu.wait_smem_to_gmem(0)


def _scratch(tiles: Tiles, outputs: bool, io_dtype: Any, part_dtype: Any) -> dict[str, Any]:
    blocks = tiles.backward
    operand = functools.partial(wgmma.operand, tiles, blocks)
    values, state, stages = blocks.values, tiles.state_dim, blocks.stages
    scratch = {
        "rows": plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        "x": operand(CHUNK, values, stages),
        "b": operand(CHUNK, state, stages),
        "h": operand(state, values, stages),
        "zero": wgmma.ZERO,
        "dh": wgmma.matrix(state, values, jnp.float32),
        "dh_operand": operand(state, values),
        "dx": wgmma.matrix(CHUNK, values, io_dtype),
        "group": wgmma.matrix(CHUNK, state, part_dtype),
        "vectors": plgpu.SMEM((len(VECTORS) if outputs else 2, CHUNK), jnp.float32),
        "through": plgpu.SMEM((state,), jnp.float32),
        "barrier": plgpu.Barrier(num_arrivals=1 + tiles.terms * (5 if outputs else 3), num_barriers=stages),
        "state_barrier": plgpu.Barrier(),
    }
    if outputs:
        squares = operand(CHUNK, CHUNK, squares_of(tiles.terms))
        scratch |= {
            "c": operand(CHUNK, state, stages),
            "dy": operand(CHUNK, values, stages),
            "squares": squares,
            "read": operand(CHUNK, values),
            "before": plgpu.SMEM((1, CHUNK, CHUNK), jnp.bfloat16, transforms=squares.transforms),
        }
    return scratch


def run_backward(
    tiles: Tiles,
    x: jax.Array,
    rows: jax.Array,
    b: jax.Array,
    c: jax.Array | None,
    skip: jax.Array | None,
    saved: jax.Array,
    dy: jax.Array | None,
    dfinal: jax.Array,
    io_dtype: Any,
) -> dict[str, jax.Array]:
    """Run the kernel on the operands of `run_forward`, the states that it saved, dy and dfinal.

    The state alone: c, skip and dy None.

    Returns:
        dx [B, T, H, P] in `io_dtype`; db and dc [parts, B, T, H, N], parts to sum, in `io_dtype` where nothing is to be
        summed, else float32; vectors float32 [B, H, parts, chunks, names, Q] of VECTORS (the state alone: the first
        two); through [B, H, parts, chunks, N]; dinitial float32 [B, H, N, P].
    """
    outputs = dy is not None
    parts = tiles.head_dim // tiles.backward.values
    whole = parts == 1 and tiles.groups == tiles.num_heads
    part_dtype = jnp.dtype(io_dtype if whole else jnp.float32)
    operands: dict[str, Any] = {"x": x, "rows": rows, "b": b, "h": saved, "dfinal": dfinal}
    if outputs:
        operands |= {"c": c, "skip": skip, "dy": dy}
    by_head = (tiles.batch, tiles.length, tiles.num_heads)
    by_chunk = (tiles.batch, tiles.num_heads, parts, tiles.chunks)
    scratch = _scratch(tiles, outputs, io_dtype, part_dtype)
    results = {
        "dx": jax.ShapeDtypeStruct((*by_head, tiles.head_dim), io_dtype),
        "db": jax.ShapeDtypeStruct((parts, *by_head, tiles.state_dim), part_dtype),
        **({"dc": jax.ShapeDtypeStruct((parts, *by_head, tiles.state_dim), part_dtype)} if outputs else {}),
        "vectors": jax.ShapeDtypeStruct((*by_chunk, *scratch["vectors"].shape), jnp.float32),
        "through": jax.ShapeDtypeStruct((*by_chunk, tiles.state_dim), jnp.float32),
        "dinitial": jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
    }
    flops = matmul_flops(tiles, tiles.backward, outputs)[1]
    exponentials = parts * tiles.batch * tiles.length * tiles.num_heads * (CHUNK if outputs else 2)
    values = plgpu.kernel(
        functools.partial(_kernel, names=(*operands, *results), tiles=tiles),
        out_type=tuple(results.values()),
        scratch_types=scratch,
        compiler_params=PARAMS,
        kernel_name="ssd_backward" if outputs else "ssd_state_backward",
        **cost(flops, exponentials, (*operands.values(), *results.values())),
        **tiles.grid(tiles.backward),
    )(*operands.values())
    # The kernel's results come without the mesh axes over which they vary.
    return dict(zip(results, align_varying_axes(x, *values)[1:], strict=True))
