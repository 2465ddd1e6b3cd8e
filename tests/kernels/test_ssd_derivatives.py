"""Forward mode and second derivatives of "reference", against differences of the float64 recurrence's own gradients.

`oracle.ssd` gives exact first derivatives in float64. Central differences of those along a direction are second
derivatives, and central differences of its values are first ones in forward mode.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import checks, oracle, ssd, ssd_state

SPEC = checks.Spec(rows=1, length=9, heads=4, groups=2, head_dim=3, state_dim=5)
TOLERANCE = 2e-5
"""Relative L2 error: float32 sums of second derivatives, and 1e-9 of the differences."""

_STEP = 1e-4

Tree = dict[str, Any]


def _direction(inputs: Tree) -> Tree:
    """A tangent of every input, in proportion to its size."""
    rng = np.random.default_rng(7)
    return {
        name: (rng.standard_normal(value.shape) * np.abs(value).mean()).astype(np.float32)
        for name, value in inputs.items()
    }


def _along(function: Callable[[Tree], Any], inputs: Tree, direction: Tree) -> Any:
    """Differentiate along a direction: fourth-order central differences in float64."""
    shifted = lambda step: function(
        {name: value.astype(np.float64) + step * direction[name].astype(np.float64) for name, value in inputs.items()}
    )
    far, near = (jax.tree.map(np.subtract, shifted(k * _STEP), shifted(-k * _STEP)) for k in (2, 1))
    return jax.tree.map(lambda near, far: (8 * near - far) / (12 * _STEP), near, far)


def _loss(inputs: Tree) -> jax.Array:
    """Take a loss that is not linear in y or the state, so that every block of the Hessian counts."""
    y, state = ssd(**inputs, implementation="reference")
    return jnp.sum(y**2) / 2 + jnp.sum(state**2) / 2


def _oracle_gradient(inputs: Tree) -> Tree:
    """The gradient of `_loss` in float64."""
    zeros = [np.zeros_like(value) for value in checks.make_cotangents(SPEC)]
    values = oracle.ssd(inputs, None, *zeros)
    return oracle.ssd(inputs, None, values.y, values.state).gradients


def _check(found: Tree, expected: Tree) -> None:
    for name, value in expected.items():
        checks.check_close(name, found[name], value, TOLERANCE)


def test_jvp() -> None:
    inputs = checks.make_inputs(SPEC)
    direction, zeros = _direction(inputs), [np.zeros_like(value) for value in checks.make_cotangents(SPEC)]

    def values(inputs: Tree) -> Tree:
        found = oracle.ssd(inputs, None, *zeros)
        return {"y": found.y, "state": found.state}

    expected = _along(values, inputs, direction)
    _, (y, state) = jax.jvp(lambda inputs: ssd(**inputs, implementation="reference"), (inputs,), (direction,))
    _check({"y": y, "state": state}, expected)
    needed = {name: inputs[name] for name in ("x", "dt", "a", "b", "initial_state")}
    tangents = {name: direction[name] for name in needed}
    _, state = jax.jvp(lambda needed: ssd_state(**needed, implementation="reference"), (needed,), (tangents,))
    _check({"state": state}, {"state": expected["state"]})


def test_jacfwd() -> None:
    """Column by column of the Jacobian by a."""
    inputs = checks.make_inputs(SPEC)
    forward = lambda a: ssd(**inputs | {"a": a}, implementation="reference")[0]
    found = jax.jacfwd(forward)(inputs["a"])
    zeros = [np.zeros_like(value) for value in checks.make_cotangents(SPEC)]
    for head, column in enumerate(np.eye(SPEC.heads, dtype=np.float32)):
        direction = {name: np.zeros_like(value) for name, value in inputs.items()} | {"a": column}
        expected = _along(lambda inputs: oracle.ssd(inputs, None, *zeros).y, inputs, direction)
        checks.check_close(f"column {head}", found[..., head], expected, TOLERANCE)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_hessian_vector_products(mode: str) -> None:
    inputs = checks.make_inputs(SPEC)
    direction = _direction(inputs)

    def reverse_over_reverse(inputs: Tree) -> Tree:
        slope = lambda inputs: sum(
            jnp.vdot(gradient, direction[name]) for name, gradient in jax.grad(_loss)(inputs).items()
        )
        return jax.grad(slope)(inputs)

    if mode == "forward over reverse":
        found = jax.jit(lambda inputs: jax.jvp(jax.grad(_loss), (inputs,), (direction,))[1])(inputs)
    else:
        found = jax.jit(reverse_over_reverse)(inputs)
    _check(found, _along(_oracle_gradient, inputs, direction))


def test_the_oracle_differentiates_the_same_loss() -> None:
    inputs = checks.make_inputs(SPEC)
    _check(jax.grad(_loss)(inputs), _oracle_gradient(inputs))


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
def test_others_have_no_forward_mode(implementation: str) -> None:
    """The limit that the docstring of `ssd` states."""
    inputs = checks.make_inputs(checks.Spec(rows=1, length=4))
    run = lambda inputs: ssd(**inputs, implementation=implementation)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (inputs,), (inputs,))


def test_second_derivatives_of_a_kernel_name_the_reference() -> None:
    inputs = checks.make_inputs(checks.Spec(rows=1, length=4))
    loss = lambda x: jnp.sum(ssd(**inputs | {"x": x}, implementation="pallas_tpu")[0] ** 2)
    with pytest.raises(ValueError, match=r"'pallas_tpu' has first derivatives alone.*'reference'"):
        jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))))(inputs["x"])
