"""RMSNorm over groups of channels.

x̂ = x r,   r = (mean(x²) + ε)^-1/2 over each group,   y = x̂ ∘ w                              arXiv 1910.07467
dw = Σ_t dy ∘ x̂,   dx = r (g - x̂ mean(g ∘ x̂)),   g = dy ∘ w

Everything is float32 inside. On a CPU the backward pass is written by hand: XLA fuses each sum of what
autodiff makes of it with the matmuls under it there, and then takes ten times as long in jax 0.10 and twice in 0.12
(remove it with the first jax in which autodiff is as fast). A TPU's compiler does better
with what autodiff makes. There the means over groups that the SSM leaves side by side in one axis (`flat`) are
matmuls: registers have 128 lanes, and an axis for each group means copies of float32 arrays there and back.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels import target
from transmamba_jax.shapes import Array, Float


def _means(value: Array) -> Array:
    """Mean over the last axis, kept; as a matmul, which is not fused with the producer of `value`."""
    width = value.shape[-1]
    return value @ jnp.full((width, 1), 1 / width, value.dtype)


def _grouped(value: Array, like: Array) -> Array:
    """[..., C] -> float32 [..., *shape of `like`]."""
    wide = jnp.promote_types(value.dtype, jnp.float32)
    return value.astype(wide).reshape(*value.shape[:-1], *like.shape)


def rms_norm(
    x: Float[Array, "... C"], weight: Float[Array, "..."], epsilon: float, flat: bool = False, plain: bool = False
) -> Float[Array, "... C"]:
    """Normalise the channels of each group by their root mean square.

    Args:
        x: any float dtype.
        weight: [C], one group, or [G, C / G].
        epsilon: added to the mean square.
        flat: where groups lie side by side in one axis, and a TPU had better leave them there.
        plain: leave every derivative to JAX; else reverse mode alone, once.

    Returns:
        The shape of `x` in float32, or in float64 where x is.
    """
    if plain:
        return _forward(x, weight, epsilon)[0]
    if target.platform() == "cpu":
        return _by_hand(x, weight, epsilon)
    if target.platform() == "tpu" and weight.ndim == 2 and flat:
        return _side_by_side(x, weight, epsilon)
    return _forward(x, weight, epsilon)[0]


def _aligned(weight: Array, like: Array) -> Array:
    """Give the weight the dtype of activations, and the rank, by axes of size one in front."""
    return jax.lax.broadcast_to_rank(weight.astype(like.dtype), like.ndim)


def _side_by_side(x: Array, weight: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    groups, width = weight.shape
    member = jnp.repeat(jnp.eye(groups, dtype=wide.dtype), width, axis=0)  # [C, G]
    exact = functools.partial(jnp.matmul, precision="highest")
    scale = jax.lax.rsqrt(exact(wide * wide, member) / width + epsilon)
    return wide * exact(scale, member.T) * _aligned(weight.reshape(-1), wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_hand(x: Array, weight: Array, epsilon: float) -> Array:
    return _forward(x, weight, epsilon)[0]


def _forward(x: Array, weight: Array, epsilon: float) -> tuple[Array, tuple[Any, ...]]:
    grouped = _grouped(x, weight)
    scale = jax.lax.rsqrt(jnp.mean(grouped * grouped, axis=-1, keepdims=True) + epsilon)
    return (grouped * (scale * _aligned(weight, grouped))).reshape(x.shape), (x, weight, scale)


def _backward(epsilon: float, residuals: tuple[Any, ...], dy: Array) -> tuple[Array, Array]:  # noqa: ARG001
    x, weight, scale = residuals
    normal, dy = _grouped(x, weight) * scale, _grouped(dy, weight)
    dweight = jnp.sum((dy * normal).reshape(*x.shape), axis=tuple(range(x.ndim - 1)))
    inner = dy * _aligned(weight, dy)
    dx = (inner - normal * _means(inner * normal)) * scale
    return dx.reshape(x.shape).astype(x.dtype), dweight.reshape(weight.shape).astype(weight.dtype)


_by_hand.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
    """Own the weight of an RMSNorm, [C], or [G, C / G] where `groups` is given."""

    epsilon: float
    dtype: str
    param_dtype: str
    groups: int | None = None
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... C"], flat: bool = False) -> Float[Array, "... C"]:
        """Normalise each token; the result is in `dtype`. `flat` as for `rms_norm`."""
        channels = x.shape[-1]
        shape = (channels,) if self.groups is None else (self.groups, channels // self.groups)
        weight = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        return rms_norm(x, weight, self.epsilon, flat, self.plain).astype(self.dtype)
