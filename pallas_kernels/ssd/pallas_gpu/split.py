"""SSD over parts of the sequence at once, for calls of so few rows and heads that whole ones leave the chip idle.

With S_k the state after part k from a state of 0, A_k the product of its decays and h_0 the initial state,

    h_{k+1} = A_k h_k + S_k

is exactly the state before part k + 1. So every part is reduced to (A_k, S_k), all at once, the recurrence over parts
joins them, and every part runs from its own h_k, again all at once. Parts are rows of the batch to the kernels. The
backward pass is the chain rule over the same steps: both kernels have their own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.pallas_gpu.block_sizes import GPU_CHUNK
from pallas_kernels.ssd.protocol import SsdInputs


def operators(
    parts_of: Callable[[jax.Array, jax.Array], int],
    whole_forward: Callable[..., tuple[jax.Array, jax.Array]],
    whole_state: Callable[[SsdInputs, int], jax.Array],
) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Callable[[SsdInputs, int], jax.Array]]:
    """Return `forward` and `final_state` of the same signatures, over `parts_of(x, b)` parts of the sequence.

    `parts_of` raises ValueError where the kernels do not support the call.
    """

    def forward(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
        """Run SSD; shapes, result and errors as those of `kernel_vjp.operators`."""
        del output_start
        x, parts = inputs.x, parts_of(inputs.x, inputs.b)
        if parts == 1:
            return whole_forward(inputs, chunk_size)
        folded = _fold_inputs(inputs, parts)
        before = _states(whole_state, folded, inputs.initial_state, chunk_size)[:, :-1]
        y, after = whole_forward(folded._replace(initial_state=before.reshape(-1, *before.shape[2:])), chunk_size)
        y = y.reshape(x.shape[0], -1, *x.shape[2:])[:, : x.shape[1]]
        return y, after.reshape(before.shape)[:, -1]

    def final_state(inputs: SsdInputs, chunk_size: int) -> jax.Array:
        """Return the final state alone, float32 [B, H, P, N]."""
        parts = parts_of(inputs.x, inputs.b)
        if parts == 1:
            return whole_state(inputs, chunk_size)
        return _states(whole_state, _fold_inputs(inputs, parts), inputs.initial_state, chunk_size)[:, -1]

    return forward, final_state


def _fold_inputs(inputs: SsdInputs, parts: int) -> SsdInputs:
    """Fold what has tokens; the initial state stays that of the first part."""
    x, dt, log_decay, b, c = (None if value is None else _fold(value, parts) for value in inputs[:5])
    return SsdInputs(x, dt, log_decay, b, c, inputs.d, inputs.initial_state)  # type: ignore[arg-type]


def _fold(value: jax.Array, parts: int) -> jax.Array:
    """[B, T, ...] -> [B parts, tokens of a part, ...]; zeros at the end (dt = 0, l = 0) leave the state as it is."""
    batch, length = value.shape[:2]
    tokens = -(-length // (parts * GPU_CHUNK)) * GPU_CHUNK
    missing = parts * tokens - length
    if missing:
        value = jnp.pad(value, ((0, 0), (0, missing)) + ((0, 0),) * (value.ndim - 2))
    return value.reshape(batch * parts, tokens, *value.shape[2:])


def _states(
    whole_state: Callable[[SsdInputs, int], jax.Array], folded: SsdInputs, initial_state: jax.Array, chunk_size: int
) -> jax.Array:
    """Return the states before every part and after the last, float32 [B, parts + 1, H, P, N]."""
    batch, log_decay = initial_state.shape[0], folded.log_decay
    zeros = jnp.zeros((log_decay.shape[0], *initial_state.shape[1:]), jnp.float32)
    updates = whole_state(folded._replace(c=None, d=None, initial_state=zeros), chunk_size)
    updates = updates.reshape(batch, -1, *initial_state.shape[1:])
    decays = jnp.exp(jnp.sum(log_decay, axis=1)).reshape(*updates.shape[:3], 1, 1)
    states = [initial_state]
    for part in range(updates.shape[1]):
        states.append(decays[:, part] * states[-1] + updates[:, part])
    return jnp.stack(states, axis=1)
