"""SSD token by token on the raw decay: slow, short, and independent of every chunked form."""

import jax
import jax.numpy as jnp


def _per_head(grouped: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, G, N] -> [B, T, H, N]: head h reads group h // (H / G)."""
    return jnp.repeat(grouped, num_heads // grouped.shape[2], axis=2)


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
    """h_t = exp(l_t) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t + d x_t, one token at a time in float32.

    x [B,T,H,P], dt and log_decay float32 [B,T,H], b and c [B,T,G,N], d float32 [H] or None,
    initial_state float32 [B,H,P,N] -> y [B,T,H,P] in x.dtype, final state float32 [B,H,P,N].
    """
    del chunk_size
    num_heads = x.shape[2]

    def step(h: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_bhp, dt_bh, l_bh, b_bhn, c_bhn = token
        written = (dt_bh[..., None] * x_bhp)[..., :, None] * b_bhn[..., None, :]
        h = jnp.exp(l_bh)[..., None, None] * h + written
        return h, jnp.sum(h * c_bhn[..., None, :], axis=-1)

    x32, b32, c32 = (value.astype(jnp.float32) for value in (x, b, c))
    tokens = (x32, dt, log_decay, _per_head(b32, num_heads), _per_head(c32, num_heads))
    state, y = jax.lax.scan(step, initial_state, jax.tree.map(lambda value: jnp.moveaxis(value, 1, 0), tokens))
    y = jnp.moveaxis(y, 0, 1)
    if d is not None:
        y = y + d[:, None] * x32
    return y.astype(x.dtype), state


def final_state(
    x: jax.Array, dt: jax.Array, log_decay: jax.Array, b: jax.Array, initial_state: jax.Array, chunk_size: int
) -> jax.Array:
    """Return the last state of `scan` alone, float32 [B,H,P,N]."""
    return scan(x, dt, log_decay, b, jnp.zeros_like(b), None, initial_state, chunk_size)[1]
