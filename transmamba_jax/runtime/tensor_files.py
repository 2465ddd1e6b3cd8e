"""Folders of safetensors files: read one tensor or some of its rows at a time, in one file or many; write."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.tree_util import keystr

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
                opened[file] = stack.enter_context(safetensors.safe_open(folder / file, framework="np"))
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
            raise ValueError(
                f"{folder} must hold each tensor in one file, found {', '.join(twice)}; delete what is old"
            )
        astray = [f"{name} in {file}" for name, file in places.items() if name and name not in names[file]]
        if astray:
            raise ValueError(f"{folder / INDEX} names what is not there: {', '.join(astray)}")
        yield Tensors({name: opened[file] for name, (file,) in owners.items()})


def _places(folder: Path) -> dict[str, str]:
    """Return name -> file; a single file needs no names."""
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{folder / INDEX} must have a mapping weight_map of names to files, found {places!r}")
        outside = sorted({file for file in places.values() if Path(file).name != file})
        if outside:
            raise ValueError(f"{folder / INDEX} must name files of the same folder, found {outside}")
        return places
    if (folder / FILE).is_file():
        return {"": FILE}
    raise ValueError(f"{folder} must hold {FILE} or {INDEX} (other formats are not read), found {inside(folder)}")


def inside(folder: Path) -> str:
    """Say what is in a folder, for a message."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it is not there, cannot be read, or is something else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold {path.name}, found {inside(path.parent)}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(tree).__name__}")
    return tree


def flatten(tree: Any) -> dict[str, Any]:
    """Return path -> leaf, such as `layers/mixer/q/kernel`."""
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten` for a tree of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def raise_differences(what: str, asked: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Compare names and shapes, or what else stands behind the names.

    Raises:
        ValueError: there is a name on one side only, or another shape; the message lists both sides.
    """
    missing = [f"{name} {shape}" for name, shape in asked.items() if name not in found]
    unknown = [f"{name} {shape}" for name, shape in found.items() if name not in asked]
    shapes = [
        f"{name}: needed {shape}, found {found[name]}"
        for name, shape in asked.items()
        if name in found and shape != found[name]
    ]
    if missing or unknown or shapes:
        lines = [
            f"needed and not there: {', '.join(missing) or 'none'}",
            f"there and not known: {', '.join(unknown) or 'none'}",
        ]
        raise ValueError("\n  ".join([f"{what}:", *lines, *shapes]))


def make(folder: Path) -> None:
    """Make a folder to write to.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from None
    with explained(folder), tempfile.NamedTemporaryFile(dir=folder):
        pass


def claim(folder: Path, files: Sequence[str]) -> None:
    """Make a folder to write weights and these files to, beside whatever else is there.

    Raises:
        ValueError: as for `make`, or some of them are in it already; nothing is overwritten.
    """
    make(folder)
    there = [name for name in dict.fromkeys((FILE, INDEX, *files)) if (folder / name).exists()]
    if there:
        raise ValueError(f"{folder} already holds {', '.join(there)}; name a new folder")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system and safetensors raise while `path` is written into a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def write(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write one file, which gets its name when it is complete.

    Raises:
        ValueError: it cannot be written.
    """
    waiting = file.with_name(f"{file.name}.partial")
    # The library takes an array's address: what is not contiguous would be written as other bytes.
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with explained(file):
        safetensors.numpy.save_file(contiguous, waiting, metadata=dict(metadata))
        os.replace(waiting, file)


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all of one file, and its metadata.

    Raises:
        ValueError: it is not there or is not safetensors.
    """
    try:
        with safetensors.safe_open(file, framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
