"""The backward GPU kernel: every gradient in one pass over x, b, c, dy and the kept states, from the last chunk back.

With h the state before the chunk, dh [N, P] the gradient of the state after it, W_ji = exp(s_i - s_j) for i >= j,
S_ji = b_j . c_i and G_ji = x_j . dy_i:

    dx_j = dt_j sum_i S_ji W_ji dy_i + dt_j exp(s_Q - s_j) b_j dh + d dy_j
    db_j = sum_i dt_j G_ji W_ji c_i + dt_j exp(s_Q - s_j) x_j dh^T
    dc_i = sum_j dt_j G_ji W_ji b_j + exp(s_i) dy_i h^T
    dh'  = exp(s_Q) dh + sum_i c_i^T exp(s_i) dy_i

The gradient of l_k sums everything whose decay spans token k: pairs j < k <= i, which the kernel sums with a triangular
product, reads of h at i >= k, writes into the next state from j < k, and h to the next state, whose sums over a chunk
the caller takes. Sums only add; a difference of running sums loses the gradient under strong decay.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd import pallas_gpu_tiles as gpu
from pallas_kernels.ssd.block_sizes import squares_of
from pallas_kernels.ssd.kernel_vjp import vary_alike
from pallas_kernels.ssd.pallas_gpu_forward import stream
from pallas_kernels.ssd.pallas_gpu_tiles import CHUNK, ROWS, Cell, Decays, Tiles

VECTORS = ("dt", "writes", "spans", "reads", "skip")
"""One scalar a token that the kernel gives: gradients of dt and of the skip, and the parts of that of l."""


def _row_sums(value: jax.Array) -> jax.Array:
    return jnp.sum(value, axis=1)


def _within(sums: jax.Array) -> jax.Array:
    """Keep, of sums over j < k at [k, i], those with i >= k."""
    row, column = gpu.indices()
    return jnp.where(column >= row, sums, 0.0)


class _Squares:
    """Operands [Q, Q] by number: all in shared memory, or, where there is room for one, in registers until used."""

    def __init__(self, tiles: Tiles, ref: Any) -> None:
        self._slots = [gpu.refs_of(tiles, ref, slot) for slot in range(ref.shape[0] // tiles.pieces)]
        self._waiting: dict[int, jax.Array] = {}

    def put(self, number: int, value: jax.Array) -> None:
        """Keep an operand."""
        if len(self._slots) == 1:
            self._waiting[number] = value
        else:
            gpu.store(self._slots[number], value)

    def get(self, number: int) -> list[Any]:
        """Return an operand's pieces; one that had to wait replaces what `get` returned before."""
        if number not in self._waiting:
            return self._slots[number if len(self._slots) > 1 else 0]
        gpu.store(self._slots[0], self._waiting.pop(number))
        plgpu.commit_smem()
        return self._slots[0]


_PAIRS, _SCORES, _CROSS = range(3)


class _Chunk:
    """Differentiates one chunk: fills the shared memory that goes out, one result after another."""

    def __init__(self, cell: Cell, refs: dict[str, Any], scratch: dict[str, Any], slot: Any) -> None:
        self.tiles, self.cell, self.refs, self.scratch = cell.tiles, cell, refs, scratch
        self.outputs = "dy" in refs
        self.x, self.b, self.h = (gpu.refs_of(self.tiles, scratch[name], slot) for name in ("x", "b", "h"))
        self.dh = gpu.refs_of(self.tiles, scratch["dh_operand"])
        self.decays = Decays(scratch["rows"].at[slot])
        self.sums: dict[str, jax.Array] = {}
        if self.outputs:
            self.c, self.dy = (gpu.refs_of(self.tiles, scratch[name], slot) for name in ("c", "dy"))
            self.squares = _Squares(self.tiles, scratch["squares"])

    def pairs(self) -> None:
        """Form S W and dt G W, [j, i], and the sums of their product."""
        weights = self.decays.pairs_transposed()
        scores = gpu.dot(self.b, gpu.transposed(self.c))
        cross = gpu.dot(self.x, gpu.transposed(self.dy)) * weights
        pairs = cross * scores
        self.sums["dt"] = _row_sums(pairs)
        dt = gpu.down(self.decays.dt, CHUNK)
        for number, value in ((_PAIRS, dt * pairs), (_SCORES, scores * weights), (_CROSS, dt * cross)):
            self.squares.put(number, value)
        plgpu.commit_smem()
        before = gpu.dot([self.scratch["before"]], self.squares.get(_PAIRS))
        self.sums["spans"] = _row_sums(_within(before))

    def _send(self, name: str, value: jax.Array, buffer: str, target: Any) -> None:
        """Write a gradient out through a buffer in shared memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.scratch[buffer][...] = value.astype(self.scratch[buffer].dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.scratch[buffer], target(self.refs[name]))

    def x_gradient(self, skip: Any, target: Any) -> None:
        """dx, and what of dt, the decay and the skip goes with it."""
        values = self.x[0].shape[1]
        x = gpu.load(self.x)
        written = gpu.dot(self.b, self.dh) * gpu.down(self.decays.to_end, values)
        sums = _row_sums(written * x)
        self.sums["writes"] = self.decays.dt * sums
        self.sums["dt"] = sums + self.sums["dt"] if self.outputs else sums
        dt = gpu.down(self.decays.dt, values)
        if not self.outputs:
            self._send("dx", dt * written, "dx", target)
            return
        dy = gpu.load(self.dy)
        self.sums["skip"] = _row_sums(dy * x)
        written += gpu.dot(self.squares.get(_SCORES), self.dy)
        self._send("dx", dt * written + skip * dy, "dx", target)
        gpu.store(gpu.refs_of(self.tiles, self.scratch["read"]), gpu.down(self.decays.from_start, values) * dy)
        plgpu.commit_smem()

    def group_gradients(self, target: Any) -> None:
        """Form and send db and dc."""
        state = self.tiles.state_dim
        db = gpu.dot(self.x, gpu.transposed(self.dh)) * gpu.down(self.decays.dt * self.decays.to_end, state)
        if not self.outputs:
            self._send("db", db, "group", target)
            return
        cross = self.squares.get(_CROSS)
        db += gpu.dot(cross, self.c)
        self._send("db", db, "group", target)
        dc = gpu.dot(self.dy, gpu.transposed(self.h)) * gpu.down(self.decays.from_start, state)
        self.sums["reads"] = _row_sums(dc * gpu.load(self.c))
        dc += gpu.dot(gpu.transposed(cross), self.b)
        self._send("dc", dc, "group", target)

    def state_gradient(self, step: Any) -> None:
        """Replace dh by the gradient of the state before the chunk; send sum_P h dh exp(s_Q) [N]."""
        following = []
        for start in self.tiles.row_starts:
            rows = pl.ds(start, ROWS)
            kept = self.decays.whole * plgpu.load(self.scratch["dh"].at[rows], layout=gpu.MATRIX)
            self.scratch["through"][rows] = _row_sums(kept * gpu.load([ref.at[rows] for ref in self.h]))
            if self.outputs:
                read = gpu.refs_of(self.tiles, self.scratch["read"])
                kept += gpu.dot(gpu.transposed(gpu.columns_of(self.c, start, ROWS)), read)
            following.append(kept)
        # After all products of rows have read: where N = 96 they overlap.
        for start, value in zip(self.tiles.row_starts, following, strict=True):
            self.scratch["dh"][pl.ds(start, ROWS)] = value
            gpu.store([ref.at[pl.ds(start, ROWS)] for ref in self.dh], value)
        for k, name in enumerate(VECTORS):
            if name in self.sums:
                self.scratch["vectors"][k] = self.sums[name]
        plgpu.commit_smem()
        place = (self.cell.row, self.cell.head, self.cell.part, step)
        plgpu.copy_smem_to_gmem(self.scratch["vectors"], self.refs["vectors"].at[place])
        plgpu.copy_smem_to_gmem(self.scratch["through"], self.refs["through"].at[place])


def _copies(cell: Cell, refs: dict[str, Any], scratch: dict[str, Any], step: Any, slot: Any) -> list[tuple[Any, Any]]:
    """Sources and destinations of what a chunk needs; step 0 is the last chunk."""
    chunk = cell.tiles.chunks - 1 - step
    pairs = [(refs["rows"].at[cell.row, cell.head, chunk], scratch["rows"].at[slot])]
    for piece in range(cell.tiles.pieces):
        row, to = cell.piece_row(piece), slot * cell.tiles.pieces + piece
        pairs.append((refs["h"].at[row, cell.head, chunk, :, cell.columns], scratch["h"].at[to]))
        for name in ("x", "dy"):
            if name in refs:
                pairs.append((refs[name].at[row, gpu.tokens(chunk), cell.head, cell.columns], scratch[name].at[to]))
        for name in ("b", "c"):
            if name in refs:
                pairs.append((refs[name].at[row, gpu.tokens(chunk), cell.group], scratch[name].at[to]))
    return pairs


def _start(tiles: Tiles, cell: Cell, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Fill dh with the gradient of the final state, and `before` with 1 at [k, j] for j < k."""
    barrier = scratch["state_barrier"]
    plgpu.copy_gmem_to_smem(refs["dfinal"].at[cell.row, cell.head, :, cell.columns], scratch["dh"], barrier)
    plgpu.barrier_wait(barrier)
    for start in tiles.row_starts:
        rows = pl.ds(start, ROWS)
        value = plgpu.load(scratch["dh"].at[rows], layout=gpu.MATRIX)
        gpu.store([ref.at[rows] for ref in gpu.refs_of(tiles, scratch["dh_operand"])], value)
    if "before" in scratch:
        row, column = gpu.indices()
        scratch["before"][...] = jnp.where(column < row, 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _kernel(*args: Any, names: tuple[str, ...], tiles: Tiles, **scratch: Any) -> None:
    """Walk the chunks of one row and head, backwards."""
    refs = dict(zip(names, args, strict=True))
    blocks = tiles.backward
    cell = tiles.cell(blocks)
    outputs = "dy" in refs
    skip = refs["skip"][cell.head] if outputs else None
    _start(tiles, cell, refs, scratch)

    def body(step: jax.Array, slot: jax.Array, carry: None) -> None:
        step = tiles.chunks - 1 - step
        chunk = _Chunk(cell, refs, scratch, slot)
        if outputs:
            chunk.pairs()
        place = (cell.row, gpu.tokens(step), cell.head)
        chunk.x_gradient(skip, lambda ref: ref.at[(*place, cell.columns)])
        chunk.group_gradients(lambda ref: ref.at[(cell.part, *place)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        chunk.state_gradient(step)
        return carry

    copies = functools.partial(_copies, cell, refs, scratch)
    stream(blocks.stages, tiles.chunks, copies, scratch["barrier"], body, None)
    plgpu.copy_smem_to_gmem(scratch["dh"], refs["dinitial"].at[cell.row, cell.head, :, cell.columns])
    plgpu.wait_smem_to_gmem(0)


def _scratch(tiles: Tiles, outputs: bool, io_dtype: Any, part_dtype: Any) -> dict[str, Any]:
    blocks = tiles.backward
    operand = functools.partial(gpu.operand, tiles, blocks)
    values, state, stages = blocks.values, tiles.state_dim, blocks.stages
    scratch = {
        "rows": plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        "x": operand(CHUNK, values, stages),
        "b": operand(CHUNK, state, stages),
        "h": operand(state, values, stages),
        "dh": gpu.matrix(state, values, jnp.float32),
        "dh_operand": operand(state, values),
        "dx": gpu.matrix(CHUNK, values, io_dtype),
        "group": gpu.matrix(CHUNK, state, part_dtype),
        "vectors": plgpu.SMEM((len(VECTORS) if outputs else 2, CHUNK), jnp.float32),
        "through": plgpu.SMEM((state,), jnp.float32),
        "barrier": plgpu.Barrier(num_arrivals=1 + tiles.pieces * (5 if outputs else 3), num_barriers=stages),
        "state_barrier": plgpu.Barrier(),
    }
    if outputs:
        squares = operand(CHUNK, CHUNK, squares_of(tiles.pieces))
        scratch |= {
            "c": operand(CHUNK, state, stages),
            "dy": operand(CHUNK, values, stages),
            "squares": squares,
            "read": operand(CHUNK, values),
            "before": plgpu.SMEM((CHUNK, CHUNK), jnp.bfloat16, transforms=squares.transforms),
        }
    return scratch


def backward(
    tiles: Tiles,
    x: jax.Array,
    rows: jax.Array,
    b: jax.Array,
    c: jax.Array | None,
    skip: jax.Array | None,
    kept: jax.Array,
    dy: jax.Array | None,
    dfinal: jax.Array,
    io_dtype: Any,
) -> dict[str, jax.Array]:
    """Run the kernel on what `forward` took and kept, on dy shaped as x and dfinal as the final state.

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
    operands: dict[str, Any] = {"x": x, "rows": rows, "b": b, "h": kept, "dfinal": dfinal}
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
    moved = sum(value.size * value.dtype.itemsize for value in (*operands.values(), *results.values()))
    exponentials = parts * tiles.batch * tiles.length * tiles.num_heads * (CHUNK if outputs else 2)
    values = plgpu.kernel(
        functools.partial(_kernel, names=(*operands, *results), tiles=tiles),
        out_type=tuple(results.values()),
        scratch_types=scratch,
        compiler_params=gpu.PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=gpu.multiply_adds(tiles, tiles.backward, outputs)[1],
            bytes_accessed=moved,
            transcendentals=exponentials,
        ),
        kernel_name="ssd_backward" if outputs else "ssd_state_backward",
        **tiles.grid(tiles.backward),
    )(*operands.values())
    # The kernel's results come without the mesh axes over which they vary.
    return dict(zip(results, vary_alike(x, *values)[1:], strict=True))
