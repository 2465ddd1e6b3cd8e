"""Rotary embedding against multiplication of complex numbers in float64, and its defining properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transmamba_jax.rotary import rotate

THETA = 10_000.0


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def complex_rotation(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x_i + i x_{i+N/2} times exp(i position theta^(-2i/N)), in float64."""
    half = x.shape[-1] // 2
    angle = np.broadcast_to(positions, x.shape[:2])[..., None, None] * theta ** (-2 * np.arange(half) / (2 * half))
    turned = (x[..., :half].astype(np.float64) + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
@pytest.mark.parametrize("width", [2, 6, 96])
def test_equals_complex_rotation(width: int, theta: float) -> None:
    x = normal(0, 2, 17, 3, width)
    for positions in (np.arange(17), np.arange(34).reshape(2, 17) * 7 % 29):
        found = rotate(jnp.asarray(x), jnp.asarray(positions), theta)
        np.testing.assert_allclose(found, complex_rotation(x, positions, theta), atol=1e-5, rtol=0)


def test_far_positions_lose_no_more_than_the_rounding_of_the_angle() -> None:
    # A float32 angle near 32768 is off by at most half of 2^-8, and so are the channels of a unit pair.
    x, positions = np.ones((1, 4, 1, 8), np.float32), np.array([8191, 8192, 32767, 20001])
    error = np.abs(
        np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), THETA)) - complex_rotation(x, positions, THETA)
    )
    assert error.max() < 2**-8


def test_position_zero_is_the_identity() -> None:
    x = jnp.asarray(normal(1, 2, 5, 2, 8))
    np.testing.assert_array_equal(rotate(x, jnp.zeros(5, jnp.int32), THETA), x)


def test_norm_is_preserved() -> None:
    x = jnp.asarray(normal(2, 2, 50, 2, 16))
    turned = rotate(x, jnp.arange(50) * 40, THETA)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    assert not np.allclose(turned, x, atol=0.1)


def test_inner_products_depend_on_the_distance_only() -> None:
    q, k = (jnp.broadcast_to(normal(seed, 1, 1, 1, 16), (1, 30, 1, 16)) for seed in (3, 4))
    positions = jnp.arange(30)
    score = lambda shift: jnp.einsum(
        "btgn,bsgn->ts", rotate(q, positions + shift, THETA), rotate(k, positions + shift, THETA)
    )
    np.testing.assert_allclose(score(0), score(211), atol=2e-4)
    diagonals = [np.ptp(np.diagonal(np.asarray(score(0)), offset)) for offset in range(-29, 30)]
    assert max(diagonals) < 2e-5
    assert np.ptp(np.asarray(score(0))[0]) > 0.1


def test_pairs_are_half_split() -> None:
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1)
    turned = np.asarray(rotate(x, jnp.array([3]), THETA))[0, 0, 0]
    assert set(np.flatnonzero(turned)) == {1, 5}


def test_bfloat16_is_float32_rounded_once() -> None:
    x = jnp.asarray(normal(5, 1, 300, 2, 8), jnp.bfloat16)
    found = rotate(x, jnp.arange(300), THETA)
    assert found.dtype == jnp.bfloat16
    wide = rotate(x.astype(jnp.float32), jnp.arange(300), THETA)
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_gradient_is_the_inverse_rotation() -> None:
    x, g = (jnp.asarray(normal(seed, 1, 20, 2, 8)) for seed in (6, 7))
    (grad,) = jax.vjp(lambda x: rotate(x, jnp.arange(20), THETA), x)[1](g)
    np.testing.assert_allclose(grad, rotate(g, -jnp.arange(20), THETA), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "positions", "theta", "message"),
    [
        ((2, 5, 8), "float32", np.arange(5), THETA, r"x must have shape \[B, T, G, N\]"),
        ((2, 5, 1, 7), "float32", np.arange(5), THETA, "even number of channels"),
        ((2, 5, 1, 8), "int32", np.arange(5), THETA, "x must be floating point"),
        ((2, 5, 1, 8), "float32", np.arange(5), 0.0, "theta must be positive"),
        ((2, 5, 1, 8), "float32", np.arange(5.0), THETA, "positions must be integers"),
        ((2, 5, 1, 8), "float32", np.arange(4), THETA, "positions must have shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses(shape: tuple[int, ...], dtype: str, positions: np.ndarray, theta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate(jnp.ones(shape, dtype), jnp.asarray(positions), theta)
