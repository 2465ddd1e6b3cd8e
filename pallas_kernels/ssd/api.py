"""Public SSD operator: check the arguments, fold documents into the decays, dispatch to an implementation."""

import functools
import logging

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.ssd import associative, decay, reference, sequential
from pallas_kernels.ssd.pallas_gpu import implementation as pallas_gpu
from pallas_kernels.ssd.pallas_tpu import implementation as pallas_tpu
from pallas_kernels.ssd.protocol import SsdImplementation, SsdInputs
from pallas_kernels.ssd.triton import implementation as triton
from pallas_kernels.table import Candidate, Table

IMPLEMENTATIONS: dict[str, SsdImplementation] = {
    "reference": reference,
    "associative": associative,
    "sequential": sequential,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "triton": triton,
}

Choice = str | tuple[str, ...] | Table | None
"""A name; names in the order of preference; measurements, before the order for the platform; None: that order."""

_ORDER = {"cpu": ("sequential",), "tpu": ("pallas_tpu", "associative"), "gpu": ("pallas_gpu", "triton", "associative")}
"""Preference by platform; the last one supports every call."""

_ELSEWHERE = ("associative",)

_BY_NAME_ONLY = {
    "pallas_gpu": "it has not been measured on a GPU; name it to use it",
    "triton": "it has not been measured on a GPU; name it to use it",
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
    implementation: Choice = None,
    output_start: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Run the state space model over whole rows (Mamba-2, arXiv 2405.21060, section 6; TransMamba, arXiv 2503.24067).

        h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T        y_t = h_t c_t + d x_t

    Head h reads the b and c of group h // (H / G). Decay sums, state and accumulation are float32 whatever the inputs
    are. Differentiable in every float input, and through the final state. Second derivatives, `jax.jvp` and
    `jax.jacfwd` need implementation "reference": the others are `jax.custom_vjp`, reverse mode once.

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
        chunk_size: tokens of one chunk, 1 or more, taken as 256 at most: a matter of speed and memory, not of the
            result. "associative" uses it, "sequential" up to 32. The kernels choose their own chunk, and "reference"
            has none.
        implementation: one of `implementations()`, or a tuple of them, of which the first that supports the call runs.
            None: the order for the hardware of the mesh of `jax.set_mesh`, or of the default backend where none is
            set: "sequential" on a CPU, "pallas_tpu" then "associative" on a TPU, "associative" elsewhere. A table of
            measurements: its fastest that supports the call at the nearest length, with the chunk size that was
            measured; where there is none, as for None. The choice is logged once, with the reason for every
            implementation passed over.
        output_start: first token with a y, in 0..T-1. Earlier ones contribute to the state alone, at the cost of the
            state alone, and their c is not read. "pallas_tpu" copies nothing for it, the others slice.

    Returns:
        y [B, T - output_start, H, P] in x.dtype (at padding: finite, without meaning), final state float32
        [B, H, P, N].

    Raises:
        ValueError: a shape or dtype does not fit, T = 0, or the implementation does not exist or does not support the
            call; with every reason.
    """
    _check(x, dt, a, b, initial_state, segment_ids, chunk_size)
    _check_like("c", c, "b", b)
    if d is not None:
        _check_array("d", d, (x.shape[2],), (jnp.float32, x.dtype))
    if isinstance(output_start, bool) or not isinstance(output_start, int) or not 0 <= output_start < x.shape[1]:
        raise ValueError(f"output_start must be an int in 0..T-1 = 0..{x.shape[1] - 1}, found {output_start!r}")
    name, chunk_size = _choose(implementation, x, b, chunk_size)
    chosen = IMPLEMENTATIONS[name]
    dt, log_decay = decay.log_decays(dt, a, segment_ids)
    skip = None if d is None else d.astype(jnp.float32)
    inputs = SsdInputs(x, dt, log_decay, b, c, skip, _state(x, b, initial_state))
    chunk_size = min(chunk_size, decay.MAX_CHUNK)
    if output_start and not chosen.supports_output_start:
        inputs = _enter(chosen, inputs, chunk_size, output_start)
        output_start = 0
    return chosen.forward(inputs, chunk_size, output_start)


def _enter(chosen: SsdImplementation, inputs: SsdInputs, chunk_size: int, output_start: int) -> SsdInputs:
    """Replace the tokens before `output_start` by the state after them."""
    x, dt, log_decay, b, c, d, state = inputs
    before = [value[:, :output_start] for value in (x, dt, log_decay, b)]
    state = chosen.final_state(SsdInputs(*before)._replace(initial_state=state), chunk_size)
    x, dt, log_decay, b, c = (value[:, output_start:] for value in (x, dt, log_decay, b, c))
    return SsdInputs(x, dt, log_decay, b, c, d, state)


def supports_output_start(x: jax.Array, b: jax.Array, implementation: Choice) -> bool:
    """Tell whether `output_start` is free of copies for such a call on one device, or inside `jax.shard_map`."""
    chosen = IMPLEMENTATIONS[_select(implementation, x, b, unpartitioned=True)[0].name]
    return chosen.supports_output_start and chosen.unsupported_reason(x, b) is None


def ssd_state(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 128,
    implementation: Choice = None,
) -> jax.Array:
    """Return the final state of `ssd` alone, at the cost of the state alone.

        h_T = exp(sum_j dt_j a) h_0 + sum_i exp(sum_{j > i} dt_j a) dt_i x_i b_i^T

    Arguments and errors as for `ssd` -> float32 [B, H, P, N]. Differentiable in every float input.
    """
    _check(x, dt, a, b, initial_state, segment_ids, chunk_size)
    name, chunk_size = _choose(implementation, x, b, chunk_size, state_alone=True)
    dt, log_decay = decay.log_decays(dt, a, segment_ids)
    inputs = SsdInputs(x, dt, log_decay, b, initial_state=_state(x, b, initial_state))
    return IMPLEMENTATIONS[name].final_state(inputs, min(chunk_size, decay.MAX_CHUNK))


def _choose(
    implementation: Choice, x: jax.Array, b: jax.Array, chunk_size: int, state_alone: bool = False
) -> tuple[str, int]:
    """Return the implementation of a call and its chunk size; log a choice that is not the caller's.

    Raises:
        ValueError: a name is unknown, or nothing named supports the call.
    """
    chosen, passed_over = _select(implementation, x, b, target.unpartitioned(), state_alone)
    chunk_size = chunk_size if chosen.chunk_size is None else chosen.chunk_size
    if isinstance(implementation, str):
        reason = IMPLEMENTATIONS[chosen.name].unsupported_reason(x, b)
        if reason is not None:
            raise ValueError(f"implementation {chosen.name!r} cannot serve this call: {reason}")
        return chosen.name, chunk_size
    reasons = "".join(f"; passed over {other!r}: {reason}" for other, reason in passed_over.items())
    why = f"chosen for {target.platform()!r}"
    if isinstance(implementation, Table) and chosen in implementation.order(x.shape[1], state_alone):
        where = " for the state alone" if state_alone else ""
        why = f"chunks of {chunk_size}, the fastest{where} by {implementation.source}"
    _log_choice(f"SSD runs as {chosen.name!r}, {why}{reasons}")
    return chosen.name, chunk_size


def _select(
    implementation: Choice, x: jax.Array, b: jax.Array, unpartitioned: bool, state_alone: bool = False
) -> tuple[Candidate, dict[str, str]]:
    """Return the name given, or the first of the order that supports the call and the reasons of those before it."""
    if isinstance(implementation, str):
        _check_names((implementation,), implementation)
        return Candidate(implementation), {}
    passed_over: dict[str, str] = {}
    order = _order(implementation, x.shape[1], state_alone)
    for candidate, excluded in order:
        name = candidate.name
        reasons = [] if excluded is None else [excluded]
        if not unpartitioned and not IMPLEMENTATIONS[name].partitionable:
            reasons.append("the compiler cannot partition a kernel over devices outside jax.shard_map")
        reason = IMPLEMENTATIONS[name].unsupported_reason(x, b)
        reasons += [] if reason is None else [reason]
        if not reasons:
            return candidate, passed_over
        passed_over.setdefault(name, "; ".join(reasons))
    last = order[-1][0]
    if isinstance(implementation, Table) and last.name in dict(implementation.excluded):
        # It supports every call, and a run must not end because of a record.
        _warn(f"SSD runs as {last.name!r}, though {passed_over[last.name]}: no other implementation can serve the call")
        return last, passed_over
    names = ", ".join(dict.fromkeys(candidate.name for candidate, _ in order))
    every = "; ".join(f"{name!r}: {reason}" for name, reason in passed_over.items())
    raise ValueError(f"no implementation of {names} can serve this call: {every}")


def _order(implementation: Choice, length: object, state_alone: bool) -> list[tuple[Candidate, str | None]]:
    """Return the candidates of a choice that is not one name, each with the reason against choosing it unasked."""
    if implementation is None or isinstance(implementation, Table):
        measured = () if implementation is None else implementation.order(length, state_alone)
        if measured:
            _check_names(tuple(candidate.name for candidate in measured), implementation)
        by_platform = _ORDER.get(target.platform(), _ELSEWHERE)
        against = _BY_NAME_ONLY | (dict(implementation.excluded) if implementation is not None else {})
        unmeasured = [(Candidate(name), against.get(name)) for name in by_platform]
        return [*((candidate, None) for candidate in measured), *unmeasured]
    names = implementation if isinstance(implementation, tuple) else ()
    _check_names(names, implementation)
    return [(Candidate(name), None) for name in names]


def _check_names(names: tuple[str, ...], given: object) -> None:
    if not names or any(name not in IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, or a tuple of them, found {given!r}"
        )


@functools.cache
def _log_choice(choice: str) -> None:
    """Log each distinct choice once per process."""
    _LOGGER.info("%s", choice)


@functools.cache
def _warn(warning: str) -> None:
    """Log each distinct warning once per process."""
    _LOGGER.warning("%s", warning)


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
