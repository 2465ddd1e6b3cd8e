"""Convert between Mamba-2 weights and exported folders."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from transmamba_jax import export
from transmamba_jax.config import Config
from transmamba_jax.convert import mamba2, mamba2_config
from transmamba_jax.data import tokenizers as data
from transmamba_jax.runtime import tensor_files
from transmamba_jax.runtime.paths import option_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba convert",
        description="Convert between Mamba-2 weights (safetensors and config.json) and folders of "
        "transmamba_jax.export. Tokenizers of the tokenizers library are copied.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inward = commands.add_parser(
        "from-mamba2", help="read a Mamba-2 model, write a folder for transmamba_jax.export.load"
    )
    outward = commands.add_parser("to-mamba2", help="read such a folder, write a Mamba-2 model")
    start = commands.add_parser(
        "start-run",
        help="read such a folder, write step 0 of a work directory, for train.py --checkpoint.partial True "
        "and every other command that takes a checkpoint",
    )
    for command in (inward, outward, start):
        command.add_argument("source", type=option_path, help="folder to read")
        command.add_argument("output", type=option_path, help="folder to write; it may hold none of this yet")
    outward.add_argument("--naming", choices=tuple(mamba2.NAMINGS), default="transformers", help="default: %(default)s")
    outward.add_argument("--dtype", choices=tuple(tensor_files.DTYPES.values()), help="default: as the parameters are")
    return parser


def _tokenizer(folder: Path) -> data.JsonTokenizer | None:
    """Return the tokenizer of the tokenizers library in a folder, None where there is none or it is bytes."""
    file = folder / export.TOKENIZER
    if not file.is_file() or file.read_text(encoding="utf-8") == data.ByteTokenizer().to_json():
        return None
    return data.JsonTokenizer(file.read_text(encoding="utf-8"), str(file))


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a folder; returns 2 where that cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "from-mamba2":
            model, params = mamba2.from_mamba2(options.source)
            export.save(options.output, Config(model=model), params, _tokenizer(options.source))
        elif options.command == "start-run":
            mamba2.start_run(options.source, options.output)
        else:
            has_tokenizer = _tokenizer(options.source) is not None
            tensor_files.claim(options.output, [mamba2_config.FILE, *[export.TOKENIZER] * has_tokenizer])
            loaded = export.load(options.source)
            mamba2.to_mamba2(loaded.config.model, loaded.params, options.output, options.naming, options.dtype)
            if has_tokenizer:
                with tensor_files.explained(options.output):
                    shutil.copy(options.source / export.TOKENIZER, options.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
