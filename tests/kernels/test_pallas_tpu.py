"""The TPU kernels: the suite in interpret mode on a CPU, and the TPU's own compiler for three chips."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as PS

from pallas_kernels import target
from pallas_kernels.ssd import api, checks, ssd, ssd_state
from pallas_kernels.ssd.pallas_tpu import backward, block_sizes
from pallas_kernels.ssd.pallas_tpu import implementation as pallas_tpu

from . import suite

pytestmark = pytest.mark.usefixtures("programs_not_kept")

# The interpreter's programs are large and run once: most of their time would go into optimising them.
QUICK_COMPILATION: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):
    QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False  # remove when jax >= 0.11 is required


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run TPU kernels on the CPU; what is allocated and never written is NaN."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK_COMPILATION))
    with pltpu.force_tpu_interpret_mode():
        yield


# The suite's lengths and chunk sizes are about chunks of any size; these have 128 tokens, cells at most 1024.
SPECS = (
    checks.Spec(rows=1, heads=1, groups=1, length=1),
    checks.Spec(length=200, heads=2, head_dim=96, state_dim=64, chunk_size=128),
    checks.Spec(rows=1, length=129, heads=2, groups=1, head_dim=32, state_dim=128, chunk_size=256),
    checks.Spec(length=200, heads=2, groups=1, regime="bursts", chunk_size=128),
    checks.Spec(rows=6, length=70, documents=True, regime="strong", groups=4, chunk_size=128),
    # Cells of 3 heads cut from transposed copies; three cells share a group.
    checks.Spec(rows=1, length=150, heads=18, groups=2, regime="slow"),
    # Whole chunks; a document ends inside one.
    checks.Spec(rows=1, length=256, heads=2, head_dim=64, state_dim=64, regime="strong"),
    checks.Spec(rows=6, length=70, documents=True, regime="slow", groups=1),
    # As wide a block of b as of x, and several cells read it.
    checks.Spec(rows=1, length=140, heads=2, groups=1, head_dim=128, state_dim=128),
)
BFLOAT16_SPECS = (
    checks.Spec(rows=1, length=300, heads=2, head_dim=64, state_dim=128, regime="bursts"),
    checks.Spec(rows=1, length=1100, heads=2, groups=1, head_dim=64, state_dim=64, regime="slow"),
    checks.Spec(rows=1, length=150, heads=7, groups=1, head_dim=96, state_dim=96),
)
STARTS = (
    checks.Spec(rows=1, length=200, heads=2, groups=1, start=1),
    # The first chunk with outputs is cut, is whole, is in the second cell, is cut there with a document.
    checks.Spec(length=400, heads=2, head_dim=64, state_dim=64, start=200, regime="strong"),
    checks.Spec(rows=1, length=400, heads=18, groups=2, start=256, regime="slow"),
    checks.Spec(rows=1, length=1300, heads=2, groups=1, start=1200, regime="slow"),
    checks.Spec(rows=1, length=1300, heads=2, groups=2, start=1024, head_dim=32, regime="bursts"),
    checks.Spec(rows=6, length=70, documents=True, regime="strong", groups=4, start=41),
)
STATE_SPECS = (checks.SPECS[0], checks.Spec(rows=6, length=70, documents=True, regime="strong", groups=4))


@pytest.mark.usefixtures("interpreter")
class TestPallasTpu(suite.SsdSuite):
    implementation = "pallas_tpu"

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_values_and_gradients(self, spec: checks.Spec) -> None:
        super().test_values_and_gradients(spec)

    @pytest.mark.slow
    @pytest.mark.parametrize("regime", ["strong"])
    def test_long_rows(self, regime: str) -> None:
        super().test_long_rows(regime)

    @pytest.mark.slow
    @pytest.mark.parametrize("spec", BFLOAT16_SPECS, ids=str)
    def test_bfloat16_of_whole_chunks(self, spec: checks.Spec) -> None:
        checks.check_bfloat16(self.implementation, spec)

    @pytest.mark.slow
    @pytest.mark.parametrize("spec", STARTS, ids=str)
    def test_outputs_from_a_later_token_on(self, spec: checks.Spec) -> None:
        super().test_outputs_from_a_later_token_on(spec)

    @pytest.mark.slow
    def test_wide_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of a v6e; the last of two is not whole."""
        monkeypatch.setattr(target, "device_kind", lambda: "TPU v6 lite")
        spec = checks.Spec(rows=1, length=300, heads=2, groups=1, head_dim=64, state_dim=64, regime="strong")
        checks.check_bfloat16(self.implementation, spec)

    @pytest.mark.parametrize("spec", STATE_SPECS, ids=str)
    def test_state_alone(self, spec: checks.Spec) -> None:
        super().test_state_alone(spec)


@pytest.mark.usefixtures("interpreter")
def test_a_gradient_that_forgets_a_term_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite sees the pairs that span a token, the smallest part of the gradient of the decay."""
    monkeypatch.setattr(backward, "_spanning", lambda pairs: jnp.zeros_like(pairs[:, :1]))
    with pytest.raises(AssertionError, match="gradient of dt: relative error"):
        checks.check_against_oracle("pallas_tpu", checks.Spec(rows=1, length=20, heads=1, groups=1))


# --- The TPU's compiler -----------------------------------------------------------------------------------------------

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = ((2, 8192, 16, 96, 96), (8, 8192, 16, 64, 64), (1, 32768, 16, 64, 128))
LONG_SHAPE = (1, 131072, 16, 96, 96)
"""The kernels of (2, 8192, 16, 96, 96), at another number of blocks."""


@functools.cache
def _devices(chip: str) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def _arguments(
    shape: tuple[int, ...], sharding: Callable[[str], Any], groups: int | None = None, dtype: Any = jnp.bfloat16
) -> dict[str, Any]:
    """Abstract inputs of `ssd`, x, b and c in the given dtype."""
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
    return {
        name: jax.ShapeDtypeStruct(size, dtype if name in "xbc" else jnp.float32, sharding=sharding(name))
        for name, size in shapes.items()
    }


def _forward(arguments: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return ssd(**arguments, implementation="pallas_tpu")


def _gradient(arguments: dict[str, jax.Array]) -> Any:
    def loss(arguments: dict[str, jax.Array]) -> jax.Array:
        y, state = _forward(arguments)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    return jax.grad(loss)(arguments)


def _kernels(function: Callable[..., Any], arguments: Any) -> list[str]:
    """Compile for the devices of the arguments; return the names of the kernels in the compiled program."""
    text = jax.jit(function).lower(arguments).compile().as_text()
    assert text is not None
    return sorted({name for name in ("ssd_forward", "ssd_backward", "ssd_state") if name in text})


def _on(chip: str, shape: tuple[int, ...], groups: int | None = None, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    sharding = SingleDeviceSharding(_devices(chip)[0])
    return _arguments(shape, lambda _: sharding, groups, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_gradient_compile(chip: str, shape: tuple[int, ...]) -> None:
    assert _kernels(_gradient, _on(chip, shape)) == ["ssd_backward", "ssd_forward"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_long_rows_compile(chip: str) -> None:
    assert _kernels(_gradient, _on(chip, LONG_SHAPE)) == ["ssd_backward", "ssd_forward"]


@pytest.mark.parametrize(("chip", "shape"), [("v5e", LONG_SHAPE), ("v5p", SHAPES[0]), ("v6e", SHAPES[2])])
def test_forward_alone_compiles(chip: str, shape: tuple[int, ...]) -> None:
    """Without a gradient to come no states are kept."""
    assert _kernels(_forward, _on(chip, shape)) == ["ssd_forward"]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape"), [("v5e", SHAPES[2]), ("v5p", SHAPES[1]), ("v6e", SHAPES[0])])
def test_float32_compiles(chip: str, shape: tuple[int, ...]) -> None:
    assert _kernels(_gradient, _on(chip, shape, dtype=jnp.float32)) == ["ssd_backward", "ssd_forward"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[0], (1, 2048, 4, 256, 256)], ids=str)
def test_wide_chunks_compile(shape: tuple[int, ...]) -> None:
    """The mesh tells that it is a v6e."""
    with jax.set_mesh(Mesh(np.array(_devices("v6e")[:1]), "data")):
        arguments = _on("v6e", shape)
        assert pallas_tpu.tiles_of(arguments["x"], arguments["b"]).blocks.chunk == block_sizes.WIDE_CHUNK
        assert _kernels(_gradient, arguments) == ["ssd_backward", "ssd_forward"]


@pytest.mark.parametrize("shape", [(2, 1000, 24, 64, 128), (2, 1000, 7, 96, 96)], ids=str)
def test_shared_groups_and_ragged_rows_compile(shape: tuple[int, ...]) -> None:
    """Six or seven cells share a group; rows end inside a chunk."""
    assert _kernels(_gradient, _on("v5e", shape, groups=1)) == ["ssd_backward", "ssd_forward"]


def test_the_state_alone_compiles() -> None:
    def gradient(arguments: dict[str, jax.Array]) -> Any:
        names = ("x", "dt", "a", "b", "initial_state")
        state = lambda some: jnp.sum(ssd_state(**some, implementation="pallas_tpu"))
        return jax.grad(state)({name: arguments[name] for name in names})

    assert _kernels(gradient, _on("v5e", (1, 2048, 4, 96, 96))) == ["ssd_state"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_gradient_compiles_inside_shard_map(chip: str) -> None:
    """Rows over one mesh axis, heads over the other; a and d vary over the heads' axis alone."""
    devices = np.array(_devices(chip)).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    rows = PS("data", None, "tensor")
    specs = {"x": rows, "dt": rows, "a": PS("tensor"), "b": rows, "c": rows, "d": PS("tensor")}
    specs["initial_state"] = PS("data", "tensor")
    run = jax.shard_map(_forward, mesh=mesh, in_specs=(specs,), out_specs=(rows, specs["initial_state"]))

    def loss(arguments: dict[str, jax.Array]) -> jax.Array:
        y, state = run(arguments)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    arguments = _arguments((2, 8192, 16, 96, 96), lambda name: NamedSharding(mesh, specs[name]))
    assert _kernels(jax.grad(loss), arguments) == ["ssd_backward", "ssd_forward"]


# --- Block sizes and unsupported calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(("itemsize", "chunk"), [(2, 128), (4, 128), (2, 256)])
def test_every_block_fits_vmem(itemsize: int, chunk: int) -> None:
    for head_dim, state_dim in ((8, 8), (64, 64), (64, 128), (96, 96), (128, 128), (256, 256)):
        for heads, groups in ((1, 1), (7, 7), (14, 14), (16, 16), (16, 1), (24, 8), (11, 1)):
            blocks = block_sizes.choose(8192, heads, groups, head_dim, state_dim, itemsize, chunk)
            in_cell = max(1, blocks.heads * groups // heads)
            assert heads % blocks.heads == 0
            assert blocks.chunk == chunk
            assert blocks.tokens % chunk == 0
            used = block_sizes.vmem_bytes(blocks, in_cell, head_dim, state_dim, itemsize)
            assert used <= block_sizes.VMEM_BUDGET


@pytest.mark.parametrize(
    ("length", "itemsize", "kind", "chunk"),
    [
        (8192, 2, "TPU v6 lite", 256),
        (128, 2, "TPU v6 lite", 128),
        (8192, 4, "TPU v6 lite", 128),
        (8192, 2, "TPU v5 lite", 128),
        (8192, 2, "cpu", 128),
    ],
)
def test_chunks_are_as_wide_as_the_matrix_unit(length: int, itemsize: int, kind: str, chunk: int) -> None:
    assert block_sizes.choose_chunk(length, itemsize, kind) == chunk


def test_blocks_are_whole_lanes_where_heads_allow_it() -> None:
    for head_dim in (64, 96, 128):
        blocks = block_sizes.choose(8192, 16, 16, head_dim, head_dim, 2)
        assert blocks.heads * head_dim % block_sizes.LANES == 0


@pytest.mark.parametrize(
    ("dtype", "head_dim", "state_dim", "message"),
    [
        (jnp.float16, 8, 16, "'pallas_tpu' cannot serve this call: x must be float32 or bfloat16, found float16"),
        (jnp.float32, 12, 16, "the head dim P of x must be a multiple of 8 up to 256, found 12"),
        (jnp.float32, 8, 264, "the state dim N of b must be a multiple of 8 up to 256, found 264"),
    ],
)
def test_unsupported_calls_say_why(dtype: Any, head_dim: int, state_dim: int, message: str) -> None:
    x, b = jnp.zeros((1, 4, 2, head_dim), dtype), jnp.zeros((1, 4, 2, state_dim), dtype)
    dt, a = jnp.zeros((1, 4, 2)), -jnp.ones(2)
    with pytest.raises(ValueError, match=message):
        ssd(x, dt, a, b, b, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=message):
        ssd_state(x, dt, a, b, implementation="pallas_tpu")


@pytest.mark.parametrize(("devices", "expected"), [(1, "pallas_tpu"), (4, "associative")])
def test_the_mesh_that_is_set_says_what_is_chosen(
    devices: int, expected: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardware that is not there counts where the mesh is made of it; a compiler cannot partition a kernel."""
    monkeypatch.setattr(api, "_log_choice", api._log_choice.__wrapped__)  # it says each thing once per process
    inputs = {name: jnp.zeros(value.shape, value.dtype) for name, value in _on("v5e", (1, 64, 4, 64, 64)).items()}
    with caplog.at_level("INFO", logger=api.__name__), jax.set_mesh(Mesh(np.array(_devices("v5e")[:devices]), "data")):
        assert target.platform() == "tpu"
        jax.eval_shape(ssd, **inputs)
    assert f"SSD runs as '{expected}', chosen for 'tpu'" in caplog.text
