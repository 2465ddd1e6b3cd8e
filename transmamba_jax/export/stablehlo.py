"""Programs of a model that need none of this package's code: StableHLO, written by `jax.export`.

    forward.jax        (params, tokens int32 [b, t]) -> logits float32 [b, t, V]
    pack_weights.jax   (params) -> weights, in the layout of a decoding step
    decode.jax         (weights, cache, tokens int32 [b]) -> (logits float32 [b, V], cache)

One file serves CPU, CUDA and TPU. A call chooses batch b, length t and the cache's capacity s. The schedule is the
config's.
"""

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from transmamba_jax import cache as memory
from transmamba_jax import schedule
from transmamba_jax.cache import LayerCache
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.generate import decode_step
from transmamba_jax.generate.arguments import check_model
from transmamba_jax.generate.decode_step import Branch, LayerMode, LayerWeights, MLPWeights
from transmamba_jax.model import TransMamba, embed
from transmamba_jax.runtime import tensor_files
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.shapes import Array, Float32, Int, least

PROGRAMS = ("forward", "pack_weights", "decode")
PLATFORMS = ("cpu", "cuda", "tpu")

# The implementations that run anywhere, and at any length.
_PORTABLE = KernelsConfig(ssd="associative", attention="blockwise")


def save_programs(
    folder: str | Path, config: ModelConfig, params: Mapping[str, Any], platforms: Sequence[str] = PLATFORMS
) -> None:
    """Write the programs; of the parameters only shapes and dtypes are read.

    Raises:
        ValueError: a platform that is unknown, or the folder cannot be written to.
    """
    folder = expand_path(folder)
    tensor_files.make(folder)
    for name, program in programs(config, params, platforms).items():
        waiting = folder / f"{name}.jax.partial"
        with tensor_files.raise_as_value_error(waiting):
            waiting.write_bytes(program.serialize())
            waiting.replace(folder / f"{name}.jax")


def load_program(folder: str | Path, name: str) -> jax_export.Exported:
    """Read a program; `load_program(folder, "forward").call(params, tokens)` runs it.

    Raises:
        ValueError: there is no such program, or the file is damaged.
    """
    if name not in PROGRAMS:
        raise ValueError(f"name must be one of {', '.join(PROGRAMS)}, found {name!r}")
    file = expand_path(folder) / f"{name}.jax"
    if not file.is_file():
        raise ValueError(f"{file.parent} must hold {file.name}, found {tensor_files.inside(file.parent)}")
    try:
        return jax_export.deserialize(bytearray(file.read_bytes()))
    except struct.error as error:  # of a file that ends too early
        raise ValueError(f"{file} is damaged: {error}") from None


def programs(
    config: ModelConfig, params: Mapping[str, Any], platforms: Sequence[str] = PLATFORMS
) -> dict[str, jax_export.Exported]:
    """Return the programs by name: forward, pack_weights, decode.

    Raises:
        ValueError: a platform that is unknown, or a mixer with an ablation, which cannot decode.
    """
    check_platforms(platforms)
    check_model(TransMamba(config))
    config = dataclasses.replace(config, remat="none")
    model = TransMamba(config, _PORTABLE)
    batch, time, capacity = jax_export.symbolic_shape("b, t, s")
    tokens = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(params))
    forward = lambda params, tokens: model.apply({"params": params}, tokens)
    pack = lambda params: pack_weights(config, params)
    step = lambda weights, cache, tokens: decode(config, weights, cache, tokens)
    write = lambda function, *arguments: jax_export.export(jax.jit(function), platforms=platforms)(*arguments)
    weights = jax.eval_shape(pack, abstract)
    cache = _cache_shapes(config, batch, capacity)
    return {
        "forward": write(forward, abstract, tokens(batch, time)),
        "pack_weights": write(pack, abstract),
        "decode": write(step, weights, cache, tokens(batch)),
    }


def check_platforms(platforms: Sequence[str]) -> None:
    """Raise a ValueError unless programs can be lowered for all of `platforms`."""
    if not platforms or not set(platforms) <= {*PLATFORMS, "rocm"}:
        raise ValueError(
            f"platforms must be some of {', '.join(PLATFORMS)} and rocm, found {', '.join(platforms) or 'none'}"
        )


def new_cache(config: ModelConfig, batch: int, capacity: int) -> dict[str, Any]:
    """Return the cache of `batch` empty rows for `decode`, as plain dicts.

    A layer with TransPoint P > 0 holds min(P, capacity) keys and values (the largest P: `capacity`). `capacity` must be
    at least the tokens of the longest row, or the largest TransPoint: what exceeds it is forgotten.
    """
    return jax.tree.map(
        lambda leaf: jnp.array(np.zeros(leaf.shape, leaf.dtype)), _cache_shapes(config, batch, capacity)
    )


def _cache_shapes(config: ModelConfig, batch: Any, capacity: Any) -> dict[str, Any]:
    """Return the shapes and dtypes of a cache; `batch` and `capacity` may be symbolic."""
    points = schedule.expand(config.transpoints, config.num_layers)
    wide = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    narrow = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.dtype(config.dtype))
    layers = []
    for point in points:
        # The state is carried along from the first token: rows of any lengths share a step, some before P, some beyond.
        layer = {
            "window": narrow(config.conv_width - 1, 2 * config.d_key + config.d_inner),
            "state": wide(config.num_heads, config.head_dim, config.state_dim),
        }
        if point > 0:
            size = capacity if point == max(points) else least(point, capacity)
            layer["keys"] = narrow(config.num_groups, size, config.state_dim)
            layer["values"] = narrow(config.num_heads, size, config.head_dim)
        layers.append(layer)
    return {"lengths": jax.ShapeDtypeStruct((batch,), jnp.int32), "layers": layers}


def pack_weights(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in the layout of `decode`, as plain dicts."""
    plain = lambda fields: {name: value for name, value in vars(fields).items() if value is not None}
    weights = decode_step.pack_weights(config, params)
    layers = [plain(layer) | ({} if layer.mlp is None else {"mlp": plain(layer.mlp)}) for layer in weights.layers]
    return plain(weights) | {"layers": layers}


def decode(
    config: ModelConfig, weights: Mapping[str, Any], cache: Mapping[str, Any], tokens: Int[Array, "B"]
) -> tuple[Float32[Array, "B V"], dict[str, Any]]:
    """Read one more token per row; rows may have different lengths.

    Returns:
        The logits of the next token per row, and the cache after this one.
    """
    starts, first = cache["lengths"], jnp.int32(0)
    x = embed(config, weights["embedding"], tokens)
    layers = []
    points = schedule.expand(config.transpoints, config.num_layers)
    for point, fields, plain in zip(points, weights["layers"], cache["layers"], strict=True):
        mlp = MLPWeights(**fields["mlp"]) if config.mlp_dim else None
        layer_weights = LayerWeights(**{"skip": None, **fields, "mlp": mlp})
        mode = LayerMode(Branch.MIXED, point) if point else LayerMode(Branch.SSM)
        layer = LayerCache(**plain)
        staging = memory.staging_layer(layer, 1)
        x, layer, staging = decode_step.layer_step(config, layer_weights, x, layer, staging, starts, first, mode)
        layer = memory.flush(layer, staging, starts, 1)
        layers.append({name: value for name, value in vars(layer).items() if value is not None})
    logits = decode_step.next_logits(config, x, weights["final_norm"], weights["embedding"], weights.get("head"))
    return logits, {"lengths": starts + 1, "layers": layers}
