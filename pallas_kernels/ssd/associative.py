"""SSD over all chunks at once, chunk states combined by an associative scan: the portable form for accelerators.

With s the running sum of l inside a chunk of Q tokens and w_ij = exp(s_i - s_j) for i >= j (Mamba-2, arXiv 2405.21060,
section 6), every chunk on its own gives its output from a zero state and what it adds to the state,

    y_i = sum_{j <= i} (c_i . b_j) w_ij dt_j x_j        S = sum_j exp(s_Q - s_j) dt_j x_j b_j^T

and the states before the chunks follow from (decay, S) pairs under the associative operation

    (e_1, S_1) then (e_2, S_2)  =  (e_1 e_2, e_2 S_1 + S_2)

Then y_i += exp(s_i) h c_i. The depth is logarithmic in the number of chunks. Gradients are JAX's own but
for the decays' (see `decay.py`), with everything of size Q x Q recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssd import decay
from pallas_kernels.ssd.kernel_vjp import NAME
from pallas_kernels.ssd.protocol import SsdInputs

supports_output_start = False
partitionable = True


def _einsum(spec: str, left: jax.Array, right: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Multiply in the inputs' dtype, accumulate in float32 (float32 inputs: no shortcut through bfloat16 or TF32)."""
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(spec, left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _chunk_tokens(chunk_size: int, length: int) -> int:
    """Return the tokens of a chunk: not more than there are, where their number is known and no symbol."""
    return min(chunk_size, length) if isinstance(length, int) else chunk_size


def _chunk(value: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [B, chunks, Q, ...], the tail filled with zeros: dt = 0 and l = 0 leave the state as it is."""
    batch, length, *rest = value.shape
    count = -(-length // chunk)
    value = jnp.pad(value, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * len(rest))
    return value.reshape(batch, count, chunk, *rest)


def _chunk_decays(log_decay: jax.Array, chunk: int, groups: int) -> jax.Array:
    """Log decays by chunk: [B, chunks, G, R, Q]."""
    batch, _, num_heads = log_decay.shape
    by_chunk = _chunk(log_decay, chunk).reshape(batch, -1, chunk, groups, num_heads // groups)
    return by_chunk.transpose(0, 1, 3, 4, 2)


def _dtx(x: jax.Array, dt: jax.Array, chunk: int, groups: int) -> jax.Array:
    """Dt x in float32: [B, chunks, Q, G, R, P]."""
    batch, _, num_heads, head_dim = x.shape
    dtx = dt[..., None] * x.astype(jnp.float32)
    return _chunk(dtx, chunk).reshape(batch, -1, chunk, groups, num_heads // groups, head_dim)


def _by_token(value: jax.Array) -> jax.Array:
    """[B, chunks, G, R, Q] -> [B, chunks, Q, G, R, 1]."""
    return jnp.moveaxis(value, -1, 2)[..., None]


@jax.checkpoint
def _within_chunks(dtx: jax.Array, log_decay: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Outputs of each chunk from a zero state: [B, chunks, Q, G, R, P] float32."""
    scores = _einsum("bkign,bkjgn->bkgij", c, b, b.dtype)[:, :, :, None] * decay.segsum(log_decay)
    return _einsum("bkgrij,bkjgrp->bkigrp", scores, dtx, b.dtype)


@jax.checkpoint
def _states(dtx: jax.Array, log_decay: jax.Array, b: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """State before each chunk [B, chunks, G, R, P, N] and after the last one [B, G, R, P, N]."""
    updates = _einsum("bkjgrp,bkjgn->bkgrpn", dtx * _by_token(decay.to_end(log_decay)), b, b.dtype)
    decays = decay.from_start(log_decay)[..., -1, None, None]

    def combine(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    if not isinstance(decays.shape[1], int):
        # A number of chunks that is a symbol (jax.export) has no tree of combinations: one chunk after another.
        final, before = jax.lax.scan(
            lambda h, chunk: (chunk[0] * h + chunk[1], h), h, (jnp.moveaxis(decays, 1, 0), jnp.moveaxis(updates, 1, 0))
        )
        return jnp.moveaxis(before, 0, 1), final
    # The initial state is a chunk of its own at the front.
    decays = jnp.concatenate([jnp.ones_like(decays[:, :1]), decays], axis=1)
    updates = jnp.concatenate([h[:, None], updates], axis=1)
    _, states = jax.lax.associative_scan(combine, (decays, updates), axis=1)
    return states[:, :-1], states[:, -1]


@jax.checkpoint
def _from_states(states: jax.Array, log_decay: jax.Array, c: jax.Array) -> jax.Array:
    """Contribution of the state before each chunk to its outputs: [B, chunks, Q, G, R, P] float32."""
    read = _einsum("bkign,bkgrpn->bkigrp", c, states, jnp.float32)
    return read * _by_token(decay.from_start(log_decay))


def _split_heads(state: jax.Array, groups: int) -> jax.Array:
    return state.reshape(state.shape[0], groups, -1, *state.shape[2:])


def unsupported_reason(x: jax.Array, b: jax.Array) -> str | None:
    """Return None: every call is supported."""
    del x, b
    return None


def forward(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
    """Run chunked SSD as `protocol.SsdImplementation.forward` says."""
    del output_start
    x, dt, log_decay, b, c, d, initial_state = inputs
    batch, length, num_heads, head_dim = x.shape
    groups, chunk = b.shape[2], _chunk_tokens(chunk_size, length)
    log_decay = _chunk_decays(log_decay, chunk, groups)
    dtx = _dtx(x, dt, chunk, groups)
    b, c = _chunk(b, chunk), _chunk(c, chunk)
    states, final = checkpoint_name(_states(dtx, log_decay, b, _split_heads(initial_state, groups)), NAME)
    y = checkpoint_name(_within_chunks(dtx, log_decay, b, c) + _from_states(states, log_decay, c), NAME)
    y = y.reshape(batch, -1, num_heads, head_dim)[:, :length]
    if d is not None:
        y = y + d[None, None, :, None] * x.astype(jnp.float32)
    return y.astype(x.dtype), final.reshape(initial_state.shape)


def final_state(inputs: SsdInputs, chunk_size: int) -> jax.Array:
    """Return the final state of `forward` alone, float32 [B,H,P,N]."""
    groups, chunk = inputs.b.shape[2], _chunk_tokens(chunk_size, inputs.x.shape[1])
    log_decay = _chunk_decays(inputs.log_decay, chunk, groups)
    dtx = _dtx(inputs.x, inputs.dt, chunk, groups)
    state = _split_heads(inputs.initial_state, groups)
    return _states(dtx, log_decay, _chunk(inputs.b, chunk), state)[1].reshape(inputs.initial_state.shape)
