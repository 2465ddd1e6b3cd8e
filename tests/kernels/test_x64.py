"""SSD with JAX_ENABLE_X64=1: 32-bit results that meet the 32-bit tolerances."""

import os
import subprocess
import sys

import pytest

from pallas_kernels.ssd import checks

SPECS = (checks.SPECS[13], checks.Spec(length=40, regime="strong"))
"""Documents with padding; strong decay. Both have several chunks."""


def run(implementation: str) -> None:
    """Check dtypes, values and every gradient, in this process."""
    for spec in SPECS:
        inputs, ids, cotangents = checks.make_inputs(spec), checks.make_segment_ids(spec), checks.make_cotangents(spec)
        (y, state), gradients = checks.evaluate(implementation, spec, inputs, ids, cotangents)
        state_alone, state_gradients = checks.evaluate_state(implementation, spec, inputs, ids, cotangents[1])
        results = {"y": y, "state": state, "state alone": state_alone, **gradients, **state_gradients}
        wrong = {name: str(value.dtype) for name, value in results.items() if value.dtype != "float32"}
        assert not wrong, f"{implementation}: expected float32, found {wrong}"
        checks.check_against_oracle(implementation, spec)
        checks.check_state_alone(implementation, spec)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "associative", "sequential"])
def test_results_are_32_bit_in_64_bit_mode(implementation: str) -> None:
    code = (
        "import jax, jax.numpy as jnp\n"
        "assert jnp.zeros(1, float).dtype == 'float64'\n"
        f"from tests.kernels.test_x64 import run; run({implementation!r})\n"
    )
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
