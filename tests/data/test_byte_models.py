"""Baselines against a slow model written out by hand."""

import gzip
import math
import random
from collections import Counter

import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data import baselines, byte_models, held_out_text, training_text


def order2_by_hand(train: bytes, held_out: bytes) -> float:
    counts = [Counter(train[i : i + n] for i in range(len(train) - n + 1)) for n in (1, 2, 3)]

    def probability(context: bytes, byte: bytes) -> float:
        followers = [count for run, count in counts[len(context)].items() if run[:-1] == context]
        lower = probability(context[1:], byte) if context else 1 / 256
        if not followers:
            return lower
        seen = counts[len(context)][context + byte]
        return (seen + len(followers) * lower) / (sum(followers) + len(followers))

    bits = [-math.log2(probability(held_out[i - 2 : i], held_out[i : i + 1])) for i in range(2, len(held_out))]
    return sum(bits) / len(bits)


def test_order2_is_the_formula():
    generator = random.Random(0)
    train = bytes(generator.choices(b"abcd", [8, 4, 2, 1], k=400))
    held_out = bytes(generator.choices(b"abcde", [8, 4, 2, 1, 1], k=60))
    assert baselines(train, held_out)["order2_bits_per_byte"] == pytest.approx(
        order2_by_hand(train, held_out), rel=1e-12
    )


def test_a_text_in_pieces_has_the_bits_of_the_whole(monkeypatch):
    generator = random.Random(1)
    train, held_out = (bytes(generator.choices(b"abcd", [8, 4, 2, 1], k=count)) for count in (100, 23))
    whole = baselines(train, held_out)["order2_bits_per_byte"]
    for piece in (1, 7, 21, 22):
        monkeypatch.setattr(byte_models, "_PIECE", piece)
        assert baselines(train, held_out)["order2_bits_per_byte"] == pytest.approx(whole, rel=1e-12)


def test_gzip_is_gzip():
    text = b"to be or not to be, that is the question. " * 30 + bytes(range(256))
    ours = baselines(b"abc", text)["gzip_bits_per_byte"] * len(text) / 8
    assert 0 <= len(gzip.compress(text, 9)) - ours <= 18  # gzip's header and trailer around zlib's


def test_a_uniform_source_of_four_bytes_costs_two_bits():
    generator = random.Random(0)
    train, held_out = (bytes(generator.choices(b"acgt", k=100_000)) for _ in range(2))
    found = baselines(train, held_out)
    assert found["order2_bits_per_byte"] == pytest.approx(2, abs=0.005)
    assert 2 <= found["xz_bits_per_byte"] < 2.3
    assert 2 <= found["brotli_bits_per_byte"] < 2.3


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="held_out must have at least 3 bytes, found 2"):
        baselines(b"abc", b"ab")


@pytest.mark.slow
def test_the_standard_library_is_predictable(stdlib_cache):
    config = DataConfig(cache_dir=str(stdlib_cache))
    measured = baselines(training_text(config), held_out_text(config))
    assert 2.4 < measured["order2_bits_per_byte"] < 2.9
    assert 1.7 < measured["gzip_bits_per_byte"] < 2.2
    assert measured["xz_bits_per_byte"] < measured["gzip_bits_per_byte"] - 0.1
    assert measured["brotli_bits_per_byte"] < measured["xz_bits_per_byte"]  # most of it is English
