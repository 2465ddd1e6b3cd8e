"""Batched answers against one-by-one arithmetic in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from tests.evaluate.test_evaluate import MODEL, RunningMean
from tests.generate.decoding import TWO, logits_of, make
from tests.generate.test_text import byte_level
from transmamba_jax import data
from transmamba_jax.data.tokenizers import ByteTokenizer
from transmamba_jax.evaluate import scoring
from transmamba_jax.evaluate.scoring import Scorer, windows
from transmamba_jax.generate import text as text_stream
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


def test_an_iterator_of_requests_gets_what_a_list_gets(params):
    scorer = make_scorer(params)
    assert scorer.log_likelihoods(iter(PAIRS[:3])) == scorer.log_likelihoods(PAIRS[:3])
    texts = [("The", " hat"), ("a", "b")]
    assert scorer.text_log_likelihoods(iter(texts)) == scorer.text_log_likelihoods(texts)


def test_a_model_that_diverged_has_no_scores(params):
    broken = {**params, "embedding": params["embedding"].at[104, 0].set(jnp.nan)}
    scorer = make_scorer(broken)
    message = "logits are NaN, so texts have no likelihood; the model has parameters that are not finite: embedding"
    with pytest.raises(ValueError, match=message):
        scorer.text_log_likelihoods([("The", " hat")])


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
    assert "3 contexts are too long: only their last 21 tokens are read" in caplog.text


def test_windows_predict_every_token_once_with_all_the_context_there_is_room_for():
    # The harness's own example: row 0..9 after -1, four tokens at a time.
    assert windows([-1], range(10), 4) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert windows([-1], [], 4) == []
    for length in (1, 2, 3, 7, 50):
        pairs = windows([-1], list(range(17)), length)
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
        pairs = windows([0], tokens, 21)
        expected.append(sum(answer(params, *pair, max_length=21)[0] for pair in pairs))
    found = make_scorer(params, max_length=21).document_log_likelihoods(documents)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1] == 0
    # A document that fits is one pair.
    np.testing.assert_allclose(found[0], answer(params, [0], documents[0])[0], rtol=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
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
    # The end of a document is not part of the text, and neither are later tokens.
    scorer.tokenizer.end_of_document = Spelling().encode(whole[0][3])[0]
    assert scorer.continuations(prompts, max_tokens=7) == [text.split(whole[0][3])[0] for text in whole]
    # A prompt that does not fit loses its beginning, and the last batch is filled up.
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


def test_a_continuation_longer_than_the_model_reads_is_scored_in_windows(params):
    context, continuation = list(b"context"), list(b"a continuation of many more tokens than twenty one")
    expected, greedy = 0.0, True
    for start in range(0, len(continuation), 21):
        stop = min(start + 21, len(continuation))
        score, likeliest = answer(params, context + continuation[:start], continuation[start:stop], max_length=21)
        expected, greedy = expected + score, greedy and likeliest
    found = make_scorer(params, max_length=21).log_likelihoods([PAIRS[0], (context, continuation), PAIRS[2]])
    check(found, [answer(params, *PAIRS[0]), (expected, greedy), answer(params, *PAIRS[2])])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "the context of request 0 is empty"),
        (([1], [256]), "the continuation of request 0 has token 256, outside the vocabulary 0..255"),
        ((["a"], [1]), "the context of request 0 must hold token ids, which are integers, found str 'a'"),
        (("a", [1]), "the context of request 0 must be token ids, found the text 'a'"),
        (([1], [1.5]), "the continuation of request 0 must hold token ids, which are integers, found float 1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses_what_has_no_answer(params, request_, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(params, max_length=21).log_likelihoods([request_])
    with pytest.raises(ValueError, match=r"max_tokens must be >= 1, found 0"):
        make_scorer(params, max_length=21).continuations(["a"], max_tokens=0)
    with pytest.raises(ValueError, match="batch_size must be >= 1, found 0"):
        make_scorer(params, batch_size=0)
    with pytest.raises(ValueError, match="too small for the tokenizer"):
        Scorer(RunningMean(dataclasses.replace(MODEL, vocab_size=9)), params, ByteTokenizer(), 21)


def merging(lower: bool = False) -> data.Tokenizer:
    """A tokenizer of letters that joins "hello" into one token, and may drop spaces."""
    words = ["h", "e", "l", "o", "y", "s", "n", " ", "he", "ll", "hell", "hello", "hel", "!"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("he", "l")]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.decoder = decoders.Fuse()
    if lower:
        tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return data.tokenizer_from_json(tokenizer.to_str())


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("hel", " yes", ("hel", " yes")),
        ("hel", "lo", ("hel", "lo")),  # together they are one token: what was scored was nothing, as if certain
        ("hell", "o", ("hell", "o")),
        ("hello ", "yes", ("hello", " yes")),  # spaces go with the continuation
        (" ", "hello", (None, " hello")),
        ("\n", "hello", (None, "\nhello")),
        ("", "hello", (None, "hello")),
        ("hel", "", ("hel", "")),
        ("", "", (None, "")),
    ],
)
def test_a_text_without_tokens_of_its_own_is_encoded_alone(context, continuation, expected):
    tokenizer = merging()
    before, tokens = expected
    before = [tokenizer.end_of_document] if before is None else tokenizer.encode(before)
    assert scoring.encode_pair(tokenizer, context, continuation) == (before, tokenizer.encode(tokens))


def test_a_text_that_no_token_spells_has_no_likelihood(params, caplog):
    scorer = make_scorer(params)
    scorer.tokenizer = merging(lower=True)
    pairs = [("hel", " "), ("hel", "lo"), ("", "hello"), (" ", "hello"), ("hel", "")]
    found = scorer.text_log_likelihoods(pairs)
    encode, end = scorer.tokenizer.encode, scorer.tokenizer.end_of_document
    assert found[0] == (-np.inf, False)
    check(found[1:2], [answer(params, encode("hel"), encode("lo"))])
    check(found[2:3], [answer(params, [end], encode("hello"))])
    assert found[3] == found[2]
    assert found[4] == (0.0, True)
    assert "1 continuations have no tokens, such as ' ': their log p is -inf" in caplog.text


@pytest.mark.slow
def test_ids_without_a_token_are_no_answer():
    """A model of 64 ids, whose tokenizer has 50: greedy decoding never gives an id beyond."""
    config = dataclasses.replace(TWO, vocab_size=64)
    model, params = make(config)
    params = {**params, "lm_head": params["lm_head"].at[:, 50:].multiply(40.0)}
    scorer = Scorer(model, params, Spelling(), max_length=16, batch_size=2)
    texts = scorer.continuations(["cadae", "bfeceh"], max_tokens=7)
    assert [len(text) for text in texts] == [7, 7]
    pairs = [(Spelling().encode(p), Spelling().encode(t)) for p, t in zip(["cadae", "bfeceh"], texts, strict=True)]
    assert [greedy for _, greedy in scorer.log_likelihoods(pairs)] == [True, True]
    logits = np.asarray(model.apply({"params": params}, np.array([pairs[0][0]])), np.float64)[0, -1]
    assert logits.argmax() >= 50
    assert logits[:50].argmax() == pairs[0][1][0]


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_sampled_continuations_do_not_depend_on_their_neighbours(generator):
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", generator)
    try:
        texts = []
        for batch_size in (3, 1):
            scorer = Scorer(*make(TWO), Spelling(), max_length=16, batch_size=batch_size)
            texts.append(scorer.continuations(["cadae", "b", "bfeceh"], max_tokens=3, sampling=Sampling(temperature=2)))
    finally:
        jax.config.update("jax_default_prng_impl", before)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_more_tokens_than_the_model_reads_are_cut_with_a_line(caplog):
    scorer = Scorer(*make(TWO), Spelling(), max_length=16, batch_size=2)
    whole = scorer.continuations(["bfecehbfe"], max_tokens=8)
    assert "too long: only their last 8 tokens" in caplog.text
    caplog.clear()
    for count in (16, 1000):
        assert scorer.continuations(["bfecehbfe"], max_tokens=count) == whole
        line = f"{count} new tokens leave no place for a prompt in max_length=16: at most 8 are generated"
        assert line in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), "byte_level"])
def test_continuations_of_characters_of_several_bytes_are_whole(tokenizer, monkeypatch):
    """Blocks cut characters; the text is the decoding of all tokens, up to a stop string of such characters."""
    tokenizer = byte_level() if isinstance(tokenizer, str) else tokenizer
    text = "天地玄黄宇宙洪荒😀é"
    tokens = tokenizer.encode(text)
    model = dataclasses.replace(TWO, vocab_size=512)
    for block in (1, 2, 3, 5, 8, 16):
        monkeypatch.setattr(scoring, "BLOCK_STEPS", block)
        cuts = lambda *_, block, **__: ([tokens[i : i + block]] for i in range(0, len(tokens), block))
        monkeypatch.setattr(text_stream, "stream", cuts)
        scorer = Scorer(*make(model), tokenizer, max_length=100, batch_size=1)
        assert scorer.continuations(["a"], max_tokens=50) == [text]
        assert scorer.continuations(["a"], ["宙"], max_tokens=50) == ["天地玄黄宇"]
        assert scorer.continuations(["a"], ["黄天", "荒😀"], max_tokens=50) == ["天地玄黄宇宙洪"]


@pytest.mark.usefixtures("unchecked")
def test_odd_texts_and_arrays_are_requests(params):
    scorer = make_scorer(params)
    arrays = [(np.array(context), jnp.array(continuation)) for context, continuation in PAIRS[:3]]
    check(scorer.log_likelihoods(arrays), [answer(params, *pair) for pair in PAIRS[:3]])
    assert scorer.log_likelihoods([]) == scorer.text_log_likelihoods([]) == scorer.continuations([]) == []
    # Halves of surrogate pairs, which JSON can hold: together a character, alone U+FFFD. NUL is read as a space.
    pairs = [("a", "\ud83d\ude00"), ("a", "😀"), ("a", "\ud83d!"), ("a", "\N{REPLACEMENT CHARACTER}!"), ("a", "\0")]
    found = scorer.text_log_likelihoods([*pairs, ("a", " ")])
    assert found[0::2] == found[1::2]
    assert scorer.text_log_likelihoods([("e", "\u0301")]) == scorer.log_likelihoods([([101], [0xCC, 0x81])])
    narrow = make_scorer(params, max_length=1)
    each = [answer(params, [context], [token])[0] for context, token in (b"ab", b"bc", b"cd")]
    assert narrow.text_log_likelihoods([("a", "bcd")])[0][0] == pytest.approx(sum(each), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "requests", "message"),
    [
        ("log_likelihoods", [([1], [2], [3])], r"request 0 must be a pair \(context, continuation\), found"),
        ("log_likelihoods", ([1], [2]), r"request 0 must be a pair \(context, continuation\), found \[1\]"),
        ("text_log_likelihoods", ["ab"], r"request 0 must be a pair \(context, continuation\), found 'ab'"),
        ("text_log_likelihoods", [("a", None)], "a request must be of texts, found NoneType None"),
        ("text_log_likelihoods", [("a", 3)], "a request must be of texts, found int 3"),
        ("text_log_likelihoods", [(b"a", b"b")], "a request must be of texts, found bytes b'a'"),
        ("continuations", "abc", "prompts must be a list of texts, found the text 'abc'"),
        ("continuations", [3], "a request must be of texts, found int 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses_what_is_no_request(params, method, requests, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_scorer(params), method)(requests)


@pytest.mark.usefixtures("unchecked")
def test_parameters_of_something_else_are_refused(params):
    with pytest.raises(ValueError, match=r'pass variables\["params"\]'):
        make_scorer({"params": params})
    with pytest.raises(ValueError, match="params do not fit the model"):
        make_scorer({"other": params["embedding"]})
    with pytest.raises(ValueError, match=r"max_length must be an integer, found float 21.0"):
        make_scorer(params, max_length=21.0)
    with pytest.raises(ValueError, match=r"max_tokens must be an integer, found float 4.0"):
        make_scorer(params).continuations(["a"], max_tokens=4.0)


def test_one_text_that_ends_is_not_its_letters():
    scorer = Scorer(*make(TWO), Spelling(), max_length=16, batch_size=1)
    (whole,) = scorer.continuations(["bfeceh"], max_tokens=7)
    stop = whole[2:4]
    assert scorer.continuations(["bfeceh"], until=stop, max_tokens=7) == [whole[: whole.index(stop)]]
    assert scorer.continuations(["bfeceh"], until=None, max_tokens=7) == [whole]
