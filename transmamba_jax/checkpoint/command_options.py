"""Options of every command that runs a checkpoint: which one, and a schedule in place of its own."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transmamba_jax import schedule
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.runtime import tensor_files
from transmamba_jax.runtime.paths import expand_path, option_path

if TYPE_CHECKING:
    from transmamba_jax.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint`, `--step`, `--schedule` and `--seq-len`."""
    parser.add_argument(
        "--checkpoint",
        type=option_path,
        required=True,
        metavar="DIR",
        help="run, its folder of checkpoints, or one step",
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint; without it: the newest")
    names = ", ".join(schedule.NAMED)
    parser.add_argument(
        "--schedule",
        nargs="+",
        metavar="NAME or P",
        help=f"run under {names}, or under a list of TransPoints (0 64 128), repeated over the layers; without it: "
        "the config's TransPoints",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="T", help="tokens that a named --schedule is scaled to; without it: data.seq_len"
    )


def restore(path: str | Path, step: int | None) -> "Checkpoint":
    """Restore the parameters of a checkpoint.

    Raises:
        ValueError: there is none, or the directory is one of exported or Mamba-2 weights; the message says what to do.
    """
    from transmamba_jax import checkpoint  # orbax takes seconds to import

    directory = expand_path(path)
    if any((directory / name).exists() for name in (tensor_files.FILE, tensor_files.INDEX)):
        first = f"convert from-mamba2 {directory} FOLDER, then " if (directory / "config.json").exists() else ""
        folder = "FOLDER" if first else directory
        raise ValueError(
            f"{directory} holds weights ({tensor_files.FILE}) and no checkpoints; python -m transmamba_jax.{first}"
            f"convert start-run {folder} WORKDIR makes WORKDIR/checkpoints of it, which is what --checkpoint takes"
        )
    saved = checkpoint.restore(directory, step, params_only=True)
    require_plain(saved.config, directory)
    return saved


def require_plain(config: Config, where: str | Path) -> None:
    """Refuse parameters of a model that a program gave: as a plain `TransMamba` they would compute something else.

    Raises:
        ValueError: they are.
    """
    given = config.train.given_model
    if given is not None:
        raise ValueError(
            f"{where} was trained with a model of a program's own, {given}, which a checkpoint does not hold; make "
            "that model in Python, and take its parameters from tm.restore(...).params"
        )


def apply(config: Config, options: argparse.Namespace) -> ModelConfig:
    """Return the model's config under the schedule that the command line names, or as it is where it names none.

    Raises:
        ValueError: `--seq-len` without `--schedule`, or as for `with_schedule`.
    """
    if options.schedule is None and options.seq_len is not None:
        raise ValueError(f"--seq-len={options.seq_len} scales --schedule, and there is none")
    seq_len = config.data.seq_len if options.seq_len is None else options.seq_len
    return with_schedule(config.model, options.schedule, seq_len)


def with_schedule(
    model: ModelConfig, choice: str | Sequence[str | int] | None, seq_len: int, option: str = "--schedule"
) -> ModelConfig:
    """Return the config under a schedule: a name scaled to `seq_len`, or TransPoints; None: its own.

    Raises:
        ValueError: no schedule has that name, or it has more TransPoints than the model has layers; the message begins
            with `option` and says which fit.
    """
    if choice is None:
        return model
    try:
        return dataclasses.replace(model, transpoints=schedule.choose(choice, seq_len, model.num_layers))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
