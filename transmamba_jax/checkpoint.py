"""Checkpoints: save asynchronously, restore onto any devices, list and inspect. The only module that knows orbax.

One step is one folder, `<directory>/<step>/`, of orbax items:

    params      the parameters, a plain nested dict of arrays
    state       every other leaf of the training state under its own path (optimizer state, step, random key)
    data        JSON: {"processes": [the state of each process's data iterator]}
    config      JSON: {"yaml": the resolved config}
    tokenizer   JSON: {"json": the tokenizer}
    metrics     JSON: {"eval_loss": held-out loss or null}

Orbax alone restores any of them: `ocp.StandardCheckpointer().restore("<directory>/<step>/params")`. A folder gets its
final name only after everything in it is on disk, so a save that was killed leaves no step behind.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from transmamba_jax import config_file
from transmamba_jax.config import CheckpointConfig, Config

_MAX_REPORTED = 10  # differences that a refusal spells out


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a training run continues from."""

    step: int
    state: Any
    data_state: dict[str, Any]
    """Of this process."""
    config_yaml: str
    tokenizer_json: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a notebook or a command reads; `checkpoint["params"]` is `checkpoint.params`."""

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


class Checkpointer:
    """Writer and reader of one run's checkpoint folder; one process group at a time writes to a folder."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                # Orbax stores the metrics of a step only when it is given a ranking.
                best_fn=lambda metrics: metrics["eval_loss"],
                best_mode="min",
                preservation_policy=_LatestAndBest(config.keep_latest, config.keep_best),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any],
        config_yaml: str,
        tokenizer_json: str,
        eval_loss: float | None = None,
    ) -> None:
        """Copy the state to the host and write it in the background.

        `state` is a registered pytree with a `params` attribute. An earlier save still under way is waited for first.

        Raises:
            ValueError: `step` is not newer than every complete step; a leaf is not an array; `data_state` is not JSON.
            OSError: (or what else broke it) the previous save failed in the background.
        """
        self.wait()
        done = self.steps()
        if done and step <= done[-1]:
            raise ValueError(f"step must be newer than the newest checkpoint {done[-1]}, found {step}")
        items = _items(_entries(state), _physical)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(items["params"]),
                state=ocp.args.StandardSave(items["state"]),
                data=ocp.args.JsonSave({"processes": _gather(data_state)}),
                config=ocp.args.JsonSave({"yaml": config_yaml}),
                tokenizer=ocp.args.JsonSave({"json": tokenizer_json}),
            ),
            metrics={"eval_loss": eval_loss},
            force=True,  # without it orbax may decide to save nothing and says so by returning False
        )

    def restore_newest(self, abstract_state: Any) -> Restored | None:
        """Restore the newest complete step, or None where there is none.

        Every leaf lands on the sharding of the same leaf of `abstract_state` (arrays or `ShapeDtypeStruct`s); a leaf
        without one is replicated over all devices.

        Raises:
            ValueError: a path, shape or dtype differs, and the message names each with what was asked and what was
                found; or another number of processes saved.
        """
        self.wait()
        if not self.steps():
            return None
        folder = _step_folder(self._directory, None)
        entries = _entries(abstract_state)
        targets = _items(entries, _target)
        _refuse_differences(folder, targets)
        arrays = {item: _read_arrays(folder / item, target) for item, target in targets.items()}
        data_states = _read_json(folder, "data")["processes"]
        if len(data_states) != jax.process_count():
            found = f"{folder} has the data positions of {len(data_states)} processes"
            raise ValueError(f"{found}, found {jax.process_count()} here; continue with as many")
        leaves = [
            _logical(functools.reduce(operator.getitem, entry.names, arrays[entry.item]), entry.leaf)
            for entry in entries
        ]
        return Restored(
            step=int(folder.name),
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), leaves),
            data_state=data_states[jax.process_index()],
            config_yaml=_read_json(folder, "config")["yaml"],
            tokenizer_json=_read_json(folder, "tokenizer")["json"],
        )

    def steps(self) -> list[int]:
        """Return the complete steps on disk, oldest first."""
        return complete_steps(self._directory)

    def wait(self) -> None:
        """Block until the save under way is complete; raise what broke it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, raise what broke the last save, and stop the background threads."""
        self._manager.close()


class _LatestAndBest(NamedTuple):
    """Keep the newest `latest` steps, and the `best` steps with the lowest finite held-out loss."""

    latest: int
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer orbax: one bool a checkpoint, oldest first."""
        del context
        losses = [(info.metrics["eval_loss"], info) for info in checkpoints]
        measured = [(loss, info) for loss, info in losses if loss is not None and math.isfinite(loss)]
        ranked = [info for _, info in sorted(measured, key=operator.itemgetter(0))]
        kept = {info.step for info in [*checkpoints[-self.latest :], *ranked[: self.best]]}
        return [info.step in kept for info in checkpoints]


def complete_steps(directory: str | Path) -> list[int]:
    """Return the steps whose save finished, oldest first; none for a folder that does not exist."""
    folder = Path(directory).absolute()
    if not folder.is_dir():
        return []
    found = ocp.path.step.standard_name_format().find_all(folder)
    # The marker is written last; a folder without it is a copy that is not complete.
    marker = ocp.path.atomicity.COMMIT_SUCCESS_FILE
    return sorted(step.step for step in found if (folder / str(step.step) / marker).exists())


def restore(directory: str | Path, step: int | None = None, *, params_only: bool = False) -> Checkpoint:
    """Read a checkpoint, the newest complete one unless `step` is given, onto the devices of this process.

    The arrays are replicated over all devices, whatever devices they were saved from. With `params_only` the optimizer
    state is not read and `state` is empty. A random key in `state` is {kind: its uint32 data}.

    Raises:
        ValueError: no complete checkpoint is there, or not that step; the message lists those that are.
    """
    folder = _step_folder(directory, step)
    return Checkpoint(
        step=int(folder.name),
        params=_read_arrays(folder / "params"),
        state={} if params_only else _read_arrays(folder / "state"),
        data_states=_read_json(folder, "data")["processes"],
        config=config_file.from_yaml(_read_json(folder, "config")["yaml"]),
        tokenizer_json=_read_json(folder, "tokenizer")["json"],
    )


def _step_folder(directory: str | Path, step: int | None) -> Path:
    folder = Path(directory).absolute()
    done = complete_steps(folder)
    if not done or (step is not None and step not in done):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        inside = complete_steps(folder / "checkpoints")
        hint = f"; {folder / 'checkpoints'} has the steps {inside}" if inside else ""
        raise ValueError(f"no complete {wanted} in {folder}: its complete steps are {done}{hint}")
    return folder / str(done[-1] if step is None else step)


class _Entry(NamedTuple):
    """One leaf of a training state and its place in the checkpoint."""

    item: str  # "params" or "state"
    names: tuple[str, ...]
    leaf: Any


def _entries(state: Any) -> list[_Entry]:
    """List the leaves in the order of `jax.tree.leaves`."""
    entries = []
    for path, leaf in jax.tree.leaves_with_path(state):
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(f"{'/'.join(names)} must be an array, found {leaf!r} of type {type(leaf).__name__}")
        item, names = ("params", names[1:]) if names[0] == "params" else ("state", names)
        if _is_key(leaf):
            names = (*names, _key_kind(leaf))
        entries.append(_Entry(item, names, leaf))
    return entries


def _items(entries: list[_Entry], convert: Any) -> dict[str, dict[str, Any]]:
    """Build the nested dict of each item from `convert(leaf)`; plain dicts and arrays need no class to be read."""
    trees: dict[str, dict[str, Any]] = {"params": {}, "state": {}}
    for entry in entries:
        node = trees[entry.item]
        for name in entry.names[:-1]:
            node = node.setdefault(name, {})
        if entry.names[-1] in node:
            raise ValueError(f"two leaves have the path {entry.item}/{'/'.join(entry.names)}")
        node[entry.names[-1]] = convert(entry.leaf)
    return trees


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> str:
    """Name the generator of a typed key, concrete or abstract: "threefry2x32"."""
    kinds: list[str] = []
    jax.eval_shape(lambda key: kinds.append(str(jax.random.key_impl(key))), leaf)
    return kinds[0]


def _physical(leaf: Any) -> Any:
    """Return what is stored: a typed key is stored as its uint32 data, which any program can read."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _logical(array: Any, like: Any) -> Any:
    """Undo `_physical`."""
    return jax.random.wrap_key_data(array, impl=_key_kind(like)) if _is_key(like) else array


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the stored shape and dtype of a leaf and where it has to land."""
    stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = None if isinstance(leaf, np.ndarray) else leaf.sharding
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding or _everywhere())


def _everywhere() -> jax.sharding.Sharding:
    """Return the sharding that puts the whole array on every device."""
    if jax.device_count() == 1:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())


def _metadata(folder: Path) -> dict[str, Any]:
    """Read the shapes and dtypes of an item without its arrays."""
    return ocp.StandardCheckpointHandler().metadata(folder).tree


def _read_arrays(folder: Path, target: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read an item as `target` says, or onto every device."""
    if target is None:
        on_all = functools.partial(jax.ShapeDtypeStruct, sharding=_everywhere())
        target = jax.tree.map(lambda leaf: on_all(leaf.shape, leaf.dtype), _metadata(folder))
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, target)


def _gather(data_state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the data states of all processes, in order; every process calls it."""
    try:
        text = np.frombuffer(json.dumps(data_state).encode("utf-8"), np.uint8)
    except TypeError as error:
        raise ValueError(f"data_state must be plain JSON: {error}") from None
    if jax.process_count() == 1:
        return [data_state]
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(lengths.max()) - text.size))
    texts = zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    return [json.loads(row[:length].tobytes()) for row, length in texts]


def _read_json(folder: Path, item: str) -> Any:
    name = "metrics" if item == "metrics" else "metadata"  # orbax's names for the files
    return json.loads((folder / item / name).read_text(encoding="utf-8"))


def _leaf_types(tree: dict[str, Any], prefix: str) -> dict[str, str]:
    """Map the path of each leaf to its dtype and shape, as text."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {
        f"{prefix}/{name(path)}": f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _refuse_differences(folder: Path, targets: dict[str, dict[str, Any]]) -> None:
    """Raise unless the checkpoint has exactly the leaves asked for: orbax would cast a dtype without a word."""
    asked: dict[str, str] = {}
    found: dict[str, str] = {}
    for item, target in targets.items():
        asked |= _leaf_types(target, item)
        found |= _leaf_types(_metadata(folder / item), item)
    lines = [
        f"{path}: asked {asked.get(path, 'nothing')}, found {found.get(path, 'nothing')}"
        for path in [*asked, *(path for path in found if path not in asked)]
        if asked.get(path) != found.get(path)
    ]
    if lines:
        more = [f"and {len(lines) - _MAX_REPORTED} more"] if len(lines) > _MAX_REPORTED else []
        raise ValueError("\n  ".join([f"the checkpoint {folder} does not fit:", *lines[:_MAX_REPORTED], *more]))


def _list(directory: Path) -> list[str]:
    """Describe each complete step on a line."""
    lines = [f"{'step':>10}  {'saved (UTC)':<19}  {'MiB':>10}  held-out loss"]
    done = {info.step: info for info in ocp.path.step.standard_name_format().find_all(directory.absolute())}
    for step in complete_steps(directory):
        folder = directory / str(step)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
        loss = _read_json(folder, "metrics")["eval_loss"]
        saved = done[step].commit_timestamp.astimezone(datetime.UTC)
        lines.append(f"{step:>10}  {saved:%Y-%m-%d %H:%M:%S}  {size:>10.2f}  {'-' if loss is None else f'{loss:.4f}'}")
    return lines


def _inspect(directory: Path, step: int | None) -> list[str]:
    """Describe each array of a step on a line."""
    folder = _step_folder(directory, step)
    lines = [f"step {folder.name} of {directory}"]
    for item in ("params", "state"):
        tree = _metadata(folder / item)
        lines += [f"{path}  {kind}" for path, kind in _leaf_types(tree, item).items()]
        counts = [(math.prod(leaf.shape), jnp.dtype(leaf.dtype).itemsize) for leaf in jax.tree.leaves(tree)]
        size = sum(count * width for count, width in counts) / 2**20
        lines.append(f"{item}: {len(counts)} arrays, {sum(count for count, _ in counts):,} numbers, {size:.2f} MiB")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """List the steps of a checkpoint folder, or the arrays of one step."""
    parser = argparse.ArgumentParser(prog="python -m transmamba_jax.checkpoint", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("list", "steps, dates, sizes, held-out losses"), ("inspect", "path, dtype, shape of arrays")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("directory", type=Path, metavar="DIR", help="folder of checkpoints: <workdir>/checkpoints")
        if name == "inspect":
            command.add_argument("--step", type=int, default=None, help="step to look at (default: the newest)")
    options = parser.parse_args(arguments)
    try:
        _step_folder(options.directory, None)
        lines = _list(options.directory) if options.command == "list" else _inspect(options.directory, options.step)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
