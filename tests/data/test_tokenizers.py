"""Tokenizers: round trips, exact byte counts, what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from transmamba_jax.data import check_vocabulary, load_tokenizer, tokenizer_from_json
from transmamba_jax.data.tokenizers import END_OF_DOCUMENT, JsonTokenizer
from transmamba_jax.data.train_tokenizer import train

TEXT = "def f(x):\n    return x + 1  # naïve, 日本語, \U0001f600\n" * 20
BPE = JsonTokenizer(train(iter([TEXT.encode()]), 300), "the test's tokenizer")
BYTES = load_tokenizer("bytes")


@given(st.text())
def test_bytes_are_their_own_ids(text):
    ids = BYTES.encode(text)
    assert ids == [byte if byte else 32 for byte in text.encode("utf-8")]
    assert BYTES.decode(ids) == text.replace("\0", " ")


@given(st.text())
def test_bpe_round_trip_and_byte_count(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.token_bytes[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_document_is_its_ids_and_one_end(tokenizer):
    ids = tokenizer.encode_document(TEXT.encode())
    assert ids.dtype == np.int32
    assert ids.tolist() == [*tokenizer.encode(TEXT), tokenizer.end_of_document]
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode()) + 1
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_part_of_a_character_decodes_to_the_replacement_character(tokenizer):
    ids = tokenizer.encode("\U0001f601")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_travels_as_text_and_as_a_pickle(tokenizer):
    for copy in (tokenizer_from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
        assert copy.end_of_document == tokenizer.end_of_document
        assert copy.vocab_size == tokenizer.vocab_size


def test_a_nul_in_a_document_does_not_end_it():
    assert BYTES.encode_document(b"a\0b").tolist() == [97, 32, 98, 0]


def test_text_that_spells_the_special_token_stays_text():
    ids = BPE.encode(f"a{END_OF_DOCUMENT}b")
    assert BPE.end_of_document not in ids
    assert BPE.decode(ids) == f"a{END_OF_DOCUMENT}b"
    assert BPE.decode([BPE.end_of_document]) == END_OF_DOCUMENT


def test_byte_fallback_tokens_count_their_bytes():
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    vocabulary |= {"\u2581": 258, "a": 259, "é": 260}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    read = JsonTokenizer(tokenizer.to_str(), "the test's tokenizer")
    text = "a é 日"
    ids = read.encode(text)
    assert read.decode(ids) == text
    assert read.token_bytes[ids].sum() == len(text.encode())
    assert read.end_of_document == 1


def test_the_largest_id_decides_the_vocabulary_size():
    tree = json.loads(BPE.to_json())
    tree["model"]["vocab"][max(tree["model"]["vocab"], key=tree["model"]["vocab"].get)] = 1000
    read = JsonTokenizer(json.dumps(tree), "a tokenizer with a gap")
    assert read.vocab_size == 1001
    assert read.token_bytes[999] == 0


def test_vocabulary_must_fit_the_model():
    check_vocabulary(BYTES, 256)
    check_vocabulary(BPE, 512)
    with pytest.raises(ValueError, match=r"model\.vocab_size=255 is too small.*set model\.vocab_size to 256"):
        check_vocabulary(BYTES, 255)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.tokenizer must be 'bytes' or the path.*nowhere\.json"):
        load_tokenizer(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "found list"),
        ('{"model": {}}', r"keys model, added_tokens and decoder.*\['model'\]"),
        ('{"model": {}, "added_tokens": [], "decoder": null}', r"tokenizer\.json is not .* library can read: data did"),
        (tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), r"tokenizer\.json is .* without a single token"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(path))


def test_a_tokenizer_without_an_end_is_refused():
    tree = json.loads(BPE.to_json())
    tree["added_tokens"] = []
    with pytest.raises(ValueError, match=r"has no end-of-document token: .*name it with data\.end_of_document"):
        JsonTokenizer(json.dumps(tree), "an endless tokenizer")


def with_added(*tokens: str) -> tokenizers.Tokenizer:
    """The test's tokenizer with more special tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(BPE.to_json())
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize("present", [None, tokenizers.processors.ByteLevel()], ids=["alone", "behind_another"])
def test_another_end_can_be_named_and_travels(tmp_path: Path, present):
    tokenizer = with_added("<end: of text>")
    tokenizer.post_processor = present
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert load_tokenizer(str(path)).end_of_document == BPE.end_of_document
    read = load_tokenizer(str(path), "<end: of text>")
    expected = [*BPE.encode(TEXT), tokenizer.token_to_id("<end: of text>")]
    for copy in (read, tokenizer_from_json(read.to_json()), pickle.loads(pickle.dumps(read))):
        assert copy.encode_document(TEXT.encode()).tolist() == expected
        assert copy.to_json() == read.to_json()
    assert JsonTokenizer(read.to_json(), "the same", "<end: of text>").to_json() == read.to_json()
    assert tokenizers.Tokenizer.from_str(read.to_json()).encode(TEXT).ids == expected
    with pytest.raises(
        ValueError, match=r"data\.end_of_document='</end>' is none .*tokenizer\.json, found \['<\|endoft"
    ):
        load_tokenizer(str(path), "</end>")


@pytest.mark.parametrize(
    ("single", "end"), [("$A <2>", "<2>"), ("$A <1> <2>", END_OF_DOCUMENT), ("<1> $A", END_OF_DOCUMENT)]
)
def test_the_end_that_a_tokenizer_appends_itself_counts(single: str, end: str):
    tokenizer = with_added("<1>", "<2>")
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<1>", "<2>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=ids)
    assert JsonTokenizer(tokenizer.to_str(), "the test's").end_of_document == tokenizer.token_to_id(end)
