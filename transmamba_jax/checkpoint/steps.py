"""The folder of checkpoints: which steps are there, which are complete, room for the next, which may go.

Knows no orbax. Beside `<step>/` lie `saving-<step>`, an empty file, while a step is being saved; `rejected-<step>`, a
damaged step that had to make way; `deleting-<step>`, for a moment.
"""

import logging
import math
import shutil
from contextlib import suppress
from pathlib import Path

from transmamba_jax.checkpoint import manifest as manifests
from transmamba_jax.checkpoint.manifest import DamagedError
from transmamba_jax.config import CheckpointConfig
from transmamba_jax.runtime import hosts

_COMPLETE = ("commit_success.txt", manifests.FILE)  # the first is orbax's, and missing in a copy that is not complete
_HEADROOM_BYTES = 2**22  # of a step besides its arrays, about


class SaveError(OSError):
    """A step was not saved. Those before it are as they were."""


def folders(directory: Path) -> list[int]:
    """Return the steps that have a folder, whatever is in it, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def complete_steps(directory: str | Path) -> list[int]:
    """Return the steps whose save finished, oldest first; none for a folder that does not exist."""
    folder = Path(directory).absolute()
    return [step for step in folders(folder) if all((folder / str(step) / name).exists() for name in _COMPLETE)]


def step_folder(directory: str | Path, step: int | None = None) -> Path:
    """Return the folder of a complete step, the newest unless `step` is given.

    Raises:
        ValueError: there is none.
    """
    folder = Path(directory).absolute()
    done = complete_steps(folder)
    if not done or (step is not None and step not in done):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        if inside := complete_steps(folder / "checkpoints"):
            found = f"; {folder / 'checkpoints'} has the steps {inside}"
        elif folder.name.isdigit() and int(folder.name) in complete_steps(folder.parent):
            found = f"; it is a step itself, of {folder.parent}: give that folder"
        else:
            found = "" if folder.is_dir() else "; it is a file" if folder.exists() else "; there is no such folder"
        raise ValueError(f"no complete {wanted} in {folder}: its complete steps are {done}{found}")
    return folder / str(done[-1] if step is None else step)


def saving_marker(directory: Path, step: int) -> Path:
    """Return the file that is there from the start of a save to its manifest: it tells a save that was killed."""
    return directory / f"saving-{step}"


def make_room(directory: Path, step: int, nbytes: int, rejected: set[int]) -> None:
    """Prepare to save a step of `nbytes`: check the space, move what is in the way aside, set the marker.

    Raises:
        SaveError: there is not enough space.
        OSError: the directory cannot be written.
    """
    needed, free = nbytes + _HEADROOM_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise SaveError(f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free in {directory}")
    for old in {step, *rejected} & set(folders(directory)):
        aside = directory / f"rejected-{old}"
        shutil.rmtree(aside, ignore_errors=True)
        (directory / str(old)).rename(aside)
        saving_marker(directory, old).unlink(missing_ok=True)
        hosts.log_first(f"checkpoint {old} was damaged or not complete: moved to {aside}", level=logging.WARNING)
    saving_marker(directory, step).touch()


def tidy_up(directory: Path, step: int, config: CheckpointConfig) -> None:
    """Remove the marker of a step that has its manifest, and older steps. The step is saved, whatever fails here."""
    try:
        saving_marker(directory, step).unlink()
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
    for step in complete_steps(directory):
        with suppress(DamagedError):
            losses[step] = manifests.read(directory / str(step)).eval_loss
    measured = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    kept = {*list(losses)[-config.keep_latest :], *sorted(measured, key=measured.__getitem__)[: config.keep_best]}
    for step in losses:
        if step not in kept:
            (directory / str(step)).rename(directory / f"deleting-{step}")
    delete_leftovers(directory)


def delete_leftovers(directory: Path) -> None:
    """Delete what a deletion left, now or when it was interrupted."""
    for doomed in directory.glob("deleting-*"):
        shutil.rmtree(doomed)
