"""SSD as one loop over chunks whose body does everything for a chunk: the fast form on a CPU.

With s the running sum of l inside a chunk of Q tokens, h the state before it and w_ij = exp(s_i - s_j) for i >= j:

    y_i = sum_{j <= i} (c_i . b_j) w_ij dt_j x_j + exp(s_i) h c_i + d x_i
    h'  = exp(s_Q) h + sum_j exp(s_Q - s_j) dt_j x_j b_j^T

Only the chunk's inputs, its Q x Q products and the state are alive at a time, so they stay in cache and memory is
linear in T. The backward pass is written by hand: a second loop from the last chunk to the first that starts from the
states before each chunk, the only thing kept, and recomputes the rest. The gradient of l is formed from sums that only
add (what spans token k), never as a difference of sums over the row: those lose it under strong decay.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import decay

_CHUNK = 64
"""Longest chunk this implementation uses."""


def _chunks(value: jax.Array, num_chunks: int) -> jax.Array:
    """[B, T, G, R] -> [chunks, B, G, R, Q], for the small arrays of one scalar per token and head."""
    batch, length, groups, ratio = value.shape
    chunked = value.reshape(batch, num_chunks, length // num_chunks, groups, ratio)
    return chunked.transpose(1, 0, 3, 4, 2)


def _tokens(chunked: jax.Array) -> jax.Array:
    """[chunks, B, G, R, Q] -> [B, T, G, R]."""
    num_chunks, batch, groups, ratio, chunk = chunked.shape
    return chunked.transpose(1, 0, 4, 2, 3).reshape(batch, num_chunks * chunk, groups, ratio)


def _sums(log_decay: jax.Array, num_chunks: int) -> tuple[jax.Array, jax.Array]:
    """Running sums inside each chunk of the coarse and fine parts, [chunks, B, G, R, Q]."""
    coarse, fine = decay.split(_chunks(log_decay, num_chunks))
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(fine, axis=-1)


def _weights(coarse: jax.Array, fine: jax.Array) -> jax.Array:
    """w_ij = exp(s_i - s_j) for i >= j, else 0: [..., Q] -> [..., Q, Q]. Masked before the exponential."""
    exponent = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    causal = jnp.tri(coarse.shape[-1], dtype=bool)
    return jnp.exp(jnp.where(causal, exponent, -jnp.inf))


def _to_end(coarse: jax.Array, fine: jax.Array) -> jax.Array:
    """exp(s_Q - s_j), [..., Q]."""
    return jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))


def _slice(value: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(value, start, chunk, axis=1).astype(jnp.float32)


def _by_token(value: jax.Array) -> jax.Array:
    """[B, G, R, Q] -> [B, Q, G, R, 1]."""
    return jnp.moveaxis(value, -1, 1)[..., None]


def _forward(
    x: jax.Array,
    dt: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    h: jax.Array,
    chunk: int,
    keep: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return y, final state, and the state before each chunk when `keep` is set."""
    num_chunks = x.shape[1] // chunk
    coarse, fine = _sums(log_decay, num_chunks)

    def body(carry, xs):
        h, y = carry
        k, s_coarse, s_fine, dt_k = xs
        x_k, b_k, c_k = (_slice(value, k * chunk, chunk) for value in (x, b, c))
        written = x_k * _by_token(dt_k)
        scores = jnp.einsum("bign,bjgn->bgij", c_k, b_k)[:, :, None] * _weights(s_coarse, s_fine)
        y_k = jnp.einsum("bgrij,bjgrp->bigrp", scores, written)
        y_k += jnp.einsum("bign,bgrpn->bigrp", c_k, h) * _by_token(jnp.exp(s_coarse + s_fine))
        y_k += d[:, :, None] * x_k
        y = jax.lax.dynamic_update_slice_in_dim(y, y_k.astype(y.dtype), k * chunk, axis=1)
        to_end = written * _by_token(_to_end(s_coarse, s_fine))
        following = jnp.exp(s_coarse[..., -1] + s_fine[..., -1])[..., None, None] * h
        following += jnp.einsum("bjgrp,bjgn->bgrpn", to_end, b_k)
        return (following, y), (h if keep else None)

    xs = (jnp.arange(num_chunks), coarse, fine, _chunks(dt, num_chunks))
    (h, y), states = jax.lax.scan(body, (h, jnp.zeros_like(x)), xs)
    return y, h, states


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _ssd(x, dt, log_decay, b, c, d, h, chunk):
    y, h, _ = _forward(x, dt, log_decay, b, c, d, h, chunk, keep=False)
    return y, h


def _ssd_fwd(x, dt, log_decay, b, c, d, h, chunk):
    y, final, states = _forward(x, dt, log_decay, b, c, d, h, chunk, keep=True)
    return (y, final), (x, dt, log_decay, b, c, d, states)


def _ssd_bwd(chunk, residuals, cotangents):
    x, dt, log_decay, b, c, d, states = residuals
    dy, dh = cotangents
    num_chunks = x.shape[1] // chunk
    coarse, fine = _sums(log_decay, num_chunks)
    below = jnp.tri(chunk, k=-1, dtype=jnp.float32)
    from_token = 1.0 - below

    def body(carry, xs):
        dh, dx, db, dc, dd = carry
        k, s_coarse, s_fine, dt_k, h = xs
        x_k, b_k, c_k, dy_k = (_slice(value, k * chunk, chunk) for value in (x, b, c, dy))
        written = x_k * _by_token(dt_k)
        weights = _weights(s_coarse, s_fine)
        products = jnp.einsum("bign,bjgn->bgij", c_k, b_k)[:, :, None]
        scores = products * weights
        dscores = jnp.einsum("bigrp,bjgrp->bgrij", dy_k, written)
        dproducts = jnp.sum(dscores * weights, axis=2)
        pairs = below * dscores * scores

        from_start = _by_token(jnp.exp(s_coarse + s_fine))
        to_end = _by_token(_to_end(s_coarse, s_fine))
        dwritten_state = jnp.einsum("bgrpn,bjgn->bjgrp", dh, b_k) * to_end
        dwritten = jnp.einsum("bgrij,bigrp->bjgrp", scores, dy_k) + dwritten_state
        dy_start = dy_k * from_start
        read = jnp.einsum("bign,bgrpn->bigrp", c_k, h)

        db_k = jnp.einsum("bgij,bign->bjgn", dproducts, c_k)
        db_k += jnp.einsum("bjgrp,bgrpn->bjgn", written * to_end, dh)
        dc_k = jnp.einsum("bgij,bjgn->bign", dproducts, b_k)
        dc_k += jnp.einsum("bigrp,bgrpn->bign", dy_start, h)
        dx_k = dwritten * _by_token(dt_k) + d[:, :, None] * dy_k
        ddt_k = jnp.moveaxis(jnp.sum(dwritten * x_k, axis=-1), 1, -1)

        # l_k reaches what spans it: reads of the old state at i >= k, writes at j < k, pairs j < k <= i, and the state.
        total = jnp.exp(s_coarse[..., -1] + s_fine[..., -1])
        reads = jnp.moveaxis(jnp.sum(dy_start * read, axis=-1), 1, -1)
        writes = jnp.moveaxis(jnp.sum(dwritten_state * written, axis=-1), 1, -1)
        spanned = jnp.einsum("ki,bgrij->bgrkj", from_token, pairs)
        dl_k = jnp.sum(below * spanned, axis=-1)
        dl_k += jnp.einsum("ki,bgri->bgrk", from_token, reads) + jnp.einsum("kj,bgrj->bgrk", below, writes)
        dl_k += (total * jnp.sum(h * dh, axis=(-1, -2)))[..., None]

        dh = total[..., None, None] * dh + jnp.einsum("bigrp,bign->bgrpn", dy_start, c_k)
        dx, db, dc = (
            jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), k * chunk, axis=1)
            for whole, part in ((dx, dx_k), (db, db_k), (dc, dc_k))
        )
        dd += jnp.sum(dy_k * x_k, axis=(0, 1, 4))
        return (dh, dx, db, dc, dd), (ddt_k, dl_k)

    xs = (jnp.arange(num_chunks), coarse, fine, _chunks(dt, num_chunks), states)
    init = (dh, jnp.zeros_like(x), jnp.zeros_like(b), jnp.zeros_like(c), jnp.zeros_like(d))
    (dh, dx, db, dc, dd), (ddt, dl) = jax.lax.scan(body, init, xs, reverse=True)
    return dx, _tokens(ddt), _tokens(dl), db, dc, dd, dh


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
    """Chunked SSD; shapes and result as `reference.scan`. Chunks are at most 64 tokens, longer ones are slower here."""
    batch, length, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    chunk = min(chunk_size, _CHUNK, length)
    heads = (groups, num_heads // groups)
    skip = jnp.zeros((num_heads,), jnp.float32) if d is None else d
    # A tail with dt = 0 and l = 0 leaves the state as it is.
    x, dt, log_decay, b, c = (_pad(value, -length % chunk) for value in (x, dt, log_decay, b, c))
    padded = x.shape[1]
    y, state = _ssd(
        x.reshape(batch, padded, *heads, head_dim),
        dt.reshape(batch, padded, *heads),
        log_decay.reshape(batch, padded, *heads),
        b,
        c,
        skip.reshape(heads),
        initial_state.reshape(batch, *heads, head_dim, state_dim),
        chunk,
    )
    return y.reshape(batch, padded, num_heads, head_dim)[:, :length], state.reshape(initial_state.shape)


def final_state(
    x: jax.Array, dt: jax.Array, log_decay: jax.Array, b: jax.Array, initial_state: jax.Array, chunk_size: int
) -> jax.Array:
    """Return the last state of `scan` alone, float32 [B,H,P,N]."""
    return scan(x, dt, log_decay, b, jnp.zeros_like(b), None, initial_state, chunk_size)[1]
