"""Chunked loss and scores against float64 arithmetic, and the sizes of what exists at once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import target
from tests.training.support import relative
from transmamba_jax.runtime.token_loss import (
    chunked_cross_entropy,
    chunked_distillation,
    chunked_log_likelihoods,
    tokens_at_a_time,
)


def _oracle(hidden, kernel, targets, weights):
    """Loss sum and its gradients by hidden and kernel, float64: dL/dz = w (softmax(z) - onehot)."""
    z = hidden @ kernel
    z = z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    one = np.eye(z.shape[-1])[targets]
    loss = -(weights * np.log((p * one).sum(-1))).sum()
    dz = weights[..., None] * (p - one)
    return loss, dz @ kernel.T, np.einsum("btd,btv->dv", hidden, dz)


@pytest.mark.parametrize("chunk", [1, 9, 10, 33, 10_000])
def test_chunked_loss_and_gradients_equal_float64(chunk):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(3, 11, 5)), rng.normal(size=(5, 7)) * 3
    targets, weights = rng.integers(0, 7, (3, 11)), (rng.random((3, 11)) < 0.7).astype(float)

    value, (dkernel, dhidden) = chunked_cross_entropy(
        lambda kernel, part: part @ kernel,
        jnp.float32(kernel),
        jnp.float32(hidden),
        jnp.asarray(targets),
        jnp.float32(weights),
        chunk,
    )
    expected, *expected_gradients = _oracle(hidden, kernel, targets, weights)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert relative((dhidden, dkernel), expected_gradients) < 1e-6


def _softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 10, 10_000])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_chunked_distillation_equals_float64(chunk, share):
    rng = np.random.default_rng(0)
    hidden, teacher, kernel = rng.normal(size=(3, 11, 5)), rng.normal(size=(3, 11, 5)), rng.normal(size=(5, 7)) * 3
    targets, weights = rng.integers(0, 7, (3, 11)), (rng.random((3, 11)) < 0.7) * rng.random((3, 11))

    (nll, kl), (dkernel, dhidden) = chunked_distillation(
        lambda kernel, part: part @ kernel,
        *(jnp.float32(array) for array in (kernel, hidden, teacher)),
        jnp.asarray(targets),
        jnp.float32(weights),
        chunk,
        share,
    )
    q, p, one = _softmax(hidden @ kernel), _softmax(teacher @ kernel), np.eye(7)[targets]
    assert float(nll) == pytest.approx(-(weights * np.log((q * one).sum(-1))).sum(), rel=1e-6)
    assert float(kl) == pytest.approx((weights * (p * np.log(p / q)).sum(-1)).sum(), rel=1e-6)
    dz = weights[..., None] * (q - (1 - share) * one - share * p)
    assert relative((dhidden, dkernel), (dz @ kernel.T, np.einsum("btd,btv->dv", hidden, dz))) < 1e-6


def _largest_array(jaxpr):
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [_largest_array(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return max([*sizes, *inner], default=0)


def test_logits_of_two_schedules_never_exist_at_once():
    hidden, kernel = jnp.ones((2, 64, 4)), jnp.ones((4, 512))
    targets, weights = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))
    run = lambda k, h, t: chunked_distillation(lambda k, part: part @ k, k, h, t, targets, weights, 16, 0.5)
    assert _largest_array(jax.make_jaxpr(run)(kernel, hidden, hidden).jaxpr) <= 16 * 512


def test_logits_of_the_whole_batch_never_exist_at_once():
    rows, time, width, vocabulary = 2, 64, 4, 512
    hidden, kernel = jnp.ones((rows, time, width)), jnp.ones((width, vocabulary))
    targets, weights = jnp.zeros((rows, time), jnp.int32), jnp.ones((rows, time))

    def largest(chunk):
        run = lambda h, k: chunked_cross_entropy(lambda k, part: part @ k, k, h, targets, weights, chunk)
        return _largest_array(jax.make_jaxpr(run)(hidden, kernel).jaxpr)

    assert largest(16) <= 16 * vocabulary
    assert largest(rows * time) >= rows * time * vocabulary
    # Over a mesh every device has a chunk of its own, of its rows and its part of the time: few chunks, whose gradients
    # are summed over the devices one by one.
    mesh = AbstractMesh((2, 1, 2, 2), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        assert largest(8) == mesh.size * 8 * vocabulary


@pytest.mark.parametrize("chunk", [1, 9, 10, 33, 10_000])
def test_chunked_scores_equal_float64(chunk):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(3, 11, 5)), rng.normal(size=(5, 7)) * 3
    targets = rng.integers(0, 7, (3, 11))
    z = hidden @ kernel
    expected = np.take_along_axis(z - np.log(np.exp(z).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]
    for vocab_size in (None, 7, 4):
        scores, likeliest = chunked_log_likelihoods(
            lambda part: part @ jnp.float32(kernel), jnp.float32(hidden), jnp.asarray(targets), chunk, vocab_size
        )
        np.testing.assert_allclose(scores, expected, atol=3e-6)  # of logits up to 20, in float32
        np.testing.assert_array_equal(likeliest, z[..., :vocab_size].argmax(-1) == targets)


@pytest.mark.parametrize(
    ("given", "platform", "vocab_size", "tokens"),
    [
        (77, "cpu", 8192, 77),
        (77, "tpu", 8192, 77),
        (None, "tpu", 8192, 8192),
        (None, "cpu", 8192, 256),
        (None, "cpu", 2048, 1024),
        (None, "cpu", 256, 8192),
        (None, "cpu", 2**24, 1),
    ],
)
def test_tokens_whose_logits_a_cpu_caches(monkeypatch, given, platform, vocab_size, tokens):
    monkeypatch.setattr(target, "platform", lambda: platform)
    assert tokens_at_a_time(given, vocab_size) == tokens


def test_logits_of_scores_never_exist_at_once():
    hidden, kernel, targets = jnp.ones((2, 64, 4)), jnp.ones((4, 512)), jnp.zeros((2, 64), jnp.int32)
    run = lambda chunk: jax.make_jaxpr(lambda h, k: chunked_log_likelihoods(lambda part: part @ k, h, targets, chunk))
    assert _largest_array(run(16)(hidden, kernel).jaxpr) <= 16 * 512
    assert _largest_array(run(128)(hidden, kernel).jaxpr) >= 128 * 512
