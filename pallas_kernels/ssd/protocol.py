"""The protocol of an SSD implementation, and the inputs that all of them take."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax


class SsdInputs(NamedTuple):
    """Inputs of one call, checked, with documents folded into dt and the log decays. Also a container of gradients."""

    x: jax.Array
    """[B, T, H, P] float32, bfloat16 or float16."""
    dt: jax.Array
    """float32 [B, T, H], 0 at padding."""
    log_decay: jax.Array
    """float32 [B, T, H], l = dt a, and `decay.FORGET` at the first token of every document but a row's first."""
    b: jax.Array
    """[B, T, G, N] in the dtype of x."""
    c: Any = None
    """[B, T, G, N] in the dtype of x. None: no outputs, the final state alone."""
    d: Any = None
    """float32 [H]. None: no skip connection."""
    initial_state: Any = None
    """float32 [B, H, P, N]. None only among the residuals of a backward pass, which does not read it."""


@runtime_checkable
class SsdImplementation(Protocol):
    """A module that computes the SSD operator.

    Accumulation, decays and states are float32 whatever the inputs are. Results are differentiable in every field of
    `SsdInputs`.
    """

    supports_output_start: bool
    """`output_start` costs no copy of the inputs. Where it is False, the dispatch slices and `output_start` is 0."""
    partitionable: bool
    """The compiler may partition the program over devices. Kernels need one device, or `jax.shard_map`."""

    def unsupported_reason(self, x: jax.Array, b: jax.Array) -> str | None:
        """Return why calls of these shapes and dtypes cannot be served here; None: they can."""

    def forward(self, inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
        """Return y [B, T - output_start, H, P] in x.dtype and the final state float32 [B, H, P, N].

        chunk_size is at least 1 and at most `decay.MAX_CHUNK`. It changes the speed, never the result.
        """

    def final_state(self, inputs: SsdInputs, chunk_size: int) -> jax.Array:
        """Return the final state alone, float32 [B, H, P, N], at the cost of the state alone. c and d are None."""
