"""Tokenizers: round trips, exact byte counts, what is refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from transmamba_jax.data import check_vocabulary, encoding, load_tokenizer, tokenizer_from_json
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
    ((_, lengths),) = BPE.encode_counted([text.encode("utf-8")])
    assert lengths.sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_document_is_its_ids_and_one_end(tokenizer):
    ids = tokenizer.encode_document(TEXT.encode())
    assert ids.dtype == np.int32
    assert ids.tolist() == [*tokenizer.encode(TEXT), tokenizer.end_of_document]
    ((counted, lengths),) = tokenizer.encode_counted([TEXT.encode()])
    assert counted.tolist() == ids[:-1].tolist()
    assert counted.dtype == lengths.dtype == np.int32
    spelt = [tokenizer.decode([index]) for index in counted]
    for text, size in zip(spelt, lengths, strict=True):
        assert "\ufffd" in text or len(text.encode("utf-8")) == size


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


def fallback_vocabulary(*more: str) -> dict[str, int]:
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *more]
    return {token: index for index, token in enumerate(tokens)}


def byte_fallback(*more: str) -> tokenizers.Tokenizer:
    """A SentencePiece vocabulary of bytes and the given tokens."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=fallback_vocabulary(*more), merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    replace = tokenizers.decoders.Replace("\u2581", " ")
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), replace]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    return tokenizer


def unigram(scheme: str) -> tokenizers.Tokenizer:
    """A Unigram vocabulary of words that begin with a space."""
    words = ["<unk>", "</s>", "\u2581", "\u2581the", "\u2581na\u00efve", "th", "e", "a", "b", "\n", "\u65e5", "\u672c"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([(w, -float(len(words) - len(w))) for w in words], 0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def byte_level(add_prefix_space: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(BPE.to_json())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    """A vocabulary that folds case, drops spaces and knows few words: it does not round-trip."""
    words = ["[UNK]", "[SEP]", "the", "th", "##e", "a", "b", "naive"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


KINDS = {
    "bytes": BYTES,
    "byte-level": BPE,
    "byte-level-prefix-space": byte_level(True),
    "byte-fallback": byte_fallback("\u2581", "a", "\u00e9", "\u2581\u2581"),
    "byte-fallback-without-a-lone-space": byte_fallback("a", "\u00e9", "\u2581a"),
    "metaspace-always": unigram("always"),
    "metaspace-first": unigram("first"),
    "metaspace-never": unigram("never"),
    "word-pieces": word_pieces(),
}


def ready(tokenizer):
    if isinstance(tokenizer, tokenizers.Tokenizer):
        tokenizer.add_special_tokens(["</s>"])
        return JsonTokenizer(tokenizer.to_str(), "the test's tokenizer")
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.text(), st.text(alphabet="the na\u00efvab\n\u65e5\u672c ")))
def test_bytes_of_tokens_add_up_to_those_of_the_document(kind, text):
    tokenizer = ready(KINDS[kind])
    ((ids, lengths),) = tokenizer.encode_counted([text.encode("utf-8")])
    assert ids.shape == lengths.shape
    assert (lengths >= 0).all()
    document = encoding.encode_document(tokenizer, text.encode("utf-8"))
    np.testing.assert_array_equal(document["id"], tokenizer.encode_document(text.encode("utf-8")))
    assert document["bytes"].sum() == len(text.encode("utf-8")) + 1
    if len(ids):
        assert lengths.sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("metaspace-always", {"\u2581the": 3, "\u2581na\u00efve": 7, "\u2581": 1, "a": 1}),
        ("metaspace-never", {"th": 2, "e": 1, "\u2581na\u00efve": 7, "\u2581": 1, "a": 1}),
        ("byte-level-prefix-space", None),
    ],
)
def test_a_token_stands_for_the_bytes_that_it_replaces(kind, tokens):
    tokenizer = ready(KINDS[kind])
    text = "the na\u00efve a"
    ((ids, lengths),) = tokenizer.encode_counted([text.encode()])
    if tokens is None:
        tokens = dict(zip(("first", "last"), (lengths[0], lengths[-1]), strict=True))
        assert (tokenizer.decode(ids[:1].tolist()), tokens["first"]) == (" ", 0)  # the space that the tokenizer adds
    else:
        found = {
            tokenizer._tokenizer.id_to_token(int(index)): int(size) for index, size in zip(ids, lengths, strict=True)
        }
        assert found == tokens


def test_vocabulary_must_fit_the_model():
    check_vocabulary(BYTES, 256)
    check_vocabulary(BPE, 512)
    with pytest.raises(ValueError, match=r"model\.vocab_size=255 is too small.*set model\.vocab_size to 256"):
        check_vocabulary(BYTES, 255)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokenizer.json").write_text(BPE.to_json())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~/tokenizer.json").to_json() == BPE.to_json()


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot read '.*/\\xff\.json': No such file or directory$"):
        load_tokenizer(os.fsdecode(bytes(tmp_path) + b"/\xff.json"))


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.tokenizer must be 'bytes' or.*train-tokenizer.*nowhere\.json"):
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


def test_a_tokenizer_that_drops_merges_at_random_is_refused():
    tree = json.loads(BPE.to_json())
    tree["model"]["dropout"] = 0.25
    with pytest.raises(ValueError, match=r"t\.json drops merges at random \(dropout of its model: 0\.25\).*to null"):
        JsonTokenizer(json.dumps(tree), "t.json")
    tree["model"]["dropout"] = None
    assert JsonTokenizer(json.dumps(tree), "t.json").encode(TEXT) == BPE.encode(TEXT)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = with_added("<pad>")
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] == "<pad>"]
    with pytest.raises(ValueError, match=r"its added tokens are '<pad>', none .*name it with data\.end_of_document"):
        JsonTokenizer(json.dumps(tree), "an endless tokenizer")


def test_the_command_that_adds_an_end_is_said_and_works(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    tree = json.loads(BPE.to_json())
    tree["added_tokens"] = []
    del tree["model"]["vocab"][END_OF_DOCUMENT]
    path.write_text(json.dumps(tree))
    with pytest.raises(
        ValueError, match=r"it has no added tokens at all\. Add one with: python -c .*model\.vocab_size"
    ) as refusal:
        load_tokenizer(str(path))
    code = str(refusal.value).split('python -c "')[1].split('" and let')[0]
    subprocess.run([sys.executable, "-c", code], check=True)
    read = load_tokenizer(str(path))
    assert read.encode_document(TEXT.encode()).tolist() == [*BPE.encode(TEXT), read.end_of_document]


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
        ValueError, match=r"data\.end_of_document='</end>' is none .*tokenizer\.json, found '<\|endoft.*Add one with: "
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
