"""Where a traced program computes narrower than in float32."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

WIDE = ("exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "div", "reduce_sum", "reduce_max", "cumsum")
"""What Δ, decays, softmaxes, norms, losses and updates are made of; SiLU is `logistic`."""


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def narrow(function: Callable[..., Any], *arguments: Any) -> set[str]:
    """Name what of WIDE `function` computes from floats of less than 32 bits.

    Raises:
        AssertionError: it has no exponential, so that nothing was looked at.
    """
    equations = list(_equations(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert "exp" in {equation.primitive.name for equation in equations}
    return {
        f"{equation.primitive.name} of {value.aval.dtype}"
        for equation in equations
        if equation.primitive.name in WIDE
        for value in equation.invars
        if jnp.issubdtype(value.aval.dtype, jnp.floating) and jnp.finfo(value.aval.dtype).bits < 32
    }
