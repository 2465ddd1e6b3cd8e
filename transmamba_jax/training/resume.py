"""Resume a run: compare it with the earlier one in its work directory, and take over its state.

`docs/resume.md` has the table of what may change.
"""

import contextlib
import dataclasses
import math
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh

from transmamba_jax import config_io, data
from transmamba_jax.checkpoint import Checkpointer, DamagedError, Restored, complete_steps, manifest, tree
from transmamba_jax.config import Config
from transmamba_jax.runtime import hosts, tree_paths
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training import starting_points
from transmamba_jax.training.optimizer import learning_rate_schedule, updates_made
from transmamba_jax.training.step import TrainState, abstract_state, master_weights

_PARTIAL = "--checkpoint.partial True"


def compare_with_earlier_run(config: Config, model: nn.Module, mesh: Mesh, workdir: Path) -> None:
    """Log every difference from the config of the run in `workdir`; refuse a config that its checkpoints do not fit.

    Raises:
        ValueError: arrays differ in path, shape or dtype; the message names the options, the first array, and how to
            continue.
    """
    saved = workdir / "config.yaml"
    if not saved.exists():
        return
    # Where the processes find one another and which kernels run, may change at every start.
    try:
        lines = config_io.differences(config_io.read_config_file(saved), config)
    except ValueError as error:
        raise ValueError(
            f"{str(error).removesuffix('?')}. It is the config of the run in {workdir}: correct it, or delete it to "
            "continue without a comparison of the options"
        ) from None
    differences = [line for line in lines if not line.startswith(("hosts.", "kernels."))]
    if differences:
        hosts.log_first(f"{saved} differs from this run:", *differences)
    stored = _stored_leaves(workdir / "checkpoints")
    if config.checkpoint.partial or not stored:
        return
    wanted = _wanted_leaves(abstract_state(config, model, mesh), stored)
    changed = [path for path in {**stored, **wanted} if stored.get(path) != wanted.get(path)]
    if changed and all(path.startswith("state/") for path in changed) and not any(map(_of_optimizer, stored)):
        raise ValueError(
            f"the checkpoints in {workdir} hold weights and no optimizer state, as transmamba_jax.convert start-run "
            f"writes them; to train from these weights, add {_PARTIAL}"
        )
    if changed:
        path = changed[0]
        named = [line for line in differences if line.startswith(("model.", "optimizer.", "train.freeze"))]
        raise ValueError(
            f"the checkpoints in {workdir} belong to another architecture or optimizer: "
            f"{'; '.join(named) or 'no option differs, the model itself does'}; {len(changed)} arrays differ, the "
            f"first is {path}: {stored.get(path, 'missing')} there, {wanted.get(path, 'missing')} here. Use the "
            "earlier values, or another --workdir; or load the arrays that match and start the others from their "
            f"initial values with {_PARTIAL}"
        )


def _of_optimizer(path: str) -> bool:
    return path.startswith("state/opt_state/")


def _begins_late(difference: str) -> bool:
    return "missing: state/opt_state/" in difference


def _stored_leaves(directory: Path) -> dict[str, str]:
    """Return path -> dtype and shape of the newest step whose manifest can be read; nothing where there is none."""
    for step in reversed(complete_steps(directory)):
        with contextlib.suppress(DamagedError):
            return {path: leaf.kind for path, leaf in manifest.read(directory / str(step)).leaves.items()}
    return {}


def _wanted_leaves(state: TrainState, stored: dict[str, str]) -> dict[str, str]:
    """Return path -> dtype and shape of a state, its parameters in the dtypes that they are stored in."""
    entries = tree.entries(_as_stored(state, stored))
    return {path: tree.kind(leaf) for path, leaf in tree.map_leaves(tree.target, entries).items()}


def _as_stored(state: TrainState, stored: dict[str, str]) -> TrainState:
    """Ask for parameters in the dtype that they are stored in: converted weights may be narrower than float32."""

    def narrow(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = stored.get(f"params/{tree_paths.path_name(path)}", str(leaf.dtype)).partition("[")[0]
        return leaf.update(dtype=dtype) if dtype in ("bfloat16", "float16") else leaf

    return dataclasses.replace(state, params=jax.tree.map_with_path(narrow, state.params))


def newest_state(
    checkpointer: Checkpointer,
    batches: data.BatchIterator,
    config: Config,
    model: nn.Module,
    mesh: Mesh,
    tokenizer: data.Tokenizer,
) -> tuple[TrainState, int]:
    """Return the state of the newest checkpoint and its step, and put the batches behind it; else a new state.

    A new state has the parameters of `train.init_from`, where that names a starting point.

    Parameters are float32, whatever dtype they are stored in.
    """
    stored = _stored_leaves(expand_path(config.workdir) / "checkpoints")
    abstract = abstract_state(config, model, mesh)
    restored = checkpointer.restore_newest(_as_stored(abstract, stored), partial=config.checkpoint.partial)
    if restored is None:
        leaves = starting_points.read(config, abstract.params, tokenizer)
        state = TrainState.create(config, model, mesh)
        return state if leaves is None else starting_points.apply(state, leaves, str(config.train.init_from)), 0
    with hosts.collective_errors():
        _proceed(restored, batches, tokenizer, config)
    state = restored.state
    if restored.differences:
        state = _fill(state, TrainState.create(config, model, mesh))
    state = dataclasses.replace(state, params=jax.tree.map(master_weights, state.params))
    if 0 < restored.step < config.train.steps:
        try:
            earlier = config_io.from_yaml(restored.config_yaml)
        except ValueError as error:  # of a version with other options
            hosts.log_first(f"the learning rates before and after step {restored.step} cannot be compared: {error}")
        else:
            _say_new_rate(earlier, config, state, any(map(_begins_late, restored.differences)))
    return state, restored.step


def _proceed(restored: Restored, batches: data.BatchIterator, tokenizer: data.Tokenizer, config: Config) -> None:
    """Put the data where a checkpoint stopped; with `checkpoint.partial`, list what was not loaded."""
    left = [*restored.differences]
    if restored.tokenizer_json != tokenizer.to_json():
        left.append(
            "data.tokenizer differs from the tokenizer in the checkpoint: its ids mean other text; "
            f"use the earlier tokenizer, or another --workdir; {_PARTIAL} keeps the parameters nevertheless"
        )
        if not config.checkpoint.partial:
            raise ValueError(left[-1])
    try:
        batches.set_state(*restored.data_states)
    except ValueError as error:
        if not config.checkpoint.partial:
            raise ValueError(
                f"{error}. Use the earlier values; or keep parameters and optimizer state and read the data from the "
                f"beginning with {_PARTIAL}"
            ) from None
        left.append(f"{error}: the data start from the beginning")
    if left:
        hosts.log_first(f"not loaded from checkpoint {restored.step}:", *left)
    steps = config.train.steps
    beyond = f", beyond train.steps={steps}: nothing is left to train" if restored.step > steps else ""
    hosts.log_first(f"continuing from step {restored.step}{beyond}")


def _say_new_rate(earlier: Config, config: Config, state: TrainState, begins: bool) -> None:
    """Log how the learning rate of the next step differs from the one that the earlier run would have had.

    `begins`: a part of the optimizer's state was not loaded; its count of updates may be in it.
    """
    made = updates_made(state.opt_state)
    count = int(state.step) if made is None else int(made)
    due = int(state.step) - int(state.skipped_steps) if begins else count
    peaks = {"learning rate": [each.optimizer.learning_rate for each in (earlier, config)]}
    if config.optimizer.name == earlier.optimizer.name == "muon":
        peaks["muon learning rate"] = [each.optimizer.muon_learning_rate for each in (earlier, config)]
    for name, pair in peaks.items():
        before, after = (
            float(learning_rate_schedule(each, peak)(updates))
            for each, peak, updates in zip((earlier, config), pair, (due, count), strict=True)
        )
        if count != due:
            hosts.log_first(
                f"the {name} of step {int(state.step) + 1} changes from {before:.3g} to {after:.3g}: the optimizer "
                f"state was not loaded, and begins its warm-up with update {count + 1}"
            )
        elif not math.isclose(before, after, rel_tol=1e-3):
            hosts.log_first(
                f"the {name} of step {int(state.step) + 1} changes from {before:.3g} to {after:.3g}: train.steps or "
                "optimizer.* differ from the earlier run. For a constant rate: --optimizer.schedule constant, with "
                "--optimizer.learning-rate; for a new warm-up and decay over the added steps: "
                f"--optimizer.restart-step {count}"
            )


def _fill(state: TrainState, new: TrainState) -> TrainState:
    """Take from `new` the leaves that a partial restore left abstract."""
    return jax.tree.map(lambda leaf, fresh: fresh if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, state, new)
