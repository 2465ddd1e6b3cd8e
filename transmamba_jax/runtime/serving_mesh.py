"""Choose the mesh for generation and scoring from the placement of the parameters.

Parameters on one device are used there. Parameters on a mesh, or under `jax.set_mesh`, are used on all of its devices:
rows of a batch are sharded over data and fsdp as far as these divide them, heads and their caches over tensor. One
token at a time leaves nothing to split along a sequence, so the devices along context take parts of parameters and rows
too, as those along fsdp do. No argument names a mesh: replicated parameters (as `tm.restore` makes them) share the
rows, and parameters on a mesh with other axes are sharded again.
"""

import contextlib
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transmamba_jax import sharding

_AXES = ("data", "fsdp", "context", "tensor")


def place(params: Any) -> tuple[Any, Mesh | None]:
    """Place the parameters for generation; return them and the mesh, None for one device.

    Raises:
        ValueError: the parameters are placed on several meshes.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    found = [place.mesh for place in placed if isinstance(place, NamedSharding)]
    meshes = {mesh for mesh in found if isinstance(mesh, Mesh) and mesh.size > 1}
    if len(meshes) > 1:
        names = ", ".join(sorted(map(str, meshes)))
        raise ValueError(f"params must be placed on one mesh, found them on {len(meshes)}: {names}")
    mesh = meshes.pop() if meshes else jax.sharding.get_mesh()
    if mesh.size <= 1:
        return params, None
    mesh = _for_tokens(mesh, whole=all(place.is_fully_replicated for place in placed))
    return jax.device_put(params, sharding.parameter_shardings(params, mesh)), mesh


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return the context to call programs in."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def copy(tree: Any, mesh: Mesh | None) -> Any:
    """Replicate arrays, which may come from another mesh, on all devices."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def for_first(params: Any) -> tuple[Any, Mesh] | None:
    """Gather the parameters of several processes on the first one; return them and its mesh, None in the others.

    Every process calls it, under the mesh on which they are placed. They are sharded over the first process's own
    devices. Each array is replicated for a moment, on every device and in the first process's memory.
    """
    first = jax.process_index() == 0

    def fetch(leaf: jax.Array) -> np.ndarray | None:
        # The others only take part in the exchange. They wait too, so that one array at a time is under way.
        whole = jax.block_until_ready(copy(leaf, jax.sharding.get_mesh()))
        return np.asarray(whole) if first else None

    fetched = jax.tree.map(fetch, params)
    if not first:
        return None
    mesh = _mesh(np.array(jax.local_devices()).reshape(1, -1, 1, 1))
    return jax.device_put(fetched, sharding.parameter_shardings(fetched, mesh)), mesh


def _for_tokens(mesh: Mesh, whole: bool) -> Mesh:
    """Return the same devices in the same order along the axes of `sharding`, one part along context."""
    devices = np.asarray(mesh.devices)
    if mesh.axis_names == _AXES:
        data, fsdp, context, tensor = devices.shape
        devices = devices.reshape(data, fsdp * context, 1, tensor)
    else:
        devices = devices.reshape((-1, 1, 1, 1) if whole else (1, -1, 1, 1))
    return _mesh(devices)


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, _AXES, axis_types=(AxisType.Auto,) * len(_AXES))
