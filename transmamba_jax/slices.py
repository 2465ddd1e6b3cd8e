"""Parts of a row that a TPU need not copy: its layout of [B, T, H, P] has no cheap slice of tokens."""

from functools import partial

import jax

from transmamba_jax.shapes import Array, Float


def tokens(array: Float[Array, "B T H P"], which: slice) -> Float[Array, "B _ H P"]:
    """Slice tokens with their heads side by side, as projections leave them and kernels read them.

    A TPU keeps [H, P] in tiles of 128 lanes, so that slices of the four axes are a copy there and another one back.
    """
    flat = array.reshape(*array.shape[:2], -1)[:, which]
    return flat.reshape(*flat.shape[:2], *array.shape[2:])


def with_first(array: Float[Array, "B T H P"], count: int) -> tuple[Array, Array]:
    """Return the array and its first tokens; on the way back, theirs is added where they lie in the gradient."""
    whole, first = _and_first(array.reshape(*array.shape[:2], -1), count)
    return whole.reshape(array.shape), first.reshape(*first.shape[:2], *array.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _and_first(array: Array, count: int) -> tuple[Array, Array]:
    return array, array[:, :count]


def _and_first_forward(array: Array, count: int) -> tuple[tuple[Array, Array], None]:
    return _and_first(array, count), None


def _and_first_backward(count: int, _: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    whole, first = gradients
    # Apart from one another, the sum is written into the array that it was read from; together, into a copy of it.
    whole, both = jax.lax.optimization_barrier((whole, whole[:, :count] + first))
    return (jax.lax.dynamic_update_slice(whole, both, (0, 0, 0)),)


_and_first.defvjp(_and_first_forward, _and_first_backward)
