"""Causal depthwise convolution along the sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transmamba_jax.shapes import SegmentIds


def causal_conv(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "K C"],
    bias: Float[Array, "C"],
    segment_ids: SegmentIds | None = None,
    history: Float[Array, "B J C"] | None = None,
) -> Float[Array, "B T C"]:
    """Mix each channel with its own K - 1 previous values.

        y_t = bias + Σ_{k=0..K-1} kernel_k · x_{t-(K-1)+k}

    The last tap meets the current token; inputs before the first token are zero, or `history`. K shifted
    multiply-adds: K is 4 here, and a general convolution is many times slower for one channel a group.

    With `segment_ids` a tap is read only where its token is real (id not 0) and has the id of the current one: taps
    never cross the boundary of a document, and the output at padding is the bias.

    Args:
        history: the J = K - 1 inputs before the first token, so that one pass over a sequence equals two passes over
            its halves, the second with the last K - 1 inputs of the first as history. It carries no ids: with
            `segment_ids` it is taken to belong to the document of the row's first token; zero what does not.

    Returns:
        [B, T, C] in the dtype of `x`. Products and sums are float32: in bfloat16 they have twice the error and take
        1.6 times as long on a CPU.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check(x, kernel, bias, segment_ids, history)
    taps, length = kernel.shape[0], x.shape[1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if history is None:
        padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    else:
        padded = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    if segment_ids is not None:
        padded_ids = jnp.pad(segment_ids, ((0, 0), (taps - 1, 0)), mode="edge")
        real = segment_ids != 0
    out = jnp.broadcast_to(bias.astype(wide), x.shape)
    for tap in range(taps):
        shifted = jax.lax.slice_in_dim(padded, tap, tap + length, axis=1).astype(wide)
        term = shifted * kernel[tap].astype(wide)
        if segment_ids is not None:
            same = jax.lax.slice_in_dim(padded_ids, tap, tap + length, axis=1) == segment_ids
            term = jnp.where((same & real)[..., None], term, 0)
        out = out + term
    return out.astype(x.dtype)


def _check(x: Array, kernel: Array, bias: Array, segment_ids: Array | None, history: Array | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, C], found {x.shape}")
    if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] != x.shape[2]:
        raise ValueError(f"kernel must have shape [K, C={x.shape[2]}] with K >= 1, found {kernel.shape}")
    if bias.shape != x.shape[2:]:
        raise ValueError(f"bias must have shape {x.shape[2:]}, found {bias.shape}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"segment_ids must have shape [B, T]={x.shape[:2]}, found {segment_ids.shape}")
    needed = (x.shape[0], kernel.shape[0] - 1, x.shape[2])
    if history is not None and history.shape != needed:
        raise ValueError(f"history must have shape [B, K - 1, C]={needed}, found {history.shape}")
