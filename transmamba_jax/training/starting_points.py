"""Start a run from parameters that are there already: `train.init_from`.

The source is a run, a folder of checkpoints or one step of it (PATH@STEP), an exported folder, or a folder of Mamba-2
safetensors. Parameters alone are taken, as float32. A run reads its source once: a resumed run has checkpoints of its
own, and keeps the name of the source in its config.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transmamba_jax import checkpoint, config_io, convert, data, export
from transmamba_jax.checkpoint import steps
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.runtime import hosts, tensor_files, tree_paths
from transmamba_jax.runtime.paths import expand_path, show_path
from transmamba_jax.training.step import TrainState, first_nonfinite, master_weights

_VOCABULARY_AXES = {"embedding": 0, "lm_head": 1}
"""Axis of the vocabulary in the parameters that have one."""
_PARTIAL = "--train.init-partial True"


@dataclasses.dataclass(frozen=True)
class _Source:
    """Contents of a starting point."""

    params: dict[str, Any]
    """Path -> array."""
    model: ModelConfig
    tokenizer_json: str | None
    """None: the source names no tokenizer, or one of another format."""
    given_model: str | None = None
    """`train.given_model` of the run."""


def with_origin(config: Config, workdir: Path) -> Config:
    """Return the config with the full name of its starting point: PATH@STEP of a checkpoint.

    A run that has checkpoints keeps the name that it began with, whatever `config` says.

    Raises:
        ValueError: the starting point of a new run is none.
    """
    given = config.train.init_from
    if not checkpoint.complete_steps(workdir / "checkpoints"):
        return config if given is None else _named(config, _begin_from(given, workdir))
    saved, origin = workdir / "config.yaml", given
    with contextlib.suppress(ValueError):  # a config that cannot be read is refused when it is compared
        origin = config_io.read_config_file(saved).train.init_from if saved.exists() else given
    if given is not None and not _same(given, origin):
        begun = "with fresh parameters" if origin is None else f"from {origin}"
        hosts.log_first(
            f"train.init_from={given} is not read: the run in {workdir} began {begun} and continues from its own "
            "checkpoint; another --workdir starts a run"
        )
    return _named(config, origin)


def read(config: Config, targets: Any, tokenizer: data.Tokenizer) -> dict[str, Any] | None:
    """Read the parameters that a new run starts from, path -> array; None: `train.init_from` names none.

    `targets` is the tree of the shapes and shardings of the run's own parameters. Of a parameter with another number of
    vocabulary rows, `train.init_partial` takes those that both have. What is left out is logged.

    Raises:
        ValueError: the source cannot be read; or, without `train.init_partial`, its tokenizer is another one or its
            parameters do not fit, and the message has a table of them.
    """
    if config.train.init_from is None:
        return None
    asked, name = tree_paths.flatten(targets), config.train.init_from
    source = _read(name, asked)
    table = _misfits(asked, source.params)
    changed = [
        f"model.{field.name}: {old!r} -> {new!r}"
        for field in dataclasses.fields(ModelConfig)
        if (old := getattr(source.model, field.name)) != (new := getattr(config.model, field.name))
    ]
    changes = [f"options that differ from the source: {'; '.join(changed)}"] if changed else []
    fitting = {path: leaf for path, leaf in source.params.items() if _fits(path, leaf, asked)}
    retold = source.tokenizer_json not in (None, tokenizer.to_json())
    tokens = "data.tokenizer differs from the tokenizer of the source: its ids mean other text"
    if retold and not config.train.init_partial:
        raise ValueError(f"train.init_from={name}: {tokens}. Use the earlier one; or {_PARTIAL} starts nevertheless")
    own = config.train.given_model
    others = f"its parameters are those of {source.given_model or 'a plain TransMamba'}, and the model here is "
    others += own or "a plain one"
    if source.given_model != own and not config.train.init_partial:
        raise ValueError(f"train.init_from={name}: {others}. {_PARTIAL} starts nevertheless")
    if table and not (config.train.init_partial and fitting):
        partly = f"; or take what fits, and the vocabulary rows that both have, with {_PARTIAL}" if fitting else ""
        lines = [*table, *changes, f"Use the model of the source{partly}"]
        raise ValueError("\n  ".join([f"train.init_from={name}: its parameters do not fit this model:", *lines]))
    hosts.log_first(f"starting from {name}: {len(fitting)} of {len(asked)} parameters", *changes)
    hosts.log_first(*table, *([tokens] if retold else []), *([others] if source.given_model != own else []))
    return fitting


def apply(state: TrainState, leaves: Mapping[str, Any], name: str) -> TrainState:
    """Put the parameters that `read` returned into a new state, as float32 and on its devices.

    Raises:
        ValueError: a parameter is not finite.
    """
    params = jax.tree.map_with_path(lambda path, own: _taken(tree_paths.path_name(path), own, leaves), state.params)
    bad = first_nonfinite(params)
    if bad is not None:
        raise ValueError(f"train.init_from={name}: {bad} has values that are not finite")
    return dataclasses.replace(state, params=params)


def _named(config: Config, name: str | None) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=name))


def _split(given: str) -> tuple[Path, int | None]:
    """Return the path and the step of PATH or PATH@STEP."""
    path, _, step = given.rpartition("@")
    if path and steps.is_step(step) and not expand_path(given).exists():
        return expand_path(path).absolute(), int(step)
    return expand_path(given).absolute(), None


def _same(given: str, origin: str | None) -> bool:
    """Tell whether an option names the origin of a run, with its step or without."""
    if origin is None:
        return False
    path, step = _split(given)
    begun, at = _split(origin)
    return path == begun and step in (None, at)


def _holds_tensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (tensor_files.FILE, tensor_files.INDEX))


def _begin_from(given: str, workdir: Path) -> str:
    try:
        if _split(given)[0].resolve() == workdir.resolve():
            raise ValueError(f"train.init_from={given} is the work directory of this run: give another --workdir")
        return _resolve(given)
    except OSError as error:
        raise ValueError(f"train.init_from={given} cannot be read: {error}") from None


def _resolve(given: str) -> str:
    path, step = _split(given)
    if not path.exists():
        raise ValueError(f"train.init_from: there is no {show_path(path)}")
    if _holds_tensors(path):
        if step is not None:
            raise ValueError(
                f"train.init_from={given}: {show_path(path)} is a folder of safetensors, which has no steps"
            )
        return str(path)
    try:
        newest = steps.step_folder(path, step)
    except ValueError as error:
        raise ValueError(
            f"train.init_from={given} must be a run, a checkpoint, an exported folder or a folder of Mamba-2 "
            f"safetensors: {error}"
        ) from None
    return f"{newest.parent if path == newest else path}@{newest.name}"


def _read(name: str, targets: Mapping[str, jax.ShapeDtypeStruct]) -> _Source:
    folder, step = _split(name)
    if step is not None:
        saved = checkpoint.restore(folder, step, params_only=True, like=targets)
        given = saved.config.train.given_model
        return _Source(tree_paths.flatten(saved.params), saved.config.model, saved.tokenizer_json, given)
    with hosts.collective_errors():
        if (folder / export.CONFIG).exists():
            loaded = export.load(folder)
            text = None if loaded.tokenizer is None else loaded.tokenizer.to_json()
            return _Source(tree_paths.flatten(loaded.params), loaded.config.model, text)
        model, params = convert.from_mamba2(folder)
    return _Source(tree_paths.flatten(params), model, None)


def _common_rows(path: str, leaf: Any, target: Any) -> tuple[slice, ...] | None:
    """Return the part that two arrays of one parameter share; None: they differ in more than the vocabulary."""
    axis = _VOCABULARY_AXES.get(path)
    if len(leaf.shape) != len(target.shape):
        return None
    differing = [index for index, sizes in enumerate(zip(leaf.shape, target.shape, strict=True)) if len({*sizes}) > 1]
    if differing not in ([], [axis]):
        return None
    return tuple(slice(min(sizes)) for sizes in zip(leaf.shape, target.shape, strict=True))


def _fits(path: str, leaf: Any, targets: Mapping[str, Any]) -> bool:
    return path in targets and _common_rows(path, leaf, targets[path]) is not None


def _misfits(targets: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of the parameters that are missing, unexpected, or of another shape."""
    rows = []
    for path in dict.fromkeys([*targets, *found]):
        here, there = (_shape(leaves[path]) if path in leaves else "" for leaves in (targets, found))
        if not (here and there):
            rows.append((path, here, there, "unexpected" if there else "missing"))
        elif here != there:
            rows.append((path, here, there, f"shape mismatch{_shared(path, found[path], targets[path])}"))
    if not rows:
        return []
    rows = [("parameter", "this model", "source", ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip()
        for row in rows
    ]


def _shared(path: str, leaf: Any, target: Any) -> str:
    rows = _common_rows(path, leaf, target)
    return "" if rows is None else f", {rows[_VOCABULARY_AXES[path]].stop} vocabulary rows in both"


def _shape(leaf: Any) -> str:
    return f"[{','.join(map(str, leaf.shape))}]"


def _taken(path: str, own: jax.Array, leaves: Mapping[str, Any]) -> jax.Array:
    """Return the source's values of a parameter, as float32 on the devices of `own`; or `own`, where there are none."""
    if path not in leaves:
        return own
    leaf = leaves[path]
    if leaf.shape == own.shape and leaf.sharding == own.sharding:
        return master_weights(leaf)
    host = np.asarray(leaf).astype(own.dtype)
    if host.shape == own.shape:
        return jax.make_array_from_callback(host.shape, own.sharding, host.__getitem__)
    rows = _common_rows(path, leaf, own)
    merge = jax.jit(lambda own, part: own.at[rows].set(part), out_shardings=own.sharding)
    return merge(own, host[rows])
