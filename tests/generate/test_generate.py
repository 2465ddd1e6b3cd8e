"""Generation against the definition: take the forward's last logits, choose, append, again."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.generate.decoding import TOTAL, TWO, decoder_of, logits_of, make
from transmamba_jax.generate import Sampling, stream
from transmamba_jax.generate.sampling import filter_logits, row_keys, sample
from transmamba_jax.generate.streaming import _Output

# The TransPoints of the model are between the lengths of the prompts, so that one row comes to it later, and never.
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8]]
NEW = 6


def generate(prompts: list[list[int]] = PROMPTS, new: int = NEW, **options: Any) -> list[list[int]]:
    return tm.generate(*make(TWO), prompts, new, **options)


def next_logits(row: list[int]) -> np.ndarray:
    # Read at its own position in a longer row: what follows a token cannot change its logits.
    return logits_of(TWO, np.pad(row, (0, TOTAL - len(row)))[None], TWO.transpoints)[0, len(row) - 1]


def test_greedy_equals_the_forward_token_by_token() -> None:
    for prompt, new in zip(PROMPTS, generate(), strict=True):
        row = list(prompt)
        for token in new:
            assert token == int(np.argmax(next_logits(row)))
            row.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"conv_width": 1, "conv_bias": False}])
def test_without_silu_on_q_k_and_v_it_is_the_same(options: dict[str, Any]) -> None:
    config = dataclasses.replace(TWO, conv_activation="none", **options)
    (new,) = tm.generate(*make(config), PROMPTS[:1], 3)
    row = list(PROMPTS[0])
    for token in new:
        logits = logits_of(config, np.pad(row, (0, TOTAL - len(row)))[None], config.transpoints)
        assert token == int(np.argmax(logits[0, len(row) - 1]))
        row.append(token)


@pytest.mark.slow
def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    key = jax.random.key(1)
    greedy, sampled = generate(new=3), generate(new=3, temperature=2.0, key=key)
    assert sampled != greedy
    assert generate(PROMPTS[1:2], 3) == greedy[1:2]
    assert generate(PROMPTS[1:2], 3, temperature=2.0, key=jax.random.fold_in(key, 1)[None]) == sampled[1:2]


@pytest.mark.slow
def test_a_batch_gives_what_each_prompt_gives_alone_in_bfloat16() -> None:
    model, params = make(dataclasses.replace(TWO, dtype="bfloat16"))
    together = tm.generate(model, params, PROMPTS, NEW)
    assert [tm.generate(model, params, [prompt], NEW)[0] for prompt in PROMPTS] == together


def test_sampling_is_reproducible_and_follows_the_key() -> None:
    draw = lambda seed: generate(new=3, temperature=2.0, key=jax.random.key(seed))
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert generate(new=3, temperature=2.0, key=jax.random.PRNGKey(0)) == draw(0)  # a key of the older kind


def test_one_prompt_is_continued_in_several_ways() -> None:
    decoder = decoder_of(TWO)
    state = decoder.prefill(PROMPTS[:1])
    forked = state.rows([0, 0, 0])
    draw = lambda seed: decoder.decode(forked, 3, Sampling(temperature=2.0), jax.random.key(seed))[0].tolist()
    first = draw(0)
    assert first == draw(0)
    assert len({tuple(row) for row in first}) > 1


LOGITS = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.06, 0.04]]))


def pick(rows: int = 1, seen: Sequence[int] = (), **options: Any) -> np.ndarray:
    sampling = Sampling(**options)
    logits, there = jnp.repeat(LOGITS, rows, axis=0), np.zeros((rows, 5), bool)
    there[:, list(seen)] = True
    keys = row_keys(jax.random.key(3), rows, sampling)
    places = jnp.zeros(rows, jnp.int32)
    return np.asarray(sample(logits, jnp.asarray(there), keys, places, sampling.as_params(), sampling.top_k))


def test_samples_follow_the_distribution() -> None:
    sharpened = np.array([0.5, 0.1, 0.3, 0.06, 0.04]) ** 0.5
    expected = 4000 * sharpened / sharpened.sum()
    counts = np.bincount(pick(4000, temperature=2.0), minlength=5)
    assert np.abs((counts - expected) / np.sqrt(expected)).max() < 5


def test_one_likely_token_is_greedy() -> None:
    for option in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert pick(50, temperature=3.0, **option).tolist() == [0] * 50


def test_top_k_top_p_and_min_p_sets() -> None:
    kept = lambda **options: np.isfinite(np.asarray(filter_logits(LOGITS, **options)))[0].nonzero()[0].tolist()
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.45) == [0]
    assert kept(top_p=0.7) == [0, 2]
    assert kept(top_p=0.85) == [0, 1, 2]
    assert kept(top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(min_p=0.0) == [0, 1, 2, 3, 4]
    assert kept(min_p=0.11) == [0, 1, 2, 3]
    assert kept(min_p=0.5) == [0, 2]


def test_repetition_penalty_divides_or_multiplies_what_is_there() -> None:
    # All these logits are negative: log 0.5 · 2 is below log 0.3, and log 0.3 · 2 below log 0.1.
    assert pick(seen=[0], repetition_penalty=1.7).tolist() == [0]
    assert pick(seen=[0], repetition_penalty=1.8).tolist() == [2]
    assert pick(seen=[0, 2], repetition_penalty=1.8).tolist() == [0]
    logits, there = jnp.array([[2.0, 1.5, -1.0]]), jnp.array([[True, False, False]])
    for penalty, token in ((1.3, 0), (1.4, 1)):
        params = Sampling(penalty).as_params()
        assert sample(logits, there, None, jnp.zeros(1, jnp.int32), params, None).tolist() == [token]


def test_stop_sequences_end_a_row_and_are_left_out() -> None:
    output = _Output([[1, 2], [2, 3, 4], [9]])
    # 1 and 2 3 might have begun a stop sequence; 2 3 4 is one.
    assert [output.take([token], last=False) for token in (1, 5, 2, 3, 2)] == [[], [1, 5], [], [], [2, 3]]
    assert output.take([3, 4, 7], last=False) == []
    assert output.stopped
    assert output.take([8], last=True) == []
    assert _Output([[1, 2]]).take([5, 1], last=True) == [5, 1]
    greedy = generate()
    stopped = generate(stop=[greedy[0][2:4], [*greedy[1][:3], 49]])
    end = next(place for place in range(NEW) if greedy[0][place : place + 2] == greedy[0][2:4])
    assert stopped[0] == greedy[0][:end]
    assert stopped[1] == greedy[1]


def test_a_stream_gives_the_tokens_as_they_come() -> None:
    greedy = generate()
    decoder = decoder_of(TWO)
    state = decoder.prefill(PROMPTS)
    steps = list(stream(decoder, state, NEW, block=1))
    assert len(steps) == NEW
    assert [[token for step in steps for token in step[row]] for row in range(3)] == greedy


def held(shape: tuple[int, ...]) -> int:
    return sum(array.shape == shape for array in jax.live_arrays())


def test_a_stream_that_donates_holds_one_cache() -> None:
    decoder = decoder_of(TWO)
    state = decoder.prefill(PROMPTS[:1]).rows([0, 0, 0])
    shape = state.cache.layers[1].keys.shape
    before, given, keys = held(shape) - 1, weakref.ref(state), state.cache.layers[1].keys
    steps = stream(decoder, state, 4, block=2, donate=True)
    del state
    for _ in steps:
        assert held(shape) - before == 1
        assert given() is None  # nor what the layers will drop
        assert keys.is_deleted()  # written to, not copied


def test_no_new_tokens() -> None:
    assert generate(new=0) == [[], [], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1, 50]]}, r"prompts\[0\] has token 50, outside the vocabulary 0..49"),
        ({"new": -1}, "max_new_tokens must be >= 0, found -1"),
        ({"temperature": -0.5}, "temperature must be >= 0, found -0.5"),
        ({"temperature": float("nan")}, "temperature must be >= 0, found nan"),
        ({"temperature": 1.0}, "needs a random key"),
        ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0))}, r"shape \(\) or \(3,\), found \(2,\)"),
        ({"top_k": 0}, "top_k must be >= 1, found 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], found 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, found 0.0"),
        ({"stop": [[]]}, r"stop\[0\] is empty"),
        ({"transpoints": (-1,)}, "transpoints"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**options)
