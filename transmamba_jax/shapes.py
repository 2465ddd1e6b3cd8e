"""The axis glossary: one letter an axis, the same letter everywhere.

    B  batch (rows)                     P  channels of one value head (head_dim)
    T  time (tokens of a row)           N  channels of one query/key head = state size (state_dim)
    D  model width (d_model)            K  convolution width
    H  value heads                      Q  tokens of one chunk
    G  query/key groups (G divides H)   L  layers
    V  vocabulary                       M  width of the gated MLP

Head h reads the queries and keys of group h // (H / G). A local name may carry its axes as a suffix (`x_bthp`).

The tests check these annotations as the package runs. A dataclass that is a pytree carries `no_type_check`:
`jax.tree.map` puts shapes and shardings where its arrays stand.
"""

from typing import TYPE_CHECKING, Any

import jax.core
import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray  # numpy's arrays are taken wherever JAX's are; a result is JAX's

Tokens = Int[Array, "B T"]
SegmentIds = Int[Array, "B T"]  # equal ids: one document; 0: padding; documents are contiguous
Hidden = Float[Array, "B T D"]
QueryKey = Float[Array, "B T G N"]
Value = Float[Array, "B T H P"]
Dt = Float32[Array, "B T H"]  # Δ after softplus
HeadScalar = Float32[Array, "H"]
State = Float32[Array, "B H P N"]
Logits = Float32[Array, "B T V"]
TransPoint = int | Shaped[Array, ""] | Shaped[Array, "B"]


def known(*sizes: Any) -> bool:
    """Tell whether sizes are numbers; in a program that jax.export writes for any size they are symbols."""
    return all(isinstance(size, int) for size in sizes)


def least(first: Any, second: Any) -> Any:
    """Return the smaller of two sizes, which may be symbols."""
    return jax.core.min_dim(first, second)
