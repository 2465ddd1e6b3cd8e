"""Train a byte-level BPE tokenizer on the configured source's training split.

    python -m transmamba_jax.data.train_tokenizer --config configs/tiny.yaml --vocab-size 4096 --output tokenizer.json

The same text and vocabulary size give the same file, byte for byte.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from transmamba_jax.config_io import load_config
from transmamba_jax.data.held_out import training_documents
from transmamba_jax.data.tokenizers import END_OF_DOCUMENT, JsonTokenizer
from transmamba_jax.runtime import logs
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.paths import option_path

MIN_VOCABULARY = 257
"""256 bytes and the end-of-document token."""


def train(documents: Iterator[bytes], vocab_size: int) -> str:
    """Return the tokenizer.json of a byte-level BPE with at most `vocab_size` ids; id 0 ends a document.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the end-of-document token.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ValueError(f"--vocab-size must be >= {MIN_VOCABULARY} (every byte and the end of document): {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.decode("utf-8") for document in documents), trainer)
    return tokenizer.to_str(pretty=True)


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="transmamba train-tokenizer",
        description="Train a byte-level BPE tokenizer on the training split of a config's data source. Further "
        "arguments override the config, as for train.py: --data.source 'text:books/*.txt'.",
        allow_abbrev=False,  # the config's options begin like these
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML experiment; its data section is read")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="largest number of ids (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=option_path,
        default="tokenizer.json",
        metavar="FILE",
        help="file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes", type=int, default=10**9, metavar="N", help="bytes of text to read (default: %(default)s)"
    )
    options, overrides = parser.parse_known_args(arguments)
    output = options.output
    try:
        require(not output.is_dir(), f"--output {output} is a folder; name a file in it")
        config = load_config(options.config, overrides)
        output.parent.mkdir(parents=True, exist_ok=True)
        documents = training_documents(config.data, options.max_bytes)
        text = train(documents, options.vocab_size)
        output.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    size = JsonTokenizer(text, str(output)).vocab_size
    print(f"{output}: {size} ids. Use it with --data.tokenizer {output} --model.vocab-size {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
