"""Synthetic tasks: rows written out by hand, and answers that the row determines and nothing else does."""

import dataclasses

import numpy as np
import pytest

from transmamba_jax.config import Config, DataConfig
from transmamba_jax.data import load_tokenizer, open_tokenizer, tokenizer_from_json, train_batches
from transmamba_jax.data.synthetic import Rows, parse
from transmamba_jax.data.task_batches import held_out_batches
from transmamba_jax.data.tasks import TASKS

SOURCES = {
    "mqar": "synthetic:mqar?vocab=32&pairs=4",
    "mqar-random": "synthetic:mqar?vocab=64&pairs=4&random=1",
    "recall": "synthetic:recall?keys=8&values=8",
    "noisy_recall": "synthetic:noisy_recall?keys=8&values=8&noise=4&share=0.5",
    "phonebook": "synthetic:phonebook?entries=4&letters=2&digits=3&queries=2",
    "copy": "synthetic:copy?count=8&alphabet=5",
    "selective_copy": "synthetic:selective_copy?count=6&alphabet=5",
    "induction": "synthetic:induction?alphabet=6",
    "needle": "synthetic:needle?digits=3",
}
LENGTH = 65


def rows(source, count=50, split="train", length=LENGTH, seed=0):
    made = Rows(parse(source), length, seed, split, count)
    return [made[index] for index in range(count)]


def answers_of(row):
    """Return, per answer, the places of its tokens."""
    return [np.flatnonzero(row.answers == number) for number in range(1, row.answers.max() + 1)]


def solved(name, row):
    """Solve a row as a person would, from the tokens before each answer; return place -> token."""
    tokens, found = list(map(int, row.tokens)), {}
    for places in answers_of(row):
        first = places[0]
        before = tokens[:first]
        if name.startswith("mqar"):
            found[first] = before[before.index(before[-1]) + 1]
        elif "recall" in name:
            key = before[-1]
            last = max(index for index, token in enumerate(before[:-1]) if token == key)
            found[first] = before[last + 1]
        elif name == "phonebook":
            name_asked = before[-2:]
            start = next(i for i in range(0, len(before) - 3, 6) if before[i : i + 2] == name_asked)
            found |= dict(zip(places, before[start + 2 : start + 5], strict=True))
        elif name == "copy":
            found |= dict(zip(places, before[1:9], strict=True))
        elif name == "selective_copy":
            found |= dict(zip(places, [token for token in before[:-1] if token != 5], strict=True))
        elif name == "induction":
            found[first] = before[before.index(6) + 1]
        else:
            text = bytes(before)
            start = text.index(b"\nThe number is ") + len(b"\nThe number is ")
            found |= dict(zip(places, before[start : start + 3], strict=True))
    return found


def test_every_task_is_tried():
    assert {parse(source).__class__ for source in SOURCES.values()} == set(TASKS.values())


@pytest.mark.parametrize("name", SOURCES)
def test_every_answer_is_determined_by_the_tokens_before_it(name):
    count = 0
    for row in rows(SOURCES[name]):
        answered = np.flatnonzero(row.weights)
        assert row.weights[0] == 0
        assert {int(place): int(row.tokens[place]) for place in answered} == solved(name, row)
        np.testing.assert_array_equal(row.weights > 0, row.answers > 0)
        np.testing.assert_array_equal(row.weights > 0, row.facts >= 0)
        assert all(row.facts[place] < place and row.tokens[row.facts[place]] == row.tokens[place] for place in answered)
        count += len(answered)
    assert count >= 50


@pytest.mark.parametrize("name", SOURCES)
def test_no_answer_is_determined_without_its_fact(name):
    # Rows that agree in every token before the answer but for its fact have other answers, so no rule that does not
    # read the fact is right more often than chance: the answer is as good as uniform given everything else.
    task, values = parse(SOURCES[name]), []
    for row in rows(SOURCES[name], count=400):
        values.append(int(row.tokens[np.flatnonzero(row.weights)[0]]))
    kinds = {"mqar": 16, "mqar-random": 32, "recall": 8, "noisy_recall": 8, "copy": 5, "selective_copy": 5}
    kinds |= {"phonebook": 10, "induction": 6, "needle": 10}
    counts = np.unique(values, return_counts=True)[1]
    assert len(counts) == kinds[name], task
    assert counts.max() < 2.2 * 400 / kinds[name]


@pytest.mark.parametrize("name", SOURCES)
def test_rows_depend_on_seed_split_and_index_alone(name):
    first = rows(SOURCES[name], 3)
    again = Rows(parse(SOURCES[name]), LENGTH, 0, "train", 2**40)
    for index in (2, 0, 1):
        np.testing.assert_array_equal(again[index].tokens, first[index].tokens)
    for other in (rows(SOURCES[name], 3, split="validation"), rows(SOURCES[name], 3, seed=1)):
        assert not all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_ids_fit_the_vocabulary_and_rows_the_length(name):
    task = parse(SOURCES[name])
    for length in (task.least_length(), LENGTH):
        for row in rows(SOURCES[name], 20, length=length):
            assert row.tokens.shape == row.weights.shape == (length,)
            assert row.tokens.dtype == np.int32
            assert 0 <= row.tokens.min() <= row.tokens.max() < task.vocab_size
            asked = int(np.count_nonzero(row.weights))
            assert asked <= task.most_answers(length)
            assert asked == task.most_answers(length) or "recall" in name
    with pytest.raises(ValueError, match="needs rows of at least"):
        Rows(task, task.least_length() - 1, 0, "train", 1)


def test_a_row_of_recall_written_out():
    # 3 keys (0, 1, 2) and 2 values (3, 4); a new key each time while there are any.
    (row,) = rows("synthetic:recall?keys=3&values=2&new=1", 1, length=10)
    pairs = row.tokens.reshape(-1, 2)
    assert sorted(pairs[:3, 0]) == [0, 1, 2]
    table = dict(pairs[:3].tolist())
    assert [table[key] for key in pairs[3:, 0]] == pairs[3:, 1].tolist()
    assert row.weights.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 1]


def test_a_row_of_mqar_written_out():
    (row,) = rows("synthetic:mqar?vocab=8&pairs=2", 1, length=8)
    keys, values = row.tokens[:4:2], row.tokens[1:4:2]
    assert set(keys) <= {1, 2, 3}
    assert set(values) <= {4, 5, 6, 7}
    asked = dict(zip(row.tokens[4::2].tolist(), row.tokens[5::2].tolist(), strict=True))
    assert asked == dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert row.weights.tolist() == [0, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("synthetic:recal", "names no task; did you mean 'recall'?"),
        ("synthetic:recall?keys=3&keys=4", "gives keys twice; keep one of them"),
        ("synthetic:recall?keys", "options are written key=value&key=value; bad query field: 'keys'"),
        ("synthetic:recall?key=3", "recall has no option 'key'; did you mean 'keys'?"),
        ("synthetic:recall?keys=3.5", "keys must be an integer, found '3.5'"),
        ("synthetic:recall?keys=0", "Recall: keys must be >= 1, found 0"),
        ("synthetic:recall?new=2", "Recall: new must be from 0 to 1, found 2"),
        ("synthetic:mqar?vocab=8&pairs=9", "pairs must be at most vocab / 2 - 1 = 3, found 9"),
        ("synthetic:phonebook?entries=30&letters=1", "1 letters make fewer names than entries=30"),
        ("synthetic:phonebook?letters=14", "letters must be at most 13, found 14"),
        ("synthetic:needle?depth=nan", "depth must be a number, found 'nan'"),
    ],
)
def test_a_bad_source_is_refused(source, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("?", r"\?").replace("+", r"\+")):
        parse(source)


def test_a_task_has_a_tokenizer_of_its_own():
    tokenizer = open_tokenizer(DataConfig(source=SOURCES["recall"]))
    assert tokenizer.vocab_size == 16
    assert tokenizer.decode(tokenizer.encode("3 15 0")) == "3 15 0"
    again = tokenizer_from_json(tokenizer.to_json())
    assert (again.vocab_size, again.to_json()) == (16, tokenizer.to_json())
    with pytest.raises(ValueError, match=r"ids 0\.\.15, found '16'"):
        tokenizer.encode("3 16")
    assert open_tokenizer(DataConfig(source=SOURCES["needle"])).to_json() == load_tokenizer("bytes").to_json()


def test_a_position_of_batches_of_another_size_is_refused():
    source = DataConfig(source="synthetic:recall?keys=8&values=8", seq_len=16, batch_size=8)
    batches = train_batches(source, open_tokenizer(source))
    next(batches)
    other = train_batches(dataclasses.replace(source, batch_size=4), open_tokenizer(source))
    with pytest.raises(ValueError, match="rows"):
        other.set_state(batches.get_state())


def test_batches_resume_exactly_and_are_shared_out():
    config = DataConfig(source=SOURCES["recall"], seq_len=16, batch_size=4)
    tokenizer = open_tokenizer(config)
    batches = train_batches(config, tokenizer)
    seen = [next(batches) for _ in range(5)]
    assert {name: (value.shape, value.dtype.name) for name, value in seen[0].items()} == {
        "tokens": ((4, 17), "int32"),
        "bytes": ((4, 17), "int32"),
        "weights": ((4, 17), "float32"),
    }
    other = train_batches(config, tokenizer)
    for _ in range(2):
        next(other)
    resumed = train_batches(config, tokenizer)
    resumed.set_state(other.get_state())
    for expected in seen[2:]:
        for name, value in next(resumed).items():
            np.testing.assert_array_equal(value, expected[name])
    parts = [train_batches(config, tokenizer, part, 2) for part in range(2)]
    halves = [next(part)["tokens"] for part in parts]
    assert sorted(map(tuple, np.concatenate(halves))) == sorted(map(tuple, seen[0]["tokens"]))
    for iterator in (batches, other, resumed, *parts):
        iterator.close()


def test_held_out_rows_are_not_those_of_training():
    config = DataConfig(source=SOURCES["copy"], seq_len=32, batch_size=4)
    (first, last) = held_out_batches(config, 6, 4)
    assert last["weights"][2:].sum() == 0
    assert last["weights"][:2].sum() == 16
    held_out = {tuple(row) for row in np.concatenate([first["tokens"], last["tokens"][:2]])}
    batches = train_batches(config, open_tokenizer(config))
    assert not held_out & {tuple(row) for _ in range(10) for row in next(batches)["tokens"]}
    batches.close()


def test_the_vocabulary_is_checked_before_anything_is_compiled():
    from transmamba_jax.data import check_vocabulary

    config = Config(data=DataConfig(source="synthetic:recall?keys=200&values=100"))
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 is too small"):
        check_vocabulary(open_tokenizer(config.data), config.model.vocab_size)
