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
    if segment_ids is None:
        return dt, dt * a
    dt = jnp.where((segment_ids == 0)[..., None], 0.0, dt)
    filled = fill_padding(segment_ids)
    starts = jnp.pad(filled[:, 1:] != filled[:, :-1], ((0, 0), (1, 0)))
    return dt, jnp.where(starts[..., None], FORGET, dt * a)
