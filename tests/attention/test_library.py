"""The attention of libraries: cuDNN's and splash attention, which lower here and run on their devices alone."""

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.attention.calls import Spec, assert_close, dense_with_gradients, relative, with_gradients
from transmamba_jax.attention import causal_attention
from transmamba_jax.attention import oracle as numpy_oracle


@pytest.fixture
def cudnn_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library believe in a cuDNN, which it asks for its version before it lowers anything."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(
        fused_attention_stablehlo, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    )


def lower(spec: Spec, dtype: str, platform: str, implementation: str) -> str:
    arrays, ids = spec.arrays()
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        return jax.vjp(lambda *x: causal_attention(*x, ids, implementation=implementation), q, k, v)[1](g)

    return jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("cudnn_at_hand")
@pytest.mark.parametrize(
    "spec",
    [
        Spec(1024, groups=2, heads=2, state_dim=96, head_dim=96),
        Spec(513, groups=1, heads=4, state_dim=20, head_dim=64),
        Spec(1, groups=1, heads=1, state_dim=128, head_dim=128),
    ],
    ids=lambda spec: f"T{spec.length}",
)
def test_cudnn_lowers_for_cuda(spec: Spec) -> None:
    text = lower(spec, "bfloat16", "cuda", "cudnn")
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text


def test_cudnn_wrapper_fits_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding and packing round the library's call, with its portable implementation in cuDNN's place."""
    library, shapes = jax.nn.dot_product_attention, []

    def portable(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        shapes.append(v.shape)
        return library(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", portable)
    arrays, _ = Spec(21, groups=2, heads=8, state_dim=20, head_dim=50).arrays()
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    wanted = dense_with_gradients([np.asarray(x, np.float32) for x in low], None)
    for ours, theirs in zip(with_gradients(low, None, implementation="cudnn"), wanted, strict=True):
        assert relative(ours, theirs) < numpy_oracle.BF16_TOLERANCE
    assert set(shapes) == {(2, 22, 4, 104)}


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (Spec(300, groups=2, heads=2, state_dim=64, head_dim=64, packed=True), "bfloat16"),
        (Spec(1024, groups=2, heads=2, state_dim=96, head_dim=96), "bfloat16"),
        (Spec(700, groups=1, heads=8, state_dim=24, head_dim=128, packed=True), "float32"),
    ],
    ids=lambda value: f"T{value.length}" if isinstance(value, Spec) else value,
)
def test_splash_lowers_for_tpu(spec: Spec, dtype: str) -> None:
    assert lower(spec, dtype, "tpu", "splash").count("tpu_custom_call") == 3  # forward, dq, dk and dv


@pytest.mark.parametrize(("length", "dtype", "block"), [(2047, "bfloat16", 512), (2048, "bfloat16", 1024)])
def test_blocks_of_splash_are_wider_in_long_rows(length: int, dtype: str, block: int) -> None:
    text = lower(Spec(length, groups=1, heads=1, state_dim=96, head_dim=96), dtype, "tpu", "splash")
    assert set(re.findall(r"block_q\\+22: (\d+)", text)) == {str(block)}


@pytest.mark.slow
def test_splash_numbers_in_interpret_mode() -> None:
    arrays, ids = Spec(200, groups=1, heads=2, state_dim=24, head_dim=16, batch=1, packed=True).arrays()
    with pltpu.force_tpu_interpret_mode():
        assert_close(arrays, ids, 1e-6, 2e-6, implementation="splash")
