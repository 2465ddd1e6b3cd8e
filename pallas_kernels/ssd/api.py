"""Public SSD operator: checks the arguments, folds documents into the decays, picks an implementation.

An implementation is a module with two functions, `scan` and `final_state`, of the signatures in `reference.py`.
"""

import functools
import logging
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.ssd import associative, decay, pallas_gpu, pallas_tpu, reference, sequential, triton

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "associative": associative,
    "sequential": sequential,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "triton": triton,
}

_LOGGER = logging.getLogger(__name__)

_COMPUTE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def implementations() -> tuple[str, ...]:
    """Return the names that `implementation` takes."""
    return tuple(IMPLEMENTATIONS)


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 128,
    implementation: str | None = None,
    start: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Run the state space model over whole rows (Mamba-2, arXiv 2405.21060, section 6; TransMamba, arXiv 2503.24067).

        h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T        y_t = h_t c_t + d x_t

    Head h reads the b and c of group h // (H / G). Decay sums, state and accumulation are float32 whatever the inputs
    are. Differentiable in every float input, and through the final state.

    Args:
        x: [B, T, H, P], T >= 1.
        dt: float32 [B, T, H], step after softplus, >= 0; 0 leaves the state as it is.
        a: float32 [H], negative.
        b: [B, T, G, N], G divides H; dtype of x.
        c: [B, T, G, N]; dtype of x.
        d: [H], skip connection; None: none.
        initial_state: float32 [B, H, P, N], the state before the first token; None: 0.
        segment_ids: int [B, T]. Equal ids are one document, documents are contiguous, 0 is padding. The state restarts
            at every document but a row's first, which continues `initial_state`; padding leaves the state alone, so
            that the final state is the one after the last real token.
        chunk_size: tokens of one chunk, 1 or more: a matter of speed and memory, not of the result. An implementation
            may use a smaller one.
        implementation: one of `implementations()`; None: by the hardware of the mesh of `jax.set_mesh`, or of
            the default backend where none is set: "sequential" on a CPU, "pallas_tpu" on a TPU where it can serve the
            call (see `_automatic`), "associative" elsewhere.
        start: first token with a y, in 0..T-1. Those before it go into the state alone, at the cost of the state alone,
            and their c is not read. "pallas_tpu" copies nothing for it, the others slice.

    Returns:
        y [B, T - start, H, P] in x.dtype (at padding: finite, without meaning), final state float32 [B, H, P, N].

    Raises:
        ValueError: a shape or dtype does not fit, T = 0, or the implementation does not exist or cannot serve the call.
    """
    _check(x, dt, a, b, initial_state, segment_ids, chunk_size)
    _check_like("c", c, "b", b)
    if d is not None:
        _check_array("d", d, (x.shape[2],), (jnp.float32, x.dtype))
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < x.shape[1]:
        raise ValueError(f"start must be an int in 0..T-1 = 0..{x.shape[1] - 1}, found {start!r}")
    module = _module(implementation, x, b)
    dt, log_decay = decay.log_decays(dt, a, segment_ids)
    skip, state = None if d is None else d.astype(jnp.float32), _state(x, b, initial_state)
    chunk_size = min(chunk_size, decay.MAX_CHUNK)
    if start and module is pallas_tpu:
        return pallas_tpu.scan(x, dt, log_decay, b, c, skip, state, chunk_size, start)
    if start:
        before = (value[:, :start] for value in (x, dt, log_decay, b))
        state = module.final_state(*before, state, chunk_size)
        x, dt, log_decay, b, c = (value[:, start:] for value in (x, dt, log_decay, b, c))
    return module.scan(x, dt, log_decay, b, c, skip, state, chunk_size)


def starts_in_passing(x: jax.Array, b: jax.Array, implementation: str | None) -> bool:
    """Say whether `start` is free of copies for such a call on one device, or inside `jax.shard_map`."""
    wanted = implementation == "pallas_tpu" or (implementation is None and target.platform() == "tpu")
    return wanted and pallas_tpu.refusal(x, b) is None


def ssd_state(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 128,
    implementation: str | None = None,
) -> jax.Array:
    """Return the final state of `ssd` alone, at the cost of the state alone.

        h_T = exp(sum_j dt_j a) h_0 + sum_i exp(sum_{j > i} dt_j a) dt_i x_i b_i^T

    Arguments and errors as for `ssd` -> float32 [B, H, P, N]. Differentiable in every float input.
    """
    _check(x, dt, a, b, initial_state, segment_ids, chunk_size)
    module = _module(implementation, x, b)
    dt, log_decay = decay.log_decays(dt, a, segment_ids)
    return module.final_state(x, dt, log_decay, b, _state(x, b, initial_state), min(chunk_size, decay.MAX_CHUNK))


def _automatic(x: jax.Array, b: jax.Array) -> str:
    """Name the implementation that runs best, of those that can serve the call, on the hardware that this is for."""
    backend = target.platform()
    if backend == "cpu":
        return "sequential"
    if backend == "tpu" and target.unpartitioned() and pallas_tpu.refusal(x, b) is None:
        return "pallas_tpu"
    return "associative"


@functools.cache
def _log_choice(name: str) -> None:
    _LOGGER.info("SSD runs as %r, chosen for %r", name, target.platform())


def _module(implementation: str | None, x: jax.Array, b: jax.Array) -> ModuleType:
    name = implementation
    if name is None:
        name = _automatic(x, b)
        _log_choice(name)
    if not isinstance(name, str) or name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, found {name!r}")
    return IMPLEMENTATIONS[name]


def _state(x: jax.Array, b: jax.Array, initial_state: jax.Array | None) -> jax.Array:
    if initial_state is not None:
        return initial_state
    batch, _, num_heads, head_dim = x.shape
    return jnp.zeros((batch, num_heads, head_dim, b.shape[3]), jnp.float32)


def _check_array(name: str, value: jax.Array, shape: tuple[int, ...], dtypes: tuple[jax.typing.DTypeLike, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, found {value.shape}")
    if not any(value.dtype == dtype for dtype in dtypes):
        names = " or ".join(dict.fromkeys(jnp.dtype(dtype).name for dtype in dtypes))
        raise ValueError(f"{name} must be {names}, found {value.dtype.name}")


def _check_like(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    if value.shape != other.shape or value.dtype != other.dtype:
        raise ValueError(
            f"{name} must have the shape and dtype of {other_name}, {other.shape} {other.dtype.name}, "
            f"found {value.shape} {value.dtype.name}"
        )


def _check(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [B, T, H, P], found shape {x.shape}")
    batch, length, num_heads, head_dim = x.shape
    if length < 1:
        raise ValueError(f"x must have at least one token, found shape {x.shape} (T = 0)")
    _check_array("x", x, x.shape, _COMPUTE_DTYPES)
    _check_array("dt", dt, (batch, length, num_heads), (jnp.float32,))
    _check_array("a", a, (num_heads,), (jnp.float32,))
    if b.ndim != 4 or b.shape[:2] != (batch, length):
        raise ValueError(f"b must be [B, T, G, N] with [B, T] = {[batch, length]}, found shape {b.shape}")
    _check_array("b", b, b.shape, (x.dtype,))
    groups = b.shape[2]
    if groups < 1 or num_heads % groups:
        raise ValueError(f"b must have a number of groups that divides H = {num_heads}, found shape {b.shape}")
    if initial_state is not None:
        _check_array("initial_state", initial_state, (batch, num_heads, head_dim, b.shape[3]), (jnp.float32,))
    if segment_ids is not None:
        if segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids must have shape {(batch, length)}, found {segment_ids.shape}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids must be an integer type, found {segment_ids.dtype.name}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an int >= 1, found {chunk_size!r}")
