"""Convert between a training state and named arrays; the classes that a restore returns. Knows no orbax."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from transmamba_jax.config import Config
from transmamba_jax.runtime import tree_paths

ITEMS = ("params", "state")
"""The parts of a checkpoint that hold arrays; the path of a leaf starts with one of them."""


@dataclasses.dataclass(frozen=True, repr=False)
class Restored:
    """A step that a training run continues from."""

    step: int
    state: Any
    """A leaf that is missing in the checkpoint is the abstract one of the target; see `differences`."""
    data_states: list[dict[str, Any]]
    """Of each process that saved."""
    config_yaml: str
    tokenizer_json: str
    differences: list[str]
    """A line for each leaf that was not restored: missing, unexpected, or a mismatch. Empty unless `partial`."""

    @property
    def data_state(self) -> dict[str, Any]:
        """Return the data state of this process, if as many processes saved."""
        return self.data_states[jax.process_index()]

    def __repr__(self) -> str:
        """Return a few lines: the step, the size of the state, the count of leaves that were not restored."""
        return f"Restored of step {self.step}\n  state: {_size(self.state)}\n  differences: {len(self.differences)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Checkpoint:
    """A step that a notebook or a command reads; `checkpoint["params"]` is `checkpoint.params`."""

    step: int
    params: dict[str, Any]
    state: dict[str, Any]
    data_states: list[dict[str, Any]]
    """Of each process that saved."""
    config: Config
    tokenizer_json: str

    def __getitem__(self, name: str) -> Any:
        """Return a field by name."""
        return vars(self)[name]

    def __repr__(self) -> str:
        """Return a few lines: the step and the sizes of the trees."""
        state = f"{len(jax.tree.leaves(self.state))} arrays" if self.state else "not read"
        return f"Checkpoint of step {self.step}\n  params: {_size(self.params)}\n  state: {state}"


def _size(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    return f"{len(leaves)} arrays, {sum(leaf.size for leaf in leaves):,} numbers"


class Entry(NamedTuple):
    """One leaf of a training state and its path in the checkpoint, `state/opt_state/1/0/mu/embedding`."""

    path: str
    leaf: Any


def entries(state: Any) -> list[Entry]:
    """List the leaves in the order of `jax.tree.leaves`.

    Raises:
        ValueError: a leaf is not an array, or two have one path.
    """
    found: list[Entry] = []
    for path, leaf in jax.tree.leaves_with_path(state):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(f"{'/'.join(names)} must be an array, found {leaf!r} of type {type(leaf).__name__}")
        if names[0] != "params":
            names.insert(0, "state")
        if _is_key(leaf):
            names.append(_key_kind(leaf))
        found.append(Entry("/".join(names), leaf))
    paths = [entry.path for entry in found]
    double = next((path for path in paths if paths.count(path) > 1), None)
    if double is not None:
        raise ValueError(f"two leaves have the path {double}")
    return found


def nested(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Build the nested dict of each item from path -> leaf; plain dicts and arrays need no class to be read."""
    return {item: {} for item in ITEMS} | tree_paths.nest(leaves)


def flat(tree: Any, item: str) -> dict[str, Any]:
    """Undo `nested` for one item."""
    return {f"{item}/{path}": leaf for path, leaf in tree_paths.flatten(tree).items()}


def differences(asked: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Describe every path that is missing, unexpected, or of another shape or dtype, on a line each."""
    missing, unexpected, mismatched = tree_paths.compare(asked, found)
    return [
        *(f"missing: {line}" for line in missing),
        *(f"unexpected: {line}" for line in unexpected),
        *(f"shape or dtype mismatch: {line}" for line in mismatched),
    ]


def kind(leaf: Any) -> str:
    """Write dtype and shape as JAX does: `float32[7,4]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def physical(leaf: Any) -> Any:
    """Return the array to store: of a typed key its uint32 data, which any program can read."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def logical(array: Any, like: Any) -> Any:
    """Undo `physical`."""
    return jax.random.wrap_key_data(array, impl=_key_kind(like)) if _is_key(like) else array


def target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the stored shape and dtype of a leaf and the sharding to restore it to."""
    stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = None if isinstance(leaf, np.ndarray) else leaf.sharding
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding or everywhere())


def everywhere() -> jax.sharding.Sharding:
    """Return the sharding that puts the whole array on every device."""
    if jax.device_count() == 1:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())


def gather_json(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trees of all processes, in order; every process calls it.

    Raises:
        ValueError: `tree` is not plain JSON.
    """
    try:
        text = np.frombuffer(json.dumps(tree).encode("utf-8"), np.uint8)
    except TypeError as error:
        raise ValueError(f"data_state must be plain JSON: {error}") from None
    if jax.process_count() == 1:
        return [tree]
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(lengths.max()) - text.size))
    texts = zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    return [json.loads(row[:length].tobytes()) for row, length in texts]


def map_leaves(convert: Callable[[Any], Any], found: list[Entry]) -> dict[str, Any]:
    """Return path -> `convert(leaf)`."""
    return {entry.path: convert(entry.leaf) for entry in found}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> str:
    """Name the generator of a typed key, concrete or abstract: "threefry2x32"."""
    kinds: list[str] = []
    jax.eval_shape(lambda key: kinds.append(str(jax.random.key_impl(key))), leaf)
    return kinds[0]
