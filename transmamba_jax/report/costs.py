"""Predicted costs of a schedule: FLOPs of training, and bytes of the cache."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from transmamba_jax import cache, schedule
from transmamba_jax.config import ModelConfig
from transmamba_jax.model import TransMamba


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters of a model."""
    return _count(dataclasses.replace(config, transpoints=schedule.mamba2()))  # the schedule quickest to trace


@functools.cache  # tracing the initialisation takes seconds, and the cells of a study have few models
def _count(config: ModelConfig) -> int:
    shapes = jax.eval_shape(TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def flops_per_token(config: ModelConfig, seq_len: int, chunk_size: int) -> float:
    """Count the floating point operations that one trained token needs, forward and backward.

    Three times the forward pass, whose terms are, per token of a row of T (a multiply-add is 2):

        weights    2 · (matrix elements that a token meets; logits once, the embedding look-up is free)
        conv       2 · K · (2 G N + H P)                                    per layer
        attention  (P_l + 1) · (G·N + H·P) · P_l / T                        per layer with TransPoint P_l
        SSD        H · (2 Q (N·G/H + P) + 4 N P) · (T - P_l) / T            per layer, chunk Q
        converter  2 · H · N · P · P_l / T                                  per layer with 0 < P_l < T

    Attention with H > G reads values of width H·P/G in each of G heads. Nothing that is computed twice
    (rematerialisation, the blockwise backward pass) counts twice.
    """
    cfg = config
    projections = 2 * cfg.d_key + 2 * cfg.d_inner + cfg.num_heads  # q, k, v, z, dt
    weights = cfg.d_model * (projections + cfg.d_inner + 3 * cfg.mlp_dim)
    conv = cfg.conv_width * (2 * cfg.d_key + cfg.d_inner)
    state = cfg.num_heads * cfg.state_dim * cfg.head_dim
    chunk = min(chunk_size, seq_len)
    ssd = 2 * chunk * (cfg.d_key + cfg.d_inner) + 4 * state
    total = 2.0 * (cfg.d_model * cfg.vocab_size + cfg.num_layers * (weights + conv))
    for transpoint in schedule.expand(cfg.transpoints, cfg.num_layers):
        point = min(transpoint, seq_len)
        share = point / seq_len
        total += (point + 1) * (cfg.d_key + cfg.d_inner) * share + ssd * (1 - share)
        total += 2 * state * share if 0 < point < seq_len else 0
    return 3 * total


def largest_cache_bytes(model: ModelConfig, seq_len: int, transpoints: Sequence[int]) -> int:
    """Return the most bytes that decoding keeps at any position of a row under a schedule.

    Keys and values grow until a layer's TransPoint and are then dropped, so the maximum is just before one, or at the
    end of the row.
    """
    points = schedule.expand(transpoints, model.num_layers)
    ends = {seq_len, *(min(point, seq_len + 1) - 1 for point in points if point > 0)}
    return max(sum(cache.cache_bytes(model, 1, length, point) for point in points) for length in ends)
