"""Test rows of prompts with completions: their weights, in training and held out, with every packing and tokenizer."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data import eval_batches, load_tokenizer, tokenizer_from_json, train_batches
from transmamba_jax.data.documents import CompletionDocument
from transmamba_jax.data.encoding import TOKEN, encode_documents
from transmamba_jax.data.tokenizers import JsonTokenizer, Tokenizer
from transmamba_jax.data.train_tokenizer import train

BYTES = load_tokenizer("bytes")


def prompts(folder: Path, count: int = 40, **options) -> DataConfig:
    """Write prompts in capital letters with completions in small ones, and return the config that reads them."""
    rows = [{"q": "Q" * (1 + n % 7), "a": chr(ord("a") + n % 26) * (n % 5)} for n in range(count)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    defaults = {"source": f"jsonl:{folder}/a.jsonl", "train_split": "all", "eval_split": "all", "seq_len": 15}
    fields = {"prompt_field": "q", "completion_field": "a", "cache_dir": str(folder)}
    return DataConfig(**{**defaults, **fields, "batch_size": 4, **options})


def of_letters(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the weights that a row must have: 0 for capital letters and padding, else 1."""
    tokens = batch["tokens"]
    learned = ~((tokens >= ord("A")) & (tokens <= ord("Z")))
    return (learned & (batch.get("segment_ids", np.ones_like(tokens)) > 0)).astype(np.float32)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_completions_and_their_end_have_weight(tmp_path: Path, packing: str) -> None:
    batches = train_batches(prompts(tmp_path, packing=packing), BYTES)
    for batch in itertools.islice(batches, 30):
        assert batch["weights"].dtype == np.float32
        np.testing.assert_array_equal(batch["weights"], of_letters(batch))
        assert 0 < batch["weights"].sum() < batch["weights"].size
        real = batch.get("segment_ids", np.ones_like(batch["tokens"])) > 0
        np.testing.assert_array_equal(batch["bytes"], real)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_held_out_rows_have_the_same_weights(tmp_path: Path, packing: str) -> None:
    batches = eval_batches(prompts(tmp_path, packing=packing), BYTES, windows=0, batch_size=3)
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    real = rows["bytes"].any(axis=1)
    np.testing.assert_array_equal(rows["weights"][real], of_letters(rows)[real])
    assert not rows["weights"][~real].any()
    if packing == "first_fit":  # whole documents, each once
        found = [
            bytes(row[ids == number].tolist())
            for row, ids in zip(rows["tokens"], rows["segment_ids"], strict=True)
            for number in range(1, ids.max() + 1)
        ]
        assert found == [("Q" * (1 + n % 7) + chr(ord("a") + n % 26) * (n % 5)).encode() + b"\0" for n in range(40)]


def test_a_document_longer_than_a_row_is_cut(tmp_path: Path) -> None:
    config = prompts(tmp_path, count=7, packing="first_fit", seq_len=4)
    batches = eval_batches(config, BYTES, windows=0, batch_size=1)
    tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    texts = ["Q" * (1 + n % 7) + chr(ord("a") + n % 26) * (n % 5) for n in range(7)]
    assert bytes(tokens.tolist()) == "".join(text + "\0" for text in texts).encode()


def test_rows_without_a_completion_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "long prompt " * 40, "a": "a"}))
    config = prompts(tmp_path, count=0, source=f"jsonl:{tmp_path}/b.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": "long prompt " * 40, "a": "a"}))
    with pytest.raises(
        ValueError, match=r"split 'all' .* has no completion in 2 rows; raise eval.windows, or data.seq"
    ):
        eval_batches(config, BYTES, windows=2, batch_size=2)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Bytes, and a small BPE."""
    text = train(iter([b"a prompt and its completion, a prompt and its end"] * 3), 300)
    return BYTES if request.param == "bytes" else tokenizer_from_json(text)


def test_parts_are_encoded_one_by_one(tokenizer: Tokenizer) -> None:
    parts = (("a pro", False), ("", True), ("mpt é", False), (" and its end", True))
    document = CompletionDocument.of((text.encode(), learned) for text, learned in parts)
    plain, found, last = (
        each.view(TOKEN)
        for each in encode_documents(tokenizer, [b"before", document, CompletionDocument.of([(b"prompt", False)])])
    )
    ids = [tokenizer.encode(text) for text, _ in parts]
    assert found["id"].tolist() == [*itertools.chain(*ids), tokenizer.end_of_document]
    learned = [flag for each, (_, flag) in zip(ids, parts, strict=True) for _ in each] + [True]
    np.testing.assert_array_equal(found["bytes"] >= 0, learned)
    assert np.maximum(found["bytes"], ~found["bytes"]).sum() == len(document) + 1
    assert (plain["bytes"] >= 0).all()
    assert (last["bytes"] < 0).all()  # the end belongs to the last part
    if isinstance(tokenizer, JsonTokenizer):
        assert ids[0] + ids[2] != tokenizer.encode("a prompt é")  # together they are other tokens


def test_a_position_continues_bit_for_bit(tmp_path: Path) -> None:
    config = prompts(tmp_path, packing="first_fit")
    batches = train_batches(config, BYTES)
    for _ in range(5):
        next(batches)
    state = json.dumps(batches.get_state())
    expected = [next(batches) for _ in range(5)]
    again = train_batches(config, BYTES)
    again.set_state(json.loads(state))
    for batch in expected:
        found = next(again)
        assert found.keys() == batch.keys() == {"tokens", "bytes", "segment_ids", "weights"}
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])
