"""Every portable SSD implementation through the suite, and what is particular to one of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import checks, sequential, ssd

from . import suite


# The reference has no chunks: what the lengths of the suite are about does not concern it.
@pytest.mark.parametrize("spec", [checks.SPECS[index] for index in (0, 1, 6, 7, 9, 11, 12)], ids=str)
def test_reference(spec: checks.Spec) -> None:
    checks.check_against_oracle("reference", spec)


class TestAssociative(suite.SsdSuite):
    implementation = "associative"


class TestSequential(suite.SsdSuite):
    implementation = "sequential"


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("chunks", "block"), [(3, 1), (10, 2), (12, 4), (15, 8), (16, 8)])
def test_blocks_of_chunks(chunks: int, block: int, groups: int) -> None:
    """The loop takes 1, 2, 4 or 8 chunks at a time: as many as pad an eighth at most."""
    spec = checks.Spec(length=8 * chunks - 3, groups=groups, chunk_size=8)
    assert sequential.chunks_of_a_block(chunks, state_bytes=1) == block
    checks.check_against_oracle("sequential", spec)


def test_documents_in_a_block_of_chunks() -> None:
    spec = checks.Spec(rows=6, length=70, chunk_size=9, documents=True)
    assert sequential.chunks_of_a_block(8, state_bytes=1) == 8
    checks.check_against_oracle("sequential", spec)


def test_blocks_fit_the_cache() -> None:
    """Fewer chunks at a time where their states are large, a power of two of them."""
    assert [sequential.chunks_of_a_block(64, 2**power) for power in (17, 19, 20, 21, 22, 30)] == [8, 8, 4, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["associative", "sequential"])
def test_memory_is_linear_in_length(implementation: str) -> None:
    """Temporary buffers of forward + backward at twice the length are about twice as large, and bounded."""
    shape = checks.Spec(rows=1, heads=4, groups=4, head_dim=64, state_dim=64)

    def temporary(length: int) -> int:
        inputs = checks.make_inputs(dataclasses.replace(shape, length=length))
        loss = lambda inputs: jnp.sum(ssd(**inputs, chunk_size=64, implementation=implementation)[0])
        analysis: Any = jax.jit(jax.grad(loss)).lower(inputs).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    # Long enough for what does not grow with T, or grows slower than the chunks do, to be small.
    short, long = temporary(4096), temporary(8192)
    assert long <= 2.1 * short
    inputs_bytes = 3 * 8192 * 4 * 64 * 4
    assert long <= 8 * inputs_bytes


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
def test_chunk_size_does_not_change_the_result(implementation: str) -> None:
    spec = checks.Spec(rows=1, length=100)
    inputs = checks.make_inputs(spec)
    expected, _ = jax.jit(lambda inputs: ssd(**inputs, implementation="reference"))(inputs)
    for chunk_size in (1, 7, 100, 1000):
        y, _ = jax.jit(lambda inputs, size=chunk_size: ssd(**inputs, chunk_size=size, implementation=implementation))(
            inputs
        )
        checks.check_close(f"y at chunk {chunk_size}", y, np.asarray(expected, np.float64), 1e-6)


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
def test_batching_over_an_added_axis(implementation: str) -> None:
    spec = checks.Spec(rows=3, length=20)
    inputs: dict[str, Any] = dict(checks.make_inputs(spec))
    a, d = inputs.pop("a"), inputs.pop("d")
    run = lambda inputs: ssd(**inputs, a=a, d=d, chunk_size=8, implementation=implementation)
    expected = jax.jit(run)(inputs)
    found = jax.jit(jax.vmap(run))({name: value[:, None] for name, value in inputs.items()})
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(value[:, 0], other, rtol=1e-5, atol=1e-5)
