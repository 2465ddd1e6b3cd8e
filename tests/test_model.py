"""The model: one parameter tree under every schedule, and what packing and padding promise."""

import dataclasses
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests import oracle, precision
from tests.models import (
    CONFIG,
    KERNELS,
    SCHEDULES,
    SEQ_LEN,
    apply,
    apply_either,
    apply_static,
    make,
    oracle_logits,
    tokens_of,
)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["static", "traced_layer", "traced_row"])
def test_every_schedule_equals_the_oracle(name: str, form: str) -> None:
    _, params = make()
    tokens = tokens_of()
    points = np.array(tm.schedule.expand(SCHEDULES[name], CONFIG.num_layers), np.int32)
    per_row = np.broadcast_to(points[:, None], (CONFIG.num_layers, tokens.shape[0]))
    argument = {"static": SCHEDULES[name], "traced_layer": points, "traced_row": np.array(per_row)}[form]
    logits = apply_either(CONFIG, params, tokens, argument)
    assert logits.dtype == jnp.float32
    assert oracle.relative_error(logits, oracle_logits(CONFIG, params, tokens, per_row)) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"tie_embeddings": False}, {"mlp_dim": 0}, {"remat": "full"}, {"remat": "dots"}, {"num_groups": 2}],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_options_equal_the_oracle(change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    _, params = make(config)
    tokens = tokens_of()
    per_row = np.array(config.transpoints)[:, None] * np.ones((1, 2), np.int32)
    logits = apply_static(config, params, tokens)
    assert oracle.relative_error(logits, oracle_logits(config, params, tokens, per_row)) < 5e-6


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    """y_t = Σ_s (q_t · k_s) v_s / (t + 1), over s <= t of the same document: no softmax."""
    length, shared = q.shape[1], v.shape[2] // q.shape[2]
    scores = jnp.einsum("btgn,bsgn->bgts", q, k)
    seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    weights = jnp.where(seen, scores, 0) / jnp.arange(1, length + 1)[None, None, :, None]
    return jnp.einsum("bhts,bshp->bthp", jnp.repeat(weights, shared, axis=1), v)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_an_attention_of_ones_own_replaces_softmax(traced: bool, packed: bool) -> None:
    params, tokens = make()[1], tokens_of()
    ids = np.array([[1] * 9 + [2] * 15, [3] * 24], np.int32) if packed else None
    model = tm.TransMamba(CONFIG, KERNELS, attention=linear_attention)
    points = np.array(CONFIG.transpoints) if traced else CONFIG.transpoints
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens, points, ids))(params)
    per_row = np.array(CONFIG.transpoints)[:, None] * np.ones((1, 2), np.int32)
    expected = oracle_logits(CONFIG, params, tokens, per_row, ids, linear_attention)
    assert oracle.relative_error(logits, expected) < 5e-6
    softmax = oracle_logits(CONFIG, params, tokens, per_row, ids)
    assert oracle.relative_error(softmax, expected) > 0.1


def test_an_attention_of_another_shape_is_refused() -> None:
    model = tm.TransMamba(CONFIG, attention=lambda *arrays: arrays[0])
    with pytest.raises(ValueError, match=r"must return the shape \[B, T, H, P\] of v, .* found \(2, \d+, 1, 4\)"):
        model.apply({"params": make()[1]}, tokens_of())


@pytest.mark.slow
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_bfloat16_logits_are_close_and_accumulated_in_float32(residual_in_fp32: bool) -> None:
    _, params = make()
    half = dataclasses.replace(CONFIG, dtype="bfloat16", residual_in_fp32=residual_in_fp32)
    points = np.array(CONFIG.transpoints)[:, None] * np.ones((1, 2), np.int32)
    expected = oracle_logits(CONFIG, params, tokens_of(), points)
    for schedule in (CONFIG.transpoints, np.array(CONFIG.transpoints)):
        logits = apply_either(half, params, tokens_of(), schedule)
        assert logits.dtype == jnp.float32
        assert np.mean(logits == logits.astype(jnp.bfloat16)) < 0.1
        assert oracle.relative_error(logits, expected) < 1e-2
    assert precision.narrow(partial(apply, half), params, tokens_of()) == set()


@pytest.mark.slow
def test_parameter_tree_is_the_same_under_every_schedule() -> None:
    shapes = {}
    for name, points in SCHEDULES.items():
        config = dataclasses.replace(CONFIG, transpoints=points)
        params = jax.eval_shape(tm.TransMamba(config).init, jax.random.key(0), tokens_of())["params"]
        shapes[name] = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert all(shape == shapes["transmamba"] for shape in shapes.values())
    layers = jax.tree.leaves(
        jax.eval_shape(tm.TransMamba(CONFIG).init, jax.random.key(0), tokens_of())["params"]["layers"]
    )
    assert {leaf.shape[0] for leaf in layers} == {CONFIG.num_layers}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_without_tokens_are_those_with_tokens(tie_embeddings: bool) -> None:
    model = tm.TransMamba(dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings))
    alone = model.init(jax.random.key(3), method="initialize")
    jax.tree.map(np.testing.assert_array_equal, alone, model.init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32)))


def test_layers_start_from_different_values() -> None:
    _, params = make()
    kernel = np.asarray(params["layers"]["mixer"]["q"]["kernel"])
    assert len({row.tobytes() for row in kernel}) == CONFIG.num_layers
    assert np.all(np.asarray(params["layers"]["mixer"]["skip"]) == 1)
    dt = np.log1p(np.exp(np.asarray(params["layers"]["mixer"]["dt_bias"], np.float64)))
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 1.01e-1
    decay = np.exp(np.asarray(params["layers"]["mixer"]["a_log"]))
    assert decay.min() >= 1
    assert decay.max() <= 16


@pytest.mark.parametrize("groups", [1, 2], ids=["one_group", "group_per_head"])
def test_mamba2_schedule_equals_an_independent_mamba2(groups: int) -> None:
    """P = 0 everywhere: in_proj order z, x, B, C, dt in one matrix and one convolution, token by token in numpy."""
    config = dataclasses.replace(CONFIG, num_layers=1, num_groups=groups, mlp_dim=0, transpoints=(0,))
    model, params = make(config)
    tokens = np.asarray(tokens_of(SEQ_LEN, 1))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layer = jax.tree.map(lambda leaf: leaf[0], p["layers"])
    m = layer["mixer"]
    heads, width, keys = config.num_heads, config.head_dim, groups * config.state_dim
    in_proj = np.concatenate([m[name]["kernel"] for name in ("z", "v", "k", "q", "dt")], axis=1)
    taps = np.concatenate([m[f"conv_{name}"]["kernel"] for name in "vkq"], axis=1)
    bias = np.concatenate([m[f"conv_{name}"]["bias"] for name in "vkq"])
    silu = lambda y: y / (1 + np.exp(-y))
    norm = lambda y: y / np.sqrt(np.mean(y**2, -1, keepdims=True) + config.norm_eps)
    window, h, expected = np.zeros((4, taps.shape[1])), np.zeros((heads, width, config.state_dim)), []
    for token in tokens[0]:
        residual = p["embedding"][token]
        z, xbc, dt = np.split(norm(residual) * layer["mixer_norm"]["scale"] @ in_proj, [heads * width, -heads])
        window = np.concatenate([window[1:], xbc[None]])
        x, b, c = np.split(silu((window * taps).sum(0) + bias), [heads * width, heads * width + keys])
        b, c = (np.repeat(y.reshape(groups, -1), heads // groups, axis=0) for y in (b, c))  # a head reads its group's
        dt = np.log1p(np.exp(dt + m["dt_bias"]))
        x = x.reshape(heads, width)
        h = np.exp(-dt * np.exp(m["a_log"]))[:, None, None] * h + (dt[:, None] * x)[:, :, None] * b[:, None]
        y = ((h @ c[:, :, None])[..., 0] + m["skip"][:, None] * x).ravel() * silu(z)
        out = (norm(y.reshape(groups, -1)) * m["norm"]["scale"]).ravel() @ m["out"]["kernel"]
        expected.append(norm(residual + out) * p["final_norm"]["scale"] @ p["embedding"].T)
    logits = jax.jit(model.apply)({"params": params}, tokens)[0]
    assert oracle.relative_error(logits, np.array(expected)) < 2e-6


def test_transformer_schedule_equals_flax_attention() -> None:
    """P = T: the mixer is plain multi-head attention, here by flax's own operator."""
    config = dataclasses.replace(CONFIG, num_layers=1, num_groups=2, mlp_dim=0, transpoints=(SEQ_LEN,), head_dim=4)
    model, params = make(config)
    tokens = tokens_of()
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    mixer = layer["mixer"]
    norm = lambda y, scale: oracle.grouped_norm(y, scale, config.norm_eps)
    x = params["embedding"][tokens]
    y = norm(x, layer["mixer_norm"]["scale"])
    ids = jnp.ones_like(tokens)
    q, k, v = (
        oracle.silu(oracle.short_conv(mixer[f"conv_{name}"], y @ mixer[name]["kernel"], ids)).reshape(
            *tokens.shape, 2, 4
        )
        for name in "qkv"
    )
    rotate = lambda y: oracle.rotate(y, config.rope_theta).astype(jnp.float32)
    attended = nn.dot_product_attention(rotate(q), rotate(k), v, mask=nn.make_causal_mask(tokens))
    attended = norm(attended, mixer["norm"]["scale"]).reshape(*tokens.shape, -1)
    expected = norm(x + attended @ mixer["out"]["kernel"], params["final_norm"]["scale"]) @ params["embedding"].T
    assert oracle.relative_error(jax.jit(model.apply)({"params": params}, tokens), expected) < 5e-6


@pytest.mark.parametrize("offset", [5, 6])
def test_packed_document_equals_the_document_alone(offset: int) -> None:
    """A document at offset s is the document alone under TransPoints max(P - s, 0)."""
    _, params = make()
    alone = tokens_of(SEQ_LEN - offset, 1)
    packed = jnp.concatenate([tokens_of(offset, 1), alone], axis=1)
    ids = jnp.where(jnp.arange(SEQ_LEN) < offset, 1, 2)[None]
    shifted = tuple(max(point - offset, 0) for point in CONFIG.transpoints)
    expected = apply_static(CONFIG, params, alone, shifted)
    for points in (CONFIG.transpoints, np.array(CONFIG.transpoints)):
        logits = apply_either(CONFIG, params, packed, points, ids)[:, offset:]
        assert oracle.relative_error(logits, expected) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("padding", [1, 9])
def test_left_padding_shifts_the_transpoints(padding: int) -> None:
    """A row left-padded by s under P + s is the unpadded row under P."""
    _, params = make()
    alone = tokens_of(SEQ_LEN - padding)
    padded = jnp.pad(alone, ((0, 0), (padding, 0)))
    ids = jnp.pad(jnp.ones_like(alone), ((0, 0), (padding, 0)))
    shifted = tuple(point + padding for point in CONFIG.transpoints)
    expected = apply_static(CONFIG, params, alone)
    for points in (shifted, np.array(shifted)):
        logits = apply_either(CONFIG, params, padded, points, ids)[:, padding:]
        assert oracle.relative_error(logits, expected) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("with_ids", [False, True])
def test_right_padding_changes_nothing(with_ids: bool) -> None:
    _, params = make()
    alone = tokens_of(SEQ_LEN - 7)
    padded = jnp.pad(alone, ((0, 0), (0, 7)))
    ids = jnp.pad(jnp.ones_like(alone), ((0, 0), (0, 7))) if with_ids else None
    logits = apply_static(CONFIG, params, padded, None, ids)
    assert np.all(np.isfinite(logits))
    assert oracle.relative_error(logits[:, :-7], apply_static(CONFIG, params, alone)) < 5e-6


def test_traced_schedules_share_one_compilation() -> None:
    model, params = make()
    traces = []

    @jax.jit
    def apply(points: jax.Array) -> jax.Array:
        traces.append(1)
        return model.apply({"params": params}, tokens_of(), points)

    outputs = [apply(jnp.array(points)) for points in ((0, 6, 24), (1, 2, 3), (24, 24, 24))]
    assert len(traces) == 1
    assert oracle.relative_error(outputs[0], outputs[1]) > 1e-3


def test_given_layers_of_another_shape_or_without_a_leaf_are_refused() -> None:
    """The shapes that they are compared with are traced once; what is wrong with them is found at every call."""
    model, params = make()
    for _ in range(2):
        wrong = jax.tree.map(lambda leaf: leaf, params)
        wrong["layers"]["mixer"]["out"]["kernel"] = wrong["layers"]["mixer"]["out"]["kernel"][:, :-1]
        with pytest.raises(flax.errors.ScopeParamShapeError, match="layers"):
            model.apply({"params": wrong}, tokens_of())
        del wrong["layers"]["mixer"]["out"]
        with pytest.raises(flax.errors.ScopeParamShapeError, match="layers"):
            model.apply({"params": wrong}, tokens_of())


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_unrolled_layers_change_the_loop_alone(traced: bool) -> None:
    config = dataclasses.replace(CONFIG, num_layers=4, transpoints=(0, 6))
    _, params = make(config)
    points = np.array([0, 6, 0, 6], np.int32) if traced else config.transpoints
    found, turns = {}, {}
    for unrolled in (1, 2, 4):
        model = tm.TransMamba(config, dataclasses.replace(KERNELS, unrolled_layers=unrolled))
        hidden = lambda p, model=model: model.apply({"params": p}, tokens_of(), points, method="hidden")
        found[unrolled] = jax.jit(hidden)(params)
        equations = jax.make_jaxpr(hidden)(params).jaxpr.eqns
        (turns[unrolled],) = [each.params["unroll"] for each in equations if each.primitive.name == "scan"]
    assert turns == ({1: 1, 2: 2, 4: 4} if traced else {1: 1, 2: 1, 4: 2})  # of blocks of one layer, or of two
    for each in found.values():
        assert oracle.relative_error(each, found[1]) < 1e-6


@pytest.mark.slow
def test_depth_adds_no_code_when_the_schedule_repeats() -> None:
    def size(num_layers: int) -> int:
        model = tm.TransMamba(dataclasses.replace(CONFIG, num_layers=num_layers, transpoints=(0, 6)))
        params = jax.eval_shape(model.init, jax.random.key(0), tokens_of())
        return len(jax.jit(model.apply).lower(params, tokens_of()).as_text().splitlines())

    assert size(16) <= 1.02 * size(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": jnp.zeros((2, 3))}, r"tokens must be integers \[B, T\], found shape \(2, 3\), dtype float32"),
        ({"tokens": jnp.zeros((3,), jnp.int32)}, r"found shape \(3,\)"),
        ({"tokens": jnp.zeros((2, 0), jnp.int32)}, "at least one token"),
        ({"transpoints": (0, -1)}, r"transpoints\[1\] must be >= 0 .*found -1"),
        ({"transpoints": ()}, "at least one TransPoint"),
        ({"transpoints": (0, 1.5)}, r"transpoints\[1\] must be an int, found 1.5"),
        ({"transpoints": (0,) * 5}, "5 entries but the model has num_layers=3"),
        ({"transpoints": jnp.zeros((4,), jnp.int32)}, r"shape \(3,\) or \(3, 2\).*found shape \(4,\)"),
        ({"transpoints": jnp.zeros((3,))}, "integer array.*float32"),
        ({"segment_ids": jnp.ones((2, 3), jnp.int32)}, r"shape \(2, 24\), found shape \(2, 3\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    model, params = make()
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, **{"tokens": tokens_of(), **arguments})
