"""Causal depthwise convolution along the sequence, and SiLU: plain JAX, on TPUs kernels."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pallas_kernels import target
from transmamba_jax.shapes import Array, SegmentIds, known

_BLOCK = 64
"""Tokens of one block of the backward pass on a CPU: 32 to 128 take the same time, 8 and 1024 longer."""

_LEAST = 256
"""Tokens from which on the TPU kernels serve: a strip of theirs. Decoding has one."""


# Recomputed in the backward pass: JAX would keep three residuals for SiLU's gradient, where its input is enough.
_silu = partial(jax.checkpoint, prevent_cse=False)(jax.nn.silu)


def causal_conv(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "K C"],
    bias: Float[Array, "C"],
    segment_ids: SegmentIds | None = None,
    history: Float[Array, "B J C"] | None = None,
    silu: bool = False,
    plain: bool = False,
) -> Float[Array, "B T C"]:
    """Mix each channel with its own K - 1 previous values, and apply SiLU if asked.

        y_t = bias + Σ_{k=0..K-1} kernel_k · x_{t-(K-1)+k}

    The last tap meets the current token; inputs before the first token are zero, or `history`. K shifted
    multiply-adds: K is 4 here, and a general convolution is many times slower for one channel a group.

    With `segment_ids` a tap is read only where its token is real (id not 0) and has the id of the current one: taps
    never cross the boundary of a document, and the output at padding is the bias.

    Args:
        history: the J = K - 1 inputs before the first token, so that one pass over a sequence equals two passes over
            its halves, the second with the last K - 1 inputs of the first as history. It carries no ids: with
            `segment_ids` it is taken to belong to the document of the row's first token; zero what does not.
        silu: return SiLU(y).
        plain: leave every derivative to JAX, at the cost of time; else reverse mode alone.

    Returns:
        [B, T, C] in the dtype of `x`. Products and sums are float32: in bfloat16 they have twice the error and take
        1.6 times as long on a CPU.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check(x, kernel, bias, segment_ids, history)
    reach = kernel.shape[0] - 1
    readable = None if segment_ids is None else _readable(segment_ids, reach)
    if not plain and _kernels_serve(x, kernel):
        return _convolve_by_kernels(x, kernel, bias, readable, history, silu)
    if history is None:
        padded = jax.lax.pad(x, np.zeros((), x.dtype), ((0, 0, 0), (reach, 0, 0), (0, 0, 0)))
    else:
        padded = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    y = (_taps if plain else _convolve)(padded, kernel, bias, readable)
    return _silu(y) if silu else y


def _kernels_serve(x: Array, kernel: Array) -> bool:
    if target.platform() != "tpu" or not target.unpartitioned() or not known(*x.shape):
        return False
    from pallas_kernels.causal_conv1d import pallas_tpu  # a tenth of a second, which only a TPU needs

    return x.shape[1] >= _LEAST and pallas_tpu.unsupported_reason(x, kernel) is None


def _convolve_by_kernels(
    x: Array, kernel: Array, bias: Array, readable: tuple[Array, ...] | None, history: Array | None, silu: bool
) -> Array:
    """Give history to the kernels as tokens of the row, and drop the outputs at these tokens."""
    from pallas_kernels.causal_conv1d import pallas_tpu

    reach = kernel.shape[0] - 1
    bits = None
    if readable is not None:
        bits = sum((mask.astype(jnp.int32) << (reach - tap) for tap, mask in enumerate(readable)), jnp.int32(0))
    if history is None:
        return pallas_tpu.causal_conv1d(x, kernel, bias, bits, silu)
    x = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    bits = None if bits is None else jnp.pad(bits, ((0, 0), (reach, 0)))
    return pallas_tpu.causal_conv1d(x, kernel, bias, bits, silu)[:, reach:]


def _readable(segment_ids: SegmentIds, reach: int) -> tuple[Bool[Array, "B T"], ...]:
    """Tell for every tap where its token is real and belongs to the document of the current one."""
    length = segment_ids.shape[1]
    padded, real = jnp.pad(segment_ids, ((0, 0), (reach, 0)), mode="edge"), segment_ids != 0
    return tuple((padded[:, tap : tap + length] == segment_ids) & real for tap in range(reach + 1))


def _taps(padded: Array, kernel: Array, bias: Array, readable: tuple[Array, ...] | None) -> Array:
    """Convolve [B, K - 1 + T, C], whose first K - 1 tokens are history, to [B, T, C]."""
    taps, length = kernel.shape[0], padded.shape[1] - kernel.shape[0] + 1
    wide = jnp.promote_types(padded.dtype, jnp.float32)
    out = jnp.broadcast_to(bias.astype(wide), (padded.shape[0], length, padded.shape[2]))
    for tap in range(taps):
        term = padded[:, tap : tap + length].astype(wide) * kernel[None, None, tap].astype(wide)
        out = out + (term if readable is None else jnp.where(readable[tap][..., None], term, 0))
    return out.astype(padded.dtype)


_convolve = jax.custom_vjp(_taps)


def _convolve_forward(
    padded: Array, kernel: Array, bias: Array, readable: tuple[Array, ...] | None
) -> tuple[Array, tuple[Any, ...]]:
    return _convolve(padded, kernel, bias, readable), (padded, kernel, bias, readable)


def _convolve_backward(residuals: tuple[Any, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    """Return the gradients of `padded`, `kernel` and `bias`.

    dx_t = Σ_k kernel_k · dy_{t+(K-1)-k}      dkernel_k = Σ_t dy_t · x_{t-(K-1)+k}      dbias = Σ_t dy_t

    By hand, because XLA's CPU backend computes each of the K + 1 sums over tokens one strided element at a time, and
    in each of them again whatever produced dy: 20 times as long. There the sums are matmuls with a row of ones, over a
    block of tokens that stays in cache.
    """
    padded, kernel, bias, readable = residuals
    reach = kernel.shape[0] - 1
    # History gets from the first tokens what tokens get from those after them.
    first = lambda value: jnp.pad(value[:, :reach], ((0, 0), (reach, 0)) + ((0, 0),) * (value.ndim - 2))
    firsts = None if readable is None else tuple(map(first, readable))
    dhistory = _spread(first(dy), kernel, firsts)[:, :reach]
    dpadded = jnp.concatenate([dhistory, _spread(dy, kernel, readable)], axis=1)
    in_blocks = target.platform() == "cpu"
    dkernel, dbias = _sums_in_blocks(padded, dy, readable) if in_blocks else _sums(padded, dy, readable)
    return dpadded.astype(padded.dtype), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _read(tap: int, values: Array, readable: tuple[Array, ...] | None) -> Array:
    """Put zeros where the tap was not read."""
    return values if readable is None else jnp.where(readable[tap][..., None], values, 0)


def _spread(dy: Array, kernel: Array, readable: tuple[Array, ...] | None) -> Array:
    """Sum kernel_k · dy_{t+(K-1)-k} over the taps, in float32: what token t is given back by those that read it.

    Slices are widened one by one: of a float32 copy, accelerators would write every slice to memory before the sum.
    """
    taps, length = kernel.shape[0], dy.shape[1]
    behind = lambda value: jnp.pad(value, ((0, 0), (0, taps - 1)) + ((0, 0),) * (value.ndim - 2))
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    after, total = behind(dy), jnp.zeros(dy.shape, wide)
    for tap in range(taps):
        there = slice(taps - 1 - tap, taps - 1 - tap + length)
        term = after[:, there].astype(wide) * kernel[None, None, tap].astype(wide)
        total += term if readable is None else jnp.where(behind(readable[tap])[:, there, None], term, 0)
    return total


def _sums(padded: Array, dy: Array, readable: tuple[Array, ...] | None) -> tuple[Array, Array]:
    """Gradients of kernel and bias, as sums over all tokens that the compiler makes in one pass."""
    wide, length = jnp.promote_types(dy.dtype, jnp.float32), dy.shape[1]
    add_up = lambda value: jnp.sum(value, axis=(0, 1))
    dy = dy.astype(wide)
    there = lambda tap: padded[:, tap : tap + length].astype(wide)
    taps = range(padded.shape[1] - length + 1)
    return jnp.stack([add_up(_read(tap, dy, readable) * there(tap)) for tap in taps]), add_up(dy)


def _sums_in_blocks(padded: Array, dy: Array, readable: tuple[Array, ...] | None) -> tuple[Array, Array]:
    """Do what `_sums` does, one block of tokens after another, by matmuls with a row of ones."""
    batch, length, channels = dy.shape
    taps, wide = padded.shape[1] - length + 1, jnp.promote_types(dy.dtype, jnp.float32)
    block = min(_BLOCK, length)

    def body(sums: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        start = jnp.minimum(first, length - block)  # a short last block reaches back over tokens that are counted
        cut = lambda value, size: jax.lax.dynamic_slice_in_dim(value, start, size, axis=1)
        dy_block, x = cut(dy, block).astype(wide), cut(padded, block + taps - 1).astype(wide)
        mask = None if readable is None else tuple(cut(m, block) for m in readable)
        ones = jnp.tile((start + jnp.arange(block, dtype=jnp.int32) >= first).astype(wide), (1, batch))
        add_up = lambda value: (ones @ value.reshape(batch * block, channels))[0]
        products = [add_up(_read(tap, dy_block, mask) * x[:, tap : tap + block]) for tap in range(taps)]
        return (sums[0] + jnp.stack(products), sums[1] + add_up(dy_block)), None

    init = jnp.zeros((taps, channels), wide), jnp.zeros((channels,), wide)
    return jax.lax.scan(body, init, jnp.arange(0, length, block, dtype=jnp.int32))[0]


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
