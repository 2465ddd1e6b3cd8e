"""The small model that the tests of the model share, and its logits by the oracle."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import transmamba_jax as tm
from tests import oracle
from transmamba_jax.config import ModelConfig

SEQ_LEN = 24
CONFIG = ModelConfig(
    vocab_size=50,
    num_layers=3,
    d_model=16,
    num_heads=2,
    num_groups=1,
    head_dim=6,
    state_dim=4,
    mlp_dim=20,
    transpoints=(0, 6, 24),
    dtype="float32",
)
KERNELS = tm.KernelsConfig(chunk_size=8)
SCHEDULES = {
    "transmamba": (0, 6, 24),
    "transformer": tm.schedule.transformer(SEQ_LEN),
    "mamba2": tm.schedule.mamba2(),
    "hybrid": tm.schedule.hybrid(SEQ_LEN, every=3),
    "beyond_the_row": (3, 20, 99),
}


def tokens_of(length: int = SEQ_LEN, batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(7), (batch, length), 1, CONFIG.vocab_size)


@cache
def make(config: ModelConfig = CONFIG) -> tuple[tm.TransMamba, Any]:
    model = tm.TransMamba(config, KERNELS)
    params = jax.jit(model.init)(jax.random.key(0), tokens_of())["params"]
    # Larger embeddings than at the start of training, so that layers matter as much as they do later.
    return model, {**params, "embedding": 20 * params["embedding"]}


def apply(config: ModelConfig, params: Any, tokens: Any, points: Any = None, ids: Any = None) -> jax.Array:
    return tm.TransMamba(config, KERNELS).apply({"params": params}, tokens, points, ids)


# Compiled once for a config, a static schedule and shapes, whichever test asks.
apply_static = jax.jit(apply, static_argnums=(0, 3))
apply_traced = jax.jit(apply, static_argnums=0)


def apply_either(config: ModelConfig, params: Any, tokens: Any, points: Any, ids: Any = None) -> jax.Array:
    return (apply_static if isinstance(points, tuple) else apply_traced)(config, params, tokens, points, ids)


@partial(jax.jit, static_argnums=(0, 5))
def oracle_in_double(
    config: ModelConfig, params: Any, tokens: Any, points: Any, ids: Any, attend: Callable[..., jax.Array]
) -> jax.Array:
    norm = lambda x, scale: oracle.grouped_norm(x, scale, config.norm_eps)
    x = params["embedding"][tokens]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
        normed = norm(x, block["mixer_norm"]["scale"])
        x = x + oracle.mixer(block["mixer"], config, normed, points[layer], ids, attend)
        if config.mlp_dim:
            y = norm(x, block["mlp_norm"]["scale"])
            gate, up, down = (block["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
            x = x + (oracle.silu(y @ gate) * (y @ up)) @ down
    head = params["embedding"].T if config.tie_embeddings else params["lm_head"]
    return norm(x, params["final_norm"]["scale"]) @ head


def oracle_logits(
    config: ModelConfig, params: Any, tokens: Any, points: Any, ids: Any = None, attend: Any = oracle.attention
) -> np.ndarray:
    """The whole model in float64, layer by layer, from the equations; points [L, B]."""
    ids = np.ones(tokens.shape, np.int32) if ids is None else ids
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return np.asarray(oracle_in_double(config, double, np.asarray(tokens), np.asarray(points), ids, attend))


ANY_DERIVATIVE = tm.KernelsConfig(ssd="reference", attention="reference")


def differentiate() -> Any:
    """Parameters, logits and gradients, under a static and a traced schedule, with documents, in both dtypes."""
    tokens, found = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16), np.int32), []
    ids = np.array([[1] * 7 + [2] * 9, [3] * 12 + [0] * 4], np.int32)
    for dtype, points in (("float32", CONFIG.transpoints), ("bfloat16", np.array(CONFIG.transpoints))):
        model = tm.TransMamba(dataclasses.replace(CONFIG, dtype=dtype), KERNELS)
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, tokens, points, ids)  # noqa: B023
            return jnp.sum(jnp.sin(logits)), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        found.append((params, logits, gradients))
    return found
