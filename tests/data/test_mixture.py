"""Test mixtures: the shares of their rows, positions, several processes, held-out rows, and what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transmamba_jax import config_io
from transmamba_jax.config import Config, DataConfig
from transmamba_jax.data import eval_batches, eval_sets, held_out_text, load_tokenizer, pipeline, train_batches
from transmamba_jax.data.held_out import training_documents

BYTES = load_tokenizer("bytes")


@pytest.fixture(name="make")
def _make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a maker of configs: documents of one letter and of one source each, in windows of a few rows."""
    monkeypatch.setattr(pipeline, "WINDOW_BYTES", 100)
    monkeypatch.setattr(pipeline, "BINS", 3)
    for letter in "abc":
        rows = [{"text": letter * (1 + 5 * n % 15), "q": "Q", "a": letter} for n in range(30 if letter == "a" else 60)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{letter}.txt").write_text(letter * 400)

    def make(shares: dict[str, float], **options: Any) -> DataConfig:
        mixture = {name.replace(":", f":{tmp_path}/"): share for name, share in shares.items()}
        defaults = {"train_split": "all", "eval_split": "all", "seq_len": 15, "cache_dir": str(tmp_path / "cache")}
        return DataConfig(**{**defaults, "mixture": mixture, "batch_size": 8, **options})

    return make


THREE = {"jsonl:a.jsonl": 1, "jsonl:b.jsonl": 2, "jsonl:c.jsonl": 5}


def letters(batch: dict[str, np.ndarray]) -> list[str]:
    """Return the letter of each row; a row has one alone, since it is of one source."""
    found = [{chr(token) for token in row if token} for row in batch["tokens"]]
    assert all(len(each) == 1 for each in found)
    return [each.pop() for each in found]


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "workers"), [("concat", 0), ("first_fit", 0), ("concat", 2)])
def test_every_batch_has_the_shares(make, packing: str, workers: int) -> None:
    batches = train_batches(make(THREE, packing=packing, num_workers=workers), BYTES)
    for batch in itertools.islice(batches, 30):  # several epochs of each source
        rows = letters(batch)
        assert [rows.count(letter) for letter in "abc"] == [1, 2, 5]
        assert batch.keys() == {"tokens", "bytes"} | ({"segment_ids"} if packing == "first_fit" else set())
    facts = batches.facts()
    assert sum(facts.values()) == pytest.approx(1)
    assert [name.rpartition("/")[2] for name in facts] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    tolerance = 1e-9 if packing == "concat" else 0.05  # padding counts for nothing
    assert list(facts.values()) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=tolerance)
    batches.close()


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_a_position_continues_bit_for_bit(make, packing: str) -> None:
    config = make(THREE, packing=packing)
    batches = train_batches(config, BYTES)
    states, expected = [], []
    for _ in range(30):
        states.append(json.dumps([batches.get_state(), batches.facts() if states else None]))
        expected.append(next(batches))
    for place in (1, 7, 23):
        again = train_batches(config, BYTES)
        state, facts = json.loads(states[place])
        again.set_state(state)
        assert again.facts() == facts
        for batch in expected[place : place + 5]:
            found = next(again)
            assert all(np.array_equal(found[name], batch[name]) for name in batch)
    with pytest.raises(ValueError, match=r"another stream: mixture: saved \[1.0, 2.0, 5.0\], now \[1.0, 1.0, 1.0\]"):
        train_batches(make(dict.fromkeys(THREE, 1)), BYTES).set_state(train_batches(make(THREE), BYTES).get_state())


@pytest.mark.slow
def test_processes_read_parts_of_the_same_rows(make) -> None:
    config = make(THREE)
    alone = train_batches(dataclasses.replace(config, streams=4), BYTES)
    parts = [train_batches(config, BYTES, index, 4) for index in range(4)]
    seen = [[next(part)["tokens"] for part in parts] for _ in range(9)]
    for rows in seen:
        whole = next(alone)
        np.testing.assert_array_equal(np.concatenate(rows), whole["tokens"])
        assert [letters(whole).count(letter) for letter in "abc"] == [1, 2, 5]


def test_a_row_of_text_beside_prompts_weighs_as_a_whole(make) -> None:
    config = make({"jsonl:a.jsonl": 1, "text:b.txt": 1}, prompt_field="q", completion_field="a")
    for batch in itertools.islice(train_batches(config, BYTES), 10):
        prompts = (batch["tokens"] == ord("Q")).any(axis=1)
        assert prompts.sum() == 4
        assert (batch["weights"][~prompts] == 1).all()
        np.testing.assert_array_equal(batch["weights"][prompts], batch["tokens"][prompts] != ord("Q"))


def test_held_out_rows_are_those_of_each_source(make) -> None:
    config = make(THREE)
    sets = eval_sets(config, BYTES, windows=6, batch_size=4)
    assert list(sets) == [name for name, _ in config.mixture]
    for name, batches in sets.items():
        alone = eval_batches(dataclasses.replace(config, mixture=(), source=name), BYTES, windows=6, batch_size=4)
        assert all(np.array_equal(*pair) for pair in zip(alone[0].values(), batches[0].values(), strict=True))
    with pytest.raises(ValueError, match="eval_batches is for one source, found a mixture"):
        eval_batches(config, BYTES, windows=6, batch_size=4)
    assert set(held_out_text(config)) == {0, *b"abc"}
    sizes = dict.fromkeys("abc", 0)
    for document in training_documents(config, 400):
        sizes[chr(document[0])] += len(document)
    for letter, share in zip("abc", (50, 100, 250), strict=True):  # the last document reaches the limit
        assert share <= sizes[letter] < share + 15


def test_yaml_and_the_command_line_name_mixtures(make, tmp_path: Path) -> None:
    config = Config(data=make(THREE))
    assert config_io.from_yaml(config_io.to_yaml(config)) == config
    hash(config)
    (tmp_path / "a.yaml").write_text("data: {mixture: {'jsonl:a': 1, 'text:b': 0.5}}")
    assert config_io.load_config(tmp_path / "a.yaml").data.mixture == (("jsonl:a", 1.0), ("text:b", 0.5))
    words = ["--data.mixture", "jsonl:c", "3", "hf:d", "1"]
    assert config_io.load_config(tmp_path / "a.yaml", words).data.sources == ("jsonl:c", "hf:d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": {"jsonl:a": 0}}, r"data.mixture\['jsonl:a'\] must be a positive share, found 0.0; leave"),
        ({"mixture": {"jsonl:a": float("nan")}}, "must be a positive share, found nan"),
        ({"mixture": {"jsonl": 1}}, "data.source must be"),
        ({"mixture": {"synthetic:copy": 1}}, "must be of documents, found the task 'synthetic:copy'"),
        ({"mixture": (("hf:a", 1.0), ("hf:a", 2.0))}, "must name a source once, found hf:a, hf:a"),
        ({"mixture": {"jsonl:a": 1}, "source": "hf:b"}, "give data.source or data.mixture, found 'hf:b' and jsonl:a"),
        ({"mixture": {"text:a": 1}, "messages_field": "m"}, "for rows with fields .* found text:a"),
    ],
)
def test_mixtures_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_a_file_of_two_sources_whose_splits_differ_is_refused(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("text " * 99)
        (tmp_path / f"{number}.txt").write_text("other text " * 99)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    for shares in ({"text:**/*.txt": 1, "text:sub/*.txt": 1}, {"jsonl:*.jsonl": 1, "jsonl:again.jsonl": 2}):
        with pytest.raises(ValueError, match=r"is in '.*' and in '.*', where its splits differ.*one source"):
            train_batches(make(shares), BYTES)
    same = make({"text:sub/*.txt": 1, "text:sub/1*.txt": 3, "text:link/0*.txt": 1})  # one name below the wildcards
    next(train_batches(same, BYTES))
