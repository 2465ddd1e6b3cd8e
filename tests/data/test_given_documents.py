"""Documents that a program gives: what is taken, what is refused, and the bytes of token ids."""

import numpy as np
import pandas
import pytest

from tests.data.test_encoding import byte_level, unigram
from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer
from transmamba_jax.data.documents import GivenDocuments, TokenDocument
from transmamba_jax.data.encoding import encode_document


def given(documents):
    return GivenDocuments(documents, "documents", DataConfig())


def test_text_and_every_kind_of_bytes_are_text():
    texts = given(["é", b"\xc3\xa9", bytearray(b"\xc3\xa9"), memoryview(b"\xc3\xa9")])
    assert [texts[index] for index in range(4)] == ["é".encode()] * 4
    assert not any(isinstance(texts[index], TokenDocument) for index in range(4))


def test_a_table_of_pandas_is_refused_with_what_to_give():
    frame = pandas.DataFrame({"text": ["a", "b", "c"]})
    for documents in (frame, frame["text"], frame[frame["text"] > "a"]["text"]):
        with pytest.raises(ValueError, match=rf"found a pandas {type(documents).__name__}; .*\['text'\]\.tolist\(\)"):
            given(documents)
    assert given(frame["text"].tolist())[2] == b"c"


def test_a_document_that_cannot_be_had_is_named():
    class Gap:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise KeyError(index)

    with pytest.raises(ValueError, match="document 1 of documents cannot be read: KeyError: 1"):
        given(Gap())[1]


def test_ids_that_are_no_whole_characters_count_their_own_bytes():
    document = given([[200] * 3 + [65]])[0]  # three first bytes of characters, which decode to U+FFFD each
    tokens = encode_document(load_tokenizer("bytes"), document)
    assert tokens["id"].tolist() == [200, 200, 200, 65, 0]
    assert tokens["bytes"].tolist() == [1, 1, 1, 1, 1]


def test_ids_of_a_byte_level_vocabulary_count_their_own_bytes():
    """The ids of a text in reverse order cut characters apart, and have the bytes that they have in the text."""
    tokenizer, text = byte_level(), "the tree 日"
    ((ids, lengths),) = tokenizer.encode_counted([text.encode()])
    reverse = ids[::-1].copy()
    document = TokenDocument(tokenizer.decode(reverse.tolist()).encode(), reverse)
    assert tokenizer.encode(document.decode()) != reverse.tolist()
    assert len(document) > len(text.encode())  # U+FFFD for each part of a character
    tokens = encode_document(tokenizer, document)
    assert tokens["bytes"].tolist() == [*lengths[::-1].tolist(), 1]


def test_other_vocabularies_spread_the_bytes_of_the_text():
    tokenizer = unigram()
    assert tokenizer.byte_lengths(np.array([1, 2])) is None
    ids = np.array(tokenizer.encode("a tree"), np.int32)
    ids = np.concatenate([ids, ids[:1], ids[:1]])
    document = TokenDocument(tokenizer.decode(ids.tolist()).encode(), ids)
    tokens = encode_document(tokenizer, document)
    assert tokens["id"][:-1].tolist() == ids.tolist()
    assert tokens["bytes"].sum() == len(document) + 1
