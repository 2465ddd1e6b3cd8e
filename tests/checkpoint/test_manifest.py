"""The checksum of an array against its definition in Python's own integers, however the array is cut."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from transmamba_jax.checkpoint import manifest as manifests

MASK = 2**64 - 1
CASES = [
    (np.float32, (11, 300)),
    (np.float32, (5, 3, 64)),
    (np.float32, (1100,)),
    (np.float32, ()),
    (np.float32, (0, 4)),
    (jnp.bfloat16, (6, 130)),
    (np.int8, (40, 9)),
    (np.bool_, (3, 5)),
    (np.uint64, (9, 40)),
]


def weight(axis: int, index: int) -> int:
    """SplitMix64 of an index, made odd."""
    z = (index + 1 + ((axis + 1) << 48)) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31) | 1


def definition(array: np.ndarray) -> str:
    """sum_i x[i] prod_k a_k[i_k] (mod 2^64) over words of at most 32 bits."""
    words = array.view({1: np.uint8, 2: np.uint16}.get(array.itemsize, np.uint32)) if array.ndim else array
    if array.ndim == 0:
        words = array.reshape(1).view(np.uint32).reshape(())
    elif array.itemsize == 8:
        words = words.reshape(*array.shape, 2)
    total = 0
    for index in itertools.product(*map(range, words.shape)):
        total += int(words[index]) * math.prod(weight(axis, i) for axis, i in enumerate(index))
    return f"{total & MASK:016x}"


def random(dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype is np.bool_:
        return rng.random(shape) < 0.5
    count = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(count), np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize(("dtype", "shape"), CASES)
@pytest.mark.parametrize(("slab", "block"), [(2**22, 2**18), (2**22, 1200), (1500, 600), (700, 300)])
def test_a_checksum_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, dtype: type, shape: tuple[int, ...], slab: int, block: int
) -> None:
    """Whole, and in slabs of several blocks the last of which is a part."""
    monkeypatch.setattr(manifests, "_SLAB", slab)
    monkeypatch.setattr(manifests, "_BLOCK", block)
    array = random(dtype, shape)
    assert manifests.describe(array).checksum == definition(array)


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_devices_sum_what_the_host_does(spec: tuple[str | None, ...]) -> None:
    array = np.random.default_rng(1).random((16, 24), np.float32)
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert f"{int(manifests._checksum_on_device({'a': sharded})['a']):016x}" == definition(array)
    assert manifests.start_checksums({"a": sharded})() == {"a": definition(array)}
