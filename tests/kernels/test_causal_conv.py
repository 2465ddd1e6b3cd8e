"""The TPU kernels of the convolution: in interpret mode against a float64 sum over taps, and the TPU's own compiler."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as PS

from pallas_kernels import target
from pallas_kernels.causal_conv1d import pallas_tpu
from pallas_kernels.causal_conv1d.pallas_tpu import causal_conv1d
from transmamba_jax.convolution import causal_conv

pytestmark = pytest.mark.usefixtures("programs_not_kept")

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def draw(shape: tuple[int, int, int], taps: int = 4, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Draw x and dy of a dtype, kernel and bias in float32."""
    rng = np.random.default_rng(0)
    batch, length, channels = shape
    normal = lambda *size: rng.standard_normal(size, np.float32)
    x, kernel, bias, dy = normal(*shape), normal(taps, channels), normal(channels), normal(batch, length, channels)
    return {"x": x.astype(dtype), "kernel": kernel, "bias": bias, "dy": dy.astype(dtype)}


def draw_readable(batch: int, length: int, taps: int) -> np.ndarray:
    """Any bits: what packing cannot give, the kernels can do too."""
    return np.random.default_rng(1).integers(0, 2**taps, (batch, length)).astype(np.int32)


def oracle(given: dict[str, np.ndarray], readable: np.ndarray | None, silu: bool) -> dict[str, np.ndarray]:
    """Compute y and the gradients in float64, by sums over taps written out."""
    x, kernel, bias, dy = (given[name].astype(np.float64) for name in ("x", "kernel", "bias", "dy"))
    taps, length = len(kernel), x.shape[1]
    reads = lambda s: 1.0 if readable is None else ((readable >> s) & 1)[..., None].astype(np.float64)
    back = [np.pad(x, ((0, 0), (s, 0), (0, 0)))[:, :length] * reads(s) for s in range(taps)]
    u = bias + sum(kernel[taps - 1 - s] * back[s] for s in range(taps))
    sigmoid = np.exp(-np.logaddexp(0, -u))
    du = dy * sigmoid * (1 + u * (1 - sigmoid)) if silu else dy
    later = lambda value, s: np.pad(value, ((0, 0), (0, s), (0, 0)))[:, s:]
    return {
        "y": u * sigmoid if silu else u,
        "x": sum(later(kernel[taps - 1 - s] * du * reads(s), s) for s in range(taps)),
        "kernel": np.stack([(du * back[taps - 1 - tap]).sum((0, 1)) for tap in range(taps)]),
        "bias": du.sum((0, 1)),
    }


def compute(given: dict[str, np.ndarray], readable: np.ndarray | None, silu: bool) -> dict[str, np.ndarray]:
    """The same by the kernels, interpreted: memory that nobody wrote is NaN there."""
    bits = None if readable is None else jnp.asarray(readable)
    with pltpu.force_tpu_interpret_mode():
        run = lambda x, kernel, bias: causal_conv1d(x, kernel, bias, bits, silu)
        y, pullback = jax.vjp(run, *(jnp.asarray(given[name]) for name in ("x", "kernel", "bias")))
        found = (y, *pullback(jnp.asarray(given["dy"])))
    return {name: np.asarray(value) for name, value in zip(("y", "x", "kernel", "bias"), found, strict=True)}


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


# Whole strips and cells; several of both, and a row that ends inside them; channels that are no whole registers, one
# token, one tap and seven; two blocks of channels.
SHAPES = [(1, 256, 128, 4), (2, 1300, 192, 4), (1, 40, 64, 2), (2, 1, 128, 1), (1, 257, 128, 7), (1, 530, 1024, 3)]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], masked: bool, silu: bool) -> None:
    *size, taps = shape
    given, readable = draw((size[0], size[1], size[2]), taps), draw_readable(*size[:2], taps) if masked else None
    found, wanted = compute(given, readable, silu), oracle(given, readable, silu)
    for name, value in wanted.items():
        assert error(found[name], value) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_is_rounded_once(masked: bool) -> None:
    given, readable = draw((2, 600, 256), dtype=jnp.bfloat16), draw_readable(2, 600, 4) if masked else None
    found, wanted = compute(given, readable, True), oracle(given, readable, True)
    assert found["y"].dtype == found["x"].dtype == jnp.bfloat16
    assert found["kernel"].dtype == found["bias"].dtype == np.float32
    for name in ("y", "x"):
        # Half a unit in the last of 8 bits; float32 sums of up to 20 that cancel are off by a few 1e-6.
        np.testing.assert_allclose(found[name].astype(np.float64), wanted[name], rtol=2**-8, atol=1e-5)
    for name in ("kernel", "bias"):
        assert error(found[name], wanted[name]) < 1e-6, name


def test_large_values_stay_finite() -> None:
    """SiLU's exponential overflows below -88 where it is written as one."""
    given = draw((1, 256, 128))
    given["x"] = given["x"] * 1e4
    found, wanted = compute(given, None, True), oracle(draw((1, 256, 128)) | {"x": given["x"]}, None, True)
    for name, value in wanted.items():
        assert error(found[name], value) < 1e-6, name


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        # The backward pass takes other tokens for those before a cell; the last channels are forgotten.
        ("before_spec", lambda tiles: pl.BlockSpec((None, 16, tiles.block), lambda b, c, _: (b, 0, c))),
        ("columns", property(lambda tiles: [slice(0, tiles.block - 128)])),
    ],
)
def test_a_broken_kernel_fails(name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw((1, 1300, 384))
    wanted = oracle(given, None, True)
    monkeypatch.setattr(pallas_tpu._Tiles, name, broken)
    found = compute(given, None, True)
    assert not all(error(found[name], value) < 1e-6 for name, value in wanted.items())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("history", [False, True])
def test_the_model_gets_the_same_from_kernels_and_plain_jax(
    packed: bool, history: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = draw((2, 300, 64))
    ids = np.repeat([[1] * 100 + [2] * 3 + [3] * 150 + [0] * 47], 2, axis=0) if packed else None
    before = jnp.asarray(draw((2, 3, 64))["dy"]) if history else None

    def run() -> list[np.ndarray]:
        function = lambda x, kernel, bias, before: causal_conv(
            x, kernel, bias, None if ids is None else jnp.asarray(ids), before, silu=True
        )
        arguments = *(jnp.asarray(given[name]) for name in ("x", "kernel", "bias")), before
        y, pullback = jax.vjp(function, *arguments)
        return [np.asarray(value) for value in (y, *pullback(jnp.asarray(given["dy"]))) if value is not None]

    plain = run()
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        program = str(jax.make_jaxpr(lambda x, k, b: causal_conv(x, k, b))(given["x"], given["kernel"], given["bias"]))
        assert "causal_conv_forward" in program
        kernels = run()
    for ours, theirs in zip(kernels, plain, strict=True):
        assert error(ours, theirs.astype(np.float64)) < 1e-6


# --- The TPU's compiler -----------------------------------------------------------------------------------------------


@functools.cache
def _devices(chip: str) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def _gradient(x: Any, kernel: Any, bias: Any, readable: Any, dy: Any) -> Any:
    y, pullback = jax.vjp(lambda *given: causal_conv1d(*given, readable, silu=True), x, kernel, bias)
    return y, pullback(dy)


def _kernels(function: Any, *arguments: Any) -> list[str]:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return sorted(set(re.findall(r"causal_conv_(?:for|back)ward", text)))


BOTH = ["causal_conv_backward", "causal_conv_forward"]


COMPILED = [
    *(
        (chip, (4, 8192, 1536), dtype, masked)
        for chip in CHIPS
        for dtype in ("bfloat16", "float32")
        for masked in (0, 1)
    ),
    ("v5e", (1, 32768, 2048), "bfloat16", 0),
    ("v5p", (2, 1000, 192), "bfloat16", 1),
    ("v6e", (2, 8195, 640), "float32", 1),
    ("v5e", (1, 512, 768), "bfloat16", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape", "dtype", "masked"), COMPILED, ids=str)
def test_compiles(chip: str, shape: tuple[int, int, int], dtype: str, masked: int) -> None:
    place = SingleDeviceSharding(_devices(chip)[0])
    of = lambda *size, dtype="float32": jax.ShapeDtypeStruct(size, dtype, sharding=place)
    x = of(*shape, dtype=dtype)
    readable = of(*shape[:2], dtype="int32") if masked else None
    assert _kernels(_gradient, x, of(4, shape[2]), of(shape[2]), readable, x) == BOTH


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_inside_shard_map(chip: str) -> None:
    """Rows over one mesh axis, channels over the other; kernel and bias vary over the channels' axis alone."""
    types = (AxisType.Auto, AxisType.Auto)
    mesh = Mesh(np.array(_devices(chip)).reshape(2, 2), ("data", "tensor"), axis_types=types)
    wide, taps, vector = PS("data", None, "tensor"), PS(None, "tensor"), PS("tensor")
    of = lambda spec, *size: jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    run = jax.shard_map(functools.partial(causal_conv1d, silu=True), in_specs=(wide, taps, vector), out_specs=wide)

    def loss(x: Any, kernel: Any, bias: Any) -> Any:
        return jnp.sum(run(x, kernel, bias).astype(jnp.float32))

    with jax.set_mesh(mesh):
        gradient = jax.grad(loss, argnums=(0, 1, 2))
        assert "causal_conv_backward" in _kernels(
            gradient, of(wide, 4, 2048, 1536), of(taps, 4, 1536), of(vector, 1536)
        )


def test_cells_are_whole_lanes_for_two_cores_and_fit() -> None:
    for channels in (128, 640, 768, 1536, 2048, 4096):
        for itemsize in (2, 4):
            tiles = pallas_tpu._Tiles(1, 8192, channels, 4, itemsize, True, False)
            assert channels % tiles.block == tiles.block % 128 == tiles.tokens % tiles.strip == 0
            assert 6 * tiles.tokens * tiles.block * itemsize <= 10 * 2**20
    assert pallas_tpu._Tiles(1, 8192, 1536, 4, 2, True, False).grid[1] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float16}, "cannot serve this call: x must be bfloat16 or float32, found float16"),
        ({"channels": 1000}, "x must have a multiple of 128 channels, or at most 768, found 1000"),
        ({"taps": 8}, "kernel must have at most 7 taps, found 8"),
    ],
)
def test_unsupported_calls_say_why(change: dict[str, Any], message: str) -> None:
    asked = {"dtype": jnp.float32, "channels": 128, "taps": 4} | change
    x = jnp.zeros((1, 256, asked["channels"]), asked["dtype"])
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x, jnp.zeros((asked["taps"], asked["channels"])), jnp.zeros(asked["channels"]))


@pytest.mark.parametrize(("devices", "expected"), [(1, True), (4, False)])
def test_kernels_serve_one_device_or_shard_map(devices: int, expected: bool) -> None:
    """A compiler cannot partition a kernel."""
    mesh = Mesh(np.array(_devices("v5e")[:devices]), ("data",), axis_types=(AxisType.Auto,))
    x, kernel, bias = (jax.ShapeDtypeStruct(size, jnp.float32) for size in ((4, 256, 128), (4, 128), (128,)))
    with jax.set_mesh(mesh):
        assert ("pallas_call" in str(jax.make_jaxpr(causal_conv)(x, kernel, bias))) == expected
        split = jax.shard_map(causal_conv, in_specs=(PS("data"), PS(), PS()), out_specs=PS("data"), check_vma=False)
        assert "pallas_call" in str(jax.make_jaxpr(split)(x, kernel, bias))
