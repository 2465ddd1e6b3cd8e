"""Values and gradients of one candidate against the float64 reference, on a few short rows of a model's heads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssd import checks
from pallas_kernels.ssd import oracle as ssd_oracle
from transmamba_jax.attention import causal_attention
from transmamba_jax.attention import oracle as attention_oracle
from transmamba_jax.calibrate.candidates import Job
from transmamba_jax.runtime.calibration import Result

_LENGTHS = (5, 70, 200)
"""Tokens: less than a chunk, chunks cut by the end of the row, several chunks."""

_SSD_CASES = ((5, "default"), (70, "slow"), (200, "default"), (200, "bursts"))
"""Tokens, and the regime of `checks.make_inputs`. Those that forget everything need the 200 tokens: the gradient of the
initial state is then 0 in float64, too."""

_HEADS_PER_GROUP = 2
"""Of the checks, at most: the float64 reference takes the heads one by one."""


def check(job: Job, candidate: Result) -> None:
    """Check a candidate with the tolerances of the test suite.

    Raises:
        AssertionError: a value or gradient is further from the reference than the tolerance, or not finite.
    """
    shared = min(_HEADS_PER_GROUP, job.model["num_heads"] // job.model["num_groups"])
    if candidate.operator == "ssd":
        _check_ssd(job, candidate, 2 * shared)
    for length in _LENGTHS if candidate.operator == "attention" else ():
        _check_attention(job, candidate, length, 2 * shared)


def _check_ssd(job: Job, candidate: Result, heads: int) -> None:
    sizes = {name: job.model[name] for name in ("head_dim", "state_dim")}
    spec = checks.Spec(rows=1, heads=heads, groups=2, chunk_size=candidate.chunk_size or 64, **sizes)
    exact = job.model["dtype"] == "float32"
    for length, regime in _SSD_CASES:
        case = dataclasses.replace(spec, length=length, regime=regime)
        if exact:
            checks.check_against_oracle(candidate.name, case)
        else:
            checks.check_bfloat16(candidate.name, case)
    checks.check_state_alone(candidate.name, dataclasses.replace(spec, length=70), not exact)


def _check_attention(job: Job, candidate: Result, length: int, heads: int) -> None:
    rng = np.random.default_rng(length)
    key = (1, length, 2, job.model["state_dim"])
    value = (1, length, heads, job.model["head_dim"])
    low = [jnp.asarray(rng.standard_normal(shape), job.model["dtype"]) for shape in (key, key, value, value)]
    wanted = attention_oracle.attend(*(np.asarray(array, np.float64) for array in low))

    def both(q: Any, k: Any, v: Any, dy: Any) -> tuple[Any, ...]:
        y, pullback = jax.vjp(lambda q, k, v: causal_attention(q, k, v, implementation=candidate.name), q, k, v)
        return y, *pullback(dy)

    found = jax.jit(both)(*low)
    exact = job.model["dtype"] == "float32"
    for name, ours, theirs in zip(("y", "gradient of q", "gradient of k", "gradient of v"), found, wanted, strict=True):
        tolerance = attention_oracle.VALUE_TOLERANCE if name == "y" else attention_oracle.GRADIENT_TOLERANCE
        tolerance = tolerance if exact else attention_oracle.BF16_TOLERANCE
        error = ssd_oracle.relative_error(np.asarray(ours, np.float64), theirs)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e} at {length} tokens"
