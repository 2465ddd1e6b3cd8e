"""SSD as one loop over chunks whose body does everything for a chunk: the fast form on a CPU.

With s the running sum of l inside a chunk of Q tokens, h the state before it and w_ij = exp(s_i - s_j) for i >= j:

    y_i = sum_{j <= i} (c_i . b_j) w_ij dt_j x_j + exp(s_i) h c_i + d x_i
    h'  = exp(s_Q) h + sum_j exp(s_Q - s_j) dt_j x_j b_j^T

Only the chunk's inputs, its Q x Q products and the state of one row are alive at a time, so they stay in cache and
memory is linear in T. Rows are taken one after another for the same reason: with N = 64, four together took 1.2 to 1.6
times as long. (A batch sharded over devices wants `jax.shard_map` around this, or the associative form.)

The backward pass is written by hand: a second loop from the last chunk to the first that starts from the state before
each chunk and recomputes the rest. Of long rows only the state before every span of chunks is kept, and those between
are computed again, a span at a time. The gradient of l is formed from sums that only add (what spans token k), never
as a difference of sums over the row: those lose it under strong decay.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssd import decay
from pallas_kernels.ssd.kernel_vjp import NAME

_CHUNK = 32
"""Tokens of one chunk at most: the fastest of 16, 32, 64 and 128 at every size measured."""

_SPAN = 16
"""Chunks of a span at most: 8 were slower, 32 no faster."""

_KEEP_ALL = 16 * 2**20
"""Bytes of states up to which all are kept: beyond, fresh pages for them cost more than computing them again."""


def _chunks(value: jax.Array, num_chunks: int) -> jax.Array:
    """[B, T, G, R] -> [B, chunks, 1, G, R, Q], for the small arrays of one scalar per token and head."""
    batch, length, groups, ratio = value.shape
    chunked = value.reshape(batch, num_chunks, 1, length // num_chunks, groups, ratio)
    return jnp.moveaxis(chunked, 3, -1)


def _tokens(chunked: jax.Array) -> jax.Array:
    """[B, chunks, 1, G, R, Q] -> [B, T, G, R]."""
    batch, num_chunks, _, groups, ratio, chunk = chunked.shape
    return jnp.moveaxis(chunked, -1, 3).reshape(batch, num_chunks * chunk, groups, ratio)


def _slice(value: jax.Array, row: jax.Array, k: jax.Array, chunk: int) -> jax.Array:
    """Chunk k of one row of [B, T, ...] as float32 [1, Q, ...]."""
    start: tuple[Any, ...] = (row, k * chunk, *(0 for _ in value.shape[2:]))
    return jax.lax.dynamic_slice(value, start, (1, chunk, *value.shape[2:])).astype(jnp.float32)


def _store(whole: jax.Array, part: jax.Array, row: jax.Array, k: jax.Array) -> jax.Array:
    """Write `part` [1, Q, ...] as chunk k of one row of `whole` [B, T, ...]."""
    part = part.reshape(part.shape[:2] + whole.shape[2:]).astype(whole.dtype)
    return jax.lax.dynamic_update_slice(whole, part, (row, k * part.shape[1], *(0 for _ in whole.shape[2:])))


def _by_head(value: jax.Array, groups: int) -> jax.Array:
    """[B, Q, H, P] -> [B, G, R, Q, P]. Whole rows stay [B, T, H, P]: with R = 1 inside, XLA copies them."""
    batch, chunk, num_heads, head_dim = value.shape
    return value.reshape(batch, chunk, groups, num_heads // groups, head_dim).transpose(0, 2, 3, 1, 4)


def _row_sums(value: jax.Array) -> jax.Array:
    """Sum over the last axis, as a product: a reduction inside a loop is not vectorised on a CPU."""
    return (value @ jnp.ones((value.shape[-1], 1), value.dtype))[..., 0]


def _times_state(value: jax.Array, state: jax.Array) -> jax.Array:
    """[B, G, Q, N] times [B, G, N, R, P] -> [B, G, R, Q, P]."""
    # Asked for in one einsum, XLA computes the transpose of it from transposed operands: twice the time.
    return jnp.einsum("bgqn,bgnrp->bgqrp", value, state).swapaxes(2, 3)


# [B, G, R, Q, P] -> [B, Q, G, R, P]; [B, Q, G, N] -> [B, G, Q, N] and back; [B, Q, G, N] -> [B, G, N, Q].
_HEADS_BACK = (0, 3, 1, 2, 4)
_GROUPS = (0, 2, 1, 3)
_GROUPS_TRANSPOSED = (0, 2, 3, 1)
# [B, G, R, P, N] -> [B, G, N, R, P] and back.
_STATE, _STATE_BACK = (0, 1, 4, 2, 3), (0, 1, 3, 4, 2)


def _split_spans(by_chunk: tuple[jax.Array, ...], spans: int) -> tuple[jax.Array, ...]:
    """[chunks, ...] -> [spans, chunks of one, ...]."""
    return jax.tree.map(lambda value: value.reshape(spans, -1, *value.shape[1:]), by_chunk)


class _Decays(NamedTuple):
    """Decays inside one chunk, from running sums s of the log decay; each [B, G, R, Q] unless said otherwise."""

    coarse: jax.Array
    fine: jax.Array

    @classmethod
    def make(cls, coarse: jax.Array, fine: jax.Array, upto: jax.Array) -> "_Decays":
        """Sum the coarse and the fine parts of l; `upto` is 1 at [k, i] for k <= i."""
        # A product, not cumsum: XLA fuses a slice of the loop's inputs into what reads it, which then is not
        # vectorised (8 ns an exponential instead of 1). A product's result is a buffer of its own.
        return cls(coarse @ upto, fine @ upto)

    def from_start(self) -> jax.Array:
        """Return exp(s_i)."""
        return jnp.exp(self.coarse + self.fine)

    def to_end(self) -> jax.Array:
        """Return exp(s_Q - s_j)."""
        return jnp.exp((self.coarse[..., -1:] - self.coarse) + (self.fine[..., -1:] - self.fine))

    def pairs(self) -> jax.Array:
        """Return exp(s_i - s_j) at [j, i] for i >= j, else 0: [B, G, R, Q, Q]. Masked before the exponential."""
        exponent = (self.coarse[..., None, :] - self.coarse[..., :, None]) + (
            self.fine[..., None, :] - self.fine[..., :, None]
        )
        causal = ~jnp.tri(self.coarse.shape[-1], k=-1, dtype=bool)
        return jnp.exp(jnp.where(causal, exponent, -jnp.inf))


def _advance(h: jax.Array, written: jax.Array, b_transposed: jax.Array, decays: _Decays) -> jax.Array:
    """Return the state after a chunk that writes [B, G, R, Q, P] under the keys [B, G, N, Q]."""
    kept = decays.from_start()[..., -1][:, :, None, :, None] * h
    return kept + jnp.einsum("bgnj,bgrjp->bgnrp", b_transposed, written * decays.to_end()[..., None])


def _forward(
    x: jax.Array,
    dt: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    h: jax.Array,
    chunk: int,
    spans: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return y, the final state [B, G, N, R, P] and the states before the spans [B, spans, 1, G, N, R, P]."""
    num_chunks, groups = x.shape[1] // chunk, b.shape[2]
    upto = jnp.tri(chunk, dtype=jnp.float32).T

    def body(row, carry, xs):
        h, y = carry
        k, dt_k, coarse, fine = xs
        decays = _Decays.make(coarse, fine, upto)
        x_k = _by_head(_slice(x, row, k, chunk), groups)
        # The state lies as [N, R, P], so that one transposed chunk, of b, serves both products that need one.
        c_k = _slice(c, row, k, chunk).transpose(_GROUPS)
        b_transposed = _slice(b, row, k, chunk).transpose(_GROUPS_TRANSPOSED)
        written = x_k * dt_k[..., None]
        scores = (c_k @ b_transposed)[:, :, None] * decays.pairs().swapaxes(-1, -2)
        y_k = scores @ written
        y_k += _times_state(c_k, h) * decays.from_start()[..., None]
        y_k += d[:, :, None, None] * x_k
        y = _store(y, y_k.transpose(_HEADS_BACK), row, k)
        return (_advance(h, written, b_transposed, decays), y), None

    def span(row, carry, xs):
        return jax.lax.scan(functools.partial(body, row), carry, xs)[0], carry[0]

    def whole_row(y, xs):
        row, h, *by_chunk = xs
        by_chunk = _split_spans((jnp.arange(num_chunks), *by_chunk), spans)
        (h, y), states = jax.lax.scan(functools.partial(span, row), (h, y), by_chunk)
        return y, (h, states)

    by_chunk = (_chunks(value, num_chunks) for value in (dt, *decay.split(log_decay)))
    y, (h, states) = jax.lax.scan(whole_row, jnp.zeros_like(x), (jnp.arange(x.shape[0]), h[:, None], *by_chunk))
    return y, h[:, 0], states


def _log_decay_gradient(pairs: jax.Array, reads: jax.Array, writes: jax.Array, through: jax.Array) -> jax.Array:
    """Gradient of l_k [B, G, R, Q]: the sum over everything whose decay spans token k.

    pairs [B, G, R, Q, Q] at [j, i], j <= i: spans j < k <= i; reads [B, G, R, Q] of the state before the chunk, at i:
    k <= i; writes [B, G, R, Q] into the state after it, from j: j < k; through [B, G, R], from state to state: every k.
    """
    chunk = reads.shape[-1]
    since = jnp.tri(chunk, dtype=jnp.float32)  # [i, k]: i >= k
    before = 1.0 - since  # [j, k]: j < k
    spanning = (jnp.ones((1, chunk)) @ (before * (pairs @ since)))[..., 0, :]
    return spanning + reads @ since + writes @ before + through[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _ssd(x, dt, log_decay, b, c, d, h, chunk, spans):  # noqa: ARG001
    return _forward(x, dt, log_decay, b, c, d, h, chunk, spans=1)[:2]


def _ssd_fwd(x, dt, log_decay, b, c, d, h, chunk, spans):
    y, final, states = checkpoint_name(_forward(x, dt, log_decay, b, c, d, h, chunk, spans), NAME)
    return (y, final), (x, dt, log_decay, b, c, d, states)


def _ssd_bwd(chunk, spans, residuals, cotangents):
    x, dt, log_decay, b, c, d, states = residuals
    dy, dh = cotangents
    num_chunks, groups = x.shape[1] // chunk, b.shape[2]
    upto = jnp.tri(chunk, dtype=jnp.float32).T

    def again(row, h, xs):
        k, dt_k, coarse, fine = xs
        written = _by_head(_slice(x, row, k, chunk), groups) * dt_k[..., None]
        b_transposed = _slice(b, row, k, chunk).transpose(_GROUPS_TRANSPOSED)
        return _advance(h, written, b_transposed, _Decays.make(coarse, fine, upto)), h

    def body(row, carry, xs):
        dh, dx, db, dc, dd = carry
        k, dt_k, coarse, fine, h = xs
        decays = _Decays.make(coarse, fine, upto)
        from_start, to_end, weights = decays.from_start()[..., None], decays.to_end()[..., None], decays.pairs()
        x_k, dy_k = (_by_head(_slice(value, row, k, chunk), groups) for value in (x, dy))
        b_k, c_k = (_slice(value, row, k, chunk).transpose(_GROUPS) for value in (b, c))
        c_transposed = _slice(c, row, k, chunk).transpose(_GROUPS_TRANSPOSED)
        written = x_k * dt_k[..., None]
        dy_start = dy_k * from_start

        # Q x Q arrays are [j, i]: most products below then read their operands as they lie in memory.
        scores = jnp.einsum("bgjn,bgin->bgji", b_k, c_k)[:, :, None] * weights
        dscores = jnp.einsum("bgrjp,bgrip->bgrji", written, dy_k)
        dproducts = jnp.sum(dscores * weights, axis=2)
        dwritten_end = _times_state(b_k, dh) * to_end
        dwritten = scores @ dy_k + dwritten_end
        dc_start = jnp.einsum("bgrip,bgnrp->bgrin", dy_start, h)
        dx_k = dwritten * dt_k[..., None] + d[:, :, None, None] * dy_k
        db_k = dproducts @ c_k + jnp.einsum("bgrjp,bgnrp->bgjn", written * to_end, dh)
        dc_k = dproducts.swapaxes(-1, -2) @ b_k + jnp.sum(dc_start, axis=2)

        decay_k = from_start[..., -1, 0]
        dl_k = _log_decay_gradient(
            pairs=dscores * scores,
            reads=_row_sums(dc_start * c_k[:, :, None]),
            writes=_row_sums(dwritten_end * written),
            through=decay_k * jnp.sum(_row_sums(h * dh), axis=2),
        )
        ddt_k = _row_sums(dwritten * x_k)

        dh = decay_k[:, :, None, :, None] * dh + jnp.einsum("bgni,bgrip->bgnrp", c_transposed, dy_start)
        dx = _store(dx, dx_k.transpose(_HEADS_BACK), row, k)
        db, dc = _store(db, db_k.transpose(_GROUPS), row, k), _store(dc, dc_k.transpose(_GROUPS), row, k)
        dd += jnp.sum(_row_sums(dy_k * x_k), axis=(0, 3))
        return (dh, dx, db, dc, dd), (ddt_k, dl_k)

    def span(row, carry, xs):
        *by_chunk, h = xs
        h = h[None] if spans == num_chunks else jax.lax.scan(functools.partial(again, row), h, tuple(by_chunk))[1]
        return jax.lax.scan(functools.partial(body, row), carry, (*by_chunk, h), reverse=True)

    def whole_row(carry, xs):
        row, dh, *by_chunk, states = xs
        by_chunk = _split_spans((jnp.arange(num_chunks), *by_chunk), spans)
        (dh, *carry), gradients = jax.lax.scan(
            functools.partial(span, row), (dh, *carry), (*by_chunk, states), reverse=True
        )
        return tuple(carry), (dh, jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:]), gradients))

    by_chunk = (_chunks(value, num_chunks) for value in (dt, *decay.split(log_decay)))
    init = tuple(jnp.zeros_like(value) for value in (x, b, c, d))
    xs = (jnp.arange(x.shape[0]), dh[:, None], *by_chunk, states)
    (dx, db, dc, dd), (dh, (ddt, dl)) = jax.lax.scan(whole_row, init, xs)
    return dx, _tokens(ddt), _tokens(dl), db, dc, dd, dh[:, 0]


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def _pad(value: jax.Array, amount: int) -> jax.Array:
    return jnp.pad(value, ((0, 0), (0, amount)) + ((0, 0),) * (value.ndim - 2)) if amount else value


def scan(
    x: jax.Array,
    dt: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None,
    initial_state: jax.Array,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Chunked SSD; shapes and result as `reference.scan`. Chunks are at most 32 tokens."""
    batch, length, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    chunk = min(chunk_size, length, _CHUNK)
    heads = (groups, num_heads // groups)
    skip = jnp.zeros((num_heads,), jnp.float32) if d is None else d
    chunks = -(-length // chunk)
    spans = chunks if initial_state.nbytes * chunks <= _KEEP_ALL else -(-chunks // _SPAN)
    # A tail with dt = 0 and l = 0 leaves the state as it is.
    tail = spans * -(-chunks // spans) * chunk - length
    x, dt, log_decay, b, c = (_pad(value, tail) for value in (x, dt, log_decay, b, c))
    padded = x.shape[1]
    y, state = _ssd(
        x,
        dt.reshape(batch, padded, *heads),
        log_decay.reshape(batch, padded, *heads),
        b,
        c,
        skip.reshape(heads),
        initial_state.reshape(batch, *heads, head_dim, state_dim).transpose(_STATE),
        chunk,
        spans,
    )
    state = state.transpose(_STATE_BACK).reshape(initial_state.shape)
    return y[:, :length], state


def final_state(
    x: jax.Array, dt: jax.Array, log_decay: jax.Array, b: jax.Array, initial_state: jax.Array, chunk_size: int
) -> jax.Array:
    """Return the last state of `scan` alone, float32 [B,H,P,N]."""
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
        kept = decay.from_start(l_k)[..., -1]
        written = x_k.astype(jnp.float32) * scale[..., None]
        return kept[..., None, None] * h + jnp.einsum("bjgrp,bjgn->bgrpn", written, b_k.astype(jnp.float32)), None

    heads = (groups, num_heads // groups)
    xs = (chunked(x, *heads), chunked(dt, *heads), chunked(log_decay, *heads), chunked(b, groups))
    state, _ = jax.lax.scan(body, initial_state.reshape(batch, *heads, head_dim, state_dim), xs)
    return state.reshape(initial_state.shape)
