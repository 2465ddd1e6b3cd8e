"""Text generation: greedy and sampled continuations of prompts of any lengths.

Every token runs the model over the whole row, so the result follows from the forward alone and holds for every
schedule, at a cost of one forward per token. Rows are padded on the right, which a causal model never reads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax.model import TransMamba
from transmamba_jax.shapes import Array, Float32, Int


def generate(
    model: TransMamba,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> list[list[int]]:
    """Continue each prompt by `max_new_tokens` tokens and return the new tokens.

    Args:
        model: the model.
        params: its parameters.
        prompts: token ids, at least one a prompt; lengths may differ.
        max_new_tokens: tokens to add to each prompt.
        temperature: 0 takes the most likely token; above, logits are divided by it and sampled.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        key: random key, needed when temperature > 0; the same key gives the same tokens.

    Raises:
        ValueError: a prompt is empty or has an id outside the vocabulary, or an option is out of range.
    """
    _check(prompts, model.config.vocab_size, max_new_tokens, temperature, top_k, top_p, key)
    if max_new_tokens == 0:
        return [[] for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.zeros((len(prompts), int(lengths.max()) + max_new_tokens), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    sample = temperature > 0
    filled = _extend(
        params,
        jnp.asarray(rows),
        jnp.asarray(lengths),
        key if sample else jax.random.key(0),
        jnp.float32(temperature if sample else 1),
        model=model,
        steps=max_new_tokens,
        sample=sample,
        top_k=top_k,
        top_p=top_p,
    )
    rows = np.asarray(filled)
    return [row[length : length + max_new_tokens].tolist() for row, length in zip(rows, lengths, strict=True)]


@partial(jax.jit, static_argnames=("model", "steps", "sample", "top_k", "top_p"))
def _extend(
    params: Any,
    rows: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: jax.Array,
    temperature: Float32[Array, ""],
    *,
    model: TransMamba,
    steps: int,
    sample: bool,
    top_k: int | None,
    top_p: float | None,
) -> Int[Array, "B T"]:
    """Fill `steps` tokens after each row's length."""
    batch = jnp.arange(rows.shape[0])
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(batch)

    def step(index: Array, rows: Int[Array, "B T"]) -> Int[Array, "B T"]:
        position = lengths + index
        hidden = model.apply({"params": params}, rows, method="hidden")[batch, position - 1]
        logits = model.apply({"params": params}, hidden, method="logits")
        if sample:
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, index)
            token = jax.vmap(jax.random.categorical)(keys, keep_likely(logits / temperature, top_k, top_p))
        else:
            token = jnp.argmax(logits, axis=-1)
        return rows.at[batch, position].set(token.astype(rows.dtype))

    return jax.lax.fori_loop(0, steps, step, rows)


def keep_likely(
    logits: Float32[Array, "B V"], top_k: int | None = None, top_p: float | None = None
) -> Float32[Array, "B V"]:
    """Set the logits of tokens outside the top-k and the top-p set to -inf; the most likely token always stays."""
    if top_k is not None:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays when the tokens before it do not reach top_p on their own.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def _check(
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
) -> None:
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, found none")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{index}] is empty; a prompt needs at least one token")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"prompts[{index}] has token {outside[0]}, outside the vocabulary 0..{vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, found {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, found {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples and needs a random key, found key=None")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], found {top_p}")
