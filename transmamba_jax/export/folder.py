"""A trained model as a folder of plain files, which are read without orbax.

    model.safetensors   the parameters, `layers/mixer/q/kernel`, stacked over the layers
    config.yaml         the config, as train.py reads it
    tokenizer.json      the tokenizer, where there is one

`stablehlo.py` adds programs that need none of this package's code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transmamba_jax import config_io, data
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import tensor_files, tree_paths
from transmamba_jax.runtime.paths import expand_path

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"


class Loaded(NamedTuple):
    """Contents of an exported folder."""

    config: Config
    params: dict[str, Any]
    tokenizer: data.Tokenizer | None


def save(folder: str | Path, config: Config, params: Mapping[str, Any], tokenizer: data.Tokenizer | None) -> None:
    """Write parameters, config and tokenizer, into a folder or a bucket (gs:// or s3://).

    Raises:
        ValueError: a parameter is not finite; or the folder holds one of the files already, or cannot be written to.
    """
    folder = expand_path(folder)
    leaves = tensor_files.cast_finite(tree_paths.flatten(params))
    tensor_files.reserve_outputs(folder, [CONFIG, TOKENIZER])
    with tensor_files.raise_as_value_error(folder):
        (folder / CONFIG).write_text(config_io.checkpoint_yaml(config), encoding="utf-8")
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    tensor_files.write(folder / tensor_files.FILE, leaves, {"format": "transmamba_jax"})


def load(folder: str | Path) -> Loaded:
    """Read what `save` wrote: `config, params, tokenizer = transmamba_jax.export.load(folder)`.

    Raises:
        ValueError: a file is missing or is not what `save` writes, or the parameters do not fit the config.
    """
    folder = expand_path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} must hold {CONFIG} and {tensor_files.FILE}, as python -m transmamba_jax.export writes them from "
            f"a checkpoint, found {tensor_files.inside(folder)}"
        )
    config = config_io.read_config_file(folder / CONFIG)
    with tensor_files.open_folder(folder) as tensors:
        leaves = {name: jnp.asarray(tensors.rows(name, 0, tensors.shape(name)[0])) for name in tensors.names()}
    asked = {path: leaf.shape for path, leaf in tree_paths.flatten(abstract_params(config.model)).items()}
    found = {path: leaf.shape for path, leaf in leaves.items()}
    tree_paths.raise_differences(f"the tensors in {folder} do not fit its {CONFIG}", asked, found)
    return Loaded(config, tree_paths.nest(leaves), _read_tokenizer(folder / TOKENIZER))


def _read_tokenizer(file: Path) -> data.Tokenizer | None:
    if not file.is_file():
        return None
    try:
        return data.tokenizer_from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Return the shapes and dtypes of a model's parameters."""
    return jax.eval_shape(TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
