"""Distribution: the mesh, and the one table that says where parameters and activations live.

Everything else is `jax.jit` with `NamedSharding`s: XLA inserts the collectives. Mesh axes:

    data   copies of the parameters; rows of the batch are split over it
    fsdp   parts of the parameters and of the optimizer state; rows are split over it too
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transmamba_jax.config import Config, MeshConfig

# Path pattern -> specs in order of preference: the larger axis of a matrix first, then the other. The first spec whose
# axes divide evenly over the mesh is used; where none does, the leaf is copied to every device. The leading axis of
# `layers` is scanned over and never cut. The last row: vectors and convolution taps are too small to be worth a gather.
PARAMETERS: tuple[tuple[str, tuple[P, ...]], ...] = (
    (r"embedding", (P("fsdp", None), P(None, "fsdp"))),
    (r"lm_head", (P(None, "fsdp"), P("fsdp", None))),
    (r"layers/mixer/(q|k|v|z)/kernel", (P(None, None, "fsdp"), P(None, "fsdp", None))),
    (r"layers/mixer/dt/kernel", (P(None, "fsdp", None),)),
    (r"layers/mixer/out/kernel", (P(None, "fsdp", None), P(None, None, "fsdp"))),
    (r"layers/mlp/(gate|up)/kernel", (P(None, None, "fsdp"), P(None, "fsdp", None))),
    (r"layers/mlp/down/kernel", (P(None, "fsdp", None), P(None, None, "fsdp"))),
    (r"layers/mixer/conv_(q|k|v)/(kernel|bias)|layers/mixer/(a_log|dt_bias|skip)|.*norm/scale", (P(),)),
)

ROWS = ("data", "fsdp")  # mesh axes that the rows of a batch are split over
ACTIVATIONS: dict[str, P] = {
    "tokens": P(ROWS, None),
    "microbatches": P(None, ROWS, None),
    "hidden": P(ROWS, None, None),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay the devices out along the axes of `config`.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    named = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % named or (-1 not in sizes.values() and named != len(devices)):
        asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{asked} needs {'a multiple of ' if -1 in sizes.values() else ''}{named} devices, found {len(devices)}; "
            "the sizes must multiply to the number of devices (-1 takes what is left)"
        )
    shape = tuple(len(devices) // named if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts that the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Check that every microbatch divides over the devices.

    Raises:
        ValueError: it does not.
    """
    shards = row_shards(mesh)
    rows = config.data.batch_size // config.train.accumulation
    if rows % shards:
        step = shards * config.train.accumulation
        raise ValueError(
            f"data.batch_size={config.data.batch_size} in train.accumulation={config.train.accumulation} microbatches "
            f"gives {rows} rows each, which do not divide over {shards} devices; data.batch_size must be a multiple "
            f"of {step}"
        )


def path_name(path: Sequence[Any]) -> str:
    """Write a tree path as `layers/mixer/q/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """Look a parameter up in the table.

    Raises:
        ValueError: no row of the table names it.
    """
    for pattern, specs in PARAMETERS:
        if re.fullmatch(pattern, path):
            return next((spec for spec in specs if _divides(spec, shape, mesh)), P())
    raise ValueError(f"parameter {path} of shape {tuple(shape)} has no row in transmamba_jax.sharding.PARAMETERS")


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of every parameter; `params` may be abstract."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, mesh)), params
    )


def like_parameters(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Shard a tree that holds copies of the parameters' tree, such as an optimizer state.

    A leaf whose path ends in a parameter's path and that has its shape lies as the parameter does; any other leaf
    (counters, coefficients) is copied to every device.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        names = ("/".join(parts[start:]) for start in range(len(parts)))
        match = next((name for name in names if name in shapes and shapes[name] == leaf.shape), None)
        return NamedSharding(mesh, P() if match is None else parameter_spec(match, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def activation(name: str, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a named activation."""
    return NamedSharding(mesh, ACTIVATIONS[name])


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices, as part of one global batch."""
    sharding = activation("tokens", mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _divides(spec: P, shape: Sequence[int], mesh: Mesh) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for size, axis in zip(shape, spec, strict=False))
