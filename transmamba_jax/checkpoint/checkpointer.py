"""Checkpoints: save asynchronously, restore onto any devices, verify. The only module that imports orbax.

One step is one folder, `<directory>/<step>/`, of orbax items and a manifest:

    params         the parameters, a plain nested dict of arrays
    state          every other leaf of the training state under its own path (optimizer state, step, random key)
    data           JSON: {"processes": [the state of each process's data iterator]}
    config         JSON: {"yaml": the resolved config}
    tokenizer      JSON: {"json": the tokenizer}
    manifest.json  dtypes, shapes and checksums of all of it, and the held-out loss (manifest.py)

Orbax alone restores any item: `ocp.StandardCheckpointer().restore("<directory>/<step>/params")`. A folder gets its
final name after the items are on disk, and its manifest after that. In a bucket, which has no rename, orbax marks what
is complete with `commit_success.txt`, and the manifest comes after that too. A killed save therefore leaves no step,
and a step that differs from its manifest is never used.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from transmamba_jax import config_io
from transmamba_jax.checkpoint import manifest as manifests
from transmamba_jax.checkpoint import steps
from transmamba_jax.checkpoint import tree as trees
from transmamba_jax.checkpoint.manifest import DamagedError, Leaf, Manifest
from transmamba_jax.checkpoint.steps import SaveError, complete_steps
from transmamba_jax.checkpoint.tree import Checkpoint, Restored
from transmamba_jax.config import CheckpointConfig
from transmamba_jax.runtime import hosts, storage
from transmamba_jax.runtime.paths import expand_path

_SAVE_SECONDS = 1200  # orbax gives a save up after these
_UNFINISHED = f"{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"


class Checkpointer:
    """Writer and reader of one run's checkpoint folder; one process group at a time writes to a folder.

    With several processes, every process makes each call. A save or restore that fails on one fails on all.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = expand_path(directory).absolute()
        storage.require_checkpoints(self._directory, "checkpoint folder")
        self._config = config
        with hosts.collective_errors(OSError):
            if hosts.is_first():
                self._directory.mkdir(parents=True, exist_ok=True)
                self._delete_unfinished("*")
                steps.delete_leftovers(self._directory)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._rejected: set[int] = set()
        self.failed_saves = 0
        """Number of saves of this process that failed."""
        self.newest: int | None = None
        """The last step that was saved or restored here."""

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

        `state` is a registered pytree with a `params` attribute. It waits for an earlier save that is
        still under way. `steps` and `restore` see the step once its manifest is on disk.

        Raises:
            ValueError: `step` is not newer than every complete step; a leaf is not an array; `data_state` is not JSON.
            SaveError: the previous save failed in the background; or there is no space for this one, or no permission.
        """
        self.wait()
        try:
            with hosts.collective_errors(SaveError):
                done = self.steps() if hosts.is_first() else []
        except OSError as error:
            raise self._failure(step, error) from error
        with hosts.collective_errors():
            if done and step <= done[-1]:
                raise ValueError(f"step must be newer than the newest checkpoint {done[-1]}, found {step}")
        arrays = trees.map_leaves(trees.physical, trees.entries(state))
        processes = trees.gather_json(data_state)
        # Only the errors of files: tensorstore reports those as ValueError.
        try:
            with hosts.collective_errors(SaveError):
                if hosts.is_first():
                    nbytes = sum(array.nbytes for array in arrays.values())
                    steps.ensure_space(self._directory, step, nbytes, self._rejected)
            self._rejected.clear()
            finish = manifests.start_checksums(arrays)
            jsons = {"processes": processes}, {"yaml": config_yaml}, {"json": tokenizer_json}
            texts = dict(zip(("data", "config", "tokenizer"), jsons, strict=True))
            items = {name: ocp.args.StandardSave(item) for name, item in trees.nested(arrays).items()}
            items |= {name: ocp.args.JsonSave(text) for name, text in texts.items()}
            with self._writing() as (writer, barrier):
                writer.save(self._directory / str(step), args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            raise self._failure(step, error) from error
        leaves = {path: Leaf(str(array.dtype), array.shape, "") for path, array in arrays.items()}
        self._pending = step, self._thread.submit(self._complete, step, writer, barrier, finish, leaves, eval_loss)

    @property
    def saving(self) -> bool:
        """True while a save is under way in the background."""
        return self._pending is not None and not self._pending[1].done()

    def restore_newest(self, abstract_state: Any, *, partial: bool = False) -> Restored | None:
        """Restore the newest step that passes verification; return None where no step was ever completed.

        Every leaf gets the sharding of the same leaf of `abstract_state` (arrays or `ShapeDtypeStruct`s); a leaf
        without one is replicated over all devices. A damaged or incomplete step is skipped and logged. With `partial`,
        leaves whose path, shape or dtype differ are not restored but listed.

        Raises:
            ValueError: a path, shape or dtype differs, and the message names each with what was asked and what was
                found; or there are steps and each of them is damaged.
        """
        self.wait()
        lost = []
        for step in hosts.broadcast_from_first(steps.folders(self._directory)[::-1]):
            folder = self._directory / str(step)
            try:
                restored = _restore(folder, abstract_state, partial)
            except DamagedError as error:
                hosts.log_first(f"checkpoint {step} skipped: {error}", level=logging.WARNING)
                self._rejected.add(step)
                if not steps.saving_marker(self._directory, step).exists():
                    lost.append(step)
            else:
                self.newest = restored.step
                return restored
        if lost:
            raise ValueError(
                f"none of the checkpoints {steps.listed(lost)} in {self._directory} is what was saved (see above); "
                "restore the folder from a copy, or use another --workdir"
            )
        return None

    def steps(self) -> list[int]:
        """Return the complete steps on disk, oldest first, without those that `restore_newest` found damaged."""
        return [step for step in steps.complete(self._directory) if step not in self._rejected]

    def wait(self) -> None:
        """Block until the save under way is complete.

        Raises:
            SaveError: it failed.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            raise self._failure(step, error) from error
        self.newest = step

    def close(self, failing: bool = False) -> None:
        """Wait for the save under way; raise its error, or log it where the run is `failing` by another one."""
        try:
            self.wait()
        except SaveError as error:
            if not failing:
                raise
            hosts.log_first(str(error), level=logging.ERROR)
        finally:
            self._thread.shutdown()

    @contextmanager
    def _writing(self) -> Iterator[tuple[ocp.AsyncCheckpointer, hosts.Barrier]]:
        """Make a writer for one save, whose barriers a failing process can abort; the body starts to write."""
        barrier = hosts.Barrier("save")
        everyone = set(range(jax.process_count()))
        # Named processes: orbax then waits for them through the coordination service, not in a collective.
        processes = ocp.options.MultiprocessingOptions(active_processes=everyone, barrier_sync_key_prefix=barrier.name)
        background = ocp.AsyncOptions(
            timeout_secs=_SAVE_SECONDS,
            barrier_sync_fn=lambda key, timeout_ms: barrier.wait(seconds=timeout_ms / 1000),  # noqa: ARG005
        )
        options = ocp.CompositeOptions(multiprocessing_options=processes)
        handler = ocp.CompositeCheckpointHandler(composite_options=options)
        writer = ocp.AsyncCheckpointer(handler, async_options=background, multiprocessing_options=processes)
        try:
            with hosts.collective_errors(SaveError):
                yield writer, barrier
        except (OSError, ValueError) as error:
            # Other processes may be writing: abort their barriers. A SaveError came from them (orbax raises none).
            if not isinstance(error, SaveError):
                barrier.abort(error)
            with suppress(Exception):
                writer.close()
            raise

    def _complete(
        self,
        step: int,
        writer: ocp.AsyncCheckpointer,
        barrier: hosts.Barrier,
        finish: manifests.Finish,
        leaves: dict[str, Leaf],
        loss: float | None,
    ) -> None:
        """Finish a save in the background: checksums, orbax's last files, the manifest; then delete old steps."""
        try:
            checksums, folder = finish(), self._directory / str(step)
            with closing(writer):
                writer.wait_until_finished()
            barrier.wait()
            if hosts.is_first():
                described = {path: dataclasses.replace(leaf, checksum=checksums[path]) for path, leaf in leaves.items()}
                manifests.write(folder, step, loss, described)
                steps.tidy_up(self._directory, step, self._config)
            # No process counts the step as saved before its manifest exists.
            barrier.wait()
        except BaseException as error:  # the other processes must learn of any error
            barrier.abort(error)
            raise

    def _delete_unfinished(self, step: str) -> None:
        steps.delete_unfinished(self._directory)
        for leftover in self._directory.glob(f"{step}{_UNFINISHED}"):
            if steps.is_step(leftover.name.partition(".")[0]):
                shutil.rmtree(leftover, ignore_errors=True)

    def _failure(self, step: int, error: BaseException) -> SaveError:
        """Count a failed save, delete its files, whose space the next one needs, and return the error to raise."""
        self.failed_saves += 1
        if hosts.is_first():
            with suppress(OSError):  # of a bucket; the next start tries again
                self._delete_unfinished(str(step))
        return SaveError(f"checkpoint {step} was not saved: {hosts.one_line(error)}")


def restore(
    directory: str | Path,
    step: int | None = None,
    *,
    params_only: bool = False,
    like: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Checkpoint:
    """Read a checkpoint onto the devices of this process: the newest that passes verification, or that of `step`.

    The arrays are replicated over all devices, whatever devices they were saved from. A parameter whose path and shape
    match an entry of `like` gets its sharding. With `params_only` the optimizer state is not read and `state` is empty.
    A random key in `state` is {kind: its uint32 data}. A damaged step is skipped and logged.

    Raises:
        ValueError: no complete checkpoint is there, or not that step, and the message lists those that are; or it is
            damaged, and the message names the leaf.
    """
    newest = steps.step_folder(directory, step)
    older = [newest.parent / str(each) for each in reversed(complete_steps(directory))] if step is None else [newest]
    for folder in older:
        try:
            return _read(folder, params_only, {} if like is None else like)
        except DamagedError as error:
            if folder == older[-1]:
                raise ValueError(f"checkpoint {folder} is not what was saved: {error}") from None
            hosts.log_first(f"checkpoint {folder.name} skipped: {error}", level=logging.WARNING)
    raise AssertionError("the loop returns or raises")


def verify(folder: Path) -> Manifest:
    """Compare everything in the folder of a step with its manifest, an array at a time; needs no device.

    Raises:
        DamagedError: something differs; the message names each leaf and file.
    """
    manifest = _open(folder)
    manifests.raise_if(_bad_leaves(folder, manifest, manifest.leaves))
    return manifest


def _open(folder: Path) -> Manifest:
    """Read the manifest and check the files, before orbax reads any of them."""
    manifest = manifests.read(folder)
    changed = manifests.changed_files(folder, manifest)
    if not changed and str(manifest.step) == folder.name:
        return manifest
    reasons = [] if str(manifest.step) == folder.name else [f"{manifests.FILE} belongs to step {manifest.step}"]
    # A change of array files is reported as the leaves that it damages.
    for item in {name.partition("/")[0] for name in changed} & {*trees.ITEMS}:
        paths = [path for path in manifest.leaves if path.startswith(f"{item}/")]
        bad = _bad_leaves(folder, manifest, paths)
        unreadable = len(bad) == len(paths) and all(" cannot be read" in line for line in bad)
        reasons += [f"no leaf of {item} can be read, such as {bad[0]}"] if unreadable else bad
    files = [f"{name} {what}" for name, what in changed.items()]
    more = [f"and {len(files) - 3} more files"] if len(files) > 3 else []
    raise DamagedError("; ".join([*reasons, *files[:3], *more]))


def _bad_leaves(folder: Path, manifest: Manifest, paths: Iterable[str]) -> list[str]:
    """Read leaves one at a time into host memory and describe those that differ from the manifest."""
    bad = []
    for path in paths:
        item = path.partition("/")[0]
        try:
            array = trees.flat(_load(folder / item, {path: ocp.RestoreArgs(restore_type=np.ndarray)}), item)[path]
        except DamagedError as error:
            bad.append(f"{path} cannot be read ({error})")
        else:
            bad += manifests.changed_leaf(path, array, manifest.leaves[path])
    return bad


def _restore(folder: Path, abstract_state: Any, partial: bool) -> Restored:
    with hosts.collective_errors(DamagedError):
        manifest = _open(folder)
    entries = trees.entries(abstract_state)
    targets = trees.map_leaves(trees.target, entries)
    asked = {path: trees.kind(target) for path, target in targets.items()}
    differences = trees.differences(asked, {path: leaf.kind for path, leaf in manifest.leaves.items()})
    if differences and not partial:
        raise ValueError("\n  ".join([f"the checkpoint {folder} does not fit:", *differences]))
    fitting = {path for path in targets if path in manifest.leaves and asked[path] == manifest.leaves[path].kind}
    arrays = _load_verified(folder, manifest, {path: targets[path] for path in targets if path in fitting})
    leaves = [trees.logical(arrays[path], leaf) if path in arrays else leaf for path, leaf in entries]
    return Restored(
        step=manifest.step,
        state=jax.tree.unflatten(jax.tree.structure(abstract_state), leaves),
        data_states=_read_json(folder, "data")["processes"],
        config_yaml=_read_json(folder, "config")["yaml"],
        tokenizer_json=_read_json(folder, "tokenizer")["json"],
        differences=differences,
    )


def _read(folder: Path, params_only: bool, like: Mapping[str, jax.ShapeDtypeStruct]) -> Checkpoint:
    manifest = _open(folder)
    wanted = {path: leaf for path, leaf in manifest.leaves.items() if path.startswith("params/") or not params_only}
    shardings = {(f"params/{path}", each.shape): each.sharding for path, each in like.items()}
    on_all, targets = trees.everywhere(), {}
    for path, leaf in wanted.items():
        sharding = shardings.get((path, leaf.shape), on_all)
        targets[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=sharding)
    arrays = trees.nested(_load_verified(folder, manifest, targets))
    return Checkpoint(
        step=manifest.step,
        params=arrays["params"],
        state=arrays["state"],
        data_states=_read_json(folder, "data")["processes"],
        config=config_io.from_yaml(_read_json(folder, "config")["yaml"]),
        tokenizer_json=_read_json(folder, "tokenizer")["json"],
    )


def _load_verified(folder: Path, manifest: Manifest, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Read arrays and compare their checksums."""
    arrays: dict[str, Any] = {}
    with hosts.collective_errors(DamagedError):
        for item in trees.ITEMS:
            of_item = {path: target for path, target in targets.items() if path.startswith(f"{item}/")}
            if of_item:
                args = {
                    path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
                    for path, leaf in of_item.items()
                }
                try:
                    arrays |= trees.flat(_load(folder / item, args), item)
                except DamagedError:
                    manifests.raise_if(_bad_leaves(folder, manifest, of_item))
                    raise
    found = manifests.start_checksums(arrays)()
    different = [path for path in arrays if found[path] != manifest.leaves[path].checksum]
    manifests.raise_if([f"{path} has other values than were saved" for path in different])
    return arrays


def _load(folder: Path, restore_args: dict[str, Any]) -> Any:
    """Read leaves of an item with orbax, and no other leaf."""
    args = trees.nested(restore_args)[folder.name]
    asked = jax.tree.map(lambda _: 0, args)
    # The handler itself, not a Checkpointer around it: that one waits for the other processes in a collective.
    with closing(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            return reader.restore(
                folder, args=ocp.args.PyTreeRestore(item=asked, restore_args=args, partial_restore=True)
            )
        except Exception as error:  # orbax 0.12 raises the bare class for a bad chunk; look again in 0.13
            raise DamagedError(hosts.one_line(error)) from error


def _read_json(folder: Path, item: str) -> Any:
    return json.loads((folder / item / "metadata").read_text(encoding="utf-8"))
