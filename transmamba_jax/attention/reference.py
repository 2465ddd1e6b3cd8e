"""Causal attention as the formula has it: all scores at once, and every derivative that JAX has."""

import jax
import jax.numpy as jnp

from transmamba_jax.shapes import Array


def attend(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    """Attend by a softmax over all T x T scores, in float32 at least; arguments as for `causal_attention`."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    value = v.reshape(*q.shape[:3], -1)
    score = jnp.einsum("btgn,bsgn->bgts", q, k, precision="highest", preferred_element_type=wide) * scale
    seen = jnp.tril(jnp.ones((1, 1, q.shape[1], q.shape[1]), bool))
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weight = jax.nn.softmax(jnp.where(seen, score, -jnp.inf), axis=-1)
    out = jnp.einsum("bgts,bsgp->btgp", weight, value.astype(wide), precision="highest")
    return out.astype(v.dtype).reshape(v.shape)
