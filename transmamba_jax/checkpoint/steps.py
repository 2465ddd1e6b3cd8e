"""Manage the folder of checkpoints: list its steps, make space for the next, delete superseded ones. Knows no orbax.

Only names equal to `str(int(name))` are steps; other files and folders are left alone. Beside `<step>/` there may be
`saving-<step>`, an empty file during a save; `rejected-<step>`, a damaged step that was moved out of the way; and
`deleting-<step>`, for a moment. A bucket has no rename: there `deleting-<step>` is an empty object beside the step,
whose manifest is deleted first, and a step has its name from the first file of its save on.
"""

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import SupportsIndex

from transmamba_jax.checkpoint import manifest as manifests
from transmamba_jax.checkpoint.manifest import DamagedError
from transmamba_jax.config import CheckpointConfig
from transmamba_jax.runtime import hosts, storage
from transmamba_jax.runtime.paths import expand_path, show_path

_COMPLETE = ("commit_success.txt", manifests.FILE)  # the first is orbax's, and missing in a copy that is not complete
_HEADROOM_BYTES = 2**22  # of a step besides its arrays, about


class SaveError(OSError):
    """A step was not saved. Those before it are as they were."""


def folders(directory: Path) -> list[int]:
    """Return the steps that have a folder, complete or not, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if is_step(path.name) and path.is_dir())


def is_step(name: str) -> bool:
    """Tell whether a file name is that of a step: `4`, not `0004` or `٤`."""
    return name.isdecimal() and str(int(name)) == name


def complete(directory: Path) -> list[int]:
    """Return the steps in exactly this folder whose save finished, oldest first."""
    return [step for step in folders(directory) if all((directory / str(step) / name).exists() for name in _COMPLETE)]


def locate(path: str | Path, step: int | None = None) -> tuple[Path, int | None]:
    """Return the folder of checkpoints and the step that a path names: a run, its folder of checkpoints, or one step.

    Raises:
        ValueError: the path names another step than `step`, or is on s3://.
    """
    given = expand_path(path).absolute()
    storage.require_checkpoints(given, "checkpoint")
    if (given / "checkpoints").is_dir() and not complete(given):  # a run may have other folders called by a number
        return given / "checkpoints", step
    if is_step(given.name) and any((given / name).exists() for name in ("params", *_COMPLETE)):
        own = int(given.name)
        if step not in (None, own):
            raise ValueError(f"step {step} is asked for, and {given} is step {own}; name the folder {given.parent}")
        return given.parent, own
    return given, step


def complete_steps(directory: str | Path) -> list[int]:
    """Return the steps whose save finished, oldest first; none for a folder that does not exist.

    `directory` is a run, its folder of checkpoints, or one step.
    """
    folder, only = locate(directory)
    return [step for step in complete(folder) if only in (None, step)]


def step_folder(directory: str | Path, step: int | None = None) -> Path:
    """Return the folder of a complete step, the newest unless `step` or `directory` names one.

    Raises:
        ValueError: there is none, or `step` is no integer.
    """
    if step is not None and not isinstance(step, SupportsIndex):
        raise ValueError(f"step must be an integer, found {type(step).__name__} {step!r}")
    folder, step = locate(directory, step)
    done = complete(folder)
    if not done or (step is not None and step not in done):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        if done:
            found = f"its complete steps are {listed(done)}"
        elif folder.is_dir():
            found = "it has no complete step"
        else:
            found = "it is a file" if folder.exists() else "there is no such folder"
        raise ValueError(f"no complete {wanted} in {show_path(folder)}: {found}")
    return folder / str(done[-1] if step is None else step)


def listed(steps: Iterable[int]) -> str:
    """Write steps for a message: `4, 8`, or none."""
    return ", ".join(map(str, steps)) or "none"


def saving_marker(directory: Path, step: int) -> Path:
    """Return the file that is there from the start of a save to its manifest: it tells a save that was killed."""
    return directory / f"saving-{step}"


def ensure_space(directory: Path, step: int, nbytes: int, rejected: set[int]) -> None:
    """Prepare to save a step of `nbytes`: check the space, move what is in the way aside, set the marker.

    Raises:
        SaveError: there is not enough space.
        OSError: the directory cannot be written.
    """
    needed, free = nbytes + _HEADROOM_BYTES, storage.free_bytes(directory)
    if free < needed:
        raise SaveError(f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free in {directory}")
    for old in {step, *rejected}:
        if not (directory / str(old)).exists():
            continue
        aside = directory / f"rejected-{old}"
        storage.delete(aside)
        (directory / str(old)).rename(aside)
        storage.delete(saving_marker(directory, old))
        hosts.log_first(f"checkpoint {old} was damaged or not complete: moved to {aside}", level=logging.WARNING)
    saving_marker(directory, step).touch()


def tidy_up(directory: Path, step: int, config: CheckpointConfig) -> None:
    """Remove the marker of a step that has its manifest, and older steps. The step is saved, whatever fails here."""
    try:
        storage.delete(saving_marker(directory, step))
        delete_superseded(directory, config)
    except OSError as error:
        hosts.log_first(
            f"checkpoint {step} is saved; older checkpoints could not be deleted: {error}", level=logging.WARNING
        )


def delete_superseded(directory: Path, config: CheckpointConfig) -> None:
    """Delete the steps that are neither among the newest nor among the best by finite held-out loss.

    A step whose manifest cannot be read is neither counted nor deleted.
    """
    losses: dict[int, float | None] = {}
    for step in complete(directory):
        with suppress(DamagedError):
            losses[step] = manifests.read(directory / str(step)).eval_loss
    measured = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    kept = {*list(losses)[-config.keep_latest :], *sorted(measured, key=measured.__getitem__)[: config.keep_best]}
    for step in losses:
        if step not in kept:
            doomed = directory / f"deleting-{step}"
            if storage.is_remote(directory):
                doomed.touch()
            else:
                (directory / str(step)).rename(doomed)
    delete_leftovers(directory)


def delete_leftovers(directory: Path) -> None:
    """Delete the steps that a deletion renamed, now or when it was interrupted; in a bucket, those that it marked."""
    for doomed in directory.glob("deleting-*"):
        step = doomed.name.removeprefix("deleting-")
        if is_step(step):
            if storage.is_remote(directory):
                storage.delete(directory / step, first=manifests.FILE)
            storage.delete(doomed)


def delete_unfinished(directory: Path) -> None:
    """Delete the steps whose save was killed or failed before their manifest, and then the markers of saves."""
    for marker in directory.glob("saving-*"):
        step = directory / marker.name.removeprefix("saving-")
        if is_step(step.name) and marker.is_file():
            if step.is_dir() and not (step / manifests.FILE).exists():
                storage.delete(step)
                hosts.log_first(f"checkpoint {step.name}: its save did not finish; what it left is deleted")
            storage.delete(marker)
