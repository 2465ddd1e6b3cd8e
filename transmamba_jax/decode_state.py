"""Where the rows of a generation have got to."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool

from transmamba_jax.cache import Cache
from transmamba_jax.shapes import Array, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where rows have got to: plain data, to be kept, copied, sliced (`rows`) or written to a file."""

    cache: Cache
    logits: Float32[Array, "B V"]
    """Of each row's next token."""
    seen: Bool[Array, "B V"]
    """Tokens that a row has."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row so far."""
        return np.asarray(self.cache.lengths)

    def rows(self, indices: Sequence[int]) -> "DecodeState":
        """Return the state of these rows; one named several times goes on in several ways."""
        picked = np.asarray(indices, np.int32)
        if picked.ndim != 1 or picked.size == 0 or picked.min() < 0 or picked.max() >= len(self.lengths):
            raise ValueError(f"indices must name rows 0..{len(self.lengths) - 1}, found {list(indices)}")
        return jax.tree.map(lambda leaf: leaf[picked], self)
