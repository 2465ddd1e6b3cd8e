"""Convert between Mamba-2 weights and exported folders."""

import argparse
import sys
from collections.abc import Sequence

from transmamba_jax import export
from transmamba_jax.config import Config
from transmamba_jax.convert import mamba2, tokenizer_files
from transmamba_jax.data.tokenizers import check_vocabulary
from transmamba_jax.runtime import hardware, logs, tensor_files
from transmamba_jax.runtime.paths import option_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba convert",
        description="Convert between Mamba-2 weights (safetensors, config.json, tokenizer.json) and folders of "
        "transmamba_jax.export.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inward = commands.add_parser(
        "from-mamba2", help="read a Mamba-2 model, write an exported folder, as python -m transmamba_jax.export does"
    )
    outward = commands.add_parser("to-mamba2", help="read an exported folder, write a Mamba-2 model")
    start = commands.add_parser(
        "start-run",
        help="read an exported folder, write step 0 of a work directory: train.py --config WORKDIR/config.yaml "
        "--checkpoint.partial True trains from it, and every command that takes a checkpoint reads it",
    )
    for command in (inward, outward, start):
        command.add_argument("source", type=option_path, help="folder to read")
        command.add_argument("output", type=option_path, help="folder to write, which may hold none of these files yet")
    outward.add_argument("--naming", choices=tuple(mamba2.NAMINGS), default="transformers", help="default: %(default)s")
    outward.add_argument("--dtype", choices=tuple(tensor_files.DTYPES.values()), help="default: as the parameters are")
    return parser


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a folder; returns 2 where that cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        hardware.require_devices()
        if options.command == "from-mamba2":
            model, params = mamba2.from_mamba2(options.source)
            read = tokenizer_files.read(options.source)
            if read is not None:
                check_vocabulary(read, model.vocab_size)
            export.save(options.output, Config(model=model), params, read)
        elif options.command == "start-run":
            mamba2.start_run(options.source, options.output)
        else:
            config, params, tokenizer = export.load(options.source)
            mamba2.to_mamba2(config.model, params, options.output, options.naming, options.dtype, tokenizer)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
