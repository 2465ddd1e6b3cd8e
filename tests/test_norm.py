"""RMSNorm against Flax's, whose gradients are autodiff's, and its precision in bfloat16."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target
from transmamba_jax.norm import RMSNorm, rms_norm


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def flax_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    norm = nn.RMSNorm(epsilon=1e-5, reduction_axes=-1, feature_axes=tuple(range(-weight.ndim, 0)))
    return norm.apply({"params": {"scale": weight}}, x.reshape(*x.shape[:-1], *weight.shape)).reshape(x.shape)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("flat", [False, True], ids=["apart", "flat"])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 8)])
def test_equals_flax_with_gradients(
    platform: str, flat: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass is by hand on a CPU and autodiff's elsewhere; means over flat groups are matmuls on a TPU."""
    monkeypatch.setattr(target, "platform", lambda: platform)
    x, weight, dy = 3 * normal(0, 2, 5, 24), 1 + normal(1, *shape), normal(2, 2, 5, 24)
    norm = lambda x, weight: rms_norm(x, weight, 1e-5, flat)
    products = "dot_general" in str(jax.make_jaxpr(norm)(x, weight))
    assert products == (platform == "tpu" and flat and len(shape) == 2)
    ours, backward = jax.vjp(norm, x, weight)
    theirs, wanted = jax.vjp(flax_norm, x, weight)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    for found, expected in zip(backward(dy), wanted(dy), strict=True):
        assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_bfloat16_is_rounded_once() -> None:
    x = (100 * normal(0, 4, 64)).astype(jnp.bfloat16)
    module = RMSNorm(1e-5, "bfloat16", "float32", groups=2)
    params = module.init(jax.random.key(1), x)
    assert params["params"]["scale"].shape == (2, 32)
    y = module.apply(params, x)
    exact = flax_norm(x.astype(jnp.float32), jnp.ones((2, 32)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    dx = jax.grad(lambda x: jnp.sum(rms_norm(x, jnp.ones((2, 32)), 1e-5) ** 3))(x)
    wide = jax.grad(lambda x: jnp.sum(rms_norm(x, jnp.ones((2, 32)), 1e-5) ** 3))(x.astype(jnp.float32))
    np.testing.assert_array_equal(dx, wide.astype(jnp.bfloat16))
