"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from transmamba_jax.shapes import Array, QueryKey


def rotate(x: QueryKey, positions: Int[Array, "T"] | Int[Array, "B T"], theta: float) -> QueryKey:
    """Rotate each pair of channels by an angle proportional to the token's position.

        angle_i = position * theta^(-2i / N),  i = 0 .. N/2 - 1
        (x_i, x_{i+N/2}) <- (x_i cos - x_{i+N/2} sin, x_i sin + x_{i+N/2} cos)

    RoFormer, arXiv 2104.09864, equation 34, with channel i paired with channel i + N/2 (half-split, as in GPT-NeoX).
    The inner product of a rotated query and a rotated key depends on the difference of their positions only. Angles,
    sines and the rotation itself are float32 (float64 for float64 inputs): bf16 cannot hold every position above 256.

    Args:
        positions: position of each token, shared by the rows ([T]) or one set a row ([B, T]).
        theta: base of the wavelengths, which run from 2π to 2π·theta tokens.

    Returns:
        The rotated channels in the dtype of `x`.

    Raises:
        ValueError: N is odd, theta is not positive, positions are not integers or their shape fits neither form.
    """
    _check(x, positions, theta)
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # The exponents are static: computed in float64, each frequency is the nearest float32.
    frequency = jnp.asarray(float(theta) ** (-np.arange(half) / half), wide)
    positions = positions if positions.ndim == 2 else positions[None]
    angle = positions.astype(wide)[..., None, None] * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x.dtype)


def _check(x: QueryKey, positions: Array, theta: float) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must have shape [B, T, G, N], found {x.shape}")
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of channels N to pair them, found N={x.shape[-1]}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, found {x.dtype}")
    if not theta > 0:
        raise ValueError(f"theta must be positive, found {theta}")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, found {positions.dtype}")
    if positions.shape not in ((x.shape[1],), x.shape[:2]):
        raise ValueError(f"positions must have shape {(x.shape[1],)} or {x.shape[:2]}, found {positions.shape}")
