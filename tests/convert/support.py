"""The stored models of transformers, and copies of them to edit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import transmamba_jax as tm
from transmamba_jax import convert

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba2"
CASES = ("tied", "limited", "bfloat16")


@cache
def golden(case: str) -> tuple[tm.ModelConfig, Any, np.ndarray, np.ndarray]:
    """Config with float32 compute, parameters, tokens, and torch's float32 logits."""
    config, params = convert.from_mamba2(GOLDEN / case)
    expected = load_file(GOLDEN / f"{case}.safetensors")
    return dataclasses.replace(config, dtype="float32"), params, expected["tokens"], expected["logits"]


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's dtype and shape, and its bytes."""
    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return {name: (f"{array.dtype} {array.shape}", array.tobytes()) for name, array in found.items()}


def copied(tmp_path: Path, case: str = "tied") -> Path:
    return Path(shutil.copytree(GOLDEN / case, tmp_path / case))


def edit_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return edit


def edit_json(name: str = "config.json", **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, **values}))

    return edit


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def hold_twice(folder: Path) -> None:
    first, second = (folder / f"model-0000{part}-of-00003.safetensors" for part in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)


STATE_SPACES = {"d_model": 16, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2", "headdim": 8}}


def trained_on(tree: dict[str, Any], path: str, value: float) -> dict[str, Any]:
    """Return parameters with one number of a leaf replaced."""
    return jax.tree.map_with_path(
        lambda at, leaf: (
            np.where(np.arange(leaf.size).reshape(leaf.shape) == 1, np.float32(value), leaf)
            if jax.tree_util.keystr(at, simple=True, separator="/") == path
            else leaf
        ),
        tree,
    )
