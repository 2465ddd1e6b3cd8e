"""Small models, their logits by the forward pass, and reading on by a decoder."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import transmamba_jax as tm
from tests import models
from transmamba_jax.config import ModelConfig
from transmamba_jax.generate.decode import Decoder, DecodeState

PROMPT, TOTAL = 12, 20
# TransPoints inside the prompt, at its last token and inside the continuation; never and 0 are among the schedules.
POINTS = (5, 12, 16)
CONFIG = dataclasses.replace(models.CONFIG, transpoints=POINTS)
KERNELS = tm.KernelsConfig(ssd="reference", chunk_size=8)
# One layer whose TransPoint is inside the continuation.
SMALL = dataclasses.replace(CONFIG, num_layers=1, mlp_dim=0, tie_embeddings=False, transpoints=(16,))
TWO = dataclasses.replace(SMALL, num_layers=2, transpoints=(4, 99))
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, TOTAL))


def random_params(config: ModelConfig) -> Any:
    """Parameters of about the sizes of a trained model's, drawn by numpy: nothing to compile."""
    shapes = jax.eval_shape(tm.TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    draw = np.random.default_rng(1)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, normal = path[-1].key, draw.normal(size=shape.shape)
        if name in ("scale", "skip"):
            normal = 1 + normal / 5
        elif name == "dt_bias":
            normal = normal - 2
        elif name == "kernel":
            normal = normal / np.sqrt(shape.shape[-2])
        return jnp.asarray(normal, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@cache
def make(config: ModelConfig = CONFIG) -> tuple[tm.TransMamba, Any]:
    return tm.TransMamba(config, KERNELS), random_params(config)


@partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params: Any, tokens: Any, points: Any) -> jax.Array:
    return tm.TransMamba(config, KERNELS).apply({"params": params}, tokens, points)


def logits_of(config: ModelConfig, tokens: np.ndarray, points: tuple[int, ...]) -> np.ndarray:
    """The forward at every position, [B, T, V]; any schedule without compiling again."""
    config = dataclasses.replace(config, transpoints=(0,))  # given as an argument, so not part of the program
    _, params = make(config)
    return np.asarray(forward(config, params, tokens, np.array(tm.schedule.expand(points, config.num_layers))))


def read_on(decoder: Decoder, state: DecodeState, tokens: np.ndarray) -> tuple[np.ndarray, DecodeState]:
    """Read the tokens one by one and return the logits after each, [B, n, V], and the last state."""
    logits = []
    for column in tokens.T:
        state = decoder.extend(state, column[:, None].tolist(), total=TOTAL)
        logits.append(np.asarray(state.logits))
    return np.stack(logits, axis=1), state


@cache
def decoder_of(config: ModelConfig = CONFIG, points: tuple[int, ...] | None = None, lazy: bool = True) -> Decoder:
    return Decoder(*make(config), points, lazy)
