"""Loss and scores of tokens from hidden states, a chunk of tokens at a time: the logits of a batch never exist at once.

    nll_i = logsumexp(z_i) - z_i[target_i]      z = logits in float32, nats

Logits of at most `chunk` tokens per device exist at a time, at least one token of every row and of every part of it
where devices split time: chunks are cut along time within those parts.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool

from pallas_kernels import target
from transmamba_jax import sharding
from transmamba_jax.shapes import Array, Float, Float32, Hidden, Int

_TOKENS = 8192
_CPU_BYTES = 2**23


def tokens_at_a_time(loss_chunk: int | None, vocab_size: int) -> int:
    """Return `train.loss_chunk`; where it is None, 8192, or on a CPU as many as have 8 MiB of logits, if that is less.

    Logits are read several times, and a CPU's cache holds so many: with 8192 ids the loss and its gradient take 0.83
    (jax 0.10) and 0.79 (jax 0.12) of their time at 8192 tokens, with 2048 ids 0.75 and 0.72.
    """
    if loss_chunk is not None:
        return loss_chunk
    return max(1, min(_TOKENS, _CPU_BYTES // (4 * vocab_size))) if target.platform() == "cpu" else _TOKENS


@dataclasses.dataclass(frozen=True)
class TimeChunks:
    """Cut [B, T, ...] into `count` chunks [count, B, Q, ...] along time, on the mesh of `jax.set_mesh`."""

    rows: int
    time: int
    shards: int
    """Parts of a row that devices hold."""
    width: int
    """Tokens of a chunk per part; the last chunk of a part is padded with zeros."""
    count: int

    @classmethod
    def of(cls, targets: Array, chunk: int) -> "TimeChunks":
        """Return chunks of [B, T] targets: at most `chunk` tokens per device, or one token of every row and part."""
        rows, time = targets.shape
        shards = sharding.parts("spread_time", time)
        part = time // shards
        held = rows // sharding.parts("rows", rows)
        count = math.ceil(part / max(chunk // held, 1))
        return cls(rows, time, shards, math.ceil(part / count), count)

    def cut(self, x: Array) -> Array:
        """Return the chunks of [B, T, ...]."""
        part = self.time // self.shards
        x = x.reshape(self.rows, self.shards, part, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.count * self.width - part)) + ((0, 0),) * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(self.rows, self.shards, self.count, self.width, *x.shape[3:]), 2, 0)
        return x.reshape(self.count, self.rows, self.shards * self.width, *x.shape[4:])

    def join(self, x: Array) -> Array:
        """Undo `cut`."""
        part = self.time // self.shards
        x = jnp.moveaxis(x.reshape(self.count, self.rows, self.shards, self.width, *x.shape[3:]), 0, 2)
        x = x.reshape(self.rows, self.shards, self.count * self.width, *x.shape[4:])[:, :, :part]
        return x.reshape(self.rows, self.time, *x.shape[3:])


def chunked_cross_entropy(
    logits: Callable[[Any, Float[Array, "B Q D"]], Float32[Array, "B Q V"]],
    head: Any,
    hidden: Hidden,
    targets: Int[Array, "B T"],
    weights: Float32[Array, "B T"],
    chunk: int,
) -> tuple[Float32[Array, ""], tuple[Any, Hidden]]:
    """Sum weighted cross-entropies in nats; return the sum and its gradients by `head` and `hidden`.

    `logits` takes the head's parameters and hidden states. A chunk's gradients are taken at once, while its logits are
    there: nothing is computed twice, as it would be by differentiating the sum. Over a mesh the gradient of the head is
    summed over devices chunk by chunk, so that many small chunks are many large sums. Accumulates in float32.
    """

    @partial(jax.value_and_grad, argnums=(0, 1))
    def summed(head: Any, hidden: Array, targets: Array, weights: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(head, hidden), targets)
        return jnp.sum(losses * weights)

    return _sum_over_chunks(summed, head, (hidden, targets, weights), jnp.float32(0), chunk)


def chunked_distillation(
    logits: Callable[[Any, Float[Array, "B Q D"]], Float32[Array, "B Q V"]],
    head: Any,
    hidden: Hidden,
    teacher_hidden: Hidden,
    targets: Int[Array, "B T"],
    weights: Float32[Array, "B T"],
    chunk: int,
    share: float,
) -> tuple[tuple[Float32[Array, ""], Float32[Array, ""]], tuple[Any, Hidden]]:
    """Sum weighted cross-entropies and divergences from a teacher, in nats, with gradients of their mixture.

        nll = sum_i w_i · (logsumexp(s_i) - s_i[target_i])        s = logits of `hidden`
        kl  = sum_i w_i · sum_v p_iv · (log p_iv - log softmax(s_i)_v)      p = softmax of the teacher's logits

    Returns (nll, kl) and the gradients of (1 - share) · nll + share · kl by `head` and `hidden`. None goes through the
    teacher's logits, which have the same head. Logits of both exist for a chunk at a time; see `chunked_cross_entropy`.
    """

    def mixed(
        head: Any, hidden: Array, targets: Array, weights: Array, teacher_hidden: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        log_q = jax.nn.log_softmax(logits(head, hidden))
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits(head, teacher_hidden)))
        picked = jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
        nll = -jnp.sum(picked * weights)
        kl = jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * weights)
        return (1 - share) * nll + share * kl, (nll, kl)

    def summed(*arguments: Any) -> Any:
        (_, sums), gradients = jax.value_and_grad(mixed, argnums=(0, 1), has_aux=True)(*arguments)
        return sums, gradients

    arrays = hidden, targets, weights, teacher_hidden
    return _sum_over_chunks(summed, head, arrays, (jnp.float32(0), jnp.float32(0)), chunk)


def _sum_over_chunks(
    summed: Callable[..., Any], head: Any, arrays: tuple[Array, ...], zero: Any, chunk: int
) -> tuple[Any, tuple[Any, Hidden]]:
    """Add up sums and gradients of `summed(head, *arrays)` over chunks of [B, T, ...] arrays: hidden, targets, others.

    `summed` returns sums like `zero`, and gradients by the head and the hidden states.
    """
    chunks = TimeChunks.of(arrays[1], chunk)
    if chunks.count == 1:
        return summed(head, *arrays)

    def body(sums: tuple[Any, Any], xs: tuple[Array, ...]) -> tuple[tuple[Any, Any], Array]:
        loss, (dhead, dhidden) = summed(head, *xs)
        return jax.tree.map(jnp.add, sums, (loss, dhead)), dhidden

    zeros = zero, jax.tree.map(jnp.zeros_like, head)
    (loss, dhead), dhidden = jax.lax.scan(body, zeros, tuple(map(chunks.cut, arrays)))  # padding has weight 0
    return loss, (dhead, chunks.join(dhidden))


def chunked_log_likelihoods(
    logits: Callable[[Float[Array, "B Q D"]], Float32[Array, "B Q V"]],
    hidden: Hidden,
    targets: Int[Array, "B T"],
    chunk: int,
    vocab_size: int | None = None,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """Return log p of each target, in nats, and whether it is the most likely id below `vocab_size` (None: of all)."""

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        z = logits(hidden)
        picked = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        likeliest = jnp.argmax(z[..., :vocab_size], axis=-1)
        return picked - jax.nn.logsumexp(z, axis=-1), likeliest == targets

    chunks = TimeChunks.of(targets, chunk)
    scores, likeliest = jax.lax.map(score, (chunks.cut(hidden), chunks.cut(targets)))
    return chunks.join(scores), chunks.join(likeliest)
