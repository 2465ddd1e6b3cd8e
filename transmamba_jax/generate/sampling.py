"""How the next token is chosen from logits."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from transmamba_jax.shapes import Array, Float32, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options, in the order in which they act."""

    repetition_penalty: float | None = None
    """Divide positive logits of tokens that are there already by this, multiply negative ones (arXiv 1909.05858)."""
    temperature: float = 0.0
    """0 takes the most likely token; above, logits are divided by it and sampled."""
    top_k: int | None = None
    """Sample among the k most likely tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Sample among tokens at least this fraction as likely as the most likely one."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.temperature >= 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature must be >= 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], found {self.min_p}")
        penalty = self.repetition_penalty
        if penalty is not None and not (penalty > 0 and math.isfinite(penalty)):
            raise ValueError(f"repetition_penalty must be positive, found {penalty}")

    def numbers(self) -> "Numbers":
        """Return what a compiled program takes as arguments."""
        return Numbers(self.temperature or None, self.top_p, self.min_p, self.repetition_penalty)


class Numbers(NamedTuple):
    """The options that may change without compiling again, as long as each stays None or does not."""

    temperature: float | Array | None
    top_p: float | Array | None
    min_p: float | Array | None
    repetition_penalty: float | Array | None


def keep_likely(
    logits: Float32[Array, "B V"],
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
) -> Float32[Array, "B V"]:
    """Set the logits of tokens outside the top-k, top-p and min-p sets to -inf; the most likely token always stays."""
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
    if min_p is not None:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def choose(
    logits: Float32[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: jax.Array | None,
    positions: Int[Array, "B"],
    numbers: Numbers,
    top_k: int | None,
) -> Int[Array, "B"]:
    """Choose the token of each row at its position.

    The randomness of a token is that of its row's key and its position, so that it depends neither on the other rows
    nor on how the work was cut into calls.
    """
    penalty = numbers.repetition_penalty
    if penalty is not None:
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if numbers.temperature is None or keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_likely(logits / numbers.temperature, top_k, numbers.top_p, numbers.min_p)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(key: jax.Array | None, rows: int, sampling: Sampling) -> jax.Array | None:
    """Return one key a row: `key` itself where it has one a row, else `key` folded with the row's number.

    None where nothing is sampled.

    Raises:
        ValueError: sampling needs a key and there is none, or its shape fits neither form.
    """
    if sampling.temperature == 0:
        return None
    if key is None:
        raise ValueError(f"temperature={sampling.temperature} samples and needs a random key, found key=None")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == (rows,):
        return key
    if key.shape != ():
        raise ValueError(f"key must be one random key or one a row, shape () or ({rows},), found {key.shape}")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
