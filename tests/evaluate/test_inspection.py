"""The inside of the layers against the forward pass and the oracle."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests import oracle
from transmamba_jax.config import ModelConfig

LENGTH = 12
CONFIG = ModelConfig(
    vocab_size=20,
    num_layers=3,
    d_model=8,
    num_heads=4,
    num_groups=2,
    head_dim=3,
    state_dim=4,
    mlp_dim=12,
    transpoints=(0, 5, LENGTH),
    dtype="float32",
)
MODEL = tm.TransMamba(CONFIG, tm.KernelsConfig(chunk_size=4))
TOKENS = np.random.default_rng(0).integers(0, 20, (2, LENGTH)).astype(np.int32)
IDS = np.array([[1] * 4 + [2] * 8, [3] * 10 + [0] * 2], np.int32)
POINTS = {"static": None, "traced": np.array([3, 0, 12]), "rows": np.array([[3, 4], [0, 12], [12, 7]])}


@pytest.fixture(name="params", scope="module")
def _params() -> Any:
    params = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]
    return {**params, "embedding": 20 * params["embedding"]}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("points", POINTS)
def test_the_inside_is_that_of_the_forward_pass(params: Any, points: str, packed: bool) -> None:
    ids, transpoints = IDS if packed else None, POINTS[points]
    found = tm.inspect(MODEL, params, TOKENS, transpoints=transpoints, segment_ids=ids)
    logits = jax.jit(lambda params: MODEL.apply({"params": params}, TOKENS, transpoints, ids))(params)
    normed = found.outputs[-1] / jnp.sqrt(jnp.mean(found.outputs[-1] ** 2, -1, keepdims=True) + CONFIG.norm_eps)
    ours = normed * params["final_norm"]["scale"][None, None] @ params["embedding"].T
    assert oracle.relative_error(ours, logits) < 2e-6
    np.testing.assert_array_equal(found.inputs[1:], found.outputs[:-1])
    expected = CONFIG.transpoints if transpoints is None else transpoints
    np.testing.assert_array_equal(found.transpoints, expected)
    assert found.attention is None


@partial(jax.jit, static_argnums=2)
def recurrence(q: Any, found: tm.Inspection, stop: int, ids: Any) -> tuple[jax.Array, jax.Array]:
    """Token by token, by the oracle, up to `stop`."""
    cut = lambda leaf: leaf[:, :stop]
    run = lambda q, k, v, dt, a: oracle.recurrence(cut(v), cut(dt), a, cut(k), cut(q), ids[:, :stop])
    return jax.vmap(run)(q, found.k, found.v, found.dt, found.a)


def test_states_and_maps_equal_the_oracle(params: Any) -> None:
    with jax.enable_x64(True):
        found = tm.inspect(MODEL, params, TOKENS, attention=True, segment_ids=IDS)
        double = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), found)
        for layer, point in enumerate(CONFIG.transpoints):
            if point:
                state = recurrence(double.q, double, point, IDS)[1][layer]
                assert oracle.relative_error(found.transpoint_state[layer], state) < 1e-6
        assert not np.any(found.transpoint_state[0])
        assert oracle.relative_error(found.final_state, recurrence(double.q, double, LENGTH, IDS)[1]) < 1e-6
        for layer in range(CONFIG.num_layers):
            q, k = (oracle.rotate(getattr(double, name)[layer], CONFIG.rope_theta) for name in "qk")
            attended = oracle.attention(q, k, double.v[layer], IDS)
            weights = jnp.repeat(found.attention[layer], 2, axis=1)
            ours = jnp.einsum("bhts,bshp->bthp", weights, double.v[layer])
            assert oracle.relative_error(ours, attended) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_ids_of_one_row_are_a_batch_of_one_and_a_text_is_refused(params: Any) -> None:
    row = [3, 1, 2]
    one, batch = (tm.inspect(MODEL, params, tokens) for tokens in (row, np.array([row], np.int32)))
    np.testing.assert_array_equal(one.outputs, batch.outputs)
    with pytest.raises(ValueError, match=r"tokens must be ids, found the text 'def'; .*inspect takes a text"):
        tm.inspect(MODEL, params, "def")


def test_layers_are_chosen(params: Any) -> None:
    every = tm.inspect(MODEL, params, TOKENS, attention=True)
    some = tm.inspect(MODEL, params, TOKENS, layers=(-1, 0), attention=True)
    assert some.layers.tolist() == [2, 0]
    assert some.transpoints.tolist() == [LENGTH, 0]
    assert some.attention.shape == (2, 2, 2, LENGTH, LENGTH)
    for field in dataclasses.fields(tm.Inspection):
        error = oracle.relative_error(getattr(some, field.name), getattr(every, field.name)[jnp.array([2, 0])])
        assert error < 1e-6, field.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (0, 3)}, "layers must be numbers from -3 to 2, found 3"),
        ({"layers": ()}, "layers must be numbers from -3 to 2, found none"),
        ({"transpoints": (1, 2, 3, 4)}, "4 entries but the model has num_layers=3"),
        ({"transpoints": np.zeros(2, np.int32)}, r"transpoints must be .* found shape \(2,\)"),
        ({"segment_ids": np.ones((2, 3), np.int32)}, "segment_ids must be integers of the tokens' shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(params: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tm.inspect(MODEL, params, TOKENS, **arguments)


def test_maps_of_another_attention_are_refused(params: Any) -> None:
    model = tm.TransMamba(CONFIG, attention=lambda *arrays: arrays[2])
    with pytest.raises(ValueError, match="attention=True needs a model with softmax attention"):
        tm.inspect(model, params, TOKENS, attention=True)
