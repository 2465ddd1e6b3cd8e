"""Causal attention as the formula has it: all scores at once, and every derivative that JAX has."""

import jax
import jax.numpy as jnp

from transmamba_jax.shapes import Array


def attend(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    """Attend by a softmax over all T x T scores, in float32 at least; arguments as for `causal_attention`."""
    weight = weights(q, k, segment_ids, scale)
    value = v.reshape(*q.shape[:3], -1).astype(weight.dtype)
    out = jnp.einsum("bgts,bsgp->btgp", weight, value, precision="highest")
    return out.astype(v.dtype).reshape(v.shape)


def weights(q: Array, k: Array, segment_ids: Array | None, scale: float) -> Array:
    """Return softmax_s(scale · q_t · k_s) over s <= t of the same document, [B, G, T, T]; float32 at least."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    score = jnp.einsum("btgn,bsgn->bgts", q, k, precision="highest", preferred_element_type=wide) * scale
    seen = jnp.tril(jnp.ones((1, 1, q.shape[1], q.shape[1]), bool))
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.softmax(jnp.where(seen, score, -jnp.inf), axis=-1)
