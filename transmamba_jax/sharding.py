"""Distribution: the mesh, and the one table that says where parameters and activations live.

Everything is `jax.jit` with `NamedSharding`s: XLA inserts the collectives. Mesh axes:

    data     copies of the parameters; rows of the batch are split over it
    fsdp     parts of the parameters and of the optimizer state; rows are split over it too
    context  parts of the sequence (parallel.py has what that takes)
    tensor   parts of the heads, of the MLP's width and of the vocabulary
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transmamba_jax.config import Config, MeshConfig
from transmamba_jax.runtime.tree_paths import path_name

# Path pattern -> mesh axis of every dimension. An axis that does not divide its dimension is left out. The leading axis
# of `layers` is scanned over and never cut. Vectors are too small for fsdp to be worth a gather.
PARAMETERS: tuple[tuple[str, P], ...] = (
    (r"embedding", P("tensor", "fsdp")),
    (r"lm_head", P("fsdp", "tensor")),
    (r"layers/mixer/(attention_)?(q|k|v|z|dt)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mixer/out/kernel", P(None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"layers/mixer/(attention_)?conv_(q|k|v)/kernel", P(None, None, "tensor")),
    (r"layers/mixer/(attention_)?conv_(q|k|v)/bias|layers/mixer/(a_log|dt_bias|skip|norm/scale)", P(None, "tensor")),
    (r"(layers/(mixer|mlp)_norm|final_norm)/scale", P()),
)

# Name of an activation's dimension -> mesh axes that it is split over, those that divide it. Groups are heads too.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "time": ("context",),
    "heads": ("tensor",),
    "width": ("tensor",),
    # Attention needs whole rows, so what splits time elsewhere splits heads there. The loss needs whole vocabularies.
    "spread_heads": ("context", "tensor"),
    "spread_time": ("context", "tensor"),
}

Layout = Sequence[str | None]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay the devices out along the axes of `config`.

    Where they are in several slices (TPU slices, or groups of GPUs that share a fast network), entire slices are placed
    along `data` first and `fsdp` then: the network between slices carries one gradient or gather per step, not every
    layer's activations.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices, or the slices do not divide over data and
            fsdp.
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
    shape = {name: len(devices) // named if size == -1 else size for name, size in sizes.items()}
    types = (AxisType.Auto,) * len(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # jax.make_mesh splits no axis of a three-dimensional torus, as two devices of v5p:8x8x8 for a row need it.
        grid = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, tuple(shape), axis_types=types)
    outer = dict.fromkeys(shape, 1)
    for axis in ("data", "fsdp"):
        outer[axis] = math.gcd(shape[axis], slices // math.prod(outer.values()))
    if math.prod(outer.values()) != slices:
        raise ValueError(
            f"the devices are in {slices} slices, which do not divide over mesh.data={shape['data']} and "
            f"mesh.fsdp={shape['fsdp']}; make one of them a multiple of {slices}"
        )
    inner = [size // outer[axis] for axis, size in shape.items()]
    grid = mesh_utils.create_hybrid_device_mesh(inner, list(outer.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(shape), axis_types=types)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["rows"])


def check_divides(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Check that rows, tokens, heads and widths divide over the devices.

    Raises:
        ValueError: one does not.
    """
    model, tensor, context = config.model, mesh.shape["tensor"], mesh.shape["context"]
    for axis, parts_, name, size in (
        ("tensor", tensor, "model.num_groups", model.num_groups),
        ("tensor", tensor, "model.mlp_dim", model.mlp_dim),
        ("context", context, "data.seq_len", config.data.seq_len),
        ("context * mesh.tensor", context * tensor if context > 1 else 1, "model.num_heads", model.num_heads),
    ):
        if size % parts_:
            raise ValueError(
                f"mesh.{axis}={parts_} does not divide {name}={size}; use a divisor of it, or change {name}"
            )
    shards = row_shards(mesh)
    rows = config.data.batch_size // config.train.accumulation
    if rows % shards:
        step = shards * config.train.accumulation
        raise ValueError(
            f"data.batch_size={config.data.batch_size} in train.accumulation={config.train.accumulation} microbatches "
            f"gives {rows} rows each, which do not divide over {shards} devices; data.batch_size must be a multiple "
            f"of {step}"
        )


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Look a parameter up in the table.

    Raises:
        ValueError: no row of the table names it.
    """
    for pattern, axes in PARAMETERS:
        if re.fullmatch(pattern, path):
            named = zip(shape, axes, strict=False)
            return P(*(axis if axis is not None and size % mesh.shape[axis] == 0 else None for size, axis in named))
    raise ValueError(f"parameter {path} of shape {tuple(shape)} has no row in transmamba_jax.sharding.PARAMETERS")


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of every parameter; `params` may be abstract."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, mesh)), params
    )


def like_parameters(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Shard a tree that holds copies of the parameters' tree, such as an optimizer state.

    A leaf whose path ends in a parameter's path and that has its shape is sharded as the parameter is; any other leaf
    (counters, coefficients) is copied to every device.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        names = ("/".join(parts[start:]) for start in range(len(parts)))
        match = next((name for name in names if name in shapes and shapes[name] == leaf.shape), None)
        return NamedSharding(mesh, P() if match is None else parameter_spec(match, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch as it comes in: rows alone, since T + 1 tokens do not divide as T do."""
    return NamedSharding(mesh, P(ACTIVATIONS["rows"]))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices, as part of one global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


# Inside a traced function: what follows is about the mesh of `jax.set_mesh`, and does nothing where there is none.


def _mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    # Inside jax.shard_map everything is local already.
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def parts(name: str, size: int) -> int:
    """Return how many parts a dimension of this name (see ACTIVATIONS) and size is split into."""
    mesh = _mesh()
    count = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ACTIVATIONS[name])
    return count if size % count == 0 else 1


def constrain(x: jax.Array, layout: Layout) -> jax.Array:
    """Split an activation's dimensions as their names say (None: not at all)."""
    if _mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, _spec(layout, {name: parts(name, size) for name, size in _sizes(layout, x)})
    )


def gather_parameter(path: str, value: jax.Array) -> jax.Array:
    """Collect the parts of a parameter that are sharded along fsdp, for its use: rows are split there, not channels.

    Below `layers` the value is one layer's, without the leading axis.
    """
    mesh = _mesh()
    if mesh is None:
        return value
    stacked = path.startswith("layers/")
    spec = parameter_spec(path, (1, *value.shape) if stacked else value.shape, mesh)[int(stacked) :]
    # The first constraint says that the part is what is kept for the backward pass: left alone, the CPU's compiler
    # keeps the unsharded parameters of every layer.
    value = jax.lax.with_sharding_constraint(value, P(*spec))
    return jax.lax.with_sharding_constraint(value, P(*(None if axis == "fsdp" else axis for axis in spec)))


def gather_layer(params: Any) -> Any:
    """Collect the parts of one layer's parameters (a slice of `layers`); see `gather_parameter`."""
    return jax.tree.map_with_path(lambda path, leaf: gather_parameter(f"layers/{path_name(path)}", leaf), params)


def per_shard(function: Callable[..., Any], layouts: Sequence[Layout], out_layouts: Any, *arrays: Any) -> Any:
    """Call `function` on each device's part of the arrays, split as their layouts say; an array may be None.

    A dimension's name means the same in every layout: where the devices do not divide one of its sizes, it stays
    unsplit everywhere. `out_layouts` is one layout, or a tuple of them for several results.
    """
    mesh = _mesh()
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    counts: dict[str, int] = {}
    for layout, array in zip(layouts, arrays, strict=True):
        if array is not None:
            for name, size in _sizes(layout, array):
                counts[name] = min(counts.get(name, parts(name, size)), parts(name, size))
    several = isinstance(out_layouts[0], tuple)
    out_specs = tuple(_spec(layout, counts) for layout in out_layouts) if several else _spec(out_layouts, counts)
    in_specs = tuple(_spec(layout, counts) for layout in layouts)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def _sizes(layout: Layout, array: jax.Array) -> list[tuple[str, int]]:
    return [(name, size) for name, size in zip(layout, array.shape, strict=True) if name is not None]


def _spec(layout: Layout, counts: dict[str, int]) -> P:
    return P(*(ACTIVATIONS[name] if name is not None and counts.get(name, 1) > 1 else None for name in layout))
