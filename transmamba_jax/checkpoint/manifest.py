"""The manifest of a checkpointed step: its arrays and files, with checksums to compare. Imports no orbax.

`manifest.json` is written last into the folder of a step, and renamed into place when all of it is on disk. A step
without a manifest was never saved completely. It holds

    leaves   path -> dtype, shape and checksum of every array
    files    path -> size of every file, and the checksum of those up to 1 MiB (metadata, JSON); arrays have their own
    step, eval_loss, and the checksum of the manifest itself

The checksum of an array x of 32-bit words is a multilinear hash,

    checksum = sum_i x[i_1, ..., i_n] a_1[i_1] ... a_n[i_n]   (mod 2^64),    a_k odd, pseudorandom, fixed

A sum does not depend on the sharding: every shard adds its part, on any mesh. A change of one word always changes the
checksum, because its weight is odd; any other change does with probability 1 - 2^-32 or more. It detects accidents, not
attacks.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax.runtime import storage

FILE = "manifest.json"

_CHECKED_BYTES = 2**20
_ROW = 2**8  # words of a row that the host multiplies with its weights, at least
_BLOCK = 2**18  # words that it multiplies at one time, about: their 64-bit copy, 2 MiB, stays in the cache
_SLAB = 2**22  # words of an array that a thread treats as one
_THREADS = min(4, os.cpu_count() or 1)  # numpy multiplies without the interpreter's lock

Finish = Callable[[], dict[str, str]]
_Region = tuple[np.ndarray, Sequence[int]]  # part of an array, and where it starts in the whole


class DamagedError(ValueError):
    """A step differs from its manifest; the message is one line that names the leaf or file."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @property
    def kind(self) -> str:
        """Dtype and shape, as text: `float32[7,4]`."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return self.size * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a step."""

    step: int
    eval_loss: float | None
    leaves: dict[str, Leaf]
    files: dict[str, tuple[int, str | None]]
    """Size in bytes, and checksum of a small file."""


def start_checksums(arrays: Mapping[str, Any]) -> Finish:
    """Start to checksum arrays and return the function that waits for the checksums; another thread may call it.

    The arrays may be donated as soon as this returns. On the CPU of one process the finishing thread does the work on
    the arrays' own memory (numpy, which is several times faster there than compiled code, and nothing is compiled);
    elsewhere the devices do it, in the order that the processes call this.

    Raises:
        ValueError: an element is not of 1, 2, 4 or 8 bytes.
    """
    on_host = {path: _start_on_host(array) for path, array in arrays.items() if _is_on_host(array)}
    on_device = {path: array for path, array in arrays.items() if path not in on_host}
    # One program for all of them. Each of several would be a collective, and a CPU has few threads for programs: two
    # processes that ran them in different orders would deadlock.
    totals = _checksum_on_device(on_device) if on_device else {}

    def finish() -> dict[str, str]:
        found = {path: checksum() for path, checksum in on_host.items()} | jax.device_get(totals)
        return {path: f"{int(checksum):016x}" for path, checksum in found.items()}

    return finish


def describe(array: np.ndarray) -> Leaf:
    """Describe an array in host memory."""
    checksum = _checksum_regions([(array, [0] * array.ndim)])
    return Leaf(str(array.dtype), array.shape, f"{checksum:016x}")


def _is_on_host(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return True
    return jax.process_count() == 1 and all(device.platform == "cpu" for device in array.sharding.device_set)


def _start_on_host(array: Any) -> Callable[[], int]:
    if isinstance(array, np.ndarray):
        return functools.partial(_checksum_regions, [(array.copy(), [0] * array.ndim)])
    once = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    regions = [(np.asarray(shard.data), [part.start or 0 for part in shard.index]) for shard in once]
    return functools.partial(_checksum_regions, regions)


def _checksum_on_device(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Compute the same sums on the devices of the arrays, sharded or not; the results are on every device."""
    with jax.enable_x64(True):
        weights = {
            path: [_weights(axis, 0, size) for axis, size in enumerate(_word_shape(array.shape, array.dtype))]
            for path, array in arrays.items()
        }
        return _weighted_sums(dict(arrays), weights)


def _checksum_regions(regions: Sequence[_Region]) -> int:
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda slab: _checksum_slab(*slab), (slab for region in regions for slab in _slabs(*region)))
        return sum(parts) % 2**64


def _slabs(data: np.ndarray, start: Sequence[int]) -> Iterator[_Region]:
    """Cut along the first axis: bounds the memory of copies and of weights."""
    if data.ndim == 0:
        yield data, start
        return
    length = max(1, len(data) * _SLAB // max(data.size, 1))
    for top in range(0, len(data), length):
        yield data[top : top + length], [start[0] + top, *start[1:]]


def _checksum_slab(data: np.ndarray, start: Sequence[int]) -> int:
    """Sum the words of part of an array times their weights; `start` is its position in the array."""
    shape = _word_shape(data.shape, data.dtype)
    words = np.ascontiguousarray(data).reshape(-1).view(_word_type(data.dtype))
    if words.size == 0:
        return 0
    weights = [_weights(axis, first, size) for axis, (first, size) in enumerate(zip([*start, 0], shape, strict=False))]
    # Axes are merged from the last one on until a row is long enough for the loop over rows to be cheap.
    row, outer = np.ones(1, np.uint64), len(shape)
    while outer > 0 and row.size < _ROW:
        outer -= 1
        row = np.multiply.outer(weights[outer], row).reshape(-1)
    rows = words.reshape(-1, row.size)
    sums = np.empty(len(rows), np.uint64)
    at_a_time = max(1, _BLOCK // row.size)
    wide = np.empty((min(at_a_time, len(rows)), row.size), np.uint64)  # fresh memory for every block takes longer
    for top in range(0, len(rows), at_a_time):
        block = rows[top : top + at_a_time]
        np.copyto(wide[: len(block)], block)
        np.einsum("ij,j->i", wide[: len(block)], row, out=sums[top : top + at_a_time])
    sums = sums.reshape(shape[:outer])
    for axis in reversed(range(outer)):
        sums = np.einsum("...j,j->...", sums, weights[axis])
    return int(sums)


@jax.jit
def _weighted_sums(arrays: dict[str, jax.Array], weights: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
    return {path: _weighted_sum(array, weights[path]) for path, array in arrays.items()}


def _weighted_sum(array: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    products = jax.lax.bitcast_convert_type(array, _word_type(array.dtype)).astype(jnp.uint64)
    for axis, factors in enumerate(weights):
        products *= factors.reshape([-1 if axis == other else 1 for other in range(products.ndim)])
    return products.sum(dtype=jnp.uint64)


def _word_type(dtype: Any) -> Any:
    """Return the unsigned type that the bits of an element are read as; 8 bytes are two words."""
    size = np.dtype(dtype).itemsize
    if size not in (1, 2, 4, 8):
        raise ValueError(f"an array of dtype {dtype} cannot be checksummed: elements must have 1, 2, 4 or 8 bytes")
    return {1: np.uint8, 2: np.uint16}.get(size, np.uint32)


def _word_shape(shape: Sequence[int], dtype: Any) -> tuple[int, ...]:
    return (*shape, 2) if np.dtype(dtype).itemsize == 8 else tuple(shape)


def _weights(axis: int, start: int, size: int) -> np.ndarray:
    """Return odd 64-bit numbers for `size` indices of an axis, by SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = np.arange(start + 1, start + size + 1, dtype=np.uint64) + np.uint64((axis + 1) << 48)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def write(folder: Path, step: int, eval_loss: float | None, leaves: dict[str, Leaf]) -> None:
    """Describe the files of `folder` and put the manifest there atomically.

    Raises:
        OSError: it cannot be written.
    """
    names = [name for name in storage.files_below(folder) if name != FILE]
    described = storage.map_files(_describe, [folder / name for name in names])
    _put(folder, Manifest(step, eval_loss, leaves, dict(zip(names, described, strict=True))))


def set_loss(folder: Path, loss: float) -> None:
    """Change the held-out loss in the manifest of a step, atomically.

    Raises:
        DamagedError: there is no manifest, or it is not what was written.
        OSError: it cannot be written.
    """
    _put(folder, dataclasses.replace(read(folder), eval_loss=loss))


def _put(folder: Path, manifest: Manifest) -> None:
    content = dataclasses.asdict(manifest)
    text = json.dumps({**content, "checksum": _checksum_content(content)}, indent=1)
    storage.replace_text(folder / FILE, text, f"{FILE}.partial", durable=True)


def read(folder: Path) -> Manifest:
    """Read the manifest of a step.

    Raises:
        DamagedError: there is none, or it is not what was written.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
        if content.pop("checksum", None) != _checksum_content(content):
            raise DamagedError(f"{FILE} is damaged: its checksum differs")
        leaves = {
            path: Leaf(leaf["dtype"], tuple(leaf["shape"]), leaf["checksum"])
            for path, leaf in content["leaves"].items()
        }
        files = {name: (size, hashed) for name, (size, hashed) in content["files"].items()}
        return Manifest(content["step"], content["eval_loss"], leaves, files)
    except FileNotFoundError:
        raise DamagedError(f"it has no {FILE}: its save did not finish, or the file was deleted") from None
    except OSError as error:
        raise DamagedError(f"{FILE} cannot be read: {error.strerror}") from None
    except DamagedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of something else
        raise DamagedError(f"{FILE} is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None


def changed_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return what is wrong with each file that is not as it was written; files that no manifest lists are ignored."""
    found = storage.map_files(_describe_or_reason, [folder / name for name in manifest.files])
    changed = {}
    for (name, (size, expected)), described in zip(manifest.files.items(), found, strict=True):
        if isinstance(described, str):
            changed[name] = described
        elif described[0] != size:
            changed[name] = f"has {described[0]:,} bytes, saved were {size:,}"
        elif described[1] != expected:
            changed[name] = "has other bytes than were saved"
    return changed


def _describe_or_reason(path: Path) -> tuple[int, str | None] | str:
    try:
        return _describe(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def changed_leaf(path: str, array: Any, saved: Leaf) -> list[str]:
    """Return what is wrong with an array that was read, at most one line."""
    if not isinstance(array, np.ndarray):
        return [f"{path} is missing"]
    found = describe(array)
    if found.kind != saved.kind:
        return [f"{path} is {found.kind}, saved was {saved.kind}"]
    return [] if found == saved else [f"{path} has other values than were saved"]


def raise_if(reasons: Sequence[str]) -> None:
    """Raise a DamagedError of all reasons, if there are any."""
    if reasons:
        raise DamagedError("; ".join(reasons))


def _describe(path: Path) -> tuple[int, str | None]:
    size = path.stat().st_size
    return size, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if size <= _CHECKED_BYTES else None


def _checksum_content(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
