"""Calls of attention and their values and gradients: a float64 loop, and autodiff of the dense formula."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import oracle
from transmamba_jax.attention import blockwise, causal_attention


@dataclasses.dataclass(frozen=True)
class Spec:
    """A call: sizes by the letters of the glossary, and where documents begin."""

    length: int
    groups: int = 1
    heads: int = 2
    state_dim: int = 8
    head_dim: int = 6
    batch: int = 2
    packed: bool = False

    def arrays(self, dtype: Any = np.float32) -> tuple[list[np.ndarray], np.ndarray | None]:
        """q, k, v, the cotangent of y, and the ids: row 0 is padded on the left, the last row on the right."""
        rng = np.random.default_rng(self.length)
        key = (self.batch, self.length, self.groups, self.state_dim)
        value = (self.batch, self.length, self.heads, self.head_dim)
        arrays = [rng.standard_normal(shape).astype(dtype) for shape in (key, key, value, value)]
        time, length = np.arange(self.length), self.length
        ids = np.stack([1 + (time > length // 2) + (time > 3 * length // 4)] * self.batch).astype(np.int32)
        ids[0, : length // 3] = 0
        ids[-1, length - length // 4 :] = 0
        return arrays, ids if self.packed else None


def relative(found: Any, wanted: Any) -> float:
    wanted = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30))


def loop(q: np.ndarray, k: np.ndarray, v: np.ndarray, ids: np.ndarray | None, scale: float) -> np.ndarray:
    """One token and one head at a time in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    y = np.zeros(v.shape)
    shared = v.shape[2] // q.shape[2]
    for row, t, head in np.ndindex(v.shape[:3]):
        sees = [s for s in range(t + 1) if ids is None or ids[row, s] == ids[row, t]]
        score = scale * k[row, sees, head // shared] @ q[row, t, head // shared]
        weight = np.exp(score - score.max())
        y[row, t, head] = weight @ v[row, sees, head] / weight.sum()
    return y


@jax.jit
def dense(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, ids: jax.Array) -> tuple:
    y, back = jax.vjp(lambda q, k, v: oracle.attention(q, k, v, ids), q, k, v)
    return y, *back(g)


def dense_with_gradients(arrays: list[np.ndarray], ids: np.ndarray | None) -> list[np.ndarray]:
    ids = np.ones(arrays[0].shape[:2], np.int32) if ids is None else ids
    with jax.enable_x64(True):
        return [np.asarray(x) for x in dense(*(jnp.asarray(x, jnp.float64) for x in arrays), jnp.asarray(ids))]


@functools.partial(jax.jit, static_argnums=(5, 6))
def blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, ids: jax.Array | None, name: str | None, _patched: tuple
) -> tuple:
    y, back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, ids, implementation=name), q, k, v)
    return y, *back(g)


def with_gradients(arrays: list[Any], ids: np.ndarray | None, implementation: str | None = None) -> tuple:
    """Value and gradients; what a fixture may patch is part of the key of the compilation cache."""
    patched = (blockwise._BLOCK, jax.default_backend())
    return blocked(*map(jnp.asarray, arrays), None if ids is None else jnp.asarray(ids), implementation, patched)


def assert_close(
    arrays: list[np.ndarray], ids: np.ndarray | None, value: float, gradient: float, implementation: str | None = None
) -> None:
    found, wanted = with_gradients(arrays, ids, implementation), dense_with_gradients(arrays, ids)
    for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        if np.linalg.norm(theirs) < 1e-12:  # one key: the weights are 1 whatever q and k are
            assert np.linalg.norm(ours) < 1e-5, name
            continue
        assert relative(ours, theirs) < (value if name == "y" else gradient), (name, relative(ours, theirs))
