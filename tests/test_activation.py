"""SiLU and SwiGLU against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transmamba_jax.activation import silu, swiglu


def normal(seed: int, *shape: int) -> jax.Array:
    return 4 * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("ours", "plain", "arguments"),
    [
        (silu, jax.nn.silu, 1),
        (swiglu, lambda gate, up: jax.nn.silu(gate) * up, 2),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_equal_autodiff_in_float64(ours, plain, arguments: int, dtype: str, tolerance: float) -> None:
    """In bfloat16 each value and gradient is off by two roundings at most: 2^-8 each, half of that on the mean."""
    inputs = [normal(seed, 7, 50).astype(dtype) for seed in range(arguments + 1)]
    values, backward = jax.vjp(ours, *inputs[1:])
    found = [values, *backward(inputs[0])]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(value, np.float64)) for value in inputs]
        wanted_values, wanted_backward = jax.vjp(plain, *wide[1:])
        wanted = [np.asarray(value) for value in (wanted_values, *wanted_backward(wide[0]))]
    for ours_, expected in zip(found, wanted, strict=True):
        assert ours_.dtype == dtype
        assert np.linalg.norm(np.asarray(ours_, np.float64) - expected) < tolerance * np.linalg.norm(expected)


def test_extremes_are_finite() -> None:
    x = jnp.asarray([-1e30, -200.0, 0.0, 200.0, 1e30])
    values, backward = jax.vjp(silu, x)
    np.testing.assert_allclose(values, [0, 0, 0, 200, 1e30])
    np.testing.assert_allclose(backward(jnp.ones(5))[0], [0, 0, 0.5, 1, 1])
