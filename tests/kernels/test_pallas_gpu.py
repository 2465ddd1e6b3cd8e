"""The GPU kernels: the suite in interpret mode on a CPU, and lowering for a Hopper that is not there.

Mosaic GPU before jax 0.11.2 has no interpreter that runs them: there the calls raise ValueError.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as PS

from pallas_kernels.ssd import checks, ssd, ssd_state
from pallas_kernels.ssd.pallas_gpu import block_sizes
from pallas_kernels.ssd.pallas_gpu import implementation as pallas_gpu

from . import suite
from .test_pallas_tpu import QUICK_COMPILATION

SERVED = jax.__version_info__ >= (0, 11, 2)  # remove when it is required

FIELDS = {"heads": 1, "groups": 1, "head_dim": 64, "state_dim": 64}
# Chunks have 64 tokens; float32 cuts P into parts. An interpreted kernel takes seconds: few cases, of few chunks.
SPECS = (
    checks.Spec(rows=1, length=70, heads=2, groups=1, head_dim=64, state_dim=64, regime="bursts"),
    checks.Spec(rows=6, length=70, documents=True, regime="strong", **FIELDS),
    checks.Spec(rows=1, length=70, heads=1, groups=1, head_dim=128, state_dim=64, regime="strong"),
)
BFLOAT16_SPECS = (
    checks.Spec(rows=1, length=130, heads=2, groups=1, head_dim=128, state_dim=128, regime="strong"),
    checks.Spec(rows=1, length=130, heads=1, groups=1, head_dim=96, state_dim=128, regime="slow"),
)
STATE_SPECS = (checks.Spec(rows=1, length=70, heads=2, groups=1, head_dim=64, state_dim=96),)
# N = 96 is computed as two overlapping matmuls.
LONG = checks.Spec(rows=1, length=200, heads=1, groups=1, head_dim=96, state_dim=96)


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

    from pallas_kernels.ssd.pallas_gpu import backward

    @contextlib.contextmanager
    def interpreting(**parameters: Any) -> Iterator[None]:
        """Run GPU kernels on the CPU; what is allocated and never written is NaN."""
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**parameters)):
            yield

    @pytest.fixture
    def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK_COMPILATION))
        with interpreting(detect_races=True):  # a race is an error
            yield

    @pytest.mark.usefixtures("interpreter")
    class TestPallasGpu(suite.SsdSuite):
        implementation = "pallas_gpu"
        fields: ClassVar[dict[str, int]] = FIELDS

        @pytest.mark.parametrize("spec", SPECS, ids=str)
        def test_values_and_gradients(self, spec: checks.Spec) -> None:
            super().test_values_and_gradients(spec)

        @pytest.mark.parametrize("regime", ["strong"])
        def test_long_rows(self, regime: str) -> None:
            checks.check_against_oracle(self.implementation, dataclasses.replace(LONG, regime=regime))

        @pytest.mark.parametrize("spec", checks.STARTS[2:3], ids=str)
        def test_outputs_from_a_later_token_on(self, spec: checks.Spec) -> None:
            super().test_outputs_from_a_later_token_on(spec)

        @pytest.mark.parametrize("spec", BFLOAT16_SPECS, ids=str)
        def test_bfloat16_of_whole_chunks(self, spec: checks.Spec) -> None:
            checks.check_bfloat16(self.implementation, spec)

        @pytest.mark.parametrize("spec", STATE_SPECS, ids=str)
        def test_state_alone(self, spec: checks.Spec) -> None:
            super().test_state_alone(spec)

    @pytest.mark.usefixtures("interpreter")
    @pytest.mark.parametrize("alone", [False, True])
    def test_parts_of_the_sequence(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
        """Few rows and heads are cut into parts that start from the states of those before; the last part is short."""
        monkeypatch.setattr(block_sizes, "_PART_CHUNKS", 1)
        assert block_sizes.choose_gpu_parts(blocks=2, chunks=3) == 3
        spec = checks.Spec(rows=1, length=150, regime="slow", **FIELDS)
        check = checks.check_state_alone if alone else checks.check_against_oracle
        check("pallas_gpu", spec)

    @pytest.mark.usefixtures("interpreter")
    @pytest.mark.parametrize(("head_dim", "state_dim", "stages"), [(96, 64, 2), (96, 96, 1)])
    def test_slots_are_filled_again(head_dim: int, state_dim: int, stages: int) -> None:
        """Copies into them are ordered after the matmuls that read them, with one slot and with two."""
        assert block_sizes.choose_gpu(False, head_dim, state_dim, 1)[1].stages == stages
        spec = checks.Spec(rows=1, length=140, heads=1, groups=1, head_dim=head_dim, state_dim=state_dim)
        checks.check_bfloat16("pallas_gpu", spec)

    @pytest.mark.usefixtures("interpreter")
    def test_a_gradient_that_forgets_a_term_fails(monkeypatch: pytest.MonkeyPatch) -> None:
        """The suite sees the pairs that span a token, the smallest part of the gradient of the decay."""
        monkeypatch.setattr(backward, "_within", lambda pairs: pairs * 0.0)
        with pytest.raises(AssertionError, match="gradient of dt: relative error"):
            checks.check_against_oracle("pallas_gpu", checks.Spec(rows=1, length=20, **FIELDS))

    # --- Lowering for a Hopper ----------------------------------------------------------------------------------------

    HOPPER = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")

    def kernels(function: Callable[..., Any], arguments: Any, mesh: AbstractMesh) -> list[str]:
        """Lower for a Hopper; return the names of the kernels in the program."""
        with jax.sharding.use_abstract_mesh(mesh):
            text = jax.jit(function).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") >= 1
        names = ("ssd_forward", "ssd_backward", "ssd_state_forward", "ssd_state_backward")
        return [name for name in names if f"{name}_mosaic_gpu" in text]

    def test_gradient_lowers() -> None:
        mesh = AbstractMesh((), (), abstract_device=HOPPER)
        arguments = _arguments((8, 8192, 16, 96, 96), jnp.bfloat16)
        assert kernels(jax.grad(_loss), arguments, mesh) == ["ssd_forward", "ssd_backward"]

    def test_xla_is_told_the_cost() -> None:
        """By every kernel, where JAX can."""
        mesh = AbstractMesh((), (), abstract_device=HOPPER)
        with jax.sharding.use_abstract_mesh(mesh):
            program = jax.make_jaxpr(jax.grad(_loss))(_arguments((8, 8192, 16, 96, 96), jnp.bfloat16))
        told = 2 if jax.__version_info__ >= (0, 12) else 0
        assert len(re.findall(r"CostEstimate\(flops=[1-9]", str(program))) == told

    def test_gradient_lowers_inside_shard_map() -> None:
        """Rows over one mesh axis, heads over the other (a and d vary over that alone); every shard cuts its rows."""
        mesh = AbstractMesh((2, 2), ("data", "tensor"), (AxisType.Auto, AxisType.Auto), abstract_device=HOPPER)
        rows = PS("data", None, "tensor")
        specs = {"x": rows, "dt": rows, "a": PS("tensor"), "b": rows, "c": rows, "d": PS("tensor")}
        specs["initial_state"] = PS("data", "tensor")

        def loss(arguments: dict[str, jax.Array]) -> jax.Array:
            run = lambda arguments: ssd(**arguments, implementation="pallas_gpu")
            outputs = (rows, specs["initial_state"])
            y, state = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=outputs)(arguments)
            return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

        arguments = _arguments((2, 131072, 16, 64, 64), jnp.bfloat16)
        found = kernels(jax.grad(loss), arguments, mesh)
        assert found == ["ssd_forward", "ssd_backward", "ssd_state_forward", "ssd_state_backward"]

    @pytest.mark.parametrize(
        ("dtype", "head_dim", "state_dim", "message"),
        [
            (jnp.float16, 64, 64, "'pallas_gpu' cannot serve this call: x must be float32 or bfloat16, found float16"),
            (jnp.float32, 80, 64, "the head dim P of x must be one of 64, 96, 128, found 80"),
            (jnp.float32, 64, 16, "the state dim N of b must be one of 64, 96, 128, found 16"),
        ],
    )
    def test_unsupported_calls_say_why(dtype: Any, head_dim: int, state_dim: int, message: str) -> None:
        x, b = jnp.zeros((1, 4, 2, head_dim), dtype), jnp.zeros((1, 4, 2, state_dim), dtype)
        dt, a = jnp.zeros((1, 4, 2)), -jnp.ones(2)
        with pytest.raises(ValueError, match=message):
            ssd(x, dt, a, b, b, implementation="pallas_gpu")
        with pytest.raises(ValueError, match=message):
            ssd_state(x, dt, a, b, implementation="pallas_gpu")

    def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
        class Blackwell:
            device_kind, compute_capability = "NVIDIA B200", "10.0"

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [Blackwell()])
        with pytest.raises(ValueError, match=r"must be a Hopper .*, found NVIDIA B200 \(10.0\)"):
            pallas_gpu.tiles_of(jnp.zeros((1, 4, 2, 64)), jnp.zeros((1, 4, 2, 64)))

    @pytest.mark.parametrize(
        ("kind", "platform", "served"),
        [
            ("NVIDIA GH200 480GB", "gpu", True),
            ("cpu", "cpu", True),
            ("NVIDIA A100-SXM4-80GB", "gpu", False),
            ("NVIDIA B200", "gpu", False),
            ("TPU v5 lite", "tpu", False),
        ],
    )
    def test_meshes_of_other_devices_are_refused(kind: str, platform: str, served: bool) -> None:
        mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, num_cores=None, platform=platform))
        x = jnp.zeros((1, 4, 2, 64))
        with jax.sharding.use_abstract_mesh(mesh):
            reason = pallas_gpu.unsupported_reason(x, x)
        message = f"the device must be a Hopper (compute capability 9), found {kind} in the mesh of jax.set_mesh"
        assert reason == (None if served else message)

    def test_lowering_for_a_cpu_is_refused() -> None:
        arguments = checks.make_inputs(checks.Spec(length=6, **FIELDS))
        with pytest.raises(ValueError, match="'pallas_gpu' cannot serve this call: it is lowered for cpu"):
            ssd(**arguments, implementation="pallas_gpu")
else:

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_older_versions_are_refused(spec: checks.Spec) -> None:
        inputs = checks.make_inputs(spec)
        message = f"'pallas_gpu' cannot serve this call: jax must be at least 0.11.2 .*, found {jax.__version__},"
        with pytest.raises(ValueError, match=message):
            ssd(**inputs, implementation="pallas_gpu")
        del inputs["c"], inputs["d"]
        with pytest.raises(ValueError, match=message):
            ssd_state(**inputs, implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("blocks", "chunks", "parts"), [(16, 128, 8), (16, 100, 6), (44, 128, 3), (45, 128, 1), (200, 128, 1), (1, 40, 1)]
)
def test_parts_fill_the_chip_once(blocks: int, chunks: int, parts: int) -> None:
    assert block_sizes.choose_gpu_parts(blocks, chunks) == parts


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_every_block_fits_shared_memory(pieces: int, shared: bool) -> None:
    for head_dim in (64, 96, 128):
        for state_dim in (64, 96, 128):
            forward, backward = block_sizes.choose_gpu(shared, head_dim, state_dim, pieces)
            assert head_dim % forward.values == 0
            assert head_dim % backward.values == 0
            whole = pieces == 1 and not shared and backward.values == head_dim
            used = block_sizes.smem_bytes_backward(backward, state_dim, pieces, True, 2 if whole else 4)
            assert used <= block_sizes.SMEM_BUDGET
            assert block_sizes.smem_bytes_forward(forward, state_dim, pieces, True) <= block_sizes.SMEM_BUDGET
    assert block_sizes.choose_gpu(False, 96, 96, 1)[1].values == 96  # no parts to sum
