"""Mesh axes over which operands and results of kernels vary inside `jax.shard_map`."""

import jax


def align_varying_axes(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Make all values vary over the mesh axes of any, inside `jax.shard_map`; elsewhere change nothing.

    A kernel's operands and results vary over the same axes; the backward pass sums the gradient of
    an operand that did not.
    """
    axes = frozenset().union(*(jax.typeof(value).manual_axis_type.varying for value in values))

    def vary(value: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(value).manual_axis_type.varying))
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    return tuple(vary(value) for value in values)


def out_struct_like(like: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result, varying over the mesh axes as the operand `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
