"""List the steps of a checkpoint folder, show the arrays of one, or verify what is on disk."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from transmamba_jax import checkpoint
from transmamba_jax.checkpoint import manifest as checkpoint_manifest
from transmamba_jax.checkpoint import steps as checkpoint_steps
from transmamba_jax.checkpoint import tree as checkpoint_tree
from transmamba_jax.checkpoint.manifest import DamagedError
from transmamba_jax.runtime import hardware, logs, storage
from transmamba_jax.runtime.paths import option_path

_COMMANDS = {
    "list": "steps, dates, sizes, held-out losses",
    "inspect": "path, dtype, shape and checksum of the arrays of a step",
    "verify": "compare every array and file with its checksum; exit code 1 where something differs",
}


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """List the steps of a checkpoint folder, show the arrays of one, or verify what is on disk."""
    parser = argparse.ArgumentParser(prog="transmamba checkpoint", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "directory", type=option_path, metavar="DIR", help="run, its folder of checkpoints, or one step"
        )
        if name != "list":
            default = "the newest" if name == "inspect" else "all"
            command.add_argument("--step", type=int, default=None, help=f"step to look at (default: {default})")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            hardware.require_devices()
            return _verify(options.directory, options.step)
        inspect = options.command == "inspect"
        lines = _inspect(options.directory, options.step) if inspect else _list(options.directory)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _list(directory: Path) -> list[str]:
    """Describe each step that has a folder, complete or not, on a line."""
    directory, only = checkpoint_steps.locate(directory)
    found = [step for step in checkpoint_steps.folders(directory) if only in (None, step)]
    if not found:
        checkpoint_steps.step_folder(directory, only)  # raises
    lines = [f"{'step':>10}  {'saved (UTC)':<19}  {'MiB':>10}  held-out loss"]
    complete = checkpoint_steps.complete(directory)
    for step in found:
        folder = directory / str(step)
        size = sum(storage.files_below(folder).values()) / 2**20
        saved = "-"
        try:
            loss = checkpoint_manifest.read(folder).eval_loss
            written = (folder / checkpoint_manifest.FILE).stat().st_mtime
            saved = f"{datetime.datetime.fromtimestamp(written, datetime.UTC):%Y-%m-%d %H:%M:%S}"
            described = "-" if loss is None else f"{loss:.4f}"
            described += "" if step in complete else "; not complete: verify says what is missing"
        except DamagedError as error:
            described = str(error)
        lines.append(f"{step:>10}  {saved:<19}  {size:>10.2f}  {described}")
    return lines


def _inspect(directory: Path, step: int | None) -> list[str]:
    """Describe each array of a step on a line."""
    folder = checkpoint_steps.step_folder(directory, step)
    try:
        manifest = checkpoint_manifest.read(folder)
    except DamagedError as error:
        raise ValueError(
            f"step {folder.name} of {folder.parent} is not what was saved: {error}; --step N takes another"
        ) from None
    lines = [f"step {folder.name} of {folder.parent}"]
    for item in checkpoint_tree.ITEMS:
        leaves = {path: leaf for path, leaf in manifest.leaves.items() if path.startswith(f"{item}/")}
        lines += [f"{path}  {leaf.kind}  {leaf.checksum}" for path, leaf in leaves.items()]
        numbers = sum(leaf.size for leaf in leaves.values())
        size = sum(leaf.nbytes for leaf in leaves.values()) / 2**20
        lines.append(f"{item}: {len(leaves)} arrays, {numbers:,} numbers, {size:.2f} MiB")
    return lines


def _verify(directory: Path, step: int | None) -> int:
    """Verify every step that has a folder, complete or not, or the one asked for."""
    directory, step = checkpoint_steps.locate(directory, step)
    steps = [each for each in checkpoint_steps.folders(directory) if step in (None, each)]
    if not steps:
        checkpoint_steps.step_folder(directory, step)  # raises
    bad = 0
    for each in steps:
        try:
            manifest = checkpoint.verify(directory / str(each))
        except DamagedError as error:
            bad += 1
            print(f"step {each}: DAMAGED: {error}")
        else:
            size = sum(leaf.nbytes for leaf in manifest.leaves.values()) / 2**20
            print(f"step {each}: good, {len(manifest.leaves)} arrays, {size:.2f} MiB, {len(manifest.files)} files")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
