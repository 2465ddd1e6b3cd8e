"""Test sources that a program registers."""

import doctest
import itertools
import pickle

import numpy as np
import pytest

from transmamba_jax import data
from transmamba_jax.config import DataConfig
from transmamba_jax.data import registry
from transmamba_jax.data.sources import open_documents


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))


class Numbers:
    """A sequence of texts that is nowhere in memory."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> str:
        return f"number {index}: é"


def open_numbers(config: DataConfig, rest: str, split: str) -> Numbers:
    assert (config.source, rest, split) == ("numbers:a:b", "a:b", "train")
    return Numbers()


def test_the_example_runs():
    parser = doctest.DocTestParser()
    example = parser.get_doctest(data.register_source.__doc__ or "", {}, "register_source", None, None)
    assert len(example.examples) == 6
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.slow
def test_a_registered_source_is_read_shuffled_and_resumed():
    data.register_source("numbers", open_numbers)
    config = DataConfig(source="numbers:a:b", seq_len=20, batch_size=4, num_workers=1)
    documents = open_documents(config, "train")
    assert documents[3] == "number 3: é".encode()
    assert documents.where(3) == "document 3 of split 'train' of data.source 'numbers:a:b'"
    assert pickle.loads(pickle.dumps(documents))[3] == documents[3]
    batches = data.train_batches(config, data.load_tokenizer("bytes"))
    first = list(itertools.islice(batches, 3))
    state = batches.get_state()
    expected = next(batches)["tokens"]
    batches.close()
    again = data.train_batches(config, data.load_tokenizer("bytes"))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], expected)
    again.close()
    assert not np.array_equal(first[0]["tokens"], expected)


@pytest.mark.parametrize("name", ["text", "stdlib", "array_record"])
def test_built_in_names_are_kept(name: str):
    with pytest.raises(ValueError, match=f"'{name}' is a built-in source .*; register another name"):
        data.register_source(name, open_numbers)


@pytest.mark.parametrize("name", ["", "a:b", "my source", "ünder"])
def test_names_are_identifiers(name: str):
    with pytest.raises(ValueError, match="a source's name must be letters, digits and _, found"):
        data.register_source(name, open_numbers)


REFUSED = r"data\.source must be 'stdlib', 'text:<glob>', .*'numbers\[:<anything>\]'"


@pytest.mark.parametrize("source", ["text", "stdlib:x", "tfds:", "", "a b:c", "folder/file.txt", "ünder"])
def test_other_forms_are_refused_by_the_config(source: str):
    data.register_source("numbers", open_numbers)
    with pytest.raises(ValueError, match=REFUSED):
        DataConfig(source=source)


@pytest.mark.parametrize("source", ["numbrs", "numbers2:a", "numbers3"])
def test_unknown_names_are_refused_when_documents_are_opened(source: str):
    data.register_source("numbers", open_numbers)
    config = DataConfig(source=source)
    name = source.partition(":")[0]
    with pytest.raises(ValueError, match=rf"{REFUSED}.*did you mean 'numbers'.*register_source\('{name}', \.\.\.\)"):
        open_documents(config, "train")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "has no documents"),
        ("one text", "must be a sequence of documents, found one str"),
        (iter(["a"]), r"found list_iterator; list\(\.\.\.\) makes one of an iterator"),
        ({"a": 1}, "found dict"),
        ([1], "document 0 of split 'train' of data.source 'mine' must be str, bytes or a list of token ids, found int"),
        (["\udcff"], "document 0 .* is no Unicode text: surrogates not allowed at 0"),
        ([b"\xff"], "document 0 .* is not UTF-8: .* at byte offset 0"),
    ],
)
def test_documents_of_another_kind_are_refused(documents, message: str):
    data.register_source("mine", lambda *_: documents)
    with pytest.raises(ValueError, match=message):
        open_documents(DataConfig(source="mine"), "train")[0]
