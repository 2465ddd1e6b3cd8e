"""Folders of safetensors files: read one tensor or some of its rows at a time, in one file or many; write."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from transmamba_jax.runtime import storage
from transmamba_jax.runtime.paths import show_path
from transmamba_jax.runtime.tree_paths import listed

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""JSON with `weight_map`: name of a tensor -> the file that holds it."""


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Tensors:
    """The tensors of a folder, by name. Bytes are read when they are asked for."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = handles

    def names(self) -> list[str]:
        """Return the names, sorted."""
        return sorted(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors writes it, such as F32."""
        return self._handles[name].get_slice(name).get_dtype()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return a part of a tensor along its first axis."""
        return self._handles[name].get_slice(name)[start:stop]


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Tensors]:
    """Open `model.safetensors`, or the files that its index names.

    Raises:
        ValueError: neither is there (a pickle is never opened), a file that the index names is missing, a tensor is not
            in the file that the index says or is in two, or a file is not safetensors.
    """
    places = _places(folder)
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        for file in sorted(set(places.values())):
            try:
                place = storage.local_copy(folder / file)
                opened[file] = stack.enter_context(safetensors.safe_open(place, framework="np"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{folder / file} cannot be read as safetensors: {error}") from None
        if not places:
            raise ValueError(f"{folder / INDEX} names no tensors in weight_map")
        names = {file: set(handle.keys()) for file, handle in opened.items()}
        owners: dict[str, list[str]] = {}
        for file in opened:
            for name in names[file]:
                owners.setdefault(name, []).append(file)
        twice = [f"{name} in {' and '.join(files)}" for name, files in sorted(owners.items()) if len(files) > 1]
        if twice:
            raise ValueError(f"{folder} must hold each tensor in one file, found {listed(twice)}; delete the old file")
        misplaced = [f"{name} in {file}" for name, file in places.items() if name and name not in names[file]]
        if misplaced:
            raise ValueError(f"{folder / INDEX} names tensors that are missing: {listed(misplaced)}")
        yield Tensors({name: opened[file] for name, (file,) in owners.items()})


def _places(folder: Path) -> dict[str, str]:
    """Return name -> file; a single file needs no names."""
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(
                f"{folder / INDEX} must have a mapping weight_map of names to files, found {type(places).__name__}"
            )
        outside = sorted({file for file in places.values() if Path(file).name != file})
        if outside:
            raise ValueError(f"{folder / INDEX} must name files of the same folder, found {listed(outside)}")
        return places
    if (folder / FILE).is_file():
        return {"": FILE}
    raise ValueError(f"{folder} must hold {FILE} or {INDEX} (other formats are not read), found {inside(folder)}")


def inside(folder: Path) -> str:
    """List the files of a folder, for a message."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    return listed(sorted(show_path(path.name) for path in folder.iterdir())) if any(folder.iterdir()) else "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it is not there, cannot be read, or is something else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold {path.name}, found {inside(path.parent)}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(tree).__name__}")
    return tree


def make(folder: Path) -> None:
    """Make a folder to write to.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from None
    if storage.is_remote(folder):
        return  # a folder of a bucket is there with its first file
    with raise_as_value_error(folder), tempfile.NamedTemporaryFile(dir=folder):
        pass


def reserve_outputs(folder: Path, files: Sequence[str]) -> None:
    """Make a folder to write weights and these files to, beside whatever else is there.

    Raises:
        ValueError: as for `make`, or some of them are in it already; nothing is overwritten.
    """
    make(folder)
    there = [name for name in dict.fromkeys((FILE, INDEX, *files)) if (folder / name).exists()]
    if there:
        raise ValueError(f"{folder} already holds {', '.join(there)}; name a new folder")


@contextlib.contextmanager
def raise_as_value_error(path: Path, action: str = "write") -> Iterator[None]:
    """Turn an error of the file system, of safetensors or of UTF-8 into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot {action} {show_path(path)}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot {action} {show_path(path)}: {error}") from None


def cast_finite(leaves: Mapping[str, Any], dtype: str | None = None) -> dict[str, np.ndarray]:
    """Return the leaves in host memory, cast to `dtype`; None: as they are.

    Raises:
        ValueError: a leaf holds NaN or infinity, or a number beyond the range of `dtype`; the message names it.
    """
    arrays = {}
    for name, leaf in leaves.items():
        array = np.asarray(jax.device_get(leaf))
        if not np.isfinite(array).all():
            kinds = [word for word, test in (("NaN", np.isnan), ("infinity", np.isinf)) if test(array).any()]
            raise ValueError(f"{name} holds {' and '.join(kinds)}; write a checkpoint from before the run diverged")
        with np.errstate(over="ignore"):
            arrays[name] = array if dtype is None else array.astype(jnp.dtype(dtype))
        if not np.isfinite(arrays[name]).all():
            largest, limit = float(np.abs(array).max()), float(jnp.finfo(dtype).max)
            raise ValueError(
                f"{name} holds numbers up to {largest:.6g}, and {dtype} ends at {limit:.6g}; write it as float32"
                f"{'' if dtype == 'bfloat16' else ' or bfloat16'}"
            )
    return arrays


def write(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write one file, which gets its name when it is complete.

    Raises:
        ValueError: it cannot be written.
    """
    # The library takes an array's address: what is not contiguous would be written as other bytes.
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with raise_as_value_error(file), storage.staged(file.parent) as folder:
        waiting = folder / f"{file.name}.partial"
        waiting.unlink(missing_ok=True)
        waiting.touch()
        mode = waiting.stat().st_mode  # as the umask says; the library makes a file that its owner alone may read
        safetensors.numpy.save_file(contiguous, waiting, metadata=dict(metadata))
        waiting.chmod(mode)
        waiting.replace(folder / file.name)


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all of one file, and its metadata.

    Raises:
        ValueError: it is not there or is not safetensors.
    """
    try:
        with safetensors.safe_open(storage.local_copy(file), framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
