"""The GPU kernels: the suite in interpret mode on a CPU, and lowering for a Hopper that is not there.

Mosaic GPU of older versions of JAX has neither: there the calls are refused.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.ssd import block_sizes, ssd, ssd_state

from . import oracle, suite
from .test_pallas_tpu import QUICK_COMPILATION

SERVED = jax.__version_info__ >= (0, 12)

FIELDS = {"heads": 1, "groups": 1, "head_dim": 64, "state_dim": 64}
# Chunks have 64 tokens. N = 96 is computed as two overlapping products; float32 cuts P into parts. An interpreted
# kernel takes seconds: few cases, of few chunks.
SPECS = (
    suite.Spec(rows=1, length=130, heads=1, groups=1, head_dim=96, state_dim=96, regime="strong"),
    suite.Spec(rows=1, length=70, heads=2, groups=1, head_dim=64, state_dim=128, regime="bursts"),
    suite.Spec(rows=6, length=70, documents=True, regime="strong", **FIELDS),
)
STATE_SPECS = (suite.Spec(rows=1, length=70, heads=2, groups=1, head_dim=64, state_dim=96),)
LONG = suite.Spec(rows=1, length=300, **FIELDS)


def _arguments(shape: tuple[int, ...], dtype: Any, groups: int | None = None) -> dict[str, Any]:
    """Abstract inputs of `ssd`."""
    batch, length, heads, head_dim, state_dim = shape
    groups = groups or heads
    shapes = {
        "x": (batch, length, heads, head_dim),
        "dt": (batch, length, heads),
        "a": (heads,),
        "b": (batch, length, groups, state_dim),
        "c": (batch, length, groups, state_dim),
        "d": (heads,),
        "initial_state": (batch, heads, head_dim, state_dim),
    }
    return {name: jax.ShapeDtypeStruct(size, dtype if name in "xbc" else jnp.float32) for name, size in shapes.items()}


def _loss(arguments: dict[str, jax.Array]) -> jax.Array:
    y, state = ssd(**arguments, implementation="pallas_gpu")
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)


if SERVED:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.ssd import pallas_gpu_backward

    @contextlib.contextmanager
    def interpreting(**parameters: Any) -> Iterator[None]:
        """Run GPU kernels on the CPU; what is allocated and never written is NaN."""
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**parameters)):
            yield

    @pytest.fixture
    def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK_COMPILATION))
        with interpreting():
            yield

    @pytest.mark.usefixtures("interpreter")
    class TestPallasGpu(suite.SsdSuite):
        implementation = "pallas_gpu"
        fields: ClassVar[dict[str, int]] = FIELDS

        @pytest.mark.parametrize("spec", SPECS, ids=str)
        def test_values_and_gradients(self, spec: suite.Spec) -> None:
            super().test_values_and_gradients(spec)

        @pytest.mark.parametrize("regime", ["strong"])
        def test_long_rows(self, regime: str) -> None:
            suite.check_against_oracle(self.implementation, dataclasses.replace(LONG, regime=regime))

        @pytest.mark.parametrize("spec", STATE_SPECS, ids=str)
        def test_state_alone(self, spec: suite.Spec) -> None:
            super().test_state_alone(spec)

    @pytest.mark.parametrize("head_dim", [64, 96])
    def test_nothing_races(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
        """Copies, products, loads and stores are ordered: one stage and two, slots that are filled again."""
        monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK_COMPILATION))
        spec = suite.Spec(rows=1, length=200, heads=1, groups=1, head_dim=head_dim, state_dim=96)
        assert block_sizes.choose_gpu(False, head_dim, 96, 1)[1].stages == (2 if head_dim == 64 else 1)
        inputs: dict[str, Any] = dict(suite.make_inputs(spec))
        inputs |= {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in "xbc"}
        dy, dstate = suite.make_cotangents(spec)
        with interpreting(detect_races=True):  # a race is an error
            (y, _), _ = suite.evaluate("pallas_gpu", spec, inputs, None, (jnp.asarray(dy, jnp.bfloat16), dstate))
        truth = oracle.ssd({name: jnp.asarray(value, jnp.float32) for name, value in inputs.items()}, None, dy, dstate)
        suite.check_close("y", jnp.asarray(y, jnp.float32), truth.y, suite.BF16_TOLERANCE)

    @pytest.mark.usefixtures("interpreter")
    def test_a_gradient_that_forgets_a_term_fails(monkeypatch: pytest.MonkeyPatch) -> None:
        """The suite sees the pairs that span a token, the smallest part of the gradient of the decay."""
        monkeypatch.setattr(pallas_gpu_backward, "_within", lambda pairs: pairs * 0.0)
        with pytest.raises(AssertionError, match="gradient of dt: relative error"):
            suite.check_against_oracle("pallas_gpu", suite.Spec(rows=1, length=20, **FIELDS))

    # --- Lowering for a Hopper ----------------------------------------------------------------------------------------

    HOPPER = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")

    def kernels(function: Callable[..., Any], arguments: Any, mesh: AbstractMesh) -> list[str]:
        """Lower for a Hopper; return the names of the kernels in the program."""
        with jax.sharding.use_abstract_mesh(mesh):
            text = jax.jit(function).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") >= 1
        names = ("ssd_forward", "ssd_backward", "ssd_state_forward", "ssd_state_backward")
        return [name for name in names if f"{name}_mosaic_gpu" in text]

    @pytest.mark.parametrize(
        ("shape", "dtype"), [((2, 8192, 16, 96, 96), jnp.bfloat16), ((1, 131072, 16, 64, 128), jnp.bfloat16)], ids=str
    )
    def test_gradient_lowers(shape: tuple[int, ...], dtype: Any) -> None:
        mesh = AbstractMesh((), (), abstract_device=HOPPER)
        assert kernels(jax.grad(_loss), _arguments(shape, dtype), mesh) == ["ssd_forward", "ssd_backward"]
else:

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_older_versions_are_refused(spec: suite.Spec) -> None:
        inputs = suite.make_inputs(spec)
        message = f"'pallas_gpu' cannot serve this call: jax must be at least 0.12, found {jax.__version__}"
        with pytest.raises(ValueError, match=message):
            ssd(**inputs, implementation="pallas_gpu")
        del inputs["c"], inputs["d"]
        with pytest.raises(ValueError, match=message):
            ssd_state(**inputs, implementation="pallas_gpu")
