"""The two operators of an implementation by kernels, differentiable, from one pass forwards and one backwards."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.varying import vary_alike

Gradients = dict[str, jax.Array]


NAME = "ssd"
"""What a forward pass leaves for the backward one has this name, for the policies of `jax.checkpoint` that keep it."""


def _differentiable_scan(run: Callable[..., Any], gradients: Callable[..., Gradients]) -> Callable[..., Any]:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def whole(plan, x, dt, log_decay, b, c, d, h):
        return run(plan, x, dt, log_decay, b, c, d, h, keep=False)[:2]

    def forward(plan, x, dt, log_decay, b, c, d, h):
        y, final, kept = checkpoint_name(run(plan, x, dt, log_decay, b, c, d, h, keep=True), NAME)
        return (y, final), (x, dt, log_decay, b, c, d, kept)

    def backward(plan, residuals, cotangents):
        found = gradients(plan, *residuals, *cotangents)
        return tuple(found[name] for name in ("x", "dt", "log_decay", "b", "c", "d", "h"))

    whole.defvjp(forward, backward)
    return whole


def _differentiable_state(run: Callable[..., Any], gradients: Callable[..., Gradients]) -> Callable[..., Any]:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def state_alone(plan, x, dt, log_decay, b, h):
        return run(plan, x, dt, log_decay, b, None, None, h, keep=False)[1]

    def forward(plan, x, dt, log_decay, b, h):
        _, final, kept = checkpoint_name(run(plan, x, dt, log_decay, b, None, None, h, keep=True), NAME)
        return final, (x, dt, log_decay, b, kept)

    def backward(plan, residuals, dfinal):
        x, dt, log_decay, b, kept = residuals
        found = gradients(plan, x, dt, log_decay, b, None, None, kept, None, dfinal)
        return tuple(found[name] for name in ("x", "dt", "log_decay", "b", "h"))

    state_alone.defvjp(forward, backward)
    return state_alone


def operators(
    plan_of: Callable[[jax.Array, jax.Array], Any],
    run: Callable[..., tuple[jax.Array | None, jax.Array, Any]],
    gradients: Callable[..., Gradients],
) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Callable[..., jax.Array]]:
    """Return `scan` and `final_state`, of the signatures in `reference.py`.

    Args:
        plan_of: (x, b) -> how the call is cut, hashable; raises ValueError where the kernels cannot serve the call.
        run: (plan, x, dt, log_decay, b, c, d, h, keep) -> y, the final state, and what the backward pass wants of it
            where `keep` is set. Without `c` and `d` there is no y.
        gradients: (plan, x, dt, log_decay, b, c, d, kept, dy, dfinal) -> gradients by those names, and of h; without
            `c`, `d` and `dy` for the state alone.
    """
    whole, state_alone = _differentiable_scan(run, gradients), _differentiable_state(run, gradients)

    def scan(
        x: jax.Array,
        dt: jax.Array,
        log_decay: jax.Array,
        b: jax.Array,
        c: jax.Array,
        d: jax.Array | None,
        initial_state: jax.Array,
        chunk_size: int,
        start: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Chunked SSD; shapes and result as `reference.scan`. The kernels choose the chunk themselves.

        With `start`, which plans of "pallas_tpu" have, y is that of the tokens from it on.

        Raises:
            ValueError: the kernels cannot serve the call (see `refusal` of the implementation).
        """
        del chunk_size
        skip = jnp.zeros((x.shape[2],), jnp.float32) if d is None else d
        plan = plan_of(x, b)
        plan = dataclasses.replace(plan, start=start) if start else plan
        return whole(plan, *vary_alike(x, dt, log_decay, b, c, skip, initial_state))

    def final_state(
        x: jax.Array, dt: jax.Array, log_decay: jax.Array, b: jax.Array, initial_state: jax.Array, chunk_size: int
    ) -> jax.Array:
        """Return the last state of `scan` alone, float32 [B, H, P, N]. Errors as for `scan`."""
        del chunk_size
        return state_alone(plan_of(x, b), *vary_alike(x, dt, log_decay, b, initial_state))

    return scan, final_state
