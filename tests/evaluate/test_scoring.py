"""Batched answers against one-by-one arithmetic in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluate.test_evaluate import MODEL, RunningMean
from tests.generate.test_decode import TWO, logits_of, make
from transmamba_jax.data.tokenizers import ByteTokenizer
from transmamba_jax.evaluate import scoring
from transmamba_jax.evaluate.scoring import Scorer, windows
from transmamba_jax.generate.sampling import Sampling

PAIRS = [
    (list(b"a"), list(b"bc")),
    (list(b"The cat sat on the mat"), list(b" and")),
    (list(b"xyz"), list(b"w")),
    (list(b"A longer context, which alone fills its batch."), list(b" So")),
    (list(b"Hello"), list(b" to everyone of you !")),
    (list(b"no continuation"), []),
]


@pytest.fixture(scope="module")
def params() -> Any:
    return RunningMean(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def make_scorer(params: Any, max_length: int = 64, batch_size: int = 3, loss_chunk: int = 40) -> Scorer:
    return Scorer(RunningMean(MODEL), params, ByteTokenizer(), max_length, batch_size, loss_chunk)


def answer(params: Any, context: list[int], continuation: list[int], max_length: int = 64) -> tuple[float, bool]:
    """One request in float64: log p token by token, each from the mean of the embeddings before it."""
    embedding = np.asarray(params["embedding"], np.float64)
    total, greedy = 0.0, True
    start = max(len(context) + len(continuation) - max_length - 1, 0)
    for count, token in enumerate(continuation):
        logits = embedding[(context + continuation[:count])[start:]].mean(0) @ embedding.T
        total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        greedy &= int(logits.argmax()) == token
    return total, greedy


def check(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-6)


def test_requests_of_unequal_lengths_get_what_each_gets_alone(params):
    likeliest = [token for token in range(256) if answer(params, list(b"The"), [token])[1]]
    pairs = [*PAIRS, (list(b"The"), likeliest)]
    expected = [answer(params, *pair) for pair in pairs]
    assert [greedy for _, greedy in expected] == [False, False, False, False, False, True, True]
    check(make_scorer(params).log_likelihoods(pairs), expected)
    check(make_scorer(params, batch_size=1, loss_chunk=10_000).log_likelihoods(pairs[:3]), expected[:3])


def test_a_long_context_loses_its_beginning(params, caplog):
    expected = [answer(params, *pair, max_length=21) for pair in PAIRS]
    assert [pair for pair, score in zip(PAIRS, expected, strict=True) if score != answer(params, *pair)] == [
        PAIRS[1],
        PAIRS[3],
        PAIRS[4],
    ]
    check(make_scorer(params, max_length=21).log_likelihoods(PAIRS), expected)
    assert "3 contexts are longer than there is room for" in caplog.text


def test_windows_predict_every_token_once_with_all_the_context_there_is_room_for():
    # The harness's own example: row 0..9 after -1, four tokens at a time.
    assert windows(range(10), -1, 4) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert windows([], -1, 4) == []
    for length in (1, 2, 3, 7, 50):
        pairs = windows(list(range(17)), -1, length)
        assert [token for _, continuation in pairs for token in continuation] == list(range(17))
        for context, continuation in pairs:
            stop = continuation[-1] + 1
            assert context + continuation == list(range(stop - len(context + continuation), stop))
            assert len(context + continuation[:-1]) == min(length, continuation[-1] + 1)


def test_documents_are_scored_in_windows(params):
    documents = [list(b"short"), [], list(b"twenty one tokens here"), list(range(1, 60))]
    expected = []
    for tokens in documents:
        # Every token from at most max_length tokens that end just before it, by the window it is in.
        pairs = windows(tokens, 0, 21)
        expected.append(sum(answer(params, *pair, max_length=21)[0] for pair in pairs))
    found = make_scorer(params, max_length=21).document_log_likelihoods(documents)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1] == 0
    # A document that fits is one pair.
    np.testing.assert_allclose(found[0], answer(params, [0], documents[0])[0], rtol=1e-6)


def test_padding_leaves_no_trace_in_a_model_with_transpoints():
    """TransPoints 4 and never: between the lengths of the rows, which share one program."""
    model, params = make(TWO)
    pairs = [([3, 1, 4, 1, 5, 9, 2], [6, 5, 3]), ([9], [4]), ([2, 6], [5, 3, 5, 8])]
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = TWO.vocab_size
    found = Scorer(model, params, tokenizer, max_length=40, batch_size=3).log_likelihoods(pairs)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        row = np.pad([*context, *continuation], (0, 20 - len(context) - len(continuation)))
        logits = logits_of(TWO, row[None], TWO.transpoints)[0].astype(np.float64)
        logits = logits[len(context) - 1 : len(context) + len(continuation) - 1]
        each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(score, each[np.arange(len(continuation)), continuation].sum(), rtol=1e-5)
        assert greedy == (logits.argmax(-1).tolist() == continuation)


class Spelling(ByteTokenizer):
    """Ids of the small model as letters; 0 ends a document."""

    vocab_size = TWO.vocab_size
    letters = "\0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(self.letters[index] for index in ids)


def continue_one(prompt: str, count: int) -> str:
    """Take the forward's most likely token, append, again."""
    row = Spelling().encode(prompt)
    for _ in range(count):
        logits = logits_of(TWO, np.pad(row, (0, 20 - len(row)))[None], TWO.transpoints)[0, len(row) - 1]
        row.append(int(logits.argmax()))
    return Spelling().decode(row)[len(prompt) :]


def test_continuations_of_unequal_prompts_end_where_they_must(monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_STEPS", 3)
    model, params = make(TWO)
    scorer = Scorer(model, params, Spelling(), max_length=16, batch_size=3)
    prompts = ["cadae", "bfeceh", "bfecehbfe"]
    whole = [continue_one(prompt, 7) for prompt in prompts]
    assert scorer.continuations(prompts, max_tokens=7) == whole
    # Texts that end a continuation: across a boundary of blocks, at the very beginning, and one that never comes.
    until = [whole[0][2:4], whole[1][:1], "no such text"]
    cut = [min((text[: text.index(stop)] for stop in until if stop in text), key=len, default=text) for text in whole]
    assert cut[0] != whole[0]
    assert cut[1] == ""
    assert scorer.continuations(prompts, until, max_tokens=7) == cut
    # The end of a document is not part of the text, and neither is what comes after it.
    scorer.tokenizer.end_of_document = Spelling().encode(whole[0][3])[0]
    assert scorer.continuations(prompts, max_tokens=7) == [text.split(whole[0][3])[0] for text in whole]
    # A prompt for which there is no room loses its beginning, and the last batch is filled up.
    assert scorer.continuations([*prompts, "zyx" + prompts[2]], max_tokens=7)[3] == whole[2].split(whole[0][3])[0]


def test_a_request_is_sampled_with_the_key_of_its_place(params, monkeypatch):
    scorer = make_scorer(params, batch_size=2)
    keys = {}

    def remember(rows, until, max_tokens, sampling, row_keys):
        assert (until, max_tokens, sampling) == ([], 7, Sampling(temperature=2.0))
        keys.update({bytes(row): key for row, key in zip(rows, row_keys, strict=True)})
        return [""] * len(rows)

    monkeypatch.setattr(scorer, "_continue", remember)
    scorer.continuations(["a", "bcd", "ef"], max_tokens=7, sampling=Sampling(temperature=2.0))
    for place, text in enumerate([b"a", b"bcd", b"ef"]):
        assert keys[text] == jax.random.fold_in(jax.random.key(0), place)


@pytest.mark.parametrize(
    ("request_", "message"),
    [(([], [1]), "the context of request 0 is empty"), (([1], [2] * 22), "has 22 tokens, more than max_length=21")],
)
def test_refuses_what_has_no_answer(params, request_, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(params, max_length=21).log_likelihoods([request_])
    with pytest.raises(ValueError, match=r"max_tokens must be in 1\.\.20, found 21"):
        make_scorer(params, max_length=21).continuations(["a"], max_tokens=21)
    with pytest.raises(ValueError, match="batch_size must be >= 1, found 0"):
        make_scorer(params, batch_size=0)
    with pytest.raises(ValueError, match="too small for the tokenizer"):
        Scorer(RunningMean(dataclasses.replace(MODEL, vocab_size=9)), params, ByteTokenizer(), 21)
