"""SSD as one loop over blocks of chunks whose body does everything for a block: the fast form on a CPU.

With s the running sum of l inside a chunk of Q tokens, h the state before it and w_ij = exp(s_i - s_j) for i >= j:

    y_i = sum_{j <= i} (c_i . b_j) w_ij dt_j x_j + exp(s_i) h c_i + d x_i
    h'  = exp(s_Q) h + sum_j exp(s_Q - s_j) dt_j x_j b_j^T

A block is U chunks, all of them in one array [U, ...]; only h goes from one to the next. Just the block's inputs, its
Q x Q matrices and the states of one row are alive at a time, so they stay in cache and memory is linear in T. Rows are
taken one after another for the same reason. (A batch sharded over devices wants `jax.shard_map` around this, or the
associative form.)

XLA divides an operation on a CPU among the cores only where it is large, and two operations run at the same time only
where both are ready. Chunk by chunk the loop stayed on one core. With eight chunks at once gradients take 0.7 of the
time on two cores; all of it together is a third more work, further from the cores, so that 16 are slower again.

The backward pass is written by hand: a second loop from the last block to the first that starts from the state before
each block and recomputes the rest. The gradient of l is formed from sums that only add (what spans token k), never as a
difference of sums over the row: those lose it under strong decay.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssd import decay
from pallas_kernels.ssd.kernel_vjp import NAME
from pallas_kernels.ssd.protocol import SsdInputs

supports_output_start = False
partitionable = True

_CHUNK = 32
"""Tokens of one chunk at most: the fastest of 16, 32 and 64, with blocks of the same number of tokens."""

_BLOCK = 8
"""Chunks of a block at most, a power of two: 4 left more of the work on one core, 16 went further out of the cache."""

_BLOCK_STATES = 4 * 2**20
"""Bytes of the states before a block's chunks, at most: twice as many took longer than half as many."""


def chunks_of_a_block(chunks: int, state_bytes: int) -> int:
    """Return how many chunks to take at a time, of so many in a row, with one row's state of so many bytes."""
    most = min(_BLOCK, max(1, _BLOCK_STATES // state_bytes))
    block = 1 << (most.bit_length() - 1)
    # Padding to whole blocks may cost an eighth at most.
    while -chunks % block > chunks // 8:
        block //= 2
    return block


def _blocks(value: jax.Array, chunks: int, chunk: int) -> jax.Array:
    """[B, T, H] -> [B, blocks, U, H, Q], for the small arrays of one scalar per token and head."""
    batch, _, num_heads = value.shape
    return value.reshape(batch, -1, chunks, chunk, num_heads).swapaxes(-1, -2)


_ZERO = np.int32(0)  # start indices of one slice must have one type, in 64-bit mode too


def _tokens(value: jax.Array) -> jax.Array:
    """[B, blocks, U, H, Q] -> [B, T, H]."""
    return value.swapaxes(-1, -2).reshape(value.shape[0], -1, value.shape[3])


def _slice(value: jax.Array, row: jax.Array, k: jax.Array, chunks: int, chunk: int) -> jax.Array:
    """Block k of one row of [B, T, ...] as float32 [U, Q, ...]."""
    start: tuple[Any, ...] = (row, k * (chunks * chunk), *(_ZERO for _ in value.shape[2:]))
    block = jax.lax.dynamic_slice(value, start, (1, chunks * chunk, *value.shape[2:]))
    return block.reshape(chunks, chunk, *value.shape[2:]).astype(jnp.float32)


def _store(whole: jax.Array, part: jax.Array, row: jax.Array, k: jax.Array) -> jax.Array:
    """Write `part` [U, H, Q, P] as block k of one row of `whole` [B, T, H, P]."""
    part = part.swapaxes(1, 2).reshape(1, -1, *whole.shape[2:]).astype(whole.dtype)
    return jax.lax.dynamic_update_slice(whole, part, (row, k * part.shape[1], _ZERO, _ZERO))


# [U, Q, H, P] -> [U, H, Q, P] and [U, H, P, Q].
_HEADS_FIRST, _TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)


def _row_sums(value: jax.Array) -> jax.Array:
    """Sum over the last axis, as a matmul: a reduction inside a loop is not vectorised on a CPU."""
    return (value @ jnp.ones((value.shape[-1], 1), value.dtype))[..., 0]


# R = H / G heads share a group's b and c. Where R is 1 its axis is left out: XLA copies what has it.


def _to_heads(value: jax.Array, num_heads: int) -> jax.Array:
    """[U, G, ...] -> [U, H, ...], the same for every head of a group."""
    return value if value.shape[1] == num_heads else jnp.repeat(value, num_heads // value.shape[1], axis=1)


def _sum_over_heads(value: jax.Array, groups: int) -> jax.Array:
    """[U, H, ...] -> [U, G, ...], summed over a group's heads."""
    if value.shape[1] == groups:
        return value
    ratio = value.shape[1] // groups
    flat = value.reshape(value.shape[0], groups, ratio, -1)
    return (jnp.ones((1, ratio), value.dtype) @ flat).reshape(value.shape[0], groups, *value.shape[2:])


def _state_update(keys_transposed: jax.Array, values: jax.Array) -> jax.Array:
    """Return sum_j keys_j values_j^T by group: [U,G,N,Q] and [U,H,Q,P] -> [U,G,N,R*P]."""
    chunks, groups = keys_transposed.shape[:2]
    num_heads, chunk, head_dim = values.shape[1:]
    if num_heads != groups:
        values = values.reshape(chunks, groups, -1, chunk, head_dim).swapaxes(2, 3)
        values = values.reshape(chunks, groups, chunk, num_heads // groups * head_dim)
    return keys_transposed @ values


def _state_update_scaled(keys_transposed: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `_state_update` with every token scaled, [U, H, Q]: on the transposed side, if that is by head."""
    if values.shape[1] == keys_transposed.shape[1]:
        return _state_update(keys_transposed * scale[..., None, :], values)
    return _state_update(keys_transposed, values * scale[..., None])


def _matmul_states(keys: jax.Array, states: jax.Array, num_heads: int) -> jax.Array:
    """Multiply keys [U,G,Q,N] by states [U,G,N,R*P]: [U,H,Q,P]."""
    values = keys @ states
    chunks, groups, chunk, width = values.shape
    if groups == num_heads:
        return values
    by_head = values.reshape(chunks, groups, chunk, -1, width * groups // num_heads).swapaxes(2, 3)
    return by_head.reshape(chunks, num_heads, chunk, -1)


def _matmul_states_transposed(values: jax.Array, states: jax.Array) -> jax.Array:
    """Multiply values [U,H,Q,P] by transposed states [U,G,N,R*P]: [U,H,Q,N]."""
    if values.shape[1] == states.shape[1]:
        return values @ states.swapaxes(-1, -2)
    chunks, num_heads, _, head_dim = values.shape
    by_head = states.reshape(chunks, states.shape[1], -1, num_heads // states.shape[1], head_dim)
    return values @ by_head.transpose(0, 1, 3, 4, 2).reshape(chunks, num_heads, head_dim, -1)


def _by_head_sums(states: jax.Array, num_heads: int) -> jax.Array:
    """Sum states [U, G, N, R*P] over N and P: [U, H]."""
    chunks, groups, state_dim, width = states.shape
    if groups != num_heads:
        states = states.reshape(chunks, groups, state_dim, num_heads // groups, width * groups // num_heads)
    return jnp.sum(_row_sums(states), axis=2).reshape(chunks, num_heads)


def _state_passing(
    h: jax.Array, chunk_decay: jax.Array, update: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return the state [G,N,R*P] after a block, and before each of its chunks [U,G,N,R*P] (reversed: after each).

    chunk_decay [U, H] over each chunk, update [U, G, N, R*P] of each chunk.
    """
    chunks, num_heads = chunk_decay.shape
    groups, state_dim, width = h.shape
    heads = () if groups == num_heads else (num_heads // groups,)
    by_head, states = (groups, state_dim, *heads, width * groups // num_heads), []
    chunk_decay, update, h = (
        chunk_decay.reshape(chunks, groups, 1, *heads, 1),
        update.reshape(chunks, *by_head),
        h.reshape(by_head),
    )
    # Unrolled: XLA makes one operation of them all, which it divides among the cores.
    for u in reversed(range(chunks)) if reverse else range(chunks):
        states.append(h)
        h = chunk_decay[u] * h + update[u]
    before = jnp.stack(states[::-1] if reverse else states)
    return h.reshape(groups, state_dim, width), before.reshape(chunks, groups, state_dim, width)


class _Decays(NamedTuple):
    """Decays inside each chunk of a block, from running sums s of the log decay."""

    coarse: jax.Array
    fine: jax.Array
    chunk: jax.Array

    @classmethod
    def make(cls, coarse: jax.Array, fine: jax.Array) -> "_Decays":
        """Sum the coarse and the fine parts of l [U, H, Q]; `chunk` is exp(s_Q) [U, H]."""
        # Matmuls, not cumsum: XLA fuses a slice of the loop's inputs into what reads it, which then is not
        # vectorised (8 ns an exponential instead of 1). The result of a matmul is a buffer of its own.
        upto = jnp.tri(coarse.shape[-1], dtype=jnp.float32).T
        chunk = jnp.exp(_row_sums(coarse) + _row_sums(fine))
        return cls(coarse @ upto, fine @ upto, chunk)

    def from_start(self) -> jax.Array:
        """Return exp(s_i)."""
        return jnp.exp(self.coarse + self.fine)

    def to_end(self) -> jax.Array:
        """Return exp(s_Q - s_j)."""
        return jnp.exp((self.coarse[..., -1:] - self.coarse) + (self.fine[..., -1:] - self.fine))

    def segsum(self) -> jax.Array:
        """Return exp(s_i - s_j) at [j, i] for i >= j, else 0: [U, H, Q, Q]. Masked before the exponential."""
        exponent = (self.coarse[..., None, :] - self.coarse[..., :, None]) + (
            self.fine[..., None, :] - self.fine[..., :, None]
        )
        causal = ~jnp.tri(self.coarse.shape[-1], k=-1, dtype=bool)
        return jnp.exp(jnp.where(causal, exponent, -jnp.inf))


def _forward(
    inputs: SsdInputs, chunk: int, chunks: int, *, save_states: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return y, the final state [B, G, N, R*P] and, if they are saved, the states before the blocks [B, blocks, ...].

    `inputs.initial_state` is [B, G, N, R*P], T whole blocks.
    """
    x, dt, log_decay, b, c, d, h = inputs
    rows, num_heads = x.shape[0], x.shape[2]
    by_block = tuple(_blocks(value, chunks, chunk) for value in (dt, *decay.split(log_decay)))
    blocks = by_block[0].shape[1]

    def body(row, carry, xs):
        h, y, states = carry
        k, dt_k, coarse, fine = xs
        if save_states:
            states = jax.lax.dynamic_update_slice(states, h[None, None], (row, k, _ZERO, _ZERO, _ZERO))
        decays = _Decays.make(coarse, fine)
        x_k, b_k, c_k = (_slice(value, row, k, chunks, chunk) for value in (x, b, c))
        x_k, c_k, b_transposed = x_k.transpose(_HEADS_FIRST), c_k.transpose(_HEADS_FIRST), b_k.transpose(_TRANSPOSED)
        dtx = x_k * dt_k[..., None]
        h, before = _state_passing(h, decays.chunk, _state_update(b_transposed, dtx * decays.to_end()[..., None]))
        scores = _to_heads(c_k @ b_transposed, num_heads) * decays.segsum().swapaxes(-1, -2)
        y_k = scores @ dtx
        y_k += _matmul_states(c_k, before, num_heads) * decays.from_start()[..., None]
        y_k += d[None, :, None, None] * x_k
        return (h, _store(y, y_k, row, k), states), None

    def whole_row(carry, xs):
        row, h, *by_block = xs
        (h, *carry), _ = jax.lax.scan(
            functools.partial(body, row), (h, *carry), (jnp.arange(blocks, dtype=jnp.int32), *by_block)
        )
        return tuple(carry), h

    states = jnp.zeros((rows, blocks if save_states else 0, *h.shape[1:]), jnp.float32)
    (y, states), h = jax.lax.scan(
        whole_row, (jnp.zeros_like(x), states), (jnp.arange(rows, dtype=jnp.int32), h, *by_block)
    )
    return y, h, states


def _log_decay_gradient(pairs: jax.Array, reads: jax.Array, writes: jax.Array, through: jax.Array) -> jax.Array:
    """Gradient of l_k [U, H, Q]: the sum over everything whose decay spans token k.

    pairs [U, H, Q, Q] at [j, i], j <= i: spans j < k <= i; reads [U, H, Q] of the state before the chunk, at i: k <= i;
    writes [U, H, Q] into the state after it, from j: j < k; through [U, H], from state to state: every k.
    """
    chunk = reads.shape[-1]
    since = jnp.tri(chunk, dtype=jnp.float32)  # [i, k]: i >= k
    before = 1.0 - since  # [j, k]: j < k
    spanning = (jnp.ones((1, chunk), jnp.float32) @ (before[None, None] * (pairs @ since)))[..., 0, :]
    return spanning + reads @ since + writes @ before + through[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _ssd(inputs, chunk, chunks):
    return _forward(inputs, chunk, chunks, save_states=False)[:2]


def _ssd_fwd(inputs, chunk, chunks):
    results = _forward(inputs, chunk, chunks, save_states=True)
    y, final, states = checkpoint_name(results, NAME)
    return (y, final), (inputs._replace(initial_state=None), states)


def _ssd_bwd(chunk, chunks, residuals, cotangents):
    (x, dt, log_decay, b, c, d, _), states = residuals
    dy, dh = cotangents
    rows, _, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    by_block = tuple(_blocks(value, chunks, chunk) for value in (dt, *decay.split(log_decay)))
    blocks = states.shape[1]

    def state_before(row, k):
        return jax.lax.dynamic_slice(states, (row, k, _ZERO, _ZERO, _ZERO), (1, 1, *states.shape[2:]))[0, 0]

    def body(row, carry, xs):
        dh, h, dx, db, dc, dd = carry
        k, dt_k, coarse, fine = xs
        decays = _Decays.make(coarse, fine)
        from_start, to_end, weights = decays.from_start(), decays.to_end(), decays.segsum()
        x_k, dy_k, b_k, c_k = (_slice(value, row, k, chunks, chunk) for value in (x, dy, b, c))
        b_transposed, c_transposed = b_k.transpose(_TRANSPOSED), c_k.transpose(_TRANSPOSED)
        x_k, dy_k, b_k, c_k = (value.transpose(_HEADS_FIRST) for value in (x_k, dy_k, b_k, c_k))

        _, before = _state_passing(h, decays.chunk, _state_update_scaled(b_transposed, x_k, dt_k * to_end))
        if state_dim <= head_dim:
            dupdate = _state_update_scaled(c_transposed, dy_k, from_start)
        else:  # Scaled on the narrower side. (It is not faster above.)
            dupdate = _state_update(c_transposed, dy_k * from_start[..., None])
        dh, dafter = _state_passing(dh, decays.chunk, dupdate, reverse=True)

        # Q x Q arrays are [j, i]: most matmuls below then read their operands in memory order. dt_j goes to
        # them and to results: without it the matmuls take x as it is.
        scores = _to_heads(b_k @ c_transposed, num_heads) * weights
        dscores = x_k @ dy_k.swapaxes(-1, -2)
        pairs = dscores * scores
        dcb = _sum_over_heads(dscores * (weights * dt_k[..., None]), groups)
        dx_end = _matmul_states(b_k, dafter, num_heads)
        dc_start = _matmul_states_transposed(dy_k, before)
        dx_k = (scores @ dy_k + dx_end * to_end[..., None]) * dt_k[..., None] + d[None, :, None, None] * dy_k
        db_k = dcb @ c_k + _sum_over_heads(_matmul_states_transposed(x_k, dafter) * (dt_k * to_end)[..., None], groups)
        dc_k = _times_transposed(dcb, b_k) + _sum_over_heads(dc_start * from_start[..., None], groups)

        ddtx_end = _row_sums(dx_end * x_k) * to_end
        dl_k = _log_decay_gradient(
            pairs=pairs * dt_k[..., None],
            reads=_row_sums(dc_start * _to_heads(c_k, num_heads)) * from_start,
            writes=ddtx_end * dt_k,
            through=decays.chunk * _by_head_sums(before * dafter, num_heads),
        )
        ddt_k = _row_sums(pairs) + ddtx_end

        dx, db, dc = _store(dx, dx_k, row, k), _store(db, db_k, row, k), _store(dc, dc_k, row, k)
        dd += jnp.sum(_row_sums(dy_k * x_k), axis=(0, 2))
        # The next state is fetched here, into the carry, so that it is an array of its own: see `_Decays.make`.
        return (dh, state_before(row, jnp.maximum(k - 1, 0)), dx, db, dc, dd), (ddt_k, dl_k)

    def whole_row(carry, xs):
        row, dh, *by_block = xs
        (dh, _, *carry), gradients = jax.lax.scan(
            functools.partial(body, row),
            (dh, state_before(row, np.int32(blocks - 1)), *carry),
            (jnp.arange(blocks, dtype=jnp.int32), *by_block),
            reverse=True,
        )
        return tuple(carry), (dh, gradients)

    # Every element of the first three is overwritten. Of different values, since equal ones XLA makes once and copies.
    init = (*(jnp.full_like(value, k) for k, value in enumerate((x, b, c))), jnp.zeros_like(d))
    (dx, db, dc, dd), (dh, (ddt, dl)) = jax.lax.scan(
        whole_row, init, (jnp.arange(rows, dtype=jnp.int32), dh, *by_block)
    )
    return (SsdInputs(dx, _tokens(ddt), _tokens(dl), db, dc, dd, dh),)


def _times_transposed(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return left^T right: [U, G, Q, Q] and [U, G, Q, N] -> [U, G, Q, N]."""
    # The identity makes XLA transpose `left` and multiply with its faster library, which takes no transposed left side.
    transposed = jnp.einsum("ugji,jk->ugik", left, jnp.eye(left.shape[-1], dtype=left.dtype))
    return transposed @ right


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def _pad(value: jax.Array, amount: int) -> jax.Array:
    return jnp.pad(value, ((0, 0), (0, amount)) + ((0, 0),) * (value.ndim - 2)) if amount else value


def unsupported_reason(x: jax.Array, b: jax.Array) -> str | None:
    """Return None: every call is supported."""
    del x, b
    return None


def forward(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
    """Run chunked SSD as `protocol.SsdImplementation.forward` says. Chunks are at most 32 tokens."""
    del output_start
    x, dt, log_decay, b, c, d, initial_state = inputs
    batch, length, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    chunk = min(chunk_size, length, _CHUNK)
    chunks = chunks_of_a_block(-(-length // chunk), 4 * num_heads * head_dim * state_dim)
    # A tail with dt = 0 and l = 0 leaves the state as it is.
    x, dt, log_decay, b, c = (_pad(value, -length % (chunks * chunk)) for value in (x, dt, log_decay, b, c))
    skip = jnp.zeros((num_heads,), jnp.float32) if d is None else d
    ratio = num_heads // groups
    state = initial_state.reshape(batch, groups, ratio, head_dim, state_dim).transpose(0, 1, 4, 2, 3)
    state = state.reshape(batch, groups, state_dim, ratio * head_dim)
    y, state = _ssd(SsdInputs(x, dt, log_decay, b, c, skip, state), chunk, chunks)
    state = state.reshape(batch, groups, state_dim, ratio, head_dim).transpose(0, 1, 3, 4, 2)
    return y[:, :length], state.reshape(initial_state.shape)


def final_state(inputs: SsdInputs, chunk_size: int) -> jax.Array:
    """Return the final state of `forward` alone, float32 [B,H,P,N]. Chunks are of chunk_size tokens."""
    x, dt, log_decay, b, _, _, initial_state = inputs
    batch, length, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    chunk = min(chunk_size, length)

    def chunked(value: jax.Array, *heads: int) -> jax.Array:
        value = _pad(value, -length % chunk)
        return jnp.moveaxis(value.reshape(batch, -1, chunk, *heads, *value.shape[3:]), 1, 0)

    @jax.checkpoint
    def body(h: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_k, dt_k, l_k, b_k = xs
        l_k = jnp.moveaxis(l_k, 1, -1)
        scale = dt_k * jnp.moveaxis(decay.to_end(l_k), -1, 1)
        chunk_decay = decay.from_start(l_k)[..., -1]
        dtx = x_k.astype(jnp.float32) * scale[..., None]
        return chunk_decay[..., None, None] * h + jnp.einsum("bjgrp,bjgn->bgrpn", dtx, b_k.astype(jnp.float32)), None

    heads = (groups, num_heads // groups)
    xs = (chunked(x, *heads), chunked(dt, *heads), chunked(log_decay, *heads), chunked(b, groups))
    state, _ = jax.lax.scan(body, initial_state.reshape(batch, *heads, head_dim, state_dim), xs)
    return state.reshape(initial_state.shape)
