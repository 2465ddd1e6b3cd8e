"""SiLU and the gate made of it, with backward passes that start from the inputs alone.

SiLU(x) = x σ(x)        SiLU'(x) = σ(x) (1 + x (1 - σ(x)))        SwiGLU: SiLU(gate) ∘ up, arXiv 2002.05202

What autodiff keeps besides, σ(x) and SiLU(x), is another array of the size of `x` each, which takes longer to write and
to read back than to compute again.
"""

import jax
import jax.numpy as jnp

from transmamba_jax.shapes import Array, Float


def _slope(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _wide(*values: Array) -> tuple[Array, ...]:
    return tuple(value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in values)


@jax.custom_vjp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x σ(x) in the dtype of `x`."""
    return jax.nn.silu(x)


def _silu_backward(x: Array, dy: Array) -> tuple[Array]:
    wide, dy = _wide(x, dy)
    return ((dy * _slope(wide)).astype(x.dtype),)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return SiLU(gate) ∘ up; both have one shape and dtype."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate, up = residuals
    wide_gate, wide_up, dy = _wide(gate, up, dy)
    dgate = dy * wide_up * _slope(wide_gate)
    return dgate.astype(gate.dtype), (dy * jax.nn.silu(wide_gate)).astype(up.dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
