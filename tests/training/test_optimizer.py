"""Schedules and update rules against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.support import little_config
from transmamba_jax.config import ModelConfig
from transmamba_jax.model import TransMamba
from transmamba_jax.training.optimizer import MATRICES, decay_mask, learning_rate_schedule, make_optimizer

PEAK, FINAL = 1e-2, 1e-3


def _rates(name, steps, warmup, peak=PEAK, fraction=0.25, **more):
    optimizer = {"schedule": name, "warmup_steps": warmup, "decay_fraction": fraction, "final_learning_rate": FINAL}
    config = little_config(train={"steps": steps}, optimizer={**optimizer, **more})
    return np.array(jax.jit(lambda: [learning_rate_schedule(config, peak)(count) for count in range(steps)])())


def test_cosine_schedule():
    n = np.arange(1, 41)
    cosine = FINAL + (PEAK - FINAL) * 0.5 * (1 + np.cos(np.pi * (n - 8) / 32))
    np.testing.assert_allclose(_rates("cosine", 40, 8), np.where(n <= 8, PEAK * n / 8, cosine), rtol=1e-5)


def test_wsd_schedule():
    n = np.arange(1, 41)
    expected = np.where(n <= 8, PEAK * n / 8, np.where(n <= 30, PEAK, PEAK - (PEAK - FINAL) * (n - 30) / 10))
    np.testing.assert_allclose(_rates("wsd", 40, 8), expected, rtol=1e-5)


def test_constant_schedule():
    n = np.arange(1, 41)
    np.testing.assert_allclose(_rates("constant", 40, 8), np.where(n <= 8, PEAK * n / 8, PEAK), rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_restart_is_the_finished_run_and_then_a_warm_up_from_its_rate_and_the_rest(name):
    found = _rates(name, 60, 8, restart_step=40)
    np.testing.assert_array_equal(found[:40], _rates(name, 40, 8))
    last = PEAK if name == "constant" else FINAL
    n = np.arange(1, 9)
    np.testing.assert_allclose(found[40:48], last + (PEAK - last) * n / 8, rtol=1e-5)
    np.testing.assert_allclose(found[48:], _rates(name, 20, 8)[8:], rtol=1e-6)
    assert found[-1] == pytest.approx(last)


@pytest.mark.parametrize("restart", [0, 20])
@pytest.mark.parametrize("peak", [PEAK, 0.5])
def test_one_factor_scales_every_rate(restart, peak):
    plain = _rates("wsd", 40, 8, peak=peak, restart_step=restart)
    scaled = _rates("wsd", 40, 8, peak=peak, restart_step=restart, learning_rate_scale=0.25)
    np.testing.assert_allclose(scaled, 0.25 * plain, rtol=1e-6)


def test_schedules_that_cannot_be_are_refused_with_the_option_to_use():
    with pytest.raises(
        ValueError, match=r"--optimizer\.final-learning-rate, or scale .* --optimizer\.learning-rate-scale"
    ):
        _rates("cosine", 4, 0, learning_rate=FINAL / 2)
    assert _rates("constant", 4, 0, peak=FINAL / 2, learning_rate=FINAL / 2)[-1] == pytest.approx(FINAL / 2)
    with pytest.raises(ValueError, match=r"restart_step=4 must be below train\.steps=4, or 0"):
        _rates("cosine", 4, 0, restart_step=4)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_edges_of_the_schedules(name):
    assert _rates(name, 40, 0)[-1] == pytest.approx(FINAL)
    assert _rates(name, 5, 5)[-1] == pytest.approx(PEAK)
    assert _rates(name, 5, 4, fraction=1.0)[-1] == pytest.approx(FINAL)
    np.testing.assert_allclose(_rates(name, 40, 8, peak=0.5), _rates(name, 40, 8) * 50, rtol=1e-5)


@pytest.fixture(name="paths", scope="module")
def _paths():
    model = TransMamba(ModelConfig(num_layers=2, transpoints=(0, 4), d_model=16, num_heads=2, num_groups=2, mlp_dim=24))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return tree, {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_weight_decay_is_for_matrices_and_convolution_taps(paths):
    tree, named = paths
    mask = dict(zip(named, jax.tree.leaves(decay_mask(tree)), strict=True))
    mixer, mlp = ("q", "k", "v", "z", "dt", "out"), ("gate", "up", "down")
    assert {name for name, decays in mask.items() if decays} == {
        "embedding",
        *(f"layers/mixer/{part}/kernel" for part in mixer),
        *(f"layers/mixer/conv_{part}/kernel" for part in "qkv"),
        *(f"layers/mlp/{part}/kernel" for part in mlp),
    }
    assert {name for name in named if MATRICES.fullmatch(name)} == {
        *(f"layers/mixer/{part}/kernel" for part in mixer),
        *(f"layers/mlp/{part}/kernel" for part in mlp),
    }


def test_muon_has_the_projections_of_an_attention_with_weights_of_its_own():
    assert all(MATRICES.fullmatch(f"layers/mixer/attention_{part}/kernel") for part in "qkv")
    assert not MATRICES.fullmatch("layers/mixer/attention_conv_q/kernel")


def _tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: scale * rng.normal(size=shape)
    return {
        "embedding": normal(5, 4),
        "layers": {"mixer": {"a_log": normal(3, 2), "q": {"kernel": normal(3, 4, 6)}, "norm": {"scale": normal(3, 4)}}},
    }


def _updates(config, steps):
    tx = make_optimizer(config)
    params = jax.tree.map(jnp.float32, _tree(0))
    state, updates = tx.init(params), []
    for step in range(steps):
        update, state = jax.jit(tx.update)(jax.tree.map(jnp.float32, _tree(1 + step)), state, params)
        updates.append(update)
    return updates


def test_adamw_with_clipping_equals_its_formula():
    config = little_config(optimizer={"warmup_steps": 0, "clip_norm": 2.5, "weight_decay": 0.3})
    cfg, params = config.optimizer, _tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    m, v = zeros, zeros
    for step, found in enumerate(_updates(config, 3), start=1):
        gradient = _tree(step)
        norm = math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        assert norm > cfg.clip_norm
        gradient = jax.tree.map(lambda g, norm=norm: g * cfg.clip_norm / norm, gradient)
        m = jax.tree.map(lambda m, g: cfg.beta1 * m + (1 - cfg.beta1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: cfg.beta2 * v + (1 - cfg.beta2) * g**2, v, gradient)
        rate = 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + math.cos(math.pi * step / 10))
        decays = {
            "embedding": 1.0,
            "layers": {"mixer": {"a_log": 0.0, "q": {"kernel": 1.0}, "norm": {"scale": 0.0}}},
        }

        def update(m, v, p, decay, rate=rate, step=step):
            direction = m / (1 - cfg.beta1**step) / (np.sqrt(v / (1 - cfg.beta2**step)) + cfg.eps)
            return -rate * (direction + cfg.weight_decay * decay * p)

        expected = jax.tree.map(update, m, v, params, decays)
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-8), found, expected)


def test_muon_turns_each_layers_matrix_and_leaves_the_rest_to_adamw():
    settings = {"warmup_steps": 0, "clip_norm": 0.0, "muon_learning_rate": 0.05, "weight_decay": 0.0}
    muon, adamw = (_updates(little_config(optimizer={**settings, "name": name}), 2) for name in ("muon", "adamw"))
    for step, (found, other) in enumerate(zip(muon, adamw, strict=True), start=1):
        matrices = np.asarray(found["layers"]["mixer"]["q"].pop("kernel"), np.float64)
        other["layers"]["mixer"]["q"].pop("kernel")
        jax.tree.map(np.testing.assert_array_equal, found, other)
        rate = 0.05 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10)))
        # Newton-Schulz brings singular values near 1; the factor is sqrt(max(1, out / in)).
        singular = np.linalg.svd(matrices, compute_uv=False) / (rate * math.sqrt(6 / 4))
        assert singular.shape == (3, 4)
        assert np.all((singular > 0.5) & (singular < 1.3))


def test_muon_decays_matrices_with_their_own_rate():
    settings = {"name": "muon", "warmup_steps": 0, "muon_learning_rate": 0.05}
    with_decay, without = (
        _updates(little_config(optimizer={**settings, "weight_decay": decay}), 1)[0] for decay in (0.2, 0.0)
    )
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), with_decay, without)
    progress = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 10))
    mixer, params = difference["layers"]["mixer"], _tree(0)
    expected = -0.05 * progress * 0.2 * params["layers"]["mixer"]["q"]["kernel"]
    np.testing.assert_allclose(mixer["q"]["kernel"], expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(
        difference["embedding"], -1e-2 * progress * 0.2 * params["embedding"], rtol=1e-3, atol=1e-7
    )
    assert not np.any(mixer["a_log"])
