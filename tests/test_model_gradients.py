"""Gradients of the model: memory, recomputation, higher derivatives and 64 bits."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from pallas_kernels import target
from tests import oracle
from tests.models import ANY_DERIVATIVE, CONFIG, KERNELS, SEQ_LEN, apply_static, make, tokens_of
from transmamba_jax.model import GatedMLP


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_rematerialisation_saves_memory_and_changes_no_gradient(traced: bool) -> None:
    tokens = tokens_of()
    points = np.full(CONFIG.num_layers, 6) if traced else (6,)
    params = make()[1]

    def gradient(remat: str) -> tuple[Any, int]:
        config = dataclasses.replace(CONFIG, remat=remat)
        loss = lambda p: jnp.sum(jnp.sin(tm.TransMamba(config, KERNELS).apply({"params": p}, tokens, points)))
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (plain, most), (dots, fewer), (full, least) = (gradient(remat) for remat in ("none", "dots", "full"))
    assert oracle.relative_error(dots, plain) < 1e-5
    assert oracle.relative_error(full, plain) < 1e-5
    assert least <= fewer < most


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sequential", "associative"])
def test_what_is_kept_is_not_computed_again(kernel: str) -> None:
    """With "dots", the forward loops of attention and of the SSM run once; with "full" twice."""

    def loops(remat: str) -> int:
        model = tm.TransMamba(
            dataclasses.replace(CONFIG, num_layers=2, remat=remat, transpoints=(0, SEQ_LEN)),
            tm.KernelsConfig(ssd=kernel, chunk_size=8),
        )
        params = jax.eval_shape(model.init, jax.random.key(0), tokens_of())
        gradient = jax.grad(lambda params: jnp.sum(model.apply(params, tokens_of())))
        return str(jax.make_jaxpr(gradient)(params)).count("scan[")

    assert loops("none") == loops("dots") < loops("full")


def test_gradients_of_the_gate_are_computed_once_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = GatedMLP(CONFIG), jax.random.normal(jax.random.key(1), (2, SEQ_LEN, CONFIG.d_model))
    params = mlp.init(jax.random.key(0), x)
    gradient = lambda: jax.grad(lambda params, x: jnp.sum(jnp.sin(mlp.apply(params, x))), (0, 1))
    elsewhere = gradient()(params, x)
    assert "optimization_barrier" not in str(jax.make_jaxpr(gradient())(params, x))
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    assert oracle.relative_error(gradient()(params, x), elsewhere) < 1e-6
    assert "optimization_barrier" in str(jax.make_jaxpr(gradient())(params, x))


@pytest.mark.slow
def test_gradient_at_padding_is_finite() -> None:
    _, params = make()
    ids = np.array([[0] * 5 + [1] * 9 + [2] * 10, [1] * 20 + [0] * 4], np.int32)
    loss = lambda p: jnp.sum(apply_static(CONFIG, p, tokens_of(), None, ids) * (ids != 0)[..., None])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.grad(loss)(params)))


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_the_references_have_jvp_and_hessian_vector_products(traced: bool) -> None:
    """Of the whole model, against central differences in the direction of a random tangent."""
    model, params, tokens = tm.TransMamba(CONFIG, ANY_DERIVATIVE), make()[1], tokens_of(12)
    ids = np.array([[1] * 5 + [2] * 7, [3] * 10 + [0] * 2], np.int32)
    points = np.array(CONFIG.transpoints) if traced else CONFIG.transpoints
    keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(params)))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape) * jnp.std(leaf)
    tangent = jax.tree.map(draw, jax.tree.unflatten(jax.tree.structure(params), list(keys)), params)

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, tokens, points, ids)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1][jnp.arange(2)[:, None], jnp.arange(11), tokens[:, 1:]])

    @jax.jit
    def derivatives(params: Any, step: float) -> Any:
        near = lambda sign: jax.tree.map(lambda leaf, by: leaf + sign * step * by, params, tangent)
        between = lambda function: jax.tree.map(
            lambda after, before: (after - before) / (2 * step), function(near(1)), function(near(-1))
        )
        along = jax.jvp(loss, (params,), (tangent,))[1]
        product = jax.jvp(jax.grad(loss), (params,), (tangent,))[1]
        return (along, between(loss)), (product, between(jax.grad(loss)))

    for found, expected in derivatives(params, 3e-3):
        assert oracle.relative_error(found, expected) < 1e-2


def test_other_kernels_refuse_forward_mode() -> None:
    model, params = tm.TransMamba(CONFIG, KERNELS), make()[1]
    loss = lambda params: jnp.sum(model.apply({"params": params}, tokens_of(6)))
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(loss, (params,), (params,))


SIXTY_FOUR_BITS = """
import sys
import jax, jax.numpy as jnp, numpy as np
import transmamba_jax as tm
from tests.models import CONFIG, KERNELS, differentiate

assert jax.config.jax_enable_x64 == (sys.argv[1] == "1")
np.savez(sys.argv[2], *jax.tree.leaves(differentiate()))
"""


@pytest.mark.slow
def test_sixty_four_bit_mode_gives_the_results_of_32_bits(tmp_path: Path) -> None:
    found = {}
    for mode in ("0", "1"):
        command = [sys.executable, "-c", SIXTY_FOUR_BITS, mode, str(tmp_path / f"{mode}.npz")]
        environment = {**os.environ, "JAX_ENABLE_X64": mode}
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True, timeout=300)
        found[mode] = np.load(tmp_path / f"{mode}.npz")
    assert found["0"].files == found["1"].files
    for name in found["0"].files:
        narrow, wide = found["0"][name], found["1"][name]
        assert narrow.dtype == wide.dtype == np.float32
        assert oracle.relative_error(wide, narrow) < 2e-5, name
