"""Helpers for the training tests: a model that compiles in a second, configs and batches."""

import errno
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

VOCABULARY, WIDTH, LENGTH = 23, 8, 12


class Little(nn.Module):
    """A stand-in with the model's interface and some of its parameter names: mean of the past, then an MLP.

    The gradient of `a_log` is NaN where it is 0, while the loss stays finite.
    """

    config: ModelConfig
    kernels: KernelsConfig = KernelsConfig()

    def setup(self) -> None:
        cfg = self.config
        normal = nn.initializers.normal(0.5)
        self.embedding = self.param("embedding", normal, (cfg.vocab_size, cfg.d_model))
        self.layers = self.param("layers", self._init_layers)

    def _init_layers(self, key: jax.Array) -> dict[str, Any]:
        cfg = self.config
        up, down = (jax.random.normal(part, (2, cfg.d_model, cfg.d_model)) / 3 for part in jax.random.split(key))
        return {"mixer": {"a_log": jnp.ones((2, 3))}, "mlp": {"up": {"kernel": up}, "down": {"kernel": down}}}

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self.logits(self.hidden(tokens, segment_ids=segment_ids))

    def hidden(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        past = jnp.tril(ids[:, :, None] == ids[:, None, :])
        x = jnp.einsum("bts,bsd->btd", past / past.sum(-1, keepdims=True), self.embedding[tokens])
        mlp = self.layers["mlp"]
        for layer in range(2):
            x = x + jnp.tanh(x @ mlp["up"]["kernel"][layer]) @ mlp["down"]["kernel"][layer]
        return x + 0.0 * jnp.sqrt(self.layers["mixer"]["a_log"]).sum()

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.embedding.T


def little_config(**sections: Any) -> Config:
    """Make a config for `Little`; keyword arguments replace fields of the sections."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "num_layers": 2,
            "num_heads": 3,
            "num_groups": 3,
            "transpoints": (0, LENGTH),
        },
        "data": {"seq_len": LENGTH, "batch_size": 8},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2, "final_learning_rate": 1e-3},
        "kernels": {},
        "train": {"steps": 10, "loss_chunk": 24, "log_every": 1},
        "checkpoint": {},
        "eval": {"every": 0},
    }
    classes = {
        "model": ModelConfig,
        "kernels": KernelsConfig,
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "train": TrainConfig,
        "checkpoint": CheckpointConfig,
        "eval": EvalConfig,
    }
    plain = {name: value for name, value in sections.items() if name not in classes}
    merged = {name: cls(**{**defaults[name], **sections.get(name, {})}) for name, cls in classes.items()}
    return Config(**merged, **plain)


def packed_batch(seed: int, rows: int = 8, length: int = LENGTH, vocabulary: int = VOCABULARY) -> dict[str, np.ndarray]:
    """Make rows of several documents and very different amounts of padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    ids = 1 + np.cumsum(rng.random((rows, length + 1)) < 0.15, axis=1)
    filled = np.linspace(3, length + 1, rows).astype(int)
    ids = np.where(np.arange(length + 1) < filled[:, None], ids, 0)
    return {"tokens": tokens, "segment_ids": ids.astype(np.int32)}


class Filling:
    """A file that takes `room` more bytes, in parts, and then refuses."""

    def __init__(self, file: Any, room: int = 10) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if content and self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = content[: min(self.room, 50)]
        self.room -= len(taken)
        return self.file.write(taken)

    def close(self) -> None:
        self.file.close()


def relative(found: Any, expected: Any) -> float:
    """Return the relative L2 distance of two trees over all leaves together."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    difference = sum(np.sum((np.asarray(f, np.float64) - np.asarray(e, np.float64)) ** 2) for f, e in pairs)
    return float(np.sqrt(difference / sum(np.sum(np.asarray(e, np.float64) ** 2) for _, e in pairs)))
