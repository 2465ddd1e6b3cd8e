"""Each known wrong formula, put into the real code, fails the suite's own check."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ssd import checks, decay

STRONG = checks.Spec(length=200, regime="strong", chunk_size=64)


@pytest.fixture(autouse=True)
def _fresh_traces() -> Iterator[None]:
    jax.clear_caches()
    yield
    jax.clear_caches()


def _check_fails(implementation: str, spec: checks.Spec, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        checks.check_against_oracle(implementation, spec)


@pytest.mark.slow
def test_decay_of_the_previous_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A_{k-1} instead of A_k."""

    def shifted(dt: Any, a: Any, segment_ids: Any) -> Any:
        del segment_ids
        return dt, jnp.pad((dt * a[None, None])[:, :-1], ((0, 0), (1, 0), (0, 0)))

    monkeypatch.setattr(decay, "log_decays", shifted)
    _check_fails("sequential", checks.Spec(), "y: relative error")


def test_no_step_on_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """V K^T instead of dt V K^T."""

    def stepless(dt: Any, a: Any, segment_ids: Any) -> Any:
        del segment_ids
        return jnp.ones_like(dt), dt * a[None, None]

    monkeypatch.setattr(decay, "log_decays", stepless)
    _check_fails("sequential", checks.Spec(), "y: relative error")


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
def test_naive_difference_of_a_running_sum(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    """Running sums of l itself instead of its coarse and fine parts."""
    monkeypatch.setattr(decay, "split", lambda log_decay: (log_decay, jnp.zeros_like(log_decay)))
    _check_fails(implementation, dataclasses.replace(STRONG, regime="bursts"), "y: relative error")


def test_factored_exponents(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(s_i) exp(-s_j) instead of exp(s_i - s_j)."""

    def factored(log_decay: Any) -> Any:
        sums = jnp.cumsum(log_decay, axis=-1)
        return jnp.tril(jnp.exp(sums)[..., :, None] * jnp.exp(-sums)[..., None, :])

    monkeypatch.setattr(decay, "segsum", factored)
    _check_fails("associative", STRONG, "y is not finite")


def test_masking_after_the_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exponential overflows above the diagonal, and 0 times infinity is the gradient."""

    def masked_late(log_decay: Any) -> Any:
        sums = jnp.cumsum(log_decay, axis=-1)
        exponent = sums[..., :, None] - sums[..., None, :]
        return jnp.where(jnp.tri(exponent.shape[-1], dtype=bool), jnp.exp(exponent), 0.0)

    monkeypatch.setattr(decay, "segsum", masked_late)
    monkeypatch.setattr(checks, "FORWARD_TOLERANCE", 1e-3)  # the running sum's own error is not the point here
    _check_fails("associative", STRONG, "not finite")


def test_gradient_of_decay_by_autodiff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a difference of running sums instead of sums over what spans a token."""

    def plain(log_decay: Any) -> Any:
        coarse, fine = (jnp.cumsum(part, axis=-1) for part in decay.split(log_decay))
        exponent = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
        return jnp.exp(jnp.where(jnp.tri(exponent.shape[-1], dtype=bool), exponent, -jnp.inf))

    monkeypatch.setattr(decay, "segsum", plain)
    _check_fails("associative", STRONG, "gradient of a: relative error")


def test_documents_that_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding ignored but the state kept across documents."""
    monkeypatch.setattr(decay, "fill_padding", jnp.zeros_like)
    _check_fails("sequential", checks.Spec(rows=6, length=70, documents=True), "y: relative error")


def test_padding_as_a_document_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding inside a document restarts the state."""
    monkeypatch.setattr(decay, "fill_padding", lambda segment_ids: segment_ids)
    _check_fails("sequential", checks.Spec(rows=6, length=70, documents=True), "y: relative error")
