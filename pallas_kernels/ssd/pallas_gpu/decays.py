"""Decays inside one chunk of the GPU kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd import decay
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK
from pallas_kernels.ssd.pallas_gpu.wgmma import ALONG, DOWN, along, down, indices


def scalar_rows(dt: jax.Array, log_decay: jax.Array) -> jax.Array:
    """[B, T, H] twice -> [B, H, chunks, 3, Q]: dt and the sums of l inside the chunk in two parts (`decay.py`)."""
    batch, length, num_heads = dt.shape
    coarse, fine = decay.split(log_decay)
    rows = jnp.stack([dt, coarse, fine]).reshape(3, batch, length // CHUNK, CHUNK, num_heads).transpose(1, 4, 2, 0, 3)
    return jnp.concatenate([rows[..., :1, :], jnp.cumsum(rows[..., 1:, :], axis=-1)], axis=-2)


class Decays:
    """Decays inside a chunk, from the [3, Q] that `scalar_rows` gives, in shared memory."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.dt, self._coarse, self._fine = (self._vector(k, DOWN) for k in range(3))
        last_coarse, last_fine = rows[1, CHUNK - 1], rows[2, CHUNK - 1]
        self.from_start = jnp.exp(self._coarse + self._fine)
        """exp(s_i) [Q]."""
        self.to_end = jnp.exp((last_coarse - self._coarse) + (last_fine - self._fine))
        """exp(s_Q - s_j) [Q]."""
        self.whole = jnp.exp(last_coarse + last_fine)
        """exp(s_Q)."""

    def _vector(self, k: int, layout: Any) -> jax.Array:
        return plgpu.load(self._rows.at[k], layout=layout, optimized=False)

    def dt_along(self) -> jax.Array:
        """dt_j at [i, j]."""
        return along(self._vector(0, ALONG), CHUNK)

    def _differences(self) -> jax.Array:
        """s_row - s_column [Q, Q]."""
        coarse, fine = (self._vector(k, ALONG) for k in (1, 2))
        return (down(self._coarse, CHUNK) - along(coarse, CHUNK)) + (down(self._fine, CHUNK) - along(fine, CHUNK))

    def segsum(self) -> jax.Array:
        """exp(s_i - s_j) at [i, j] for i >= j, else 0. Masked before the exponential, which could overflow."""
        row, column = indices()
        return jnp.exp(jnp.where(row >= column, self._differences(), -jnp.inf))

    def segsum_transposed(self) -> jax.Array:
        """exp(s_i - s_j) at [j, i] for i >= j, else 0."""
        row, column = indices()
        return jnp.exp(jnp.where(row <= column, -self._differences(), -jnp.inf))
