"""Ablations of the mixer against their definitions in float64, with the parts of the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests import oracle
from tests.test_mixer import BATCH, CONFIG, KERNELS, SEQ_LEN, make
from transmamba_jax import sharding
from transmamba_jax.ablations import AblatedMixer
from transmamba_jax.config import Config, TrainConfig
from transmamba_jax.mixer import Mixer
from transmamba_jax.runtime.tree_paths import path_name

ABLATIONS = ("zero_state", "converter_without_dt", "gated_attention", "separate_weights")
POINT = 11


def ablated(name):
    return dataclasses.replace(CONFIG, ablation=name)


def parameters(name):
    params, x, _ = make(CONFIG)
    other = make(CONFIG, 1)[0] if name == "separate_weights" else {}
    parts = ("q", "k", "v", "conv_q", "conv_k", "conv_v") if other else ()
    return {**params, **{f"attention_{part}": other[part] for part in parts}}, x


def projected(params, x, prefix=""):
    ids = jnp.ones(x.shape[:2], jnp.int32)
    project = lambda part: oracle.silu(
        oracle.short_conv(params[f"{prefix}conv_{part}"], x @ params[prefix + part]["kernel"], ids)
    )
    heads = lambda y, count: y.reshape(*y.shape[:2], count, -1)
    return heads(project("q"), 2), heads(project("k"), 2), heads(project("v"), 4)


def expected(name, params, x, point=POINT):
    """The definition: both parts of the row on their own, and the state that passes from one to the other."""
    ones = lambda y: jnp.ones(y.shape[:2], jnp.int32)
    flat = lambda y: y.reshape(*y.shape[:2], -1)
    scale = params["norm"]["scale"]
    gate = oracle.silu(x @ params["z"]["kernel"])
    q, k, v = projected(params, x, "attention_" if name == "separate_weights" else "")
    turn = lambda y: oracle.rotate(y, CONFIG.rope_theta)
    attended = flat(oracle.attention(turn(q), turn(k), v, ones(x)))
    attended = attended * gate if name == "gated_attention" else attended

    q, k, v = projected(params, x)
    dt, a = jnp.log1p(jnp.exp(x @ params["dt"]["kernel"] + params["dt_bias"])), -jnp.exp(params["a_log"])
    k_heads, q_heads = jnp.repeat(k, 2, axis=2), jnp.repeat(q, 2, axis=2)
    state = 0
    for token in range(point):
        later = jnp.exp(dt[:, token + 1 : point].sum(1) * a)[..., None, None]
        factor = 1 if name == "converter_without_dt" else dt[:, token][..., None, None]
        state = state + later * factor * v[:, token][..., None] * k_heads[:, token][..., None, :]
    if name == "zero_state":
        state = jnp.zeros_like(state)
    past = slice(None), slice(point, None)
    y, _ = oracle.recurrence(v[past], dt[past], a, k[past], q[past], ones(x[past]))
    decay = jnp.exp(jnp.cumsum(dt[past], axis=1) * a)
    y = y + decay[..., None] * jnp.einsum("bhpn,bthn->bthp", state, q_heads[past])
    y = flat(y + params["skip"][:, None] * v[past]) * gate[past]
    norm = lambda y: oracle.grouped_norm(y, scale, CONFIG.norm_eps)
    return jnp.concatenate([norm(attended[:, :point]), norm(y)], axis=1) @ params["out"]["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_its_definition(name):
    params, x = parameters(name)
    mixer = AblatedMixer(ablated(name), KERNELS)
    apply = jax.jit(lambda point: mixer.apply({"params": params}, x, point))
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (params, x))
        right = np.asarray(expected(name, *wide))
        plain = np.asarray(expected("none", *wide))
    for point in (jnp.int32(POINT), jnp.full(BATCH, POINT, jnp.int32)):
        assert oracle.relative_error(apply(point), right) < 1e-5
    assert oracle.relative_error(mixer.apply({"params": params}, x, POINT), right) < 1e-5
    assert oracle.relative_error(plain, right) > 1e-2


@pytest.mark.parametrize(
    ("name", "equal_points"),
    [
        ("zero_state", (0, SEQ_LEN)),
        ("converter_without_dt", (0, SEQ_LEN)),
        ("gated_attention", (0,)),
        ("separate_weights", (0,)),
    ],
)
def test_an_ablation_of_the_passage_changes_nothing_where_there_is_none(name, equal_points):
    params, x = parameters(name)
    shared = make(CONFIG)[0]
    mixer = AblatedMixer(ablated(name), KERNELS)
    run = jax.jit(lambda point: mixer.apply({"params": params}, x, point))
    for point in equal_points:
        whole = Mixer(CONFIG, KERNELS).apply({"params": shared}, x, point)
        assert oracle.relative_error(run(jnp.int32(point)), whole) < 1e-5


@pytest.mark.slow
def test_a_document_that_begins_behind_the_transpoint_is_not_ablated():
    params, x = parameters("zero_state")
    ids = jnp.where(jnp.arange(SEQ_LEN) < POINT, 1, 2)[None].repeat(BATCH, 0)
    whole = Mixer(CONFIG, KERNELS).apply({"params": params}, x, POINT, ids)
    found = AblatedMixer(ablated("zero_state"), KERNELS).apply({"params": params}, x, POINT, ids)
    assert oracle.relative_error(found, whole) < 1e-5


def test_the_model_has_the_ablation_of_its_config_and_every_parameter_a_sharding():
    config = dataclasses.replace(ablated("separate_weights"), vocab_size=8, num_layers=2, mlp_dim=0)
    shapes = jax.eval_shape(tm.TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    mesh = sharding.make_mesh(tm.MeshConfig(), jax.devices()[:1])
    specs = {
        path_name(path): sharding.parameter_spec(path_name(path), leaf.shape, mesh)
        for path, leaf in jax.tree.leaves_with_path(shapes)
    }
    assert specs["layers/mixer/attention_q/kernel"] == specs["layers/mixer/q/kernel"]
    assert specs["layers/mixer/attention_conv_v/bias"] == specs["layers/mixer/conv_v/bias"]


def test_what_cannot_decode_says_so_before_anything_runs():
    config = ablated("zero_state")
    with pytest.raises(ValueError, match=r"train\.sample_tokens must be 0 with model\.ablation=zero_state"):
        Config(model=config)
    Config(model=config, train=TrainConfig(sample_tokens=0))
    with pytest.raises(ValueError, match=r"model\.ablation must be 'none' to decode, found 'zero_state'"):
        tm.generate(tm.TransMamba(config), {}, [[1]], 1)
    with pytest.raises(ValueError, match=r"inspect needs a model with model\.ablation='none'"):
        tm.inspect(tm.TransMamba(config), {}, jnp.zeros((1, 4), jnp.int32))
