"""The tests run the package with its annotations checked, and without implicit alignment of axes; see conftest.py."""

import jax.numpy as jnp
import jaxtyping
import pytest

import transmamba_jax as tm
from tests.conftest import CHECKED


def inputs(tokens_of_v: int = 4, dtype: str = "float32") -> tuple[jnp.ndarray, ...]:
    k, v = jnp.ones((2, 4, 1, 8)), jnp.ones((2, tokens_of_v, 2, 8))
    return k, v, jnp.ones((2, 4, 2), dtype), -jnp.ones(2)


def test_a_size_that_differs_between_arguments_is_an_error() -> None:
    assert tm.memory_converter(*inputs()).shape == (2, 2, 8, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)memory_converter.*'v'.*B T H P"):
        tm.memory_converter(*inputs(tokens_of_v=5))


def test_a_dtype_that_differs_from_the_annotation_is_an_error() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)memory_converter.*'dt'.*Float32"):
        tm.memory_converter(*inputs(dtype="bfloat16"))


def test_the_modules_of_the_model_are_checked() -> None:
    names = {"attention.api", "cache", "convolution", "generate.decode", "mixer", "model", "norm", "parallel", "rotary"}
    assert {f"transmamba_jax.{name}" for name in names} <= set(CHECKED)


@pytest.mark.usefixtures("unchecked")
def test_the_package_refuses_by_itself() -> None:
    with pytest.raises(ValueError, match=r"dt must have shape \(2, 5, 2\), found \(2, 4, 2\)"):
        tm.memory_converter(*inputs(tokens_of_v=5))


def test_axes_are_not_aligned_silently() -> None:
    with pytest.raises(ValueError, match="could not be broadcast together"):
        jnp.ones((2, 3)) + jnp.ones(3)
