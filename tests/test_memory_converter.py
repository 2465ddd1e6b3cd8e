"""The Memory Converter against its closed form in float64, and against the operator that continues from it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from pallas_kernels.ssd import ssd
from tests import oracle

BATCH, SEQ_LEN, HEADS, GROUPS, WIDTH, STATE = 2, 45, 4, 2, 6, 8


def make(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 5)
    return {
        "k": jax.random.normal(keys[0], (BATCH, SEQ_LEN, GROUPS, STATE), dtype),
        "v": jax.random.normal(keys[1], (BATCH, SEQ_LEN, HEADS, WIDTH), dtype),
        "dt": jax.nn.softplus(jax.random.normal(keys[2], (BATCH, SEQ_LEN, HEADS)) - 2),
        "a": -jnp.exp(jax.random.uniform(keys[3], (HEADS,), maxval=2)),
        "initial_state": jax.random.normal(keys[4], (BATCH, HEADS, WIDTH, STATE)),
    }


def closed_form(k: Any, v: Any, dt: Any, a: Any, points: Any, initial_state: Any = None, ids: Any = None) -> np.ndarray:
    """h_P = exp(sum_j dt_j a) h_0 + sum_i exp(sum_{j>i} dt_j a) dt_i v_i k_i^T, one row and head at a time."""
    k, v, dt, a = (np.asarray(array, np.float64) for array in (k, v, dt, a))
    state = np.zeros((BATCH, HEADS, WIDTH, STATE))
    for row in range(BATCH):
        point = min(int(np.broadcast_to(points, (BATCH,))[row]), SEQ_LEN)
        real = [t for t in range(point) if ids is None or ids[row][t] != 0]
        document = [t for t in real if ids is None or ids[row][t] == ids[row][real[-1]]]
        for head in range(HEADS):
            for position, t in enumerate(document):
                decay = np.exp(sum(dt[row, later, head] * a[head] for later in document[position + 1 :]))
                state[row, head] += decay * dt[row, t, head] * np.outer(v[row, t, head], k[row, t, head // 2])
            if initial_state is not None and document == real:
                decay = np.exp(sum(dt[row, t, head] * a[head] for t in document))
                state[row, head] += decay * np.asarray(initial_state[row, head], np.float64)
    return state


@pytest.mark.parametrize("point", [0, 1, 7, 8, 9, 44, 45, 60, None])
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_equals_the_closed_form(point: int | None, traced: bool) -> None:
    inputs = make()
    argument = jnp.int32(point) if traced and point is not None else point
    state = tm.memory_converter(**inputs, transpoint=argument, chunk_size=8)
    expected = closed_form(
        *(inputs[name] for name in ("k", "v", "dt", "a")), SEQ_LEN if point is None else point, inputs["initial_state"]
    )
    assert state.dtype == jnp.float32
    assert oracle.relative_error(state, expected) < 1e-6


def test_one_transpoint_per_row_under_jit() -> None:
    inputs = make(1)
    points = np.array([3, 30])
    state = jax.jit(lambda points: tm.memory_converter(**inputs, transpoint=points))(points)
    expected = closed_form(*(inputs[name] for name in ("k", "v", "dt", "a")), points, inputs["initial_state"])
    assert oracle.relative_error(state, expected) < 1e-6


@pytest.mark.parametrize("point", [3, 10, 20, 33, 45])
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_forgets_earlier_documents(point: int, traced: bool) -> None:
    inputs = make(2)
    ids = np.array([[1] * 20 + [2] * 20 + [0] * 5, [0] * 6 + [1] * 9 + [5] * 30], np.int32)
    argument = jnp.int32(point) if traced else point
    state = tm.memory_converter(**inputs, transpoint=argument, segment_ids=ids)
    expected = closed_form(*(inputs[name] for name in ("k", "v", "dt", "a")), point, inputs["initial_state"], ids)
    assert oracle.relative_error(state, expected) < 1e-6


@pytest.mark.parametrize("point", [1, 17, 44])
def test_hand_over_is_lossless(point: int) -> None:
    """State at P, then the operator from P on: the same as the operator over the whole sequence."""
    inputs = make(3)
    k, v, dt, a, h0 = (inputs[name] for name in ("k", "v", "dt", "a", "initial_state"))
    c = jax.random.normal(jax.random.key(9), k.shape)
    whole_y, whole_h = ssd(v, dt, a, k, c, initial_state=h0, chunk_size=8)
    state = tm.memory_converter(k, v, dt, a, transpoint=point, initial_state=h0, chunk_size=8)
    y, h = ssd(v[:, point:], dt[:, point:], a, k[:, point:], c[:, point:], initial_state=state, chunk_size=8)
    assert oracle.relative_error(y, whole_y[:, point:]) < 1e-6
    assert oracle.relative_error(h, whole_h) < 1e-6
    assert oracle.relative_error(tm.memory_converter(k, v, dt, a, initial_state=h0), whole_h) < 1e-6


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_gradient_reaches_the_prefix_and_nothing_else(traced: bool) -> None:
    inputs = make(4)
    cotangent = jax.random.normal(jax.random.key(5), inputs["initial_state"].shape)
    point = jnp.int32(20) if traced else 20

    def loss(inputs: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(cotangent * tm.memory_converter(**inputs, transpoint=point, chunk_size=8))

    grads = jax.grad(loss)(inputs)
    with jax.enable_x64(True):
        double = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in inputs.items()}
        weights = jnp.asarray(np.asarray(cotangent), jnp.float64)

        def oracle_loss(inputs: dict[str, jax.Array]) -> jax.Array:
            k, v, dt, a = (inputs[name] for name in ("k", "v", "dt", "a"))
            h = inputs["initial_state"]
            for t in range(20):
                update = (dt[:, t, :, None] * v[:, t])[..., None] * jnp.repeat(k[:, t], 2, axis=1)[:, :, None]
                h = jnp.exp(dt[:, t] * a[None])[..., None, None] * h + update
            return jnp.sum(weights * h)

        expected = jax.grad(oracle_loss)(double)
    for name in inputs:
        assert oracle.relative_error(grads[name], expected[name]) < 1e-5, name
    assert np.all(np.asarray(grads["k"])[:, 20:] == 0)
    assert np.all(np.any(np.asarray(grads["v"])[:, :20] != 0, axis=(2, 3)))


def test_bfloat16_keys_and_values() -> None:
    inputs = make(6)
    half = {**inputs, "k": inputs["k"].astype(jnp.bfloat16), "v": inputs["v"].astype(jnp.bfloat16)}
    state = tm.memory_converter(**half)
    assert state.dtype == jnp.float32
    expected = closed_form(*(inputs[name] for name in ("k", "v", "dt", "a")), SEQ_LEN, inputs["initial_state"])
    assert oracle.relative_error(state, expected) < 1e-2


@pytest.mark.parametrize(
    ("transpoint", "message"),
    [
        (-1, "transpoint must be >= 0.*found -1"),
        (np.zeros(3, np.int32), r"shape \(\) or \(2,\), found shape \(3,\)"),
        (1.5, "integer.*float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_transpoints_are_refused(transpoint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tm.memory_converter(**make(), transpoint=transpoint)
