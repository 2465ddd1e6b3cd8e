"""The mixer against the float64 oracle: every TransPoint, static and traced, values and gradients, and each trap."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests import oracle, precision
from transmamba_jax import parallel
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.convolution import causal_conv
from transmamba_jax.memory_converter import memory_converter
from transmamba_jax.mixer import Mixer
from transmamba_jax.rotary import rotate

BATCH, SEQ_LEN, CHUNK = 2, 37, 8
POINTS = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 5)
CONFIG = ModelConfig(
    d_model=24,
    num_heads=4,
    num_groups=2,
    head_dim=6,
    state_dim=8,
    transpoints=(0,),
    dtype="float32",
)
KERNELS = KernelsConfig(chunk_size=CHUNK)
VARIANTS = {
    "default": {},
    "rotary_both": {"rotary": "both"},
    "no_attention_norm": {"attention_norm": False},
    "no_skip": {"use_d_skip": False},
    "one_group": {"num_groups": 1},
    "group_per_head": {"num_groups": 4},
    "linear_convolution": {"conv_activation": "none"},
    "plain_attention": {"conv_activation": "none", "conv_width": 1, "conv_bias": False},
}


@cache
@partial(jax.jit, static_argnums=0)
def make(config: ModelConfig, seed: int = 0) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters away from their symmetric starting values, an input and a cotangent."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (BATCH, SEQ_LEN, config.d_model))
    params = Mixer(config, KERNELS).init(keys[1], x, 0)["params"]
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(keys[2], len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(noise, leaves, strict=True)]
    return jax.tree.unflatten(tree, leaves), x, jax.random.normal(keys[3], x.shape)


def output_and_gradient(apply: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array, cotangent: Any) -> Any:
    """Output and the gradient of <output, cotangent> with respect to parameters and input."""

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = apply(params, x)
        return jnp.sum(y * cotangent), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads


def run(
    config: ModelConfig,
    params: Any,
    x: jax.Array,
    cotangent: Any,
    point: Any,
    ids: Any = None,
    kernels: KernelsConfig = KERNELS,
) -> Any:
    return output_and_gradient(
        lambda params, x: Mixer(config, kernels).apply({"params": params}, x, point, ids), params, x, cotangent
    )


run_static = jax.jit(run, static_argnums=(0, 4, 6))
run_traced = jax.jit(run, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def oracle_in_double(config: ModelConfig, params: Any, x: jax.Array, cotangent: Any, points: Any, ids: Any) -> Any:
    return output_and_gradient(lambda params, x: oracle.mixer(params, config, x, points, ids), params, x, cotangent)


def run_oracle(config: ModelConfig, params: Any, x: Any, cotangent: Any, point: Any, ids: Any = None) -> Any:
    ids = np.ones((BATCH, SEQ_LEN), np.int32) if ids is None else ids
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x, cotangent))
        points = np.broadcast_to(np.int32(point), (BATCH,))
        return jax.tree.map(np.asarray, oracle_in_double(config, *double, points, ids))


def per_leaf_error(actual: Any, expected: Any) -> float:
    """Largest error of a leaf relative to the larger of its norm and 1e-3 of the whole gradient's norm."""
    whole = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(expected)))
    errors = [
        float(np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-3 * whole))
        for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    return max(errors)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_equals_the_oracle(point: int, traced: bool) -> None:
    params, x, cotangent = make(CONFIG)
    y, grads = (
        run_traced(CONFIG, params, x, cotangent, jnp.int32(point))
        if traced
        else run_static(CONFIG, params, x, cotangent, point)
    )
    expected_y, expected_grads = run_oracle(CONFIG, params, x, cotangent, point)
    assert oracle.relative_error(y, expected_y) < 2e-6
    assert per_leaf_error(grads, expected_grads) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("point", [1, 19, SEQ_LEN - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_one_pass_of_the_tpu_kernels_equals_the_oracle(point: int, packed: bool) -> None:
    """They convert on the way: no token is sliced for them, and gradients of both sides meet in one array."""
    config = dataclasses.replace(CONFIG, head_dim=8)
    kernels = KernelsConfig(ssd="pallas_tpu", chunk_size=CHUNK)
    params, x, cotangent = make(config)
    ids = np.array([[1] * 11 + [2] * 20 + [0] * 6, [3] * 19 + [4] * 18], np.int32) if packed else None
    cotangent = cotangent if ids is None else cotangent * (ids != 0)[..., None]
    with pltpu.force_tpu_interpret_mode():
        y, grads = jax.jit(run, static_argnums=(0, 4, 6))(config, params, x, cotangent, point, ids, kernels)
    expected_y, expected_grads = run_oracle(config, params, x, cotangent, point, ids)
    real = np.ones(x.shape[:2], bool) if ids is None else ids != 0
    assert oracle.relative_error(np.asarray(y)[real], expected_y[real]) < 2e-6
    assert per_leaf_error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "traced"])
def test_open_choices_equal_the_oracle(variant: str, traced: bool) -> None:
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    params, x, cotangent = make(config, seed=1)
    y, grads = (
        run_traced(config, params, x, cotangent, jnp.int32(19))
        if traced
        else run_static(config, params, x, cotangent, 19)
    )
    expected_y, expected_grads = run_oracle(config, params, x, cotangent, 19)
    assert oracle.relative_error(y, expected_y) < 2e-6
    assert per_leaf_error(grads, expected_grads) < 1e-5


@pytest.mark.slow
def test_one_transpoint_per_row() -> None:
    params, x, cotangent = make(CONFIG)
    points = np.array([5, 30], np.int32)
    y, grads = run_traced(CONFIG, params, x, cotangent, points)
    expected_y, expected_grads = run_oracle(CONFIG, params, x, cotangent, points)
    assert oracle.relative_error(y, expected_y) < 2e-6
    assert per_leaf_error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("point", [0, 9, 14, 15, 20, SEQ_LEN])
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_packed_documents_equal_the_oracle(point: int, traced: bool) -> None:
    params, x, cotangent = make(CONFIG)
    # Row 0: two documents and right padding; row 1: left padding and two documents. One boundary is at 15.
    ids = np.array([[1] * 15 + [2] * 17 + [0] * 5, [0] * 7 + [3] * 8 + [4] * 22], np.int32)
    cotangent = cotangent * (ids != 0)[..., None]
    step, argument = (run_traced, jnp.int32(point)) if traced else (run_static, point)
    y, grads = step(CONFIG, params, x, cotangent, argument, ids)
    expected_y, expected_grads = run_oracle(CONFIG, params, x, cotangent, point, ids)
    real = (ids != 0)[..., None]
    assert np.all(np.isfinite(y))
    assert oracle.relative_error(np.where(real, y, 0), np.where(real, expected_y, 0)) < 2e-6
    assert per_leaf_error(grads, expected_grads) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_causal_across_the_transpoint(traced: bool) -> None:
    params, x, _ = make(CONFIG)

    def output(x: jax.Array, t: int, point: Any) -> jax.Array:
        return Mixer(CONFIG, KERNELS).apply({"params": params}, x, point)[:, t, 0].sum()

    gradient = jax.jit(jax.grad(output), static_argnums=() if traced else 2)
    for point in (0, 5, 20, SEQ_LEN):
        rows = [np.abs(gradient(x, t, point)).sum(axis=(0, 2)) for t in range(SEQ_LEN)]
        influence = np.stack(rows)  # [output t, input s]
        assert np.all(np.triu(influence, 1) == 0), f"a later token changes an earlier output at TransPoint {point}"
        assert np.all(np.tril(influence)[:, 0] > 0), f"the first token is lost at TransPoint {point}"


def test_bfloat16_is_close_to_float32() -> None:
    params, x, cotangent = make(CONFIG)
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    y, grads = run_static(half, params, x, cotangent, 19)
    expected_y, expected_grads = run_oracle(CONFIG, params, x, cotangent, 19)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert oracle.relative_error(y, expected_y) < 1e-2
    assert oracle.relative_error(grads, expected_grads) < 2e-2


@pytest.mark.parametrize("kernel", ["sequential", "associative", "reference"])
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_bfloat16_keeps_exponentials_and_sums_in_float32(kernel: str, traced: bool) -> None:
    """Δ, A, decays, softmax and norms, forward and backward pass."""
    params, x, cotangent = make(CONFIG)
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    kernels = KernelsConfig(ssd=kernel, chunk_size=CHUNK)
    if traced:
        found = precision.narrow(partial(run, half, kernels=kernels), params, x, cotangent, jnp.int32(19))
    else:
        found = precision.narrow(lambda *arguments: run(half, *arguments, 19, kernels=kernels), params, x, cotangent)
    assert found == set()


@pytest.mark.slow
def test_bfloat16_hands_on_steps_decays_and_states_that_were_never_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x, _ = make(CONFIG)
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    calls = {}

    def spy(name: str, operator: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        calls[name] = arguments
        return operator(*arguments, **options)

    for name in ("convert", "scan"):
        monkeypatch.setattr(parallel, name, partial(spy, name, getattr(parallel, name)))
    kept = Mixer(half, KERNELS).apply({"params": params}, x, 19, capture_intermediates=True, mutable="intermediates")[1]
    (projected,) = kept["intermediates"]["dt"]["__call__"]
    assert projected.dtype == jnp.bfloat16
    double = lambda leaf: np.asarray(leaf, np.float64)
    step = np.logaddexp(0, double(projected).reshape(BATCH, SEQ_LEN, -1) + double(params["dt_bias"]))
    _, _, before, *_ = calls["convert"]
    _, after, _, _, _, skip, state, _ = calls["scan"]
    np.testing.assert_allclose(np.concatenate([before, after], axis=1), step, rtol=1e-6)
    for decay in (calls["convert"][3], calls["scan"][2]):
        np.testing.assert_allclose(decay, -np.exp(double(params["a_log"])), rtol=1e-6)
    np.testing.assert_array_equal(skip, params["skip"])
    assert {value.dtype for value in (before, after, decay, skip, state)} == {jnp.dtype("float32")}
    assert np.mean(state == state.astype(jnp.bfloat16)) < 0.1


def no_step_on_v(k: Any, v: Any, dt: Any, a: Any, **options: Any) -> jax.Array:
    """Eq. 9 as printed: the state without Δ on V."""
    return memory_converter(k, v / dt[..., None], dt, a, **options)


def previous_decay(k: Any, v: Any, dt: Any, a: Any, **options: Any) -> jax.Array:
    """Eqs. 4 and 7 as printed: the decay of step k is that of step k - 1."""
    shifted = jnp.concatenate([jnp.zeros_like(dt[:, :1]), dt[:, :-1]], axis=1)
    return memory_converter(k, v * (dt / jnp.maximum(shifted, 1e-6))[..., None], shifted, a, **options)


def rotated_keys(k: Any, v: Any, dt: Any, a: Any, **options: Any) -> jax.Array:
    """The rotated key cache handed to an SSM that reads unrotated queries."""
    return memory_converter(rotate(k, jnp.arange(k.shape[1]), CONFIG.rope_theta), v, dt, a, **options)


def forgotten_prefix(k: Any, v: Any, dt: Any, a: Any, **options: Any) -> jax.Array:
    """The prefix state replaced by 0."""
    return jnp.zeros_like(memory_converter(k, v, dt, a, **options))


def stopped_gradient(k: Any, v: Any, dt: Any, a: Any, **options: Any) -> jax.Array:
    """The prefix state cut off from the gradient."""
    return jax.lax.stop_gradient(memory_converter(k, v, dt, a, **options))


@pytest.mark.parametrize(
    "trap", [no_step_on_v, previous_decay, rotated_keys, forgotten_prefix, stopped_gradient], ids=lambda f: f.__name__
)
def test_converter_traps_are_caught(trap: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch) -> None:
    params, x, cotangent = make(CONFIG)
    expected = run_oracle(CONFIG, params, x, cotangent, 19)
    assert oracle.relative_error(run_static(CONFIG, params, x, cotangent, 19), expected) < 1e-5
    monkeypatch.setattr(parallel, "memory_converter", trap)
    trapped = jax.jit(lambda params, x: run(CONFIG, params, x, cotangent, 19))(params, x)
    assert oracle.relative_error(trapped, expected) > 1e-3


def test_convolution_on_each_side_of_the_transpoint_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x, cotangent = make(CONFIG)
    expected, _ = run_oracle(CONFIG, params, x, cotangent, 19)

    def split_conv(x: Any, kernel: Any, bias: Any, _: Any, silu: bool, **options: Any) -> jax.Array:
        halves = [causal_conv(part, kernel, bias, None, silu=silu, **options) for part in (x[:, :19], x[:, 19:])]
        return jnp.concatenate(halves, axis=1)

    monkeypatch.setattr(parallel, "causal_conv", split_conv)
    y = Mixer(CONFIG, KERNELS).apply({"params": params}, x, 19)
    error = np.abs(np.asarray(y) - expected).max(axis=(0, 2))
    assert error[:19].max() < 1e-4
    assert error[19:22].min() > 1e-2


def test_parameters_count_and_names() -> None:
    params, _, _ = make(CONFIG)
    names = sorted("/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    convolutions = [f"conv_{name}/{leaf}" for name in "kqv" for leaf in ("bias", "kernel")]
    dense = [f"{name}/kernel" for name in ("dt", "k", "out", "q", "v", "z")]
    assert names == sorted(["a_log", "dt_bias", "skip", "norm/scale", *convolutions, *dense])
