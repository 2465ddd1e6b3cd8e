"""Folders of safetensors files: read one tensor or some of its rows at a time, in one file or many; write."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
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
            in the file that the index says, or a file is not safetensors.
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
        astray = [f"{name} in {file}" for name, file in places.items() if name and name not in names[file]]
        if astray:
            raise ValueError(f"{folder / INDEX} names what is not there: {', '.join(astray)}")
        yield Tensors({name: opened[file] for file in opened for name in names[file]})


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


def raise_differences(what: str, asked: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> None:
    """Compare names and shapes.

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


def claim(folder: Path) -> None:
    """Make a folder to write to.

    Raises:
        ValueError: it cannot be made, or there are weights in it already; nothing is overwritten.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from None
    there = [name for name in (FILE, INDEX) if (folder / name).exists()]
    if there:
        raise ValueError(f"{folder} already holds {there[0]}; name a new folder, or delete it")


def write(folder: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write one file, which gets its name when it is complete."""
    waiting = folder / f"{FILE}.partial"
    # The library takes an array's address: what is not contiguous would be written as other bytes.
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, waiting, metadata=dict(metadata))
    os.replace(waiting, folder / FILE)
