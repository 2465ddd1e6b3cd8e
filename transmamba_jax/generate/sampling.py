"""Sample the next token from logits: repetition penalty, temperature, top-k, top-p, min-p; and the random keys."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from transmamba_jax.generate.arguments import real_number, whole_number
from transmamba_jax.shapes import Array, Float32, Int

_LEAST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # normal numbers


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of sampling, in the order in which they are applied."""

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
        """Check the ranges; numbers of any type become Python's."""
        for name in ("repetition_penalty", "temperature", "top_p", "min_p"):
            if name == "temperature" or getattr(self, name) is not None:
                object.__setattr__(self, name, real_number(name, getattr(self, name)))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 1))
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, found {self.temperature}")
        if self.temperature > _LARGEST:
            raise ValueError(f"temperature must be a finite float32, found {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], found {self.min_p}")
        penalty = self.repetition_penalty
        if penalty is not None and not (penalty > 0 and math.isfinite(penalty)):
            raise ValueError(f"repetition_penalty must be positive, found {penalty}")

    @property
    def greedy(self) -> bool:
        """True where the most likely token is taken: also below 1.2e-38, which float32 arithmetic flushes to 0."""
        return self.temperature < _LEAST

    def as_params(self) -> "SamplingParams":
        """Return the arguments of a compiled program."""
        temperature = None if self.greedy else self.temperature
        return SamplingParams(temperature, self.top_p, self.min_p, self.repetition_penalty)


class SamplingParams(NamedTuple):
    """Options that may change without compiling again, as long as each stays None or stays a number."""

    temperature: float | Array | None
    top_p: float | Array | None
    min_p: float | Array | None
    repetition_penalty: float | Array | None


def filter_logits(
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
        # A token stays when the tokens before it do not reach top_p on their own. The first one has none before it.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p).at[..., 0].set(True)
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if min_p is not None:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def mask_vocabulary(logits: Float32[Array, "*batch V"], vocab_size: int | Array | None) -> Float32[Array, "*batch V"]:
    """Set the logits of ids >= `vocab_size` to -inf; None: of no id. A padded vocabulary has ids without a token."""
    if vocab_size is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def sample(
    logits: Float32[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    keys: Array | None,
    positions: Int[Array, "B"],
    params: SamplingParams,
    top_k: int | None,
    vocab_size: int | Array | None = None,
) -> Int[Array, "B"]:
    """Sample the token of each row, an id below `vocab_size`; greedily without a temperature or without keys.

    The randomness of a token comes from its row's key (of `row_keys`) and its position alone: neither the other rows
    nor the cutting of the work into calls matters.
    """
    penalty = params.repetition_penalty
    if penalty is not None:
        assert seen is not None
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        # Of several infinite logits no softmax exists: an extreme penalty makes them as large as float32 allows.
        logits = jnp.where(seen, jnp.clip(penalized, -_LARGEST / 4, _LARGEST / 4), logits)
    logits = mask_vocabulary(logits, vocab_size)
    if params.temperature is None or keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest becomes 0: divided by a small temperature, logits overflow to -inf and never to +inf, whose softmax
    # is NaN.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / params.temperature
    logits = filter_logits(logits, top_k, params.top_p, params.min_p)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(key: Array | None, rows: int, sampling: Sampling) -> jax.Array | None:
    """Return one threefry key per row, from an array of keys or from one key folded with the row's number.

    The RBG generators draw other numbers under `vmap` than for each key alone: rows would depend on each other. So the
    words of a key of another generator are folded into a threefry key.

    Returns:
        Keys, shape (rows,); None where nothing is sampled.

    Raises:
        ValueError: sampling needs a key and there is none, or it is no random key, or its shape is neither () nor
            (rows,).
    """
    if sampling.greedy:
        return None
    key = _typed(key, sampling.temperature)
    if key.shape == ():
        key = fold_rows(key, np.arange(rows))
    elif key.shape != (rows,):
        raise ValueError(f"key must be one random key or one per row, shape () or ({rows},), found {key.shape}")
    return _threefry(key)


def fold_rows(key: jax.Array, rows: np.ndarray) -> jax.Array:
    """Return `jax.random.fold_in(key, row)` of each row, one after another: see `row_keys`."""
    return jax.lax.map(lambda row: jax.random.fold_in(key, row), jnp.asarray(rows, jnp.int32))


def _typed(key: Array | None, temperature: float) -> jax.Array:
    if key is None:
        raise ValueError(f"temperature={temperature} samples and needs a random key, found key=None")
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key must be a random key such as jax.random.key(0), found {key!r}")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    # The words of an untyped key tell the generator; the two of four words differ in how they fold.
    unsafe = str(jax.random.key_impl(jax.random.key(0))) == "unsafe_rbg"
    kinds = {2: "threefry2x32", 4: "unsafe_rbg" if unsafe else "rbg"}
    words = key.shape[-1] if key.ndim else 0
    if key.dtype != np.uint32 or words not in kinds:
        raise ValueError(
            f"key must be a random key such as jax.random.key(0), found an array of {key.dtype} {list(key.shape)}"
        )
    return jax.random.wrap_key_data(jnp.asarray(key), impl=kinds[words])


def _threefry(keys: jax.Array) -> jax.Array:
    if str(jax.random.key_impl(keys)) == "threefry2x32":
        return keys
    data = jax.random.key_data(keys)  # uint32 [rows, words]
    folded = jax.random.wrap_key_data(data[:, :2], impl="threefry2x32")
    for word in range(2, data.shape[1]):
        folded = jax.vmap(jax.random.fold_in)(folded, data[:, word])
    return folded
