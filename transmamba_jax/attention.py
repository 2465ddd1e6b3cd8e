"""Causal softmax attention inside documents: one function, four implementations.

`blockwise` is plain JAX for every device; `cudnn` and `splash` are the libraries' fused kernels for NVIDIA GPUs and
TPUs; `reference` is the formula, with all scores at once and every derivative that JAX has. Scores are computed once
per query/key group: a group whose H/G heads share them is one attention head whose value is the H/G values side by
side.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from pallas_kernels import target
from transmamba_jax.shapes import QueryKey, SegmentIds, Value, known

Implementation = Literal["reference", "blockwise", "cudnn", "splash"]

NAME = "attention"
"""What a forward pass leaves for the backward one has this name, for the policies of `jax.checkpoint` that keep it."""

# Block edge: 512 has the fastest forward on a CPU and ties with 256 for the backward (128 takes 1.4 times as long).
_BLOCK = 512
_BLOCK_MULTIPLE = 8

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
    implementation: str | None = None,
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
            then "blockwise", elsewhere "blockwise". A named one is taken whatever the default backend is.

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
        return _reference(q, k, v, segment_ids, scale)
    if name == "cudnn":
        return _cudnn(q, k, v, scale)
    if name == "splash":
        return _splash(q, k, v, segment_ids, scale)
    return _blockwise(q, k, v, segment_ids, scale)


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


# --- the choice of an implementation ------------------------------------------------------------------------------


def _choose(q: Array, v: Array, segment_ids: Array | None, implementation: str | None) -> Implementation:
    refusals: dict[str, Callable[[], str | None]] = {
        "reference": lambda: None,
        "blockwise": lambda: None,
        "cudnn": lambda: _refuse_cudnn(q, v, segment_ids),
        "splash": lambda: _refuse_splash(q),
    }
    if implementation is None:
        return next(name for name in _AUTOMATIC.get(target.platform(), ("blockwise",)) if refusals[name]() is None)
    if implementation not in refusals:
        raise ValueError(f"unknown implementation {implementation!r}; use one of {', '.join(refusals)} or None")
    reason = refusals[implementation]()
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot serve this call: {reason}")
    return cast(Implementation, implementation)


def _refuse_cudnn(q: Array, v: Array, segment_ids: Array | None) -> str | None:
    if segment_ids is not None:
        return "its masks know sequence lengths, not segment_ids"
    if not known(*q.shape):
        return f"it needs shapes that are numbers, found {q.shape}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, found {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > _CUDNN_HEAD_DIM:
        return f"it needs N and P of at most {_CUDNN_HEAD_DIM}, found N={q.shape[-1]}, P={v.shape[-1]}"
    return None


def _refuse_splash(q: Array) -> str | None:
    if not known(*q.shape):
        return f"it needs shapes that are numbers, found {q.shape}"
    return None if q.dtype in (jnp.bfloat16, jnp.float32) else f"it needs bfloat16 or float32, found {q.dtype}"


# --- reference: the formula ---------------------------------------------------------------------------------------


def _reference(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    value = v.reshape(*q.shape[:3], -1)
    score = jnp.einsum("btgn,bsgn->bgts", q, k, precision="highest", preferred_element_type=wide) * scale
    seen = jnp.tril(jnp.ones((1, 1, q.shape[1], q.shape[1]), bool))
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weight = jax.nn.softmax(jnp.where(seen, score, -jnp.inf), axis=-1)
    out = jnp.einsum("bgts,bsgp->btgp", weight, value.astype(wide), precision="highest")
    return out.astype(v.dtype).reshape(v.shape)


# --- blockwise: plain JAX -----------------------------------------------------------------------------------------


def _blockwise(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    shape, length = v.shape, q.shape[1]
    v = v.reshape(*q.shape[:3], -1)
    count = -(-length // _BLOCK)
    if not known(length):
        block = _BLOCK
    else:
        block = -(-length // (count * _BLOCK_MULTIPLE)) * _BLOCK_MULTIPLE if count > 1 else length
    # Keys that pad the last block lie in the future of every real query, and their ids need not differ from real ones.
    if not known(length) or count * block > length:
        q, k, v = (jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, count * block - length)), mode="edge")
    # XLA's CPU products of bfloat16 take 1.5 times as long as a cast to float32 and its product.
    # A program for any length is for any device too.
    cast = known(length) and target.platform() == "cpu"
    operand = jnp.promote_types(q.dtype, jnp.float32) if cast else q.dtype
    return _attend(q, k, v, segment_ids, float(scale), block, jnp.dtype(operand))[:, :length].reshape(shape)


def _split(x: Array, block: int) -> Array:
    """[B, T, G, N] -> [blocks, B, G, block, N]."""
    batch, length, groups, width = x.shape
    return x.reshape(batch, length // block, block, groups, width).transpose(1, 0, 3, 2, 4)


def _join(x: Array) -> Array:
    """[blocks, B, G, block, N] -> [B, T, G, N]."""
    count, batch, groups, block, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * block, groups, width)


def _dot(equation: str, a: Array, b: Array, operand: jnp.dtype) -> Array:
    wide = jnp.promote_types(operand, jnp.float32)
    return jnp.einsum(equation, a.astype(operand), b.astype(operand), preferred_element_type=wide)


def _visible(ids_q: Array | None, ids_k: Array | None, block: int, diagonal: bool) -> Array | None:
    """Mask [B or 1, 1, block, block] of the pairs that see each other; None when all do."""
    same = None if ids_q is None or ids_k is None else (ids_q[:, None, :, None] == ids_k[:, None, None, :])
    if not diagonal:
        return same
    causal = jnp.tril(jnp.ones((1, 1, block, block), bool))
    return causal if same is None else causal & same


def _first_block(ids: Array) -> Array:
    """First key block that each query block has to visit: an earlier one shares no id with it, in any row.

    Blocks whose ranges of ids do not overlap share none. For contiguous documents with rising ids the bound is exact.
    """
    low, high = ids.min(-1), ids.max(-1)  # [blocks, B]
    overlap = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    return jnp.argmax(overlap.any(-1), axis=1)


def _split_ids(ids: Array | None, count: int, block: int) -> tuple[Array | None, Array]:
    if ids is None:
        return None, jnp.zeros(count, jnp.int32)
    blocks = ids.reshape(ids.shape[0], count, block).swapaxes(0, 1)
    return blocks, _first_block(blocks)


def _at(blocks: Array | None, index: Array) -> Array | None:
    return None if blocks is None else blocks[index]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q: Array, k: Array, v: Array, ids: Array | None, scale: float, block: int, operand: jnp.dtype) -> Array:
    return _attend_forward(q, k, v, ids, scale, block, operand)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, ids: Array | None, scale: float, block: int, operand: jnp.dtype
) -> tuple[Array, Any]:
    """Online softmax; the diagonal block comes first, so that the running maximum is finite from the start on."""
    qs, ks, vs = (_split(x, block) for x in (q, k, v))
    count = qs.shape[0]
    ids_b, first = _split_ids(ids, count, block)

    def visit(row: Sequence, column: Array, diagonal: bool) -> tuple[Array, Array]:
        query, ids_q = row
        score = _dot("bgqn,bgkn->bgqk", query, ks[column], operand) * scale
        mask = _visible(ids_q, _at(ids_b, column), block, diagonal)
        return score if mask is None else jnp.where(mask, score, -jnp.inf), vs[column]

    def query_block(_: None, xs: tuple) -> tuple[None, tuple[Array, Array]]:
        index, start, *row = xs
        score, value = visit(row, index, True)
        top = score.max(-1)
        weight = jnp.exp(score - top[..., None])
        state = top, weight.sum(-1), _dot("bgqk,bgkp->bgqp", weight, value, operand)

        def key_block(column: Array, state: tuple) -> tuple:
            top, total, out = state
            score, value = visit(row, column, False)
            higher = jnp.maximum(top, score.max(-1))
            weight, keep = jnp.exp(score - higher[..., None]), jnp.exp(top - higher)
            out = out * keep[..., None] + _dot("bgqk,bgkp->bgqp", weight, value, operand)
            return higher, total * keep + weight.sum(-1), out

        top, total, out = lax.fori_loop(start, index, key_block, state)
        return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

    _, (out, log_total) = lax.scan(query_block, None, (jnp.arange(count), first, qs, ids_b))
    out, log_total = checkpoint_name((_join(out), log_total), NAME)
    return out, (q, k, v, ids, out, log_total)


def _attend_backward(scale: float, block: int, operand: jnp.dtype, saved: Any, grad: Array) -> tuple:
    """Recompute each block's weights w from the saved log-sum-exp, then

    dv_s = Σ_t w_ts g_t,  ds_ts = w_ts (g_t · v_s - g_t · y_t),  dq_t = scale Σ_s ds_ts k_s,  dk_s = scale Σ_t ds_ts q_t
    """
    q, k, v, ids, out, log_total = saved
    qs, ks, vs, outs, grads = (_split(x, block) for x in (q, k, v, out, grad))
    ids_b, first = _split_ids(ids, len(qs), block)
    wide = log_total.dtype
    mean = jnp.einsum("ibgqp,ibgqp->ibgq", grads.astype(wide), outs.astype(wide))

    def visit(row: Sequence, column: Array, diagonal: bool) -> tuple[Array, Array, Array]:
        query, gradient, log_sum, center, ids_q = row
        key, value = ks[column], vs[column]
        score = _dot("bgqn,bgkn->bgqk", query, key, operand) * scale - log_sum[..., None]
        mask = _visible(ids_q, _at(ids_b, column), block, diagonal)
        weight = jnp.exp(score if mask is None else jnp.where(mask, score, -jnp.inf))
        slope = weight * (_dot("bgqp,bgkp->bgqk", gradient, value, operand) - center[..., None])
        return (
            _dot("bgqk,bgkn->bgqn", slope, key, operand),
            _dot("bgqk,bgqn->bgkn", slope, query, operand),
            _dot("bgqk,bgqp->bgkp", weight, gradient, operand),
        )

    def query_block(sums: tuple, xs: tuple) -> tuple[tuple, Array]:
        index, start, *row = xs

        def key_block(column: Array, carry: tuple, diagonal: bool = False) -> tuple:
            dq, dk, dv = carry
            to_q, to_k, to_v = visit(row, column, diagonal)
            return dq + to_q, dk.at[column].add(to_k), dv.at[column].add(to_v)

        carry = key_block(index, (jnp.zeros_like(row[0], wide), *sums), diagonal=True)
        dq, dk, dv = lax.fori_loop(start, index, key_block, carry)
        return (dk, dv), dq

    # zeros_like, here and above: inside shard_map a carry has to vary over the mesh as what is added to it does.
    zeros = jnp.zeros_like(ks, wide), jnp.zeros_like(vs, wide)
    xs = (jnp.arange(len(qs)), first, qs, grads, log_total, mean, ids_b)
    (dk, dv), dq = lax.scan(query_block, zeros, xs)
    return _join(dq * scale).astype(q.dtype), _join(dk * scale).astype(k.dtype), _join(dv).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


# --- cuDNN and splash: the libraries' kernels ---------------------------------------------------------------------

_CUDNN_HEAD_DIM = 128  # 256 on Hopper and later; 128 holds everywhere
_SPLASH_VALUE_WIDTH = 512  # its accumulators and double-buffered blocks stay within the 16 MiB of VMEM
_SPLASH_LANES = 128
_SPLASH_BLOCK = 1024  # block edge of long rows and narrow heads in bfloat16; for others it was not tried


def _pack(q: Array, k: Array, v: Array, limit: int) -> tuple[Array, Array, Array]:
    """Put as many values of a group side by side as `limit` channels hold, and repeat its q and k for the rest."""
    batch, length, heads, width = v.shape
    shared = heads // q.shape[2]
    together = max(n for n in range(1, shared + 1) if shared % n == 0 and (n == 1 or n * width <= limit))
    q, k = (jnp.repeat(x, shared // together, axis=2) for x in (q, k))
    return q, k, v.reshape(batch, length, heads // together, together * width)


def _cudnn(q: Array, k: Array, v: Array, scale: float) -> Array:
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


def _splash(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    """Call the TPU kernel of jax.experimental, a row at a time under vmap.

    It takes any head dims, of q and k and of v apart, and lengths that are multiples of its blocks, which are multiples
    of 128. Verified: its numbers and gradients in interpret mode, that it compiles for a TPU, and the choice of blocks
    by the compiler's count of instructions (`benchmarks/kernel_cycles.py`): at 8192 tokens, N = P = 96, twice forwards
    and once backwards, edges of 1024 need 0.81 of those of 512 on v5e, 0.80 on v5p, 0.76 on v6e. Not verified: speed.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    q, k, value = _pack(q, k, v, _SPLASH_VALUE_WIDTH)
    length = v.shape[1]
    narrow = q.dtype == jnp.bfloat16 and max(q.shape[-1], value.shape[-1]) <= _SPLASH_LANES
    edge = _SPLASH_BLOCK if narrow and length >= 2 * _SPLASH_BLOCK else _BLOCK
    count = -(-length // edge)
    block = -(-length // (count * _SPLASH_LANES)) * _SPLASH_LANES
    padding = count * block - length
    q, k, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * scale, k, value))
    mask = splash.MultiHeadMask([splash.CausalMask((count * block,) * 2)] * q.shape[1])
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, residual_checkpoint_name=NAME)
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, value)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge").astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, value, splash.SegmentIds(ids, ids))
    return out.swapaxes(1, 2)[:, :length].reshape(v.shape)
