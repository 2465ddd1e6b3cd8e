"""Causal attention and its gradients in float64 numpy, from the equations alone, and the tolerances against it."""

from typing import NamedTuple

import numpy as np

VALUE_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 3e-6
BF16_TOLERANCE = 2e-2
"""Relative L2 errors allowed; a library's kernel rounds the weights to bfloat16 as well."""


class Result(NamedTuple):
    """y, and the gradients of sum(y dy)."""

    y: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray) -> Result:
    """Attend to every token up to the current one, with scale 1/sqrt(N); q, k [B, T, G, N], v and dy [B, T, H, P].

    w = softmax(q k^T / sqrt(N)), y = w v;   ds = w ∘ (dw - sum_s(dw ∘ w)), dw = dy v^T
    """
    groups, scale = q.shape[2], q.shape[3] ** -0.5
    wide = [np.asarray(value, np.float64) for value in (q, k, v, dy)]
    q, k, v, dy = (value.reshape(*value.shape[:2], groups, -1).swapaxes(1, 2) for value in wide)  # [B, G, T, R P]
    shared = wide[2].shape[2] // groups
    split = lambda value: value.reshape(*value.shape[:3], shared, -1)
    scores = np.einsum("bgtn,bgsn->bgts", q, k) * scale
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    y = np.einsum("bgts,bgsp->bgtp", weight, v)
    dweight = np.einsum("bgtrp,bgsrp->bgts", split(dy), split(v))
    dscores = weight * (dweight - np.sum(dweight * weight, -1, keepdims=True)) * scale
    dq, dk = np.einsum("bgts,bgsn->bgtn", dscores, k), np.einsum("bgts,bgtn->bgsn", dscores, q)
    dv = np.einsum("bgts,bgtp->bgsp", weight, dy)
    back = lambda value, like: value.swapaxes(1, 2).reshape(like.shape)
    return Result(back(y, wide[2]), back(dq, wide[0]), back(dk, wide[1]), back(dv, wide[2]))
