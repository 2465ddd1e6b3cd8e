"""Causal convolution against a float64 loop over tokens and taps, and against the library's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import target
from pallas_kernels.causal_conv1d import pallas_tpu
from transmamba_jax.convolution import causal_conv

IDS = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 0], [1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0]], np.int32)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(taps: int = 4, length: int = 12, channels: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(0, 2, length, channels), normal(1, taps, channels), normal(2, channels)


def loop(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """y_t = bias + Σ_back kernel_{K-1-back} x_{t-back} over the real tokens of the document of t, in float64."""
    y = np.zeros(x.shape) + bias
    for row, t, back in np.ndindex(*x.shape[:2], len(kernel)):
        if back <= t and (ids is None or ids[row, t] == ids[row, t - back] != 0):
            y[row, t] += kernel[len(kernel) - 1 - back].astype(np.float64) * x[row, t - back]
    return y


@pytest.mark.parametrize(("taps", "length"), [(4, 12), (4, 1), (4, 3), (1, 5), (2, 7), (7, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_loop(taps: int, length: int, packed: bool) -> None:
    x, kernel, bias = inputs(taps, length)
    ids = IDS[:, :length] if packed else None
    found = causal_conv(
        jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), ids if ids is None else jnp.asarray(ids)
    )
    np.testing.assert_allclose(found, loop(x, kernel, bias, ids), atol=2e-6)


def test_equals_the_library_with_gradients() -> None:
    x, kernel, bias, g = *inputs(), normal(3, 2, 12, 5)

    def library(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return bias[None, None] + jax.lax.conv_general_dilated(
            x, kernel[:, None], (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=5
        )

    with jax.enable_x64(True):
        want, back = jax.vjp(library, *(jnp.asarray(a, jnp.float64) for a in (x, kernel, bias)))
        wanted = jax.tree.map(np.asarray, (want, *back(jnp.asarray(g, jnp.float64))))
    found, back = jax.vjp(causal_conv, *map(jnp.asarray, (x, kernel, bias)))
    for ours, theirs in zip((found, *back(jnp.asarray(g))), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_every_platform_equal_autodiff(
    platform: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums over tokens are made in blocks of 64 on a CPU and whole elsewhere; here of 150 tokens, in float64."""
    x, kernel, bias, g = *inputs(length=150), normal(3, 2, 150, 5)
    ids = np.repeat([[1] * 70 + [0] * 9 + [2] * 71], 2, axis=0) if packed else np.ones((2, 150), np.int32)

    def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        earlier = lambda y, back: jnp.pad(y, ((0, 0), (back, 0), (0, 0)))[:, :150]
        same = lambda back: (earlier(ids[..., None], back) == ids[..., None]) & (ids[..., None] != 0)
        kernel, bias = kernel[:, None, None], bias[None, None]
        return bias + sum(jnp.where(same(3 - tap), earlier(x, 3 - tap) * kernel[tap], 0) for tap in range(4))

    with jax.enable_x64(True):
        wanted = jax.vjp(plain, *(jnp.asarray(a, jnp.float64) for a in (x, kernel, bias)))[1](
            jnp.asarray(g, jnp.float64)
        )
        wanted = jax.tree.map(np.asarray, wanted)
    monkeypatch.setattr(target, "platform", lambda: platform)
    run = lambda x, kernel, bias: causal_conv(x, kernel, bias, jnp.asarray(ids) if packed else None)
    for ours, theirs in zip(jax.vjp(run, *map(jnp.asarray, (x, kernel, bias)))[1](jnp.asarray(g)), wanted, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)


@pytest.mark.usefixtures("programs_not_kept")
@pytest.mark.parametrize("kernels", [False, True])
def test_a_tpu_copies_nothing_for_the_gradient(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler fuses every slice and sum: besides the results, only the cotangent before SiLU is written, once.

    The kernels write nothing but sums of eight tokens.
    """
    if not kernels:
        monkeypatch.setattr(pallas_tpu, "unsupported_reason", lambda *_: "not asked for")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    mesh = Mesh(np.array([device]), ("rows",), axis_types=(AxisType.Auto,))
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    x = of(4, 8192, 1536)  # more than fits beside it in the memory of the core, where a copy would not count
    with jax.set_mesh(mesh):
        run = lambda x, kernel, bias: causal_conv(x, kernel, bias, silu=True)
        gradient = jax.jit(lambda *arguments, dy: jax.vjp(run, *arguments)[1](dy))
        memory = gradient.lower(x, of(4, 1536), of(1536), dy=x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (0.02 if kernels else 1.01) * 2 * x.size


def test_gradients_stay_inside_documents() -> None:
    x, kernel, bias = map(jnp.asarray, inputs())
    ids = jnp.asarray(IDS)
    jacobian = jax.jacrev(lambda x: causal_conv(x, kernel, bias, ids).sum(-1))(x)  # [B, T, B, T, C]
    reaches = np.abs(np.asarray(jacobian)).sum(-1) > 0
    for row, t, other, s in np.ndindex(2, 12, 2, 12):
        expected = row == other and 0 <= t - s < 4 and IDS[row, t] == IDS[row, s] != 0
        assert reaches[row, t, other, s] == expected, (row, t, other, s)


def test_a_packed_document_equals_the_document_alone() -> None:
    x, kernel, bias = map(jnp.asarray, inputs())
    packed = causal_conv(x, kernel, bias, jnp.asarray(IDS))
    np.testing.assert_allclose(packed[:1, 2:7], causal_conv(x[:1, 2:7], kernel, bias), atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 5, 11])
@pytest.mark.parametrize("packed", [False, True])
def test_two_passes_with_history_equal_one(cut: int, packed: bool) -> None:
    x, kernel, bias = map(jnp.asarray, inputs())
    ids = jnp.asarray(np.maximum(IDS, 1)) if packed else None
    whole = causal_conv(x, kernel, bias, ids)
    earlier = jnp.pad(x[:, :cut], ((0, 0), (3, 0), (0, 0)))[:, -3:]
    if ids is not None:
        document = jnp.pad(ids[:, :cut], ((0, 0), (3, 0)))[:, -3:] == ids[:, cut : cut + 1]
        earlier = jnp.where(document[..., None], earlier, 0)
    second = causal_conv(x[:, cut:], kernel, bias, None if ids is None else ids[:, cut:], earlier)
    np.testing.assert_allclose(second, whole[:, cut:], atol=1e-6)


def test_history_receives_gradients() -> None:
    x, kernel, bias = map(jnp.asarray, inputs())
    grad = jax.grad(lambda history: causal_conv(x, kernel, bias, None, history)[:, 0].sum())(jnp.zeros((2, 3, 5)))
    np.testing.assert_allclose(grad, jnp.broadcast_to(kernel[:3], (2, 3, 5)))


def test_bfloat16_is_float32_rounded_once() -> None:
    x, kernel, bias = map(jnp.asarray, inputs())
    low = x.astype(jnp.bfloat16)
    found = causal_conv(low, kernel, bias)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, causal_conv(low.astype(jnp.float32), kernel, bias).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((2, 12))}, r"x must have shape \[B, T, C\]"),
        ({"kernel": np.ones((4, 6))}, r"kernel must have shape \[K, C=5\]"),
        ({"bias": np.ones(4)}, "bias must have shape"),
        ({"segment_ids": np.ones((2, 11), np.int32)}, "segment_ids must have shape"),
        ({"history": np.ones((2, 4, 5))}, "history must have shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses(change: dict[str, np.ndarray], message: str) -> None:
    arguments = dict(zip(("x", "kernel", "bias"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        causal_conv(**{name: jnp.asarray(value) for name, value in arguments.items()})
