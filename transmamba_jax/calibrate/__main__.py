"""Measure this device: which implementations are right and fast for a model, and which TransPoints.

python -m transmamba_jax.calibrate --config FILE [--section.key value ...]      check, time, keep a record
python -m transmamba_jax.calibrate show                                         print the records
python -m transmamba_jax.calibrate --plan --config FILE --seq-len T             TransPoints by measured speed
"""

import argparse
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transmamba_jax import config_io
from transmamba_jax.calibrate import show, trials
from transmamba_jax.calibrate.candidates import make_job
from transmamba_jax.config import Config
from transmamba_jax.runtime import calibration, hardware, host_memory, logs
from transmamba_jax.runtime.paths import option_path, show_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba calibrate",
        description="Check every implementation of SSD and attention that can serve a config's shapes on this device, "
        "time those that are right, and keep a record, which train, generate and evaluate look for. "
        "Options of the config (--data.seq-len 8192) may follow.",
        epilog="`transmamba calibrate show [FILE ...]` prints the records.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of an experiment, or the name of one of the package's")
    add("--quick", action="store_true", help="one length and fewer chunk sizes and rounds")
    add("--output", type=option_path, metavar="FILE", help="write the record here too; with --plan, the plan (JSON)")
    add("--limit", type=float, default=300.0, metavar="SECONDS", help="a candidate that is silent for so long hangs")
    add("--plan", action="store_true", help="measure layers by TransPoint and recommend a schedule")
    add("--seq-len", type=int, metavar="T", help="--plan: tokens of a row; without it data.seq_len")
    add("--objective", choices=["train", "prefill", "decode"], help="--plan: what is to be fast; without it train")
    add("--budget", metavar="LIMIT", help="--plan: 800ms, 0.8 of the Transformer's time, or 64MiB of cache per row")
    add("--topology", metavar="NAME", help="--plan: predict for an absent chip (v5e:2x2) by its compiler")
    add("--figure", type=option_path, metavar="FILE", help="--plan: draw the plan (.png, .svg)")
    return parser


_PLAN_ONLY = ("seq_len", "objective", "budget", "topology", "figure")


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and keep a record, or print the records."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["show"]:
            return _show(arguments[1:])
        options, overrides = _parser().parse_known_args(arguments)
        with logs.shown():
            if options.plan:
                return _plan(options, overrides)
            for name in _PLAN_ONLY:
                if getattr(options, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} is for --plan, which is not given")
            return _calibrate(_config(options, overrides), options)
    except ValueError as error:
        print(f"transmamba calibrate: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader left, as `head` does: no error
        raise
    except (OSError, RuntimeError) as error:
        print(f"transmamba calibrate: {error}", file=sys.stderr)
        return 1


def _show(arguments: Sequence[str]) -> int:
    """Print the records in the files given, or all of the cache."""
    parser = argparse.ArgumentParser(prog="transmamba calibrate show", description="Print records of measurements.")
    parser.add_argument("files", nargs="*", type=option_path, metavar="FILE", help="record; without any: all there are")
    files = parser.parse_args(arguments).files or sorted(calibration.folder().glob("*.json"))
    none = f"there are no records in {calibration.folder()}; python -m transmamba_jax.calibrate --config FILE makes one"
    print("\n".join(show.show(files)) if files else none)
    return 0


def _config(options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    if options.config is None:
        raise ValueError(f"--config is required: a YAML file or one of {', '.join(config_io.config_names())}")
    if not 0 < options.limit <= threading.TIMEOUT_MAX:  # nan, too
        raise ValueError(
            f"--limit must be positive and at most {threading.TIMEOUT_MAX:g} seconds, found {options.limit:g}"
        )
    return config_io.load_config(options.config, overrides)


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Plan, print, and write what is asked for."""
    host_memory.keep_freed()  # as training does
    if options.topology is None:
        hardware.require_devices()
    # orbax, Grain and matplotlib take seconds to import.
    from transmamba_jax.calibrate import costs, figure, plan

    if options.seq_len is not None:
        overrides = [*overrides, "--data.seq-len", str(options.seq_len)]
    config = _config(options, overrides)
    budget = None if options.budget is None else costs.parse_budget(options.budget)
    if options.figure is not None:
        figure.check_name(options.figure)
    found = plan.make_plan(config, options.objective or "train", budget, options.topology, options.quick)
    _print_and_write(
        plan.text(found),
        [
            (options.output, functools.partial(plan.write, found)),
            (options.figure, functools.partial(figure.draw, found)),
        ],
    )
    return 0


def _calibrate(config: Config, options: argparse.Namespace) -> int:
    record = trials.make_record(make_job(config, options.quick, options.limit))
    file: Path | None = None
    failures: list[str] = []
    try:
        file = calibration.file_of(record.key)
        record = dataclasses.replace(record, source=str(file))
    except ValueError as error:  # there is no home folder
        failures.append(f"the record is not kept: {error}")
    lines = [*show.table(record)]
    for purpose in ("train", "read"):
        lines.append(f"{purpose}: {calibration.describe(record.kernels(config.kernels, purpose))}")
    write = functools.partial(calibration.write, record)
    _print_and_write(lines, [(output, write) for output in dict.fromkeys((file, options.output))], failures)
    return 0


def _print_and_write(
    lines: Iterable[str], writes: Iterable[tuple[Path | None, Callable[[Path], None]]], earlier: Iterable[str] = ()
) -> None:
    """Print a result and write it to the files that are given: it took minutes, and no failure loses the rest.

    Raises:
        RuntimeError: files cannot be written, or there are earlier failures; it names all.
    """
    failures = [*earlier]
    try:
        print("\n".join(lines), flush=True)
    finally:
        for file, write in writes:
            if file is None:
                continue
            try:
                write(file)
            except (OSError, ValueError, RuntimeError) as error:
                failures.append(f"{show_path(file)} is not written: {error}")
    if failures:
        raise RuntimeError("; ".join(failures))


if __name__ == "__main__":
    sys.exit(main())
