"""Read and write Mamba-2 weights: safetensors with the names of transformers or of state-spaces.

A Mamba-2 model is this package's model with every TransPoint 0 and no MLP. `docs/convert.md` has the table of names.
No pickle is ever opened.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import config_io, export
from transmamba_jax.convert import mamba2_config, tokenizer_files
from transmamba_jax.convert.mamba2_config import Naming
from transmamba_jax.data import tokenizers as data
from transmamba_jax.model_config import DTypeName, ModelConfig
from transmamba_jax.runtime import tensor_files, tree_paths
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.runtime.tensor_files import Tensors

_OF_A_RUN = ("metrics.jsonl", "tensorboard", "report")
"""Outputs of training; those of an earlier run would be mixed with, or cut for, the one that starts."""

_LAYER = "backbone.layers.{layer}."
NAMINGS = {"transformers": "backbone.embeddings.weight", "state-spaces": "backbone.embedding.weight"}
_HEAD = "lm_head.weight"

_Turn: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One leaf of this package: rows `start` to `stop` of one tensor of a Mamba-2 file, in another layout."""

    path: str
    name: str
    start: int
    stop: int
    tail: tuple[int, ...]
    """Shape of one row in the file."""
    from_file: _Turn
    to_file: _Turn

    @property
    def layered(self) -> bool:
        """True for a leaf that is stacked over the layers."""
        return self.path.startswith("layers/")


def from_mamba2(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a Mamba-2 model: `config.json` and safetensors, in one file or many.

    Weights that are all bfloat16 stay so, and so does the compute dtype of the config; anything else becomes float32,
    without loss.

    Returns:
        The config, with every TransPoint 0, and the parameters for `TransMamba(config)`.

    Raises:
        ValueError: a file is missing or of another format; the config asks for what this package does not have; or
            a tensor is missing, unexpected or of another shape, and the message lists each.
    """
    folder = expand_path(folder)
    config, naming = mamba2_config.read(folder)
    parts = _parts(config, naming)
    with tensor_files.open_folder(folder) as tensors:
        _check_tensors(folder, config, naming, parts, tensors)
        kinds = {tensors.dtype(name) for name in tensors.names()}
        unknown = sorted(kinds - set(tensor_files.DTYPES))
        if unknown:
            raise ValueError(f"{folder} must hold {', '.join(tensor_files.DTYPES)}, found {', '.join(unknown)}")
        dtype: DTypeName = "bfloat16" if kinds == {"BF16"} else "float32"
        leaves = {part.path: _read(part, config.num_layers, tensors, dtype) for part in parts}
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    return config, tree_paths.nest(leaves)


def to_mamba2(
    config: ModelConfig,
    params: Mapping[str, Any],
    folder: str | Path,
    naming: Naming = "transformers",
    dtype: str | None = None,
    tokenizer: data.Tokenizer | None = None,
) -> None:
    """Write a model whose every TransPoint is 0 as a Mamba-2 model: `config.json`, `model.safetensors`, tokenizer.

    Args:
        config: the model's.
        params: its parameters.
        folder: a new one, or one without weights and config.json.
        naming: whose names, transformers' or state-spaces'.
        dtype: "float32", "bfloat16" or "float16"; None: as the parameters are.
        tokenizer: written as `tokenizer.json` and `tokenizer_config.json`; its end of document becomes `eos_token_id`.

    Raises:
        ValueError: the model is not a Mamba-2 model, or the naming has no option for it; a parameter is missing,
            unexpected, of another shape, not finite, or beyond the range of `dtype`; the folder holds one of the files
            already or cannot be written to; or naming or dtype is unknown.
    """
    folder = expand_path(folder)
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}, found {naming!r}")
    if dtype is not None and dtype not in tensor_files.DTYPES.values():
        raise ValueError(f"dtype must be None or one of {', '.join(tensor_files.DTYPES.values())}, found {dtype!r}")
    end = None if tokenizer is None else tokenizer.end_of_document
    parts = _parts(config, naming)
    leaves = tree_paths.flatten(params)
    tree = mamba2_config.write(config, naming, dtype or _dtype_of(leaves), end)
    _check_leaves(config, parts, leaves)
    arrays = tensor_files.cast_finite(leaves, dtype)
    tensors: dict[str, list[np.ndarray]] = {}
    for part in parts:
        leaf = arrays[part.path]
        for layer in range(config.num_layers if part.layered else 1):
            rows = part.to_file(leaf[layer] if part.layered else leaf)
            tensors.setdefault(part.name.format(layer=layer), []).append(rows)
    tensor_files.reserve_outputs(folder, [mamba2_config.FILE, *tokenizer_files.names(tokenizer)])
    whole = {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in tensors.items()}
    tensor_files.write(folder / tensor_files.FILE, whole, {"format": "pt"})
    with tensor_files.raise_as_value_error(folder):
        (folder / mamba2_config.FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    tokenizer_files.write(folder, tokenizer)


@no_type_check
@partial(jax.tree_util.register_dataclass, data_fields=["params", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Start:
    """A training state before the first step: the optimizer's state is not known yet."""

    params: Any
    step: jax.Array


def start_run(folder: str | Path, workdir: str | Path) -> None:
    """Write an exported folder as step 0 of a work directory: parameters, config.yaml, the tokenizer.

    There is no optimizer state in it: `train.py --config WORKDIR/config.yaml --checkpoint.partial True` starts that.

    Raises:
        ValueError: the folder cannot be read; a parameter is not finite; or the work directory has checkpoints, one of
            the files or outputs of another run already, or cannot be written to.
    """
    from transmamba_jax import checkpoint  # orbax takes seconds to import, and conversion does not need it

    workdir = expand_path(workdir).absolute()  # its config names it, wherever training is started
    loaded, directory = export.load(folder), workdir / "checkpoints"
    done = checkpoint.complete_steps(directory)
    if done:
        raise ValueError(f"{directory} already holds step {done[-1]}; name a new work directory")
    params = tree_paths.nest(tensor_files.cast_finite(tree_paths.flatten(loaded.params)))
    tensor_files.reserve_outputs(workdir, [export.CONFIG, export.TOKENIZER, *_OF_A_RUN])
    tensor_files.make(directory)
    writer = checkpoint.Checkpointer(directory, loaded.config.checkpoint)
    tokenizer = data.ByteTokenizer() if loaded.tokenizer is None else loaded.tokenizer
    config = dataclasses.replace(loaded.config, workdir=str(workdir))
    if isinstance(tokenizer, data.JsonTokenizer):
        named = dataclasses.replace(config.data, tokenizer=str(workdir / export.TOKENIZER))
        config = dataclasses.replace(config, data=named)
    nothing_read: dict[str, Any] = {"streams": []}
    state = _Start(params, jnp.zeros((), jnp.int32))
    with tensor_files.raise_as_value_error(directory):
        writer.save(0, state, nothing_read, config_io.checkpoint_yaml(config), tokenizer.to_json())
        writer.close()
    with tensor_files.raise_as_value_error(workdir):
        if isinstance(tokenizer, data.JsonTokenizer):
            (workdir / export.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        (workdir / export.CONFIG).write_text(config_io.to_yaml(config), encoding="utf-8")


def _parts(config: ModelConfig, naming: Naming) -> list[_Part]:
    """List the leaves with their names in the file; the parts of one tensor are in the order of its rows."""
    inner, key, heads, width = config.d_inner, config.d_key, config.num_heads, config.d_model
    vkq = (("v", inner), ("k", key), ("q", key))  # x, B and C
    same: _Turn = lambda array: array
    transpose: _Turn = lambda array: array.T
    parts: list[_Part] = []

    def add(
        name: str,
        rows: Sequence[tuple[str, int]],
        tail: tuple[int, ...] = (),
        from_file: _Turn = same,
        to_file: _Turn = same,
    ) -> None:
        start = 0
        for path, count in rows:
            parts.append(_Part(path, name, start, start + count, tail, from_file, to_file))
            start += count

    mixer, ours = f"{_LAYER}mixer.", "layers/mixer/"
    projections = [(f"{ours}{leaf}/kernel", rows) for leaf, rows in (("z", inner), *vkq, ("dt", heads))]
    add(f"{mixer}in_proj.weight", projections, (width,), transpose, transpose)
    kernels = [(f"{ours}conv_{leaf}/kernel", rows) for leaf, rows in vkq]
    add(f"{mixer}conv1d.weight", kernels, (1, config.conv_width), lambda x: x[:, 0].T, lambda x: x.T[:, None])
    if config.conv_bias:
        add(f"{mixer}conv1d.bias", [(f"{ours}conv_{leaf}/bias", rows) for leaf, rows in vkq])
    for name, leaf in (("A_log", "a_log"), ("D", "skip"), ("dt_bias", "dt_bias")):
        add(f"{mixer}{name}", [(f"{ours}{leaf}", heads)])
    by_group: _Turn = lambda array: array.reshape(config.num_groups, -1)
    add(f"{mixer}norm.weight", [(f"{ours}norm/scale", inner)], (), by_group, lambda array: array.reshape(-1))
    add(f"{mixer}out_proj.weight", [(f"{ours}out/kernel", width)], (inner,), transpose, transpose)
    add(f"{_LAYER}norm.weight", [("layers/mixer_norm/scale", width)])
    add("backbone.norm_f.weight", [("final_norm/scale", width)])
    add(NAMINGS[naming], [("embedding", config.vocab_size)], (width,))
    if not config.tie_embeddings:
        add(_HEAD, [("lm_head", config.vocab_size)], (width,), transpose, transpose)
    return parts


def _read(part: _Part, num_layers: int, tensors: Tensors, dtype: str) -> Any:
    names = [part.name.format(layer=layer) for layer in range(num_layers if part.layered else 1)]
    rows = [part.from_file(tensors.rows(name, part.start, part.stop)).astype(jnp.dtype(dtype)) for name in names]
    return jnp.asarray(np.stack(rows) if part.layered else rows[0])


def _check_tensors(folder: Path, config: ModelConfig, naming: Naming, parts: list[_Part], tensors: Tensors) -> None:
    """Compare names and shapes, and a head that is said to be the embedding with it."""
    if config.num_layers > len(tensors.names()):
        raise ValueError(
            f"{folder}: {mamba2_config.FILE} has {config.num_layers} layers, and the files only "
            f"{len(tensors.names())} tensors"
        )
    asked = {}
    for part in parts:  # the last part of a tensor ends where the tensor ends
        for layer in range(config.num_layers if part.layered else 1):
            asked[part.name.format(layer=layer)] = (part.stop, *part.tail)
    found = {name: tensors.shape(name) for name in tensors.names()}
    tied = config.tie_embeddings and _HEAD in found
    if tied:
        asked[_HEAD] = (config.vocab_size, config.d_model)
    tree_paths.raise_differences(f"the tensors in {folder} do not fit its {mamba2_config.FILE}", asked, found)
    if tied:
        whole = (0, config.vocab_size)
        if not np.array_equal(tensors.rows(_HEAD, *whole), tensors.rows(NAMINGS[naming], *whole)):
            raise ValueError(
                f"{folder}: {_HEAD} must equal {NAMINGS[naming]}, because {mamba2_config.FILE} ties them; they differ"
            )


def _dtype_of(leaves: Mapping[str, Any]) -> str:
    """Return the dtype of the leaves, float32 where they differ.

    Raises:
        ValueError: a leaf has a dtype that Mamba-2 files do not have.
    """
    dtypes = {path: str(np.asarray(leaf).dtype) for path, leaf in leaves.items()}
    for path, dtype in dtypes.items():
        if dtype not in tensor_files.DTYPES.values():
            known = ", ".join(tensor_files.DTYPES.values())
            raise ValueError(f"{path} must be of dtype {known}, found {dtype}; cast it, or give dtype='float32'")
    return next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else "float32"


def _check_leaves(config: ModelConfig, parts: list[_Part], leaves: Mapping[str, Any]) -> None:
    asked = {}
    for part in parts:
        row = np.broadcast_to(np.False_, (part.stop - part.start, *part.tail))
        asked[part.path] = (*([config.num_layers] if part.layered else []), *part.from_file(row).shape)
    found = {path: np.shape(leaf) for path, leaf in leaves.items()}
    tree_paths.raise_differences("params do not fit the config", asked, found)
