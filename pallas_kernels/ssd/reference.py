"""SSD token by token on the raw decay: slow, short, and independent of every chunked form.

The one implementation that JAX differentiates any number of times, in forward and reverse mode.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.protocol import SsdInputs

supports_output_start = False
partitionable = True


def unsupported_reason(x: jax.Array, b: jax.Array) -> str | None:
    """Return None: every call is supported."""
    del x, b
    return None


def _per_head(grouped: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, G, N] -> [B, T, H, N]: head h reads group h // (H / G)."""
    return jnp.repeat(grouped, num_heads // grouped.shape[2], axis=2)


def forward(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(l_t) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t + d x_t, one token at a time in float32.

    There are no chunks: chunk_size is not used.
    """
    del chunk_size, output_start
    x, dt, log_decay, b, c, d, initial_state = inputs
    num_heads = x.shape[2]

    def step(h: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_bhp, dt_bh, l_bh, b_bhn, c_bhn = token
        update = (dt_bh[..., None] * x_bhp)[..., :, None] * b_bhn[..., None, :]
        h = jnp.exp(l_bh)[..., None, None] * h + update
        return h, jnp.sum(h * c_bhn[..., None, :], axis=-1)

    x32, b32, c32 = (value.astype(jnp.float32) for value in (x, b, c))
    tokens = (x32, dt, log_decay, _per_head(b32, num_heads), _per_head(c32, num_heads))
    state, y = jax.lax.scan(step, initial_state, jax.tree.map(lambda value: jnp.moveaxis(value, 1, 0), tokens))
    y = jnp.moveaxis(y, 0, 1)
    if d is not None:
        y = y + d[None, None, :, None] * x32
    return y.astype(x.dtype), state


def final_state(inputs: SsdInputs, chunk_size: int) -> jax.Array:
    """Return the final state of `forward` alone, float32 [B,H,P,N]."""
    return forward(inputs._replace(c=jnp.zeros_like(inputs.b)), chunk_size)[1]
