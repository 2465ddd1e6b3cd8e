"""SSD over parts of the sequence at once, for calls of so few rows and heads that whole ones leave the chip idle.

With S_k the state that part k leaves from a state of 0, A_k the product of its decays and h_0 the initial state,

    h_{k+1} = A_k h_k + S_k

is exactly the state before part k + 1. So every part is reduced to (A_k, S_k), all at once, the recurrence over parts
joins them, and every part runs from its own h_k, again all at once. Parts are rows of the batch to the kernels. The
backward pass is the chain rule over the same steps: both kernels have their own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.pallas_gpu.block_sizes import GPU_CHUNK


def operators(
    parts_of: Callable[[jax.Array, jax.Array], int],
    whole_scan: Callable[..., tuple[jax.Array, jax.Array]],
    whole_state: Callable[..., jax.Array],
) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Callable[..., jax.Array]]:
    """Return `scan` and `final_state` of the same signatures, cut into `parts_of(x, b)` parts of the sequence.

    `parts_of` raises ValueError where the kernels cannot serve the call.
    """

    def scan(
        x: jax.Array,
        dt: jax.Array,
        log_decay: jax.Array,
        b: jax.Array,
        c: jax.Array,
        d: jax.Array | None,
        initial_state: jax.Array,
        chunk_size: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Chunked SSD; shapes, result and errors as `kernel_vjp.operators`' `scan`."""
        parts = parts_of(x, b)
        if parts == 1:
            return whole_scan(x, dt, log_decay, b, c, d, initial_state, chunk_size)
        folded = [_fold(value, parts) for value in (x, dt, log_decay, b, c)]
        before = _states(whole_state, folded[:4], initial_state, chunk_size)[:, :-1]
        y, after = whole_scan(*folded, d, before.reshape(-1, *before.shape[2:]), chunk_size)
        y = y.reshape(x.shape[0], -1, *x.shape[2:])[:, : x.shape[1]]
        return y, after.reshape(before.shape)[:, -1]

    def final_state(
        x: jax.Array, dt: jax.Array, log_decay: jax.Array, b: jax.Array, initial_state: jax.Array, chunk_size: int
    ) -> jax.Array:
        """Return the last state of `scan` alone, float32 [B, H, P, N]."""
        parts = parts_of(x, b)
        if parts == 1:
            return whole_state(x, dt, log_decay, b, initial_state, chunk_size)
        folded = [_fold(value, parts) for value in (x, dt, log_decay, b)]
        return _states(whole_state, folded, initial_state, chunk_size)[:, -1]

    return scan, final_state


def _fold(value: jax.Array, parts: int) -> jax.Array:
    """[B, T, ...] -> [B parts, tokens of a part, ...]; zeros at the end (dt = 0, l = 0) leave the state as it is."""
    batch, length = value.shape[:2]
    tokens = -(-length // (parts * GPU_CHUNK)) * GPU_CHUNK
    missing = parts * tokens - length
    if missing:
        value = jnp.pad(value, ((0, 0), (0, missing)) + ((0, 0),) * (value.ndim - 2))
    return value.reshape(batch * parts, tokens, *value.shape[2:])


def _states(
    whole_state: Callable[..., jax.Array], folded: list[jax.Array], initial_state: jax.Array, chunk_size: int
) -> jax.Array:
    """States before every part and after the last, float32 [B, parts + 1, H, P, N], of folded x, dt, l and b."""
    _, _, log_decay, _ = folded
    batch = initial_state.shape[0]
    nothing = jnp.zeros((log_decay.shape[0], *initial_state.shape[1:]), jnp.float32)
    left = whole_state(*folded, nothing, chunk_size).reshape(batch, -1, *initial_state.shape[1:])
    kept = jnp.exp(jnp.sum(log_decay, axis=1)).reshape(*left.shape[:3], 1, 1)
    states = [initial_state]
    for part in range(left.shape[1]):
        states.append(kept[:, part] * states[-1] + left[:, part])
    return jnp.stack(states, axis=1)
