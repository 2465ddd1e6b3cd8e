"""Random keys of every generator, numbers that vanish in float32, and ids without a token."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.generate.decoding import TWO, make
from transmamba_jax.generate import Decoder, Sampling
from transmamba_jax.generate.sampling import fold_rows, row_keys, sample

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8]]
WARM = Sampling(temperature=2.0)


@pytest.fixture(params=["threefry2x32", "rbg", "unsafe_rbg"])
def generator(request: pytest.FixtureRequest) -> Iterator[str]:
    """The generator that `jax.random.key` makes keys of."""
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", request.param)
    yield request.param
    jax.config.update("jax_default_prng_impl", before)


def test_rows_do_not_depend_on_their_neighbours(generator: str) -> None:
    key = jax.random.key(3)
    assert str(jax.random.key_impl(key)) == generator
    model, params = make(TWO)
    draw = lambda prompts, key: tm.generate(model, params, prompts, 3, temperature=2.0, key=key)
    together = draw(PROMPTS, key)
    assert len({tuple(row) for row in together}) == 3
    alone = [draw([prompt], jax.random.fold_in(key, row)[None])[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert draw(PROMPTS, jnp.stack([jax.random.fold_in(key, row) for row in range(3)])) == together
    assert draw(PROMPTS, jax.random.key(4)) != together
    assert draw(PROMPTS, jax.random.key_data(key)) == together  # a key of the older kind


@pytest.mark.usefixtures("generator")
def test_keys_of_rows_are_those_of_each_row() -> None:
    key = jax.random.key(7)
    folded = fold_rows(key, np.array([4, 0, 9]))
    for row, number in enumerate((4, 0, 9)):
        assert folded[row] == jax.random.fold_in(key, number)


@pytest.mark.usefixtures("generator")
def test_rows_of_one_distribution_are_independent() -> None:
    """Every pair of two rows' tokens is as frequent as the product of their probabilities."""
    keys = row_keys(jax.random.key(0), 2, WARM)
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 2)) * 2
    draw = jax.jit(jax.vmap(lambda place: sample(logits, None, keys, place + jnp.arange(2), WARM.as_params(), None)))
    pairs = np.asarray(draw(10 * jnp.arange(4000)))  # [draws, rows]
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(pairs.T), 1)
    expected = 4000 * np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    assert np.abs((counts - expected) / np.sqrt(expected)).max() < 4.5


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-40, 1e-45, 1e-300])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature: float) -> None:
    logits = jnp.array([[0.0, 5.0, 4.999], [-1e4, -3.0, -2.0], [80.0, 1e3, -jnp.inf]])
    for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        sampling = Sampling(temperature=temperature, **options)
        keys = row_keys(jax.random.key(0), 3, sampling)
        chosen = sample(logits, None, keys, jnp.arange(3), sampling.as_params(), sampling.top_k)
        assert chosen.tolist() == [1, 2, 1]
        assert sampling.greedy == (temperature < 1.1e-38)


def test_a_temperature_beyond_float32_is_refused() -> None:
    Sampling(temperature=3.4e38)
    for temperature in (3.5e38, float("inf")):
        with pytest.raises(ValueError, match="temperature must be a finite float32, found"):
            Sampling(temperature=temperature)


@pytest.mark.parametrize("key", [0, "0", jnp.arange(3), jnp.zeros(2), np.zeros((3, 5), np.uint32), jnp.uint32(0)])
@pytest.mark.usefixtures("unchecked")
def test_a_key_that_is_none_is_refused(key: object) -> None:
    with pytest.raises(ValueError, match=r"key must be a random key such as jax.random.key\(0\), found"):
        row_keys(key, 3, WARM)  # type: ignore[arg-type]


PADDED = dataclasses.replace(TWO, vocab_size=64)
"""The ids from 50 on have no token, as in a vocabulary that was padded to a multiple of 64."""


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3), Sampling(temperature=9.0), Sampling(1.3, 9.0, 60)])
def test_ids_without_a_token_are_never_sampled(sampling: Sampling) -> None:
    model, params = make(PADDED)
    # Such ids are the most likely ones: their embeddings are the final norm's direction, many times as long.
    params = {**params, "lm_head": params["lm_head"].at[:, 50:].multiply(40.0)}
    prompts = [list(range(start, start + 5)) for start in range(12)]
    options = dataclasses.asdict(sampling) | {"key": jax.random.key(0)}
    free = np.array(tm.generate(model, params, prompts, 12, **options))
    kept = np.array(tm.generate(model, params, prompts, 12, **options, vocab_size=50))
    assert (free >= 50).mean() > 0.5
    assert kept.max() < 50
    # What may be sampled has the probabilities that it has without the others.
    cut = {**params, "lm_head": params["lm_head"][:, :50], "embedding": params["embedding"][:50]}
    narrow = tm.TransMamba(dataclasses.replace(PADDED, vocab_size=50))
    if sampling.greedy:
        assert kept.tolist() == tm.generate(narrow, cut, prompts, 12, **options)


def test_the_tokenizers_size_is_checked() -> None:
    for size in (0, -1, 51):
        with pytest.raises(ValueError, match=rf"vocab_size must be in 1..50, the ids of the model, found {size}"):
            Decoder(*make(TWO), vocab_size=size)
    with pytest.raises(ValueError, match=r"vocab_size must be in 1..50, the ids of the model, found 0"):
        tm.generate(*make(TWO), PROMPTS, vocab_size=0)
