"""Write a checkpoint as a folder of safetensors, config, tokenizer and programs."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from transmamba_jax import data
from transmamba_jax.checkpoint import command_options
from transmamba_jax.export import folder, stablehlo
from transmamba_jax.generate.arguments import check_model
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import hardware, logs, tensor_files
from transmamba_jax.runtime.paths import option_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba export",
        description="Write a checkpoint as a folder of safetensors, config, tokenizer and programs (StableHLO).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    command_options.add_arguments(parser)
    add(
        "--output",
        type=option_path,
        required=True,
        metavar="DIR",
        help="folder to write, which must not hold an export yet",
    )
    add(
        "--platforms",
        nargs="*",
        default=list(stablehlo.PLATFORMS),
        metavar="NAME",
        help=f"platforms to compile the programs for (default: {' '.join(stablehlo.PLATFORMS)}); none: no programs",
    )
    return parser


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Export a checkpoint and return the exit code: 0, or 2 with the reason printed."""
    options = _parser().parse_args(arguments)
    try:
        hardware.require_devices()
        if options.platforms:
            stablehlo.check_platforms(options.platforms)
        programs_too = [f"{name}.jax" for name in stablehlo.PROGRAMS] if options.platforms else []
        tensor_files.reserve_outputs(options.output, [folder.CONFIG, folder.TOKENIZER, *programs_too])
        saved = command_options.restore(options.checkpoint, options.step)
        config = dataclasses.replace(saved.config, model=command_options.apply(saved.config, options))
        if options.platforms:
            check_model(TransMamba(config.model))  # before anything is written
        folder.save(options.output, config, saved.params, data.tokenizer_from_json(saved.tokenizer_json))
        if options.platforms:
            stablehlo.save_programs(options.output, config.model, saved.params, options.platforms)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote step {saved.step} to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
