"""Train a model: `python train.py --config configs/tiny.yaml --train.steps 100 --model.d-model 256`.

`--compile-only --topology v5e:16x16` compiles the step for absent hardware and prints its memory and time.
Exit codes: 0 complete, 1 diverged, 2 bad configuration, 3 compiled and does not fit, 74 a file could not be read or
written (the last checkpoint, the report), 75 asked to stop and saved (run the same command to continue), 130 second
Ctrl-C.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from transmamba_jax import config_io
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.data import registry
from transmamba_jax.runtime import compile_cache, hardware, host_memory, hosts, logs


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line: these options and every one of `Config`."""

    experiment: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    config: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """YAML file of the experiment, or the name of one of the package's (tiny). Options on the command line replace its
    values."""
    compile_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the step for the hardware of --topology, which need not be here; print its memory and time; train
    nothing."""
    topology: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Hardware of --compile-only: v5e:16x16, v5p:8x8x8, cpu:8, ..."""


def main(
    arguments: Sequence[str] | None = None,
    model: Callable[[ModelConfig], Any] | None = None,
    program: str = "train.py",
) -> int:
    """Parse the command line, validate, train; return the exit code.

    `model` makes a module from the configuration's `model` section, in place of `TransMamba`. `program` is the
    name that help and errors begin with.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with logs.safe_output():
        try:
            options = parse(arguments, program)
        except (ValueError, OSError) as error:
            return _fail(program, error, 2)
        return _run(options, model, program)
    return 0


def parse(arguments: Sequence[str], program: str = "train.py") -> Options:
    """Read the experiment's file, then the options that replace its values; exit where help is asked for.

    Raises:
        ValueError: no file, or an option that is wrong.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file = parser.parse_known_args(arguments)[0].config
    if file is None and not {"-h", "--help"} & set(arguments):
        names = "\n  ".join(config_io.config_names())
        raise ValueError(
            f"--config is required: {program} --config NAME [--section.key value ...], with a YAML file or one of\n"
            f"  {names}\n--help shows every option."
        )
    read = config_io.Experiment(Config()) if file is None else config_io.read_experiment(file)
    options = config_io.parse_command_line(Options(read.config), arguments, program, __doc__, read.schedule)
    if options.compile_only != bool(options.topology):
        raise ValueError("--compile-only and --topology NAME (v5e:16x16, v5p:8x8x8, cpu:8, ...) go together")
    if not options.compile_only:
        for source in options.experiment.data.sources:
            registry.check_source(source)
    return options


def _run(options: Options, model: Callable[[ModelConfig], Any] | None, program: str) -> int:
    host_memory.keep_freed()
    # orbax and Grain take seconds to import: mistakes and --help need neither.
    from transmamba_jax.compile_only import compile_only
    from transmamba_jax.training.loop import EXIT_NOT_SAVED, train
    from transmamba_jax.training.step_log import NonFiniteError

    config = options.experiment
    try:
        with logs.shown():
            if options.compile_only:
                return compile_only(config, options.topology)
            compile_cache.keep_programs()
            hosts.start(config.hosts)
            hardware.require_devices()
            return train(config, None if model is None else model(config.model))
    except ValueError as error:
        return _fail(program, error, 2)
    except OSError as error:
        return _fail(program, error, EXIT_NOT_SAVED)
    except NonFiniteError as error:
        return _fail(program, error, 1)


def _fail(program: str, message: object, code: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(program="transmamba train"))
