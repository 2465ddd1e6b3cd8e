"""Read and write the files of a tokenizer beside a Mamba-2 model: tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from transmamba_jax.data.tokenizers import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, Tokenizer
from transmamba_jax.runtime import tensor_files

TOKENIZER, SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"


def read(folder: Path) -> JsonTokenizer | None:
    """Read the tokenizer.json beside a model, None where there is none.

    A document ends with the `eos_token` of tokenizer_config.json; else with the `eos_token_id` of config.json if that
    is an added token, since transformers writes a default there; else as `JsonTokenizer` finds.

    Raises:
        ValueError: a file cannot be read, or no token can end a document.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    settings = tensor_files.read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is None and (folder / CONFIG).is_file():
        end = _added_token(tensor_files.read_json(file), tensor_files.read_json(folder / CONFIG).get("eos_token_id"))
    with tensor_files.raise_as_value_error(file, "read"):
        return JsonTokenizer(file.read_text(encoding="utf-8"), str(file), end)


def _added_token(tokenizer: Mapping[str, Any], index: Any) -> str | None:
    found = tokenizer.get("added_tokens")
    added = {each.get("id"): each.get("content") for each in found or () if isinstance(each, dict)}
    return added.get(index) if isinstance(index, int) else None


def names(tokenizer: Tokenizer | None) -> list[str]:
    """Return the names of the files that `write` writes: none for the ids of a synthetic task."""
    return [TOKENIZER, SETTINGS] if isinstance(tokenizer, ByteTokenizer | JsonTokenizer) else []


def write(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write the files, if the tokenizer has some.

    Raises:
        ValueError: they cannot be written.
    """
    if tokenizer is None or not names(tokenizer):
        return
    text = _bytes().to_str() if isinstance(tokenizer, ByteTokenizer) else tokenizer.to_json()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizers.Tokenizer.from_str(text).id_to_token(tokenizer.end_of_document),
        "clean_up_tokenization_spaces": False,
    }
    with tensor_files.raise_as_value_error(folder):
        (folder / TOKENIZER).write_text(text, encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _bytes() -> tokenizers.Tokenizer:
    """Make the byte tokenizer: an id is a byte, 0 ends a document, and NUL in a text is a space."""
    # The library spells a byte as a character: printable ones as themselves, the others from U+0100 on, in order.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    del vocabulary["\u0100"]
    vocabulary[END_OF_DOCUMENT] = 0
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Replace("\0", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer
