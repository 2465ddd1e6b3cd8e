"""The mixer once more, written from the equations alone: one token at a time, in float64, with nothing shared.

It runs inside `jax.enable_x64(True)` and is differentiable, so it serves values and gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax.config import ModelConfig


def silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))


def same_document(ids: jax.Array, back: int) -> jax.Array:
    """Tell whether token t and token t - back exist, are real and share a document: [B, T]."""
    shifted = jnp.concatenate([jnp.zeros_like(ids[:, :back]), ids[:, : ids.shape[1] - back]], axis=1)
    return (shifted == ids) & (ids != 0)


def short_conv(params: Mapping[str, Any], x: jax.Array, ids: jax.Array) -> jax.Array:
    """y_t = bias + sum_j kernel[K-1-j] x_{t-j}, over the taps of the same document."""
    kernel, seq_len = params["kernel"], x.shape[1]
    y = jnp.zeros_like(x) + params.get("bias", np.zeros(x.shape[-1]))[None, None]
    for back in range(min(kernel.shape[0], seq_len)):
        shifted = jnp.concatenate([jnp.zeros_like(x[:, :back]), x[:, : seq_len - back]], axis=1)
        y = (
            y
            + jnp.where(same_document(ids, back)[..., None], shifted, 0)
            * kernel[None, None, kernel.shape[0] - 1 - back]
        )
    return y


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding as multiplication of complex numbers, first half real and second half imaginary."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None, :]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Dense softmax attention, every head with its own copy of its group's q and k."""
    repeat = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, repeat, axis=2), jnp.repeat(k, repeat, axis=2)
    scores = jnp.einsum("bthn,bshn->bhts", q, k) / np.sqrt(q.shape[-1])
    time = np.arange(q.shape[1])
    mask = (time[:, None] >= time)[None] & (ids[:, :, None] == ids[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshp->bthp", weights, v)


def recurrence(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t; h restarts with a document, padding leaves it."""
    repeat = x.shape[2] // b.shape[2]
    b, c = jnp.repeat(b, repeat, axis=2), jnp.repeat(c, repeat, axis=2)

    def step(carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        h, document = carry
        x_t, dt_t, b_t, c_t, id_t = token
        real = (id_t != 0)[:, None, None, None]
        kept = jnp.where((id_t == document)[:, None, None, None], h, 0)
        new = jnp.exp(dt_t * a[None])[..., None, None] * kept
        new = new + (dt_t[..., None] * x_t)[..., None] * b_t[..., None, :]
        h = jnp.where(real, new, h)
        return (h, jnp.where(id_t != 0, id_t, document)), jnp.einsum("bhpn,bhn->bhp", h, c_t)

    start = (jnp.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1]), x.dtype), jnp.zeros_like(ids[:, 0]))
    tokens = tuple(jnp.moveaxis(array, 1, 0) for array in (x, dt, b, c, ids))
    (h, _), y = jax.lax.scan(step, start, tokens)
    return jnp.moveaxis(y, 0, 1), h


def grouped_norm(y: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    grouped = y.reshape(*y.shape[:2], *scale.shape)
    normed = grouped / jnp.sqrt(jnp.mean(grouped**2, axis=-1, keepdims=True) + eps) * scale[None, None]
    return normed.reshape(y.shape)


def mixer(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    x: jax.Array,
    points: jax.Array,
    ids: jax.Array | None = None,
    attend: Callable[..., jax.Array] = attention,
) -> jax.Array:
    """where(t < P, attend, ssd), both branches over the whole row; `points` [B]."""
    ids = jnp.ones(x.shape[:2], jnp.int32) if ids is None else ids
    heads = lambda y, count: y.reshape(*y.shape[:2], count, -1)
    activate = silu if cfg.conv_activation == "silu" else lambda y: y
    project = lambda name: activate(short_conv(params[f"conv_{name}"], x @ params[name]["kernel"], ids))
    q, k = heads(project("q"), cfg.num_groups), heads(project("k"), cfg.num_groups)
    v = heads(project("v"), cfg.num_heads)
    if cfg.rotary == "both":
        q, k = rotate(q, cfg.rope_theta), rotate(k, cfg.rope_theta)
        attended = attend(q, k, v, ids)
    else:
        attended = attend(rotate(q, cfg.rope_theta), rotate(k, cfg.rope_theta), v, ids)
    attended = attended.reshape(*x.shape[:2], -1)
    if cfg.attention_norm:
        attended = grouped_norm(attended, params["norm"]["scale"], cfg.norm_eps)
    dt = jnp.log1p(jnp.exp(x @ params["dt"]["kernel"] + params["dt_bias"][None, None]))
    scanned, _ = recurrence(v, dt, -jnp.exp(params["a_log"]), k, q, ids)
    if cfg.use_d_skip:
        scanned = scanned + params["skip"][None, None, :, None] * v
    gated = scanned.reshape(*x.shape[:2], -1) * silu(x @ params["z"]["kernel"])
    scanned = grouped_norm(gated, params["norm"]["scale"], cfg.norm_eps)
    before = np.arange(x.shape[1])[None, :, None] < points[:, None, None]
    return jnp.where(before, attended, scanned) @ params["out"]["kernel"]


def relative_error(actual: Any, expected: Any) -> float:
    """‖actual - expected‖ / ‖expected‖ over all leaves together, in float64."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(got, np.float64), np.asarray(want, np.float64)) for got, want in pairs]
    difference = np.sqrt(sum(np.sum((got - want) ** 2) for got, want in pairs))
    return float(difference / np.sqrt(sum(np.sum(want**2) for _, want in pairs)))
