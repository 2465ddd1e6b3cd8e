"""Resuming: what a run in a work directory may differ in from the one before it, and how it takes over its state."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from transmamba_jax import config_io, data, sharding
from transmamba_jax.checkpoint import Checkpointer, Restored, complete_steps
from transmamba_jax.config import Config
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import hosts
from transmamba_jax.training.step import TrainState, abstract_state, create_state, init_state


def compare_with_earlier_run(config: Config, model: TransMamba, workdir: Path) -> None:
    """Print every difference from the config of the run in `workdir`; refuse what its checkpoints cannot continue."""
    saved = workdir / "config.yaml"
    if not saved.exists():
        return
    earlier = config_io.read_config_file(saved)
    # Where the processes find one another, and which kernels run, may be new at every start.
    free = ("hosts.", "kernels.")
    differences = [line for line in config_io.differences(earlier, config) if not line.startswith(free)]
    if not differences:
        return
    hosts.say(f"{saved} differs from this run:", *differences)
    if config.checkpoint.partial or not complete_steps(workdir / "checkpoints"):
        return
    before, now = _shapes(earlier, type(model)(earlier.model)), _shapes(config, model)
    changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    if changed:
        path = changed[0]
        named = [line for line in differences if line.startswith(("model.", "optimizer."))]
        raise ValueError(
            f"the checkpoints in {workdir} belong to another architecture or optimizer: {'; '.join(named)}; "
            f"{len(changed)} arrays differ, the first is {path}: {before.get(path)} there, {now.get(path)} here; "
            "use another --workdir, or the earlier values"
        )


def _shapes(config: Config, model: TransMamba) -> dict[str, str]:
    state = jax.eval_shape(lambda: init_state(config, model))
    return {
        sharding.path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(state)
    }


def newest_state(
    checkpointer: Checkpointer,
    batches: data.BatchIterator,
    config: Config,
    model: TransMamba,
    mesh: Mesh,
    tokenizer: data.Tokenizer,
) -> tuple[TrainState, int]:
    """Return the state of the newest checkpoint and its step, and put the batches behind it; else a new state."""
    restored = checkpointer.restore_newest(abstract_state(config, model, mesh), partial=config.checkpoint.partial)
    if restored is None:
        return create_state(config, model, mesh), 0
    with hosts.together():
        _proceed(restored, batches, tokenizer, config)
    state = restored.state
    return _fill(state, create_state(config, model, mesh)) if restored.differences else state, restored.step


def _proceed(restored: Restored, batches: data.BatchIterator, tokenizer: data.Tokenizer, config: Config) -> None:
    """Put the data where a checkpoint stopped; with `checkpoint.partial`, list what of it was left behind."""
    left = [*restored.differences]
    if restored.tokenizer_json != tokenizer.to_json():
        left.append(
            "data.tokenizer differs from the tokenizer in the checkpoint: its ids mean other text; "
            "use the earlier tokenizer, or another --workdir"
        )
        if not config.checkpoint.partial:
            raise ValueError(left[-1])
    try:
        batches.set_state(*restored.data_states)
    except ValueError as error:
        if not config.checkpoint.partial:
            raise
        left.append(f"{error}: the data start anew")
    if left:
        hosts.say(f"not taken from checkpoint {restored.step}:", *left)
    steps = config.train.steps
    beyond = f", beyond train.steps={steps}: nothing is left to train" if restored.step > steps else ""
    hosts.say(f"continuing from step {restored.step}{beyond}")


def _fill(state: TrainState, new: TrainState) -> TrainState:
    """Take from `new` the leaves that a partial restore left abstract."""
    return jax.tree.map(lambda leaf, fresh: fresh if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, state, new)
