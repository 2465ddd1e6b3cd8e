"""Causal attention by the libraries' fused kernels: cuDNN's for NVIDIA GPUs, splash attention for TPUs."""

import jax
import jax.numpy as jnp

from transmamba_jax.attention.blockwise import NAME
from transmamba_jax.shapes import Array, known

_CUDNN_HEAD_DIM = 128  # 256 on Hopper and later; 128 holds everywhere
_SPLASH_VALUE_WIDTH = 512  # its accumulators and double-buffered blocks stay within the 16 MiB of VMEM
_SPLASH_LANES = 128
_SPLASH_SHORT_BLOCK = 512
_SPLASH_BLOCK = 1024  # block edge of long rows and narrow heads in bfloat16; for others it was not tried


def cudnn_unsupported_reason(q: Array, v: Array, segment_ids: Array | None) -> str | None:
    """Return why `cudnn` cannot serve a call, or None."""
    if segment_ids is not None:
        return "its masks know sequence lengths, not segment_ids"
    if not known(*q.shape):
        return f"it needs shapes that are numbers, found {q.shape}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, found {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > _CUDNN_HEAD_DIM:
        return f"it needs N and P of at most {_CUDNN_HEAD_DIM}, found N={q.shape[-1]}, P={v.shape[-1]}"
    return None


def splash_unsupported_reason(q: Array) -> str | None:
    """Return why `splash` cannot serve a call, or None."""
    if not known(*q.shape):
        return f"it needs shapes that are numbers, found {q.shape}"
    return None if q.dtype in (jnp.bfloat16, jnp.float32) else f"it needs bfloat16 or float32, found {q.dtype}"


def _pack(q: Array, k: Array, v: Array, limit: int) -> tuple[Array, Array, Array]:
    """Put as many values of a group side by side as `limit` channels hold, and repeat its q and k for the rest."""
    batch, length, heads, width = v.shape
    shared = heads // q.shape[2]
    together = max(n for n in range(1, shared + 1) if shared % n == 0 and (n == 1 or n * width <= limit))
    q, k = (jnp.repeat(x, shared // together, axis=2) for x in (q, k))
    return q, k, v.reshape(batch, length, heads // together, together * width)


def cudnn(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Call the library's cuDNN flash attention.

    It takes one head dim, a multiple of 8, for q, k and v, and trains on even lengths only, so zeros fill up the
    channels and one token may follow the last. Verified: it lowers for CUDA, values and gradients. Not verified: any
    number, for it has not run on a GPU.
    """
    q, k, value = _pack(q, k, v, _CUDNN_HEAD_DIM)
    length, width = v.shape[1], value.shape[-1]
    dim = -(-max(q.shape[-1], width) // 8) * 8
    padded = [jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, dim - x.shape[-1]))) for x in (q, k, value)]
    out = jax.nn.dot_product_attention(*padded, scale=scale, is_causal=True, implementation="cudnn")
    return out[:, :length, :, :width].reshape(v.shape)


def splash(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    """Call the TPU kernel of jax.experimental, a row at a time under vmap.

    It takes any head dims, of q and k and of v apart, and lengths that are multiples of its blocks, which are multiples
    of 128. Verified: its numbers and gradients in interpret mode, that it compiles for a TPU, and the choice of blocks
    by the compiler's count of instructions (`benchmarks/tpu/kernel_cycles.py`): at 8192 tokens, N = P = 96, two forward
    passes and one backward, edges of 1024 need 0.81 of those of 512 on v5e, 0.80 on v5p, 0.76 on v6e. Not verified:
    speed.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    q, k, value = _pack(q, k, v, _SPLASH_VALUE_WIDTH)
    length = v.shape[1]
    narrow = q.dtype == jnp.bfloat16 and max(q.shape[-1], value.shape[-1]) <= _SPLASH_LANES
    edge = _SPLASH_BLOCK if narrow and length >= 2 * _SPLASH_BLOCK else _SPLASH_SHORT_BLOCK
    count = -(-length // edge)
    block = -(-length // (count * _SPLASH_LANES)) * _SPLASH_LANES
    padding = count * block - length
    q, k, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * scale, k, value))
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((count * block,) * 2)] * q.shape[1])
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes, residual_checkpoint_name=NAME)
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, value)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge").astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, value, splash_attention.SegmentIds(ids, ids))
    return out.swapaxes(1, 2)[:, :length].reshape(v.shape)
