"""Log decays: documents as resets, and running sums whose differences keep their precision.

The state decays by exp(l_t) at token t, l_t = dt_t a <= 0. Chunked forms need exp(l_{j+1} + ... + l_i) for i >= j. The
difference of two float32 running sums loses it when the sums are large: at |l| = 16 a step and 64 steps the sums reach
1024, whose spacing is 1.2e-4, as an error of 1e-4 in a decay that multiplies neighbouring tokens. Factoring it into
exp(s_i) exp(-s_j) overflows outright. Here each l is split into

    coarse = round(max(l, -128) 2^8) / 2^8        fine = max(l, -128) - coarse        (both exact in float32)

Sums of up to 256 coarse parts are multiples of 2^-8 below 2^15 in magnitude, 23 bits: exact in float32 in any order,
and so are their differences. Sums of 256 fine parts stay below 1/2, so their rounding error is below 1e-7. Clipping at
-128 changes nothing, exp(-104) is already 0 in float32.
"""

import jax
import jax.numpy as jnp

FORGET = -128.0
"""A log decay that forgets everything: its exponential is exactly 0 in float32."""

MAX_CHUNK = 256
"""Longest chunk over which sums of coarse parts are exact."""

_STEPS_PER_UNIT = 256.0


def split(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split log decays [...] float32 into coarse and fine parts; the gradient goes straight through to the fine one."""
    clipped = jnp.maximum(log_decay, FORGET)
    coarse = jax.lax.stop_gradient(jnp.round(clipped * _STEPS_PER_UNIT) / _STEPS_PER_UNIT)
    return coarse, clipped - coarse


def fill_padding(segment_ids: jax.Array) -> jax.Array:
    """Give padding the id of the last real token before it; leading padding gets the first real id.

    segment_ids int [B, T], 0: padding -> int [B, T]. A row without real tokens stays 0.
    """
    length = segment_ids.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    last_real = jax.lax.cummax(jnp.where(segment_ids != 0, positions, -1), axis=1)
    first_real = jnp.argmax(segment_ids != 0, axis=1)[:, None].astype(jnp.int32)
    return jnp.take_along_axis(segment_ids, jnp.where(last_real >= 0, last_real, first_real), axis=1)


def log_decays(dt: jax.Array, a: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return (dt, l) [B, T, H] float32 with documents folded in.

    l = dt a. Padding has dt = 0: it adds nothing to the state and leaves it as it is. The first token of every document
    but a row's first has l = FORGET: the state restarts there, and the initial state reaches the first document only.
    """
    a = a[None, None]
    if segment_ids is None:
        return dt, dt * a
    dt = jnp.where((segment_ids == 0)[..., None], 0.0, dt)
    filled = fill_padding(segment_ids)
    starts = jnp.pad(filled[:, 1:] != filled[:, :-1], ((0, 0), (1, 0)))
    return dt, jnp.where(starts[..., None], FORGET, dt * a)


# Decays inside a chunk as functions of l [..., Q], with s_i = l_1 + ... + l_i. The gradient of l_k is a sum over every
# decay that spans token k. The backward passes below add those up; what autodiff makes of a difference of running sums
# adds up everything and subtracts the rest, which loses the gradient where decay is strong.


# Running sums are matmuls with a triangular matrix of ones: a cumulative sum goes over its array log Q times.


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply matrices in float32, whatever a device would take for enough."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _sums(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    coarse, fine = split(log_decay)
    upto = jnp.tri(log_decay.shape[-1], dtype=log_decay.dtype).T  # [k, i]: k <= i
    return _times(coarse, upto), _times(fine, upto)


@jax.custom_vjp
def from_start(log_decay: jax.Array) -> jax.Array:
    """exp(s_i): [..., Q] -> [..., Q]."""
    coarse, fine = _sums(log_decay)
    return jnp.exp(coarse + fine)


def _from_start_fwd(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    decays = from_start(log_decay)
    return decays, decays


def _from_start_bwd(decays: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.cumsum(cotangent * decays, axis=decays.ndim - 1, reverse=True),)


from_start.defvjp(_from_start_fwd, _from_start_bwd)


@jax.custom_vjp
def to_end(log_decay: jax.Array) -> jax.Array:
    """exp(s_Q - s_j): [..., Q] -> [..., Q]."""
    coarse, fine = _sums(log_decay)
    return jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))


def _to_end_fwd(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    decays = to_end(log_decay)
    return decays, decays


def _to_end_bwd(decays: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    sums = jnp.cumsum((cotangent * decays)[..., :-1], axis=-1)
    return (jnp.concatenate([jnp.zeros_like(decays[..., :1]), sums], axis=-1),)


to_end.defvjp(_to_end_fwd, _to_end_bwd)


@jax.custom_vjp
def segsum(log_decay: jax.Array) -> jax.Array:
    """Return the pairwise cumulative decay exp(s_i - s_j) at [i, j], i >= j, else 0: [..., Q] -> [..., Q, Q]."""
    coarse, fine = _sums(log_decay)
    exponent = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    # Masked before the exponential: above the diagonal it would overflow.
    return jnp.exp(jnp.where(jnp.tri(exponent.shape[-1], dtype=bool), exponent, -jnp.inf))


def _segsum_fwd(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    decays = segsum(log_decay)
    return decays, decays


def _segsum_bwd(decays: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    before = jnp.tri(decays.shape[-1], k=-1, dtype=decays.dtype)  # [k, j]: j < k
    since = jnp.tri(decays.shape[-1], dtype=decays.dtype).T  # [k, i]: i >= k
    rows = _times(since, cotangent * decays)  # [k, j]
    return (jnp.sum(jax.lax.broadcast_to_rank(before, rows.ndim) * rows, axis=-1),)


segsum.defvjp(_segsum_fwd, _segsum_bwd)
