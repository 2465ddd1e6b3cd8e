"""The two operators of an implementation by kernels, differentiable, from one forward and one backward kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssd.protocol import SsdInputs
from pallas_kernels.varying import align_varying_axes

NAME = "ssd"
"""Name of the residuals of a forward pass, for the policies of `jax.checkpoint` that save them."""

Run = Callable[[Any, SsdInputs, bool], tuple[jax.Array | None, jax.Array, Any]]
Gradients = Callable[[Any, SsdInputs, Any, jax.Array | None, jax.Array], SsdInputs]


def _differentiable(run: Run, gradients: Gradients) -> Callable[[Any, SsdInputs], tuple[Any, jax.Array]]:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def operator(plan, inputs):
        return run(plan, inputs, False)[:2]

    def forward(plan, inputs):
        y, final, saved = checkpoint_name(run(plan, inputs, True), NAME)
        return (y, final), (inputs._replace(initial_state=None), saved)

    def backward(plan, residuals, cotangents):
        return (gradients(plan, *residuals, *cotangents),)

    operator.defvjp(forward, backward)
    return operator


def operators(
    plan_of: Callable[[jax.Array, jax.Array], Any], run: Run, gradients: Gradients
) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Callable[[SsdInputs, int], jax.Array]]:
    """Return `forward` and `final_state` of `protocol.SsdImplementation`.

    They are `jax.custom_vjp`: reverse mode, once. Second derivatives and forward mode need "reference".

    Args:
        plan_of: (x, b) -> the tiling of a call, hashable; raises ValueError where the kernels do not support it.
        run: (plan, inputs, save) -> y, the final state, and with `save` the residuals of the backward pass. Inputs
            without c give None for y.
        gradients: (plan, inputs, residuals, dy, dfinal) -> the gradients. `inputs.initial_state` is None, and so are
            c, d and dy where the state alone was asked for.
    """
    operator = _differentiable(run, gradients)

    def aligned(inputs: SsdInputs) -> SsdInputs:
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        return inputs._replace(**dict(zip(given, align_varying_axes(*given.values()), strict=True)))

    def forward(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
        """Run SSD as `protocol.SsdImplementation.forward` says. The kernels choose the chunk: chunk_size is not used.

        Raises:
            ValueError: the kernels do not support the call (`unsupported_reason` of the implementation).
        """
        del chunk_size
        if inputs.d is None:
            inputs = inputs._replace(d=jnp.zeros((inputs.x.shape[2],), jnp.float32))
        plan = plan_of(inputs.x, inputs.b)
        plan = dataclasses.replace(plan, output_start=output_start) if output_start else plan
        return operator(plan, aligned(inputs))

    def final_state(inputs: SsdInputs, chunk_size: int) -> jax.Array:
        """Return the final state alone, float32 [B, H, P, N]. Errors as for `forward`."""
        del chunk_size
        return operator(plan_of(inputs.x, inputs.b), aligned(inputs))[1]

    return forward, final_state
