"""Train a model: `python train.py --config configs/tiny.yaml --train.steps 100 --model.d-model 256`.

`--compile-only --topology v5e:16x16` compiles the step for hardware that need not be here and prints what it needs.
Exit codes: 0 complete, 1 diverged, 2 bad configuration, 3 compiled and does not fit, 74 a file could not be read or
written (the last checkpoint, the report), 75 asked to stop and saved (run the same command to go on), 130 second
Ctrl-C.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transmamba_jax import config_io
from transmamba_jax.config import Config
from transmamba_jax.runtime import host_memory, hosts


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, validate, train; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--topology", metavar="NAME")
    known, overrides = parser.parse_known_args(arguments)
    if known.config is None and not {"-h", "--help"} & set(overrides):
        return _no_config()
    try:
        config = Config() if known.config is None else config_io.read_config_file(known.config)
        program = f"train.py --config {known.config or 'FILE'}"
        config = config_io.parse_command_line(config, overrides, program, description=__doc__)
    except ValueError as error:
        return _fail(error, 2)

    if known.compile_only != (known.topology is not None):
        return _fail("--compile-only and --topology NAME (v5e:16x16, v5p:8x8x8, cpu:8, ...) go together", 2)

    host_memory.keep_freed()
    # orbax and Grain take seconds to import: mistakes and --help need neither.
    from transmamba_jax.compile_only import compile_only
    from transmamba_jax.training.loop import EXIT_NOT_SAVED, NonFiniteError, train

    log, handler = logging.getLogger("pallas_kernels"), logging.StreamHandler()
    log.setLevel(logging.INFO)  # which kernel was chosen
    log.addHandler(handler)
    try:
        if known.compile_only:
            return compile_only(config, known.topology)
        hosts.start(config.hosts)
        return train(config)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, EXIT_NOT_SAVED)
    except NonFiniteError as error:
        return _fail(error, 1)
    finally:
        log.removeHandler(handler)


def _no_config() -> int:
    configs = sorted(str(path) for path in Path("configs").rglob("*.yaml"))
    found = "\n  ".join(["", *configs]) if configs else " none in configs/"
    return _fail(
        "--config is required: train.py --config FILE [--section.key value ...]\n"
        f"--help shows every option. Configurations here:{found}",
        2,
    )


def _fail(message: object, code: int) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
