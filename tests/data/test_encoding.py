"""Test that long documents are read and encoded in parts, and that the parts have the tokens of the whole."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from transmamba_jax.config import DataConfig
from transmamba_jax.data import documents as documents_module
from transmamba_jax.data import encoding, eval_batches, load_tokenizer, text_files, train_batches
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.tokenizers import JsonTokenizer
from transmamba_jax.data.train_tokenizer import train

PART = 500
BYTES = load_tokenizer("bytes")
WORDS = ["the", "café", "x1", "日本語", "  ", "\n", "\n\n", "—", "\U0001f600", "def f():\n    return 1\n", "it's"]


def prose(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def byte_level() -> JsonTokenizer:
    return JsonTokenizer(train(iter([prose(500).encode()]), 400), "byte-level")


def unigram() -> JsonTokenizer:
    """SentencePiece's kind: words begin with a space, and the first word of a text is given one."""
    pieces = sorted({piece for word in WORDS for piece in (word, "\u2581" + word, *word)} - {"  "})
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", -20.0), *((piece, -5.0 / len(piece)) for piece in pieces)], 0)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["</s>"])
    return JsonTokenizer(tokenizer.to_str(), "unigram")


def counting() -> JsonTokenizer:
    """A tokenizer whose ids depend on how much text there is before: no place to cut."""
    tokenizer = tokenizers.Tokenizer.from_str(byte_level().to_json())
    tokenizer.normalizer = tokenizers.normalizers.Prepend("the ")
    return JsonTokenizer(tokenizer.to_str(), "prepends")


TOKENIZERS = {"bytes": lambda: BYTES, "byte-level": byte_level, "unigram": unigram}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few hundred bytes be a long document."""
    for module in (documents_module, encoding, text_files):
        monkeypatch.setattr(module, "PART_BYTES", PART)


def write_long(folder: Path, count: int = 6) -> list[bytes]:
    texts = [prose(300 * number + 5, seed=number).encode() for number in range(count)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text)
    return texts


def config_for(folder: Path, **options) -> DataConfig:
    defaults = {"train_split": "all", "eval_split": "all", "seq_len": 15, "batch_size": 2, "shuffle": False}
    return DataConfig(source=f"text:{folder}/*.txt", **{**defaults, **options})


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_parts_have_the_tokens_of_the_whole(tmp_path: Path, kind: str):
    tokenizer, texts = TOKENIZERS[kind](), write_long(tmp_path)
    documents = open_documents(config_for(tmp_path), "all")
    assert documents.has_long
    for index, text in enumerate(texts):
        parts = encoding.EncodeInParts(documents, tokenizer).flat_map(index)
        assert len(parts) == max(1, -(-len(text) // PART))
        again = encoding.EncodeInParts(documents, tokenizer).flat_map(index)
        np.testing.assert_array_equal(again[len(parts) // 2]["tokens"], parts[len(parts) // 2]["tokens"])
        joined = np.concatenate([part["tokens"] for part in parts])
        np.testing.assert_array_equal(joined.view(encoding.TOKEN), encoding.encode_document(tokenizer, text))
        assert max(len(part["tokens"]) for part in parts) < 2 * PART


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rows_are_those_of_the_documents_read_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    tokenizer, texts = TOKENIZERS[kind](), write_long(tmp_path)
    config = config_for(tmp_path)
    batches = list(itertools.islice(train_batches(config, tokenizer), 200))
    rows = np.concatenate([batch["tokens"] for batch in batches]).ravel()
    stream = np.concatenate([tokenizer.encode_document(text) for text in texts])
    np.testing.assert_array_equal(rows, np.resize(stream, rows.size))
    assert sum(batch["bytes"].sum() for batch in batches) > 0
    held_out = eval_batches(config, tokenizer, 0, 4)
    monkeypatch.setattr(text_files, "PART_BYTES", 2**22)
    for parted, whole in zip(held_out, eval_batches(config, tokenizer, 0, 4), strict=True):
        np.testing.assert_array_equal(parted["tokens"], whole["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_position_inside_a_long_document_continues_bit_for_bit(tmp_path: Path, packing: str, workers: int):
    write_long(tmp_path)
    config = config_for(tmp_path, packing=packing, shuffle=True, num_workers=workers)
    batches = train_batches(config, BYTES)
    states, expected = [], []
    for _ in range(40):
        states.append(json.dumps(batches.get_state()))
        expected.append(next(batches))
    batches.close()
    for position in (1, 17, 33) if workers == 0 else (17,):
        restored = train_batches(config, BYTES)
        restored.set_state(json.loads(states[position]))
        for batch in expected[position : position + 4]:
            for name, rows in next(restored).items():
                np.testing.assert_array_equal(rows, batch[name])
        restored.close()


def test_a_tokenizer_that_cannot_be_cut_is_refused_with_how_to_split(tmp_path: Path):
    write_long(tmp_path)
    config = config_for(tmp_path)
    with pytest.raises(ValueError, match=r"1\.txt has .* bytes, too many .* near byte 500; split the file .* split -C"):
        list(itertools.islice(train_batches(config, counting()), 500))


def test_a_document_may_end_within_the_token_at_the_end_of_a_part(tmp_path: Path):
    tokenizer = byte_level()
    word = next(word for word in prose(200).split() if len(word) > 3 and len(tokenizer.encode(f" {word}")) == 1)
    text = "\n" * (PART - 2) + f" {word}"
    (tmp_path / "a.txt").write_text(text)
    assert tokenizer.find_cut(text, PART) is None  # the last token begins before the end of the first part
    documents = open_documents(config_for(tmp_path), "all")
    parts = encoding.EncodeInParts(documents, tokenizer).flat_map(0)
    assert len(parts) == 2
    joined = np.concatenate([part["tokens"] for part in parts]).view(encoding.TOKEN)
    np.testing.assert_array_equal(joined, encoding.encode_document(tokenizer, text.encode()))


def test_bytes_that_are_not_utf8_are_named_by_their_place_in_the_file(tmp_path: Path):
    data = bytearray(write_long(tmp_path)[-1])
    place = data.index(b"x1", 3 * PART + 100)
    data[place] = 0xFF
    (tmp_path / "5.txt").write_bytes(bytes(data))
    parts = encoding.EncodeInParts(open_documents(config_for(tmp_path), "all"), BYTES).flat_map(5)
    with pytest.raises(
        ValueError, match=rf"5\.txt is not UTF-8: invalid start byte at byte offset {place} \(byte 0xff"
    ):
        list(parts)


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path):
    write_long(tmp_path)
    documents = open_documents(config_for(tmp_path), "all")
    parts = encoding.EncodeInParts(documents, BYTES).flat_map(5)
    (tmp_path / "5.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"5\.txt became shorter than its [\d,]+ bytes at the start"):
        parts[2]


@pytest.mark.parametrize("limit", range(8))
def test_text_is_cut_between_characters(limit: int):
    text = "aé日\U0001f600".encode()
    cut = documents_module.cut_text(text, limit)
    assert text.startswith(cut)
    assert cut.decode() == text[:limit].decode("utf-8", "ignore")
