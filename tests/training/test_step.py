"""The loss against float64 arithmetic, accumulation against the large batch, and steps that are not finite."""

import dataclasses
import math
import re
import typing
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests import precision
from tests.training.support import LENGTH, VOCABULARY, Little, little_config, packed_batch, relative
from transmamba_jax import sharding
from transmamba_jax.training import step as train_step
from transmamba_jax.training.loss import loss_and_gradient, token_weights
from transmamba_jax.training.optimizer import learning_rate_schedule, make_optimizer
from transmamba_jax.training.step import TrainState, abstract_batch, first_nonfinite, leaf_name, make_train_step


def test_weights_leave_out_padding_and_the_first_token_of_another_document():
    ids = np.array([[1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 4]], np.int32)
    weights = token_weights({"tokens": np.zeros_like(ids), "segment_ids": ids})
    np.testing.assert_array_equal(weights, [[1, 0, 1, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(token_weights({"tokens": np.zeros((2, 4))}), np.ones((2, 3)))


CONFIG = little_config()
MODEL = Little(CONFIG.model)


@pytest.fixture(name="mesh", scope="module")
def _mesh():
    return sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])


@pytest.fixture(name="first", scope="module")
def _first(mesh):
    return TrainState.create(CONFIG, MODEL, mesh)


@pytest.fixture(name="initial")
def _initial(first):
    """A copy of the first state: steps consume the arrays that they are given."""
    return jax.tree.map(jnp.copy, first)


@pytest.fixture(name="step", scope="module")
def _step(mesh):
    return make_train_step(CONFIG, MODEL, make_optimizer(CONFIG), mesh)


@pytest.mark.parametrize("ablation", typing.get_args(typing.get_type_hints(tm.ModelConfig)["ablation"]))
def test_the_options_that_programs_depend_on_are_a_valid_config(ablation):
    config = little_config(model={"ablation": ablation}, train={"sample_tokens": 0, "log_every": 3})
    kept = train_step.program_config(config)
    assert kept.model == config.model
    assert train_step.program_config(kept) == kept
    assert kept == train_step.program_config(little_config(model={"ablation": ablation}, train={"sample_tokens": 0}))


def test_accumulation_equals_the_large_batch(initial):
    batch, params = packed_batch(1), initial.params

    @partial(jax.jit, static_argnums=1)
    def run(batch, accumulation):
        return loss_and_gradient(params, MODEL, batch, accumulation, 24)

    large = run(batch, 1)
    assert relative(run(batch, 4), large) < 1e-6
    # Microbatches have unequal numbers of tokens, so the mean of their means is something else.
    parts = [{name: rows[start::4] for name, rows in batch.items()} for start in range(4)]
    means = [run(part, 1) for part in parts]
    assert relative(jax.tree.map(lambda *g: sum(g) / 4, *means), large) > 1e-2


def test_runs_that_differ_in_seed_and_rate_share_a_program_where_asked(mesh, monkeypatch):
    compiled, compile_one = [], train_step._compile
    monkeypatch.setattr(train_step, "_compile", lambda *key: compiled.append(key) or compile_one(*key))
    abstract = abstract_batch(CONFIG, mesh)
    batch = {name: packed_batch(4)["tokens"][: leaf.shape[0], : leaf.shape[1]] for name, leaf in abstract.items()}
    rate = learning_rate_schedule(CONFIG, CONFIG.optimizer.learning_rate)

    def compare(seed, scale):
        config = dataclasses.replace(
            CONFIG,
            train=dataclasses.replace(CONFIG.train, seed=seed),
            optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate_scale=scale),
        )
        alone = make_train_step(config, MODEL, make_optimizer(config), mesh)
        shared = train_step.compile_train_step(config, MODEL, mesh)
        (one, metrics), (other, again) = [run(TrainState.create(config, MODEL, mesh), batch) for run in (alone, shared)]
        assert relative(one.params, other.params) < 1e-6
        assert float(metrics["learning_rate"]) == pytest.approx(float(again["learning_rate"]), rel=1e-6)
        assert float(again["learning_rate"]) == pytest.approx(float(rate(0)) * scale, rel=1e-6)

    with train_step.share_programs():
        compare(0, 1.0)
        compare(1, 0.25)
    assert len(compiled) == 1
    compare(2, 0.5)  # a program's own runs compile each for itself: settings of JAX may have changed
    assert len(compiled) == 2


def test_weights_of_a_batch_scale_its_losses(initial):
    batch, params = packed_batch(2), initial.params
    weights = np.random.default_rng(0).choice([0.0, 0.5, 2.0], batch["tokens"].shape).astype(np.float32)
    weighted = {**batch, "weights": weights}
    run = jax.jit(lambda batch, count: loss_and_gradient(params, MODEL, batch, count, 24), static_argnums=1)

    ids = batch["segment_ids"]
    real = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    logits = np.asarray(MODEL.apply({"params": params}, batch["tokens"][:, :-1], ids[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    w = np.where(real, weights[:, 1:], 0)
    assert float(run(weighted, 1)[0]) == pytest.approx((nll * w).sum() / w.sum(), rel=1e-6)
    assert relative(run(weighted, 4), run(weighted, 1)) < 1e-6
    ones = {**batch, "weights": np.ones_like(weights)}
    assert relative(run(ones, 1), run(batch, 1)) == 0


@pytest.mark.parametrize("accumulation", [1, 4])
def test_logits_at_weighted_positions_alone_give_the_same_loss_and_gradient(initial, accumulation):
    batch, rng = packed_batch(3), np.random.default_rng(0)
    del batch["segment_ids"]
    # Of 12 targets per row, 0 to 3 have weight.
    order = rng.permuted(np.tile(np.arange(LENGTH + 1), (8, 1)), axis=1)
    counts = np.arange(8)[:, None] % 4
    weighted = {**batch, "weights": np.where(order < counts, 0.5 + rng.random(order.shape), 0).astype(np.float32)}
    run = jax.jit(
        lambda most: loss_and_gradient(initial.params, MODEL, weighted, accumulation, 8, most), static_argnums=0
    )
    assert relative(run(3), run(None)) < 1e-6
    assert relative(run(2), run(None)) > 1e-3
    # The largest array with a vocabulary is that of the positions, not of the row.
    sizes = lambda most: [
        size for size in re.findall(rf"tensor<(\d+)x(\d+)x{VOCABULARY}xf32>", run.lower(most).as_text())
    ]
    rows = 8 // accumulation
    assert max(int(a) * int(b) for a, b in sizes(3)) <= 3 * rows


def _with_a_log(state, value):
    layers = {**state.params["layers"], "mixer": {"a_log": jnp.full((2, 3), value)}}
    return dataclasses.replace(state, params={**state.params, "layers": layers})


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(initial, step):
    state, _ = step(initial, packed_batch(0))
    bad = _with_a_log(state, 0.0)
    before = jax.device_get((bad.params, bad.opt_state))
    for count in (1, 2):
        bad, metrics = step(bad, packed_batch(count))
        assert math.isfinite(metrics["loss"])
        assert not math.isfinite(metrics["grad_norm"])
        assert leaf_name(bad.params, int(metrics["nonfinite_leaf"])) == "layers/mixer/a_log"
        assert (int(bad.step), int(bad.skipped_steps), int(bad.nonfinite_steps)) == (1 + count, count, count)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((bad.params, bad.opt_state)), before)
    good, metrics = step(_with_a_log(bad, 1.0), packed_batch(3))
    assert (int(good.step), int(good.skipped_steps), int(good.nonfinite_steps)) == (4, 2, 0)
    assert int(metrics["nonfinite_leaf"]) == len(jax.tree.leaves(good.params))
    # Two updates were made before this one or at it: the second step of a warm-up of two has the peak rate.
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    assert relative(good.params["embedding"], before[0]["embedding"]) > 1e-4


def test_a_loss_that_is_not_finite_changes_nothing(initial, step):
    state = dataclasses.replace(initial, params={**initial.params, "embedding": initial.params["embedding"] * np.nan})
    assert first_nonfinite(state.params) == "embedding"
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, packed_batch(0))
    assert math.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)


@pytest.mark.slow
def test_a_bfloat16_step_has_loss_gradient_parameters_and_moments_in_float32(mesh):
    small = {"head_dim": 4, "state_dim": 4, "mlp_dim": 12}
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = little_config(model={"dtype": dtype, **small}, train={"accumulation": 2})
        model = tm.TransMamba(config.model, tm.KernelsConfig(chunk_size=8))
        state = TrainState.create(config, model, mesh)
        step = make_train_step(config, model, make_optimizer(config), mesh)
        gradient = partial(loss_and_gradient, model=model, batch=packed_batch(0), accumulation=2, chunk=24)
        found[dtype] = jax.jit(gradient)(state.params)
        assert precision.narrow(step, state, packed_batch(0)) == set()
        leaves = [found[dtype], *jax.eval_shape(step, state, packed_batch(0))]
        floats = {leaf.dtype for leaf in jax.tree.leaves(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert floats == {jnp.dtype("float32")}
    (loss, gradient), (exact_loss, exact_gradient) = found["bfloat16"], found["float32"]
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-4)
    assert relative(gradient, exact_gradient) < 3e-2
    assert max(jax.tree.leaves(jax.tree.map(relative, gradient, exact_gradient))) < 0.1


def test_metrics_of_a_step(initial, step):
    batch = packed_batch(2)
    batch["bytes"] = batch["tokens"] % 7 + 1
    loss, gradient = jax.jit(lambda params: loss_and_gradient(params, MODEL, batch, 1, 24))(initial.params)
    new_state, metrics = step(initial, batch)
    weights = np.asarray(token_weights(batch), np.float64)
    read = (batch["bytes"][:, 1:] * weights).sum()
    squares = lambda tree: sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["tokens"]) == weights.sum()
    assert float(metrics["bits_per_byte"]) == pytest.approx(float(loss) * weights.sum() / math.log(2) / read, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(math.sqrt(squares(gradient)), rel=1e-5)
    assert float(metrics["param_norm"]) == pytest.approx(math.sqrt(squares(new_state.params)), rel=1e-5)


class Adapted(tm.TransMamba):
    """A subclass with a parameter that is created where the layers' output is used."""

    def setup(self):
        super().setup()
        self.adapter = nn.Dense(self.config.d_model)

    def hidden(self, tokens, transpoints=None, segment_ids=None):
        return self.adapter(super().hidden(tokens, transpoints, segment_ids))


def test_a_subclass_has_the_parameters_that_its_layers_create():
    init = partial(train_step.init_state, CONFIG, Adapted(CONFIG.model))
    state = jax.eval_shape(lambda: init(jax.random.key_data(jax.random.key(0))))
    assert "adapter" in state.params
