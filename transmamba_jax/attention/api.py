"""Public causal attention: checks the arguments and picks an implementation."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Literal, cast, get_args

import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.table import Table
from transmamba_jax.attention import blockwise, library, reference
from transmamba_jax.shapes import Array, QueryKey, SegmentIds, Value

Attention = Callable[[Array, Array, Array, Array | None], Array]
"""(q [B, T, G, N], k [B, T, G, N], v [B, T, H, P], segment_ids [B, T] or None) -> y [B, T, H, P]."""

Implementation = Literal["reference", "blockwise", "cudnn", "splash"]

Choice = str | Table | None
"""A name; measurements, before the order for the platform; None: that order."""

_LOGGER = logging.getLogger("transmamba_jax.attention")

_AUTOMATIC: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("blockwise",),
    "gpu": ("cudnn", "blockwise"),
    "tpu": ("splash", "blockwise"),
}


def implementations() -> tuple[str, ...]:
    """Return the names that `implementation` takes."""
    return get_args(Implementation)


def causal_attention(
    q: QueryKey,
    k: QueryKey,
    v: Value,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    implementation: Choice = None,
) -> Value:
    """Attend to the tokens of the same document up to and including the current one.

        y_t = Σ_{s <= t, id_s = id_t} w_ts v_s,   w_t = softmax_s(scale · q_t · k_s)

    Paper arXiv 2503.24067, equation 1; online softmax and recomputation as in arXiv 2205.14135 and 2307.08691. Head h
    reads the queries and keys of group h // (H / G). Scores, softmax statistics and accumulation are float32 (float64
    for float64 inputs). No array of size T x T is formed, except by "reference"; memory is linear in T, in the backward
    pass too.

    Args:
        segment_ids: equal ids attend to each other; id 0 (padding) is one more id, so that padding sees padding alone
            and its output is finite.
        scale: factor on the scores, 1/sqrt(N) when not given.
        implementation: None takes the first that can serve the call: on GPU "cudnn" then "blockwise", on TPU "splash"
            then "blockwise", elsewhere "blockwise". A table of measurements: its fastest that can serve the call at
            the nearest length, else as for None. Both are logged once. A named one is taken whatever the default
            backend is.

    Returns:
        [B, T, H, P] in the dtype of `v`. Differentiable once, in reverse mode, in q, k and v; "reference" any number
        of times, in both modes.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `implementation` is unknown or cannot serve the call.
    """
    _check(q, k, v, segment_ids)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = _choose(q, v, segment_ids, implementation)
    if name == "reference":
        return reference.attend(q, k, v, segment_ids, scale)
    if name == "cudnn":
        return library.cudnn(q, k, v, scale)
    if name == "splash":
        return library.splash(q, k, v, segment_ids, scale)
    return blockwise.attend(q, k, v, segment_ids, scale)


def _check(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must share one shape [B, T, G, N], found {q.shape} and {k.shape}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must have shape [B, T, H, P] with [B, T]={q.shape[:2]}, found {v.shape}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q and v must not be empty, found {q.shape} and {v.shape}")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"the groups of q must divide the heads of v, found G={q.shape[2]}, H={v.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(f"q, k and v must share one floating-point dtype, found {q.dtype}, {k.dtype}, {v.dtype}")
    if segment_ids is None:
        return
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must have shape [B, T]={q.shape[:2]}, found {segment_ids.shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers, found {segment_ids.dtype}")


def _choose(q: Array, v: Array, segment_ids: Array | None, implementation: Choice) -> Implementation:
    reasons: dict[str, Callable[[], str | None]] = {
        "reference": lambda: None,
        "blockwise": lambda: None,
        "cudnn": lambda: library.cudnn_unsupported_reason(q, v, segment_ids),
        "splash": lambda: library.splash_unsupported_reason(q),
    }
    if implementation is None or isinstance(implementation, Table):
        return _first(reasons, q.shape[1], implementation)
    if implementation not in reasons:
        raise ValueError(f"unknown implementation {implementation!r}; use one of {', '.join(reasons)} or None")
    reason = reasons[implementation]()
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot serve this call: {reason}")
    return cast(Implementation, implementation)


def _first(reasons: dict[str, Callable[[], str | None]], length: object, table: Table | None) -> Implementation:
    """Return the first implementation of a table, then of the platform, that can serve the call; log it."""
    measured = () if table is None else tuple(candidate.name for candidate in table.order(length))
    excluded = {} if table is None else dict(table.excluded)
    platform, passed_over = target.platform(), ""
    for name in (*measured, *_AUTOMATIC.get(platform, ("blockwise",))):
        reason = excluded.get(name) or reasons[name]()
        if reason is None:
            why = f"chosen for {platform!r}"
            if table is not None and name in measured:
                why = f"the fastest by {table.source}"
            _log_choice(f"attention runs as {name!r}, {why}{passed_over}")
            return cast(Implementation, name)
        passed_over += f"; passed over {name!r}: {reason}"
    # Blockwise serves every call, and a run must not end because of a record.
    _warn(f"attention runs as 'blockwise', though no implementation is left{passed_over}")
    return "blockwise"


@functools.cache
def _log_choice(choice: str) -> None:
    """Log each distinct choice once per process."""
    _LOGGER.info("%s", choice)


@functools.cache
def _warn(warning: str) -> None:
    """Log each distinct warning once per process."""
    _LOGGER.warning("%s", warning)
