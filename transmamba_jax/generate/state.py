"""Positions and caches of the rows of a generation: in memory, and as a file of safetensors."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from transmamba_jax import cache as memory
from transmamba_jax import schedule
from transmamba_jax.cache import Cache
from transmamba_jax.config import ModelConfig
from transmamba_jax.runtime import tensor_files, tree_paths
from transmamba_jax.shapes import Array, Float32

_FORMAT = "transmamba_jax decode state 1"
_OTHER_FIELDS = {"transpoints", "param_dtype", "remat"}
"""Of a config: what a state does not depend on, and the TransPoints, which stand apart."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Positions and caches of rows: plain data, to keep, copy, slice (`rows`) or write to a file (`Decoder.save`)."""

    cache: Cache
    logits: Float32[Array, "B V"]
    """Of each row's next token."""
    seen: Bool[Array, "B V"]
    """Tokens that a row has."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row so far."""
        return np.asarray(self.cache.lengths)

    def rows(self, indices: Sequence[int]) -> "DecodeState":
        """Return the state of these rows; a row named several times is continued in several ways."""
        picked = np.asarray(indices, np.int32)
        if picked.ndim != 1 or picked.size == 0 or picked.min() < 0 or picked.max() >= len(self.lengths):
            raise ValueError(f"indices must name rows 0..{len(self.lengths) - 1}, found {list(indices)}")
        return jax.tree.map(lambda leaf: leaf[picked], self)


def save(file: Path, state: DecodeState, config: ModelConfig) -> None:
    """Write a state and what it belongs to.

    Raises:
        ValueError: the file cannot be written.
    """
    arrays = {name: np.asarray(jax.device_get(array)) for name, array in tree_paths.flatten(state).items()}
    model, points = json.dumps(_fields(config)), json.dumps(state.cache.transpoints)
    metadata = {"format": _FORMAT, "model": model, "transpoints": points}
    tensor_files.write(file, arrays, metadata)


def load(file: Path, config: ModelConfig, points: schedule.Schedule) -> DecodeState:
    """Read what `save` wrote.

    Raises:
        ValueError: the file cannot be read, is of another model or schedule, or holds other names, shapes or dtypes
            than such a state.
    """
    arrays, metadata = tensor_files.read(file)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{file} must be a {_FORMAT}, as Decoder.save writes it, found {metadata.get('format')!r}")
    wanted, found = _fields(config), json.loads(metadata["model"])
    others = [
        f"{name}: {found.get(name)!r}, not {value!r}" for name, value in wanted.items() if found.get(name) != value
    ]
    if others:
        raise ValueError(f"{file} is the state of another model, whose config has {'; '.join(others)}")
    if metadata["transpoints"] != json.dumps(points):
        raise ValueError(f"{file} is a state under the TransPoints {metadata['transpoints']}, not {json.dumps(points)}")
    like = _like(config, points, arrays)
    describe = lambda array: f"{array.dtype}[{','.join(map(str, array.shape))}]"
    asked = {name: describe(array) for name, array in tree_paths.flatten(like).items()}
    held = {name: describe(array) for name, array in arrays.items()}
    tree_paths.raise_differences(f"{file} is not a whole state of this model", asked, held, "shape or dtype")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(arrays[name]) for name in asked])


def _like(config: ModelConfig, points: schedule.Schedule, arrays: dict[str, np.ndarray]) -> DecodeState:
    """Return the shapes and dtypes of a state of these lengths, with the capacities and states in `arrays`."""
    lengths = arrays.get("cache/lengths", np.zeros(1, np.int32)).reshape(-1)
    layers = []
    for index, point in enumerate(points):
        keys, state = arrays.get(f"cache/layers/{index}/keys"), arrays.get(f"cache/layers/{index}/state")
        # Rows before the TransPoint need their keys and values; the last row may still leave its state for later there.
        capacity = keys.shape[2] if keys is not None and keys.ndim == 4 else 0
        capacity = max(capacity, min(point, int(lengths.max()))) if lengths.min() < point else capacity
        lazy = state is None and int(lengths.max()) <= point
        layers.append(jax.eval_shape(partial(memory.init_layer, config, len(lengths), capacity, lazy)))
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((len(lengths), *shape), dtype)
    cache = Cache(tuple(layers), of(jnp.int32), points)  # type: ignore[arg-type]
    return DecodeState(cache, of(jnp.float32, config.vocab_size), of(jnp.bool_, config.vocab_size))  # type: ignore[arg-type]


def _fields(config: ModelConfig) -> dict[str, Any]:
    """Return what a state depends on, as JSON gives it back."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OTHER_FIELDS}
    return json.loads(json.dumps(fields))
