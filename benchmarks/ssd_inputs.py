"""Inputs of the races of the SSD operator."""

import numpy as np


def make_inputs(shape: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """Return the arguments of `ssd` by name for [B, T, H, P, N], one group a head, and cotangents of its results.

    The decays are those of a freshly initialised layer.
    """
    batch, length, heads, head_dim, state_dim = shape
    rng = np.random.default_rng(seed)

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, np.float32)

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (batch, length, heads))).astype(np.float32),
        "a": -rng.uniform(1, 16, heads).astype(np.float32),
        "b": normal(batch, length, heads, state_dim) / np.float32(state_dim**0.5),
        "c": normal(batch, length, heads, state_dim),
        "d": np.ones(heads, np.float32),
        "dy": normal(batch, length, heads, head_dim),
        "dstate": normal(batch, heads, head_dim, state_dim),
    }
