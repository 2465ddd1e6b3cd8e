"""Causal attention in plain JAX for every device: online softmax over blocks, of whole rows or with a cache.

Names that end in `_t` are transposed blocks [.., N, tokens]. Every matmul here sums over the last dimension of its left
operand and the last but one of its right operand. XLA's CPU copies an operand that is not so before it multiplies:
scores take 1.5 times as long, and gradients of keys and values, whose copies have the size of the scores, 2.1 times.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import target
from transmamba_jax.shapes import Array, Float, Int, QueryKey, Value, known

Keys: TypeAlias = Float[Array, "B G S N"]
Values: TypeAlias = Float[Array, "B H S P"]

NAME = "attention"
"""Name of the residuals, for the policies of `jax.checkpoint` that keep them."""

# Block edge: 512 has the fastest forward on a CPU and ties with 256 for the backward (128 takes 1.4 times as long).
_BLOCK = 512
_BLOCK_MULTIPLE = 8
# Queries at a time in a block on the diagonal, whose other half is masked. On two cores 4 x 512 tokens take 0.73
# (4 heads) and 0.80 (8 heads) of the time of a whole block, forward + backward. 128 takes longer to compile.
_CPU_EDGE = 256


def attend(q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float) -> Array:
    """Attend to whole rows; arguments as for `causal_attention`."""
    shape, length = v.shape, q.shape[1]
    v = v.reshape(*q.shape[:3], -1)
    count = -(-length // _BLOCK)
    if not known(length):
        block = _BLOCK
    else:
        block = -(-length // (count * _BLOCK_MULTIPLE)) * _BLOCK_MULTIPLE if count > 1 else length
    # Keys that pad the last block are in the future of every real query, and their ids need not differ from real ones.
    if not known(length) or count * block > length:
        q, k, v = (jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, count * block - length)), mode="edge")
    # A program for any length is for any device too.
    operand = matmul_dtype(q.dtype) if known(length) else q.dtype
    return _attend(q, k, v, segment_ids, float(scale), block, jnp.dtype(operand))[:, :length].reshape(shape)


def matmul_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype to cast operands of matmuls to."""
    # XLA's CPU matmuls of bfloat16 take 1.5 times as long as a cast to float32 and its matmul.
    return jnp.promote_types(dtype, jnp.float32) if target.platform() == "cpu" else dtype


def _split(x: Array, block: int) -> Array:
    """[B, T, G, N] -> [blocks, B, G, block, N]."""
    batch, length, groups, width = x.shape
    return x.reshape(batch, length // block, block, groups, width).transpose(1, 0, 3, 2, 4)


def _join(x: Array) -> Array:
    """[blocks, B, G, block, N] -> [B, T, G, N]."""
    count, batch, groups, block, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * block, groups, width)


def _split_t(x: Array, block: int) -> Array:
    """[B, T, G, N] -> [blocks, B, G, N, block]."""
    return _split(x, block).swapaxes(3, 4)


def _join_t(x: Array) -> Array:
    """[blocks, B, G, N, block] -> [B, T, G, N]."""
    return _join(x.swapaxes(3, 4))


def _dot(equation: str, a: Array, b: Array, operand: jnp.dtype) -> Array:
    wide = jnp.promote_types(operand, jnp.float32)
    return jnp.einsum(equation, a.astype(operand), b.astype(operand), preferred_element_type=wide)


def _same_document(ids_q: Array | None, ids_k: Array | None) -> Array | None:
    """Mask [B, 1, q, k] of the pairs of one document; None when all are."""
    return None if ids_q is None or ids_k is None else (ids_q[:, None, :, None] == ids_k[:, None, None, :])


def _diagonal(block: int, ids: Array | None) -> Iterator[tuple[slice, slice, Array]]:
    """Yield the parts of a block on the diagonal: queries, the keys up to them, and the mask [B or 1, 1, q, k]."""
    edge = _CPU_EDGE if target.platform() == "cpu" else block
    for start in range(0, block, edge):
        stop = min(start + edge, block)
        queries, keys = slice(start, stop), slice(0, stop)
        causal = (jnp.arange(stop)[None] <= jnp.arange(start, stop)[:, None])[None, None]
        same = None if ids is None else _same_document(ids[:, queries], ids[:, keys])
        yield queries, keys, causal if same is None else causal & same


def _first_block(ids: Array) -> Array:
    """First key block that each query block has to visit: an earlier one shares no id with it, in any row.

    Blocks whose ranges of ids do not overlap share none. For contiguous documents with rising ids the bound is exact.
    """
    low, high = ids.min(-1), ids.max(-1)  # [blocks, B]
    overlap = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    return jnp.argmax(overlap.any(-1), axis=1).astype(jnp.int32)


def _split_ids(ids: Array | None, count: int, block: int) -> tuple[Array | None, Array]:
    if ids is None:
        return None, jnp.zeros(count, jnp.int32)
    blocks = ids.reshape(ids.shape[0], count, block).swapaxes(0, 1)
    return blocks, _first_block(blocks)


def _at(blocks: Array | None, index: Array | int) -> Array | None:
    return None if blocks is None else blocks[index]


def _scores(query: Array, key_t: Array, mask: Array | None, scale: float, operand: jnp.dtype) -> Array:
    score = _dot("bgqn,bgnk->bgqk", query, key_t, operand) * scale
    return score if mask is None else jnp.where(mask, score, -jnp.inf)


def _statistics(score: Array, value: Array, operand: jnp.dtype) -> tuple[Array, Array, Array]:
    """Return max_s score_s, Σ_s exp(score_s - max) and Σ_s exp(score_s - max)·v_s; every query sees a key."""
    top = score.max(-1)
    weight = jnp.exp(score - top[..., None])
    return top, weight.sum(-1), _dot("bgqk,bgkp->bgqp", weight, value, operand)


def _online_softmax(
    query: Array,
    load: Callable[[Array], tuple[Array, Array, Array | None]],
    state: tuple[Array, Array, Array],
    others: tuple[Any, Any],
    scale: float,
    operand: jnp.dtype,
) -> tuple[Array, Array]:
    """Attend from a block of queries to one block of keys after another.

    m <- max(m, max_s score_s),  l <- l·exp(m_old - m) + Σ_s exp(score_s - m),  out likewise with v_s (arXiv 2205.14135)

    Args:
        query: [B, G, q, N].
        load: number of a block -> transposed keys [B, G, N, k], values [B, G, k, P], and the mask of the pairs that see
            each other, [B or 1, 1, q, k] or None (all).
        state: `_statistics` of keys of which every query sees one, so that the maximum is finite from the start on.
        others: numbers of the first block that follows and of the one after the last.
        scale: factor on the scores.
        operand: dtype of the operands of matmuls; they accumulate in float32 at least.

    Returns:
        Output [B, G, q, P] and log-sum-exp of the scores [B, G, q].
    """

    def key_block(column: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = state
        key_t, value, mask = load(column)
        score = _scores(query, key_t, mask, scale, operand)
        higher = jnp.maximum(top, score.max(-1))
        weight, keep = jnp.exp(score - higher[..., None]), jnp.exp(top - higher)
        out = out * keep[..., None] + _dot("bgqk,bgkp->bgqp", weight, value, operand)
        return higher, total * keep + weight.sum(-1), out

    start, stop = others
    none = isinstance(start, int) and isinstance(stop, int) and start >= stop
    top, total, out = state if none else lax.fori_loop(start, stop, key_block, state)
    return out / total[..., None], top + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q: Array, k: Array, v: Array, ids: Array | None, scale: float, block: int, operand: jnp.dtype) -> Array:
    return _attend_forward(q, k, v, ids, scale, block, operand)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, ids: Array | None, scale: float, block: int, operand: jnp.dtype
) -> tuple[Array, Any]:
    qs, ks_t, vs = _split(q, block), _split_t(k, block), _split(v, block)
    count = qs.shape[0]
    ids_b, first = _split_ids(ids, count, block)

    def query_block(_: None, xs: tuple) -> tuple[None, tuple[Array, Array]]:
        index, start, query, ids_q = xs

        def load(column: Array) -> tuple[Array, Array, Array | None]:
            return ks_t[column], vs[column], _same_document(ids_q, _at(ids_b, column))

        def part(queries: slice, keys: slice, mask: Array) -> tuple[Array, Array, Array]:
            score = _scores(query[:, :, queries], ks_t[index][..., keys], mask, scale, operand)
            return _statistics(score, vs[index][:, :, keys], operand)

        # The diagonal block comes first: every query sees itself.
        parts = [part(*each) for each in _diagonal(block, ids_q)]
        top, total, out = (jnp.concatenate(each, axis=2) for each in zip(*parts, strict=True))
        out, log_total = _online_softmax(query, load, (top, total, out), (start, index), scale, operand)
        return None, (out.astype(v.dtype), log_total)

    _, (out, log_total) = lax.scan(query_block, None, (jnp.arange(count, dtype=jnp.int32), first, qs, ids_b))
    out, log_total = checkpoint_name((_join(out), log_total), NAME)
    return out, (q, k, v, ids, out, log_total)


class _Queries(NamedTuple):
    """A block of queries, and what the backward pass knows of them."""

    query: Array
    query_t: Array
    grad: Array
    grad_t: Array
    log_total: Array
    center: Array
    """Σ_p g_p · y_p, [B, G, q]."""

    def part(self, queries: slice) -> "_Queries":
        rows = (each[:, :, queries] for each in (self.query, self.grad, self.log_total, self.center))
        query, grad, log_total, center = rows
        return _Queries(query, self.query_t[..., queries], grad, self.grad_t[..., queries], log_total, center)


class _Keys(NamedTuple):
    """A block of keys and their values."""

    key: Array
    key_t: Array
    value_t: Array

    def part(self, keys: slice) -> "_Keys":
        return _Keys(self.key[:, :, keys], self.key_t[..., keys], self.value_t[..., keys])


def _attend_backward(scale: float, block: int, operand: jnp.dtype, saved: Any, grad: Array) -> tuple:
    """Recompute each block's weights w from the saved log-sum-exp, then

    dv_s = Σ_t w_ts g_t,  ds_ts = w_ts (g_t · v_s - g_t · y_t),  dq_t = scale Σ_s ds_ts k_s,  dk_s = scale Σ_t ds_ts q_t
    """
    q, k, v, ids, out, log_total = saved
    wide = log_total.dtype
    outs, grads = _split(out, block), _split(grad, block)
    center = jnp.einsum("ibgqp,ibgqp->ibgq", grads.astype(wide), outs.astype(wide))
    queries = _Queries(_split(q, block), _split_t(q, block), grads, _split_t(grad, block), log_total, center)
    keys = _Keys(_split(k, block), _split_t(k, block), _split_t(v, block))
    ids_b, first = _split_ids(ids, len(outs), block)

    def pull_back(row: _Queries, column: _Keys, mask: Array | None) -> tuple[Array, Array, Array]:
        """Return the gradients of queries [B, G, q, N], and of keys and values, transposed."""
        weight = jnp.exp(_scores(row.query, column.key_t, mask, scale, operand) - row.log_total[..., None])
        slope = weight * (_dot("bgqp,bgpk->bgqk", row.grad, column.value_t, operand) - row.center[..., None])
        return (
            _dot("bgqk,bgkn->bgqn", slope, column.key, operand),
            _dot("bgnq,bgqk->bgnk", row.query_t, slope, operand),
            _dot("bgpq,bgqk->bgpk", row.grad_t, weight, operand),
        )

    def query_block(sums: tuple, xs: tuple) -> tuple[tuple, Array]:
        index, start, row, ids_q = xs
        own, to_queries = jax.tree.map(lambda blocks: blocks[index], keys), []
        dk, dv = jnp.zeros_like(own.key_t, wide), jnp.zeros_like(own.value_t, wide)
        for some, seen, mask in _diagonal(block, ids_q):
            to_q, to_k, to_v = pull_back(row.part(some), own.part(seen), mask)
            to_queries.append(to_q)
            dk, dv = dk.at[..., seen].add(to_k), dv.at[..., seen].add(to_v)

        def key_block(column: Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            mask = _same_document(ids_q, _at(ids_b, column))
            to_q, to_k, to_v = pull_back(row, jax.tree.map(lambda blocks: blocks[column], keys), mask)
            return dq + to_q, dk.at[column].add(to_k), dv.at[column].add(to_v)

        dks, dvs = sums
        carry = jnp.concatenate(to_queries, axis=2), dks.at[index].add(dk), dvs.at[index].add(dv)
        dq, dk, dv = lax.fori_loop(start, index, key_block, carry)
        return (dk, dv), dq

    # zeros_like, here and above: inside shard_map a carry has to vary over the mesh as what is added to it does.
    zeros = jnp.zeros_like(keys.key_t, wide), jnp.zeros_like(keys.value_t, wide)
    (dk, dv), dq = lax.scan(query_block, zeros, (jnp.arange(len(outs), dtype=jnp.int32), first, queries, ids_b))
    return _join(dq * scale).astype(q.dtype), _join_t(dk * scale).astype(k.dtype), _join_t(dv).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def cached_attention(q: QueryKey, keys: Keys, values: Values, start: Int[Array, ""]) -> Value:
    """Attend from the tokens at positions start + i to the cached tokens up to and including each.

        y_i = Σ_{s <= start + i} softmax_s(q_i · k_s / √N) v_s

    Only blocks of keys are visited that a query can see. Scores, statistics and accumulation are float32. The queries'
    own keys and values are in the cache already, at slot start + i.

    Returns:
        [B, n, H, P] in the dtype of `values`.
    """
    batch, length, groups, width = q.shape
    heads, capacity, channels = values.shape[1:]
    count, block = -(-length // _BLOCK), min(capacity, _BLOCK)
    edge = length if count == 1 else _BLOCK
    values = values.reshape(batch, groups, heads // groups, capacity, channels)

    def query_block(xs: tuple[Array, Array]) -> Array:
        index, query = xs
        positions = start + jnp.minimum(index * edge + jnp.arange(edge, dtype=jnp.int32), length - 1)

        def load(column: Array | int) -> tuple[Array, Array, Array]:
            # The last block begins early where blocks do not fill the cache; it shares some keys, which are masked.
            begin = jnp.minimum(column * block, capacity - block)
            key = lax.dynamic_slice_in_dim(keys, begin, block, axis=2)
            value = lax.dynamic_slice_in_dim(values, begin, block, axis=3).swapaxes(2, 3)
            slots = begin + jnp.arange(block, dtype=jnp.int32)[None]
            seen = (slots >= column * block) & (slots <= positions[:, None])
            return key.swapaxes(2, 3), value.reshape(batch, groups, block, -1), seen[None, None]

        # Block 0 holds slot 0, which every query sees.
        scale, operand = 1 / math.sqrt(width), matmul_dtype(q.dtype)
        key_t, value, mask = load(0)
        state = _statistics(_scores(query, key_t, mask, scale, operand), value, operand)
        stop = 1 if block == capacity else jnp.minimum(positions[-1], capacity - 1) // block + 1
        return _online_softmax(query, load, state, (1, stop), scale, operand)[0]

    queries = _split(jnp.pad(q, ((0, 0), (0, count * edge - length), (0, 0), (0, 0))), edge)
    out = _join(lax.map(query_block, (jnp.arange(count, dtype=jnp.int32), queries)))[:, :length]
    return out.reshape(batch, length, heads, channels).astype(values.dtype)
