"""The prompts of a run's samples."""

import dataclasses
import types

import jax
import pytest

from tests.generate.decoding import TWO, make
from transmamba_jax import data
from transmamba_jax.config import Config, DataConfig, TrainConfig
from transmamba_jax.training import sample


def test_prompts_are_spread_over_the_text_and_begin_where_a_line_does():
    lines = [f"line {number} of é\n" for number in range(1000)]
    text = "".join(lines).encode()
    pieces = sample._pieces(text)
    assert len(pieces) == sample.PROMPTS == 3
    begun = [lines.index(piece[: piece.index("\n") + 1]) for piece in pieces]
    places = [text.index(lines[number].encode()) for number in begun]
    assert places[0] == 0
    for place, start in zip((len(text) // 3, 2 * len(text) // 3), places[1:], strict=True):
        assert 0 <= place - start < len(lines[-1].encode())


def test_no_prompt_is_empty_or_begins_within_a_character():
    line = "".join(f"é{number}é," for number in range(3000))
    pieces = sample._pieces(f"{line}\0".encode())
    assert len({line.index(piece.removesuffix("\0")) for piece in pieces}) == 3
    for text in ("\0", "é\0", "é\n\0"):
        assert all(sample._pieces(text.encode()))


@pytest.mark.slow
def test_a_padded_vocabulary_is_sampled_as_text(monkeypatch):
    """A model of 1,024 ids with byte tokens: samples are bytes, whatever the ids beyond them say."""
    config = Config(
        model=dataclasses.replace(TWO, vocab_size=1024), train=TrainConfig(sample_tokens=12), data=DataConfig(seq_len=8)
    )
    model, params = make(config.model)
    params = {**params, "lm_head": params["lm_head"].at[:, 256:].multiply(40.0)}
    text = "".join(f"line {number}\n" for number in range(100))
    monkeypatch.setattr(data, "held_out_text", lambda _: text.encode())
    state = types.SimpleNamespace(params=params, key=jax.random.key(0))
    sampled = sample.sample_text(config, model, data.load_tokenizer("bytes"), state, step=3)
    assert sampled.count("--- model\n") == sample.PROMPTS
    assert all(len(part.split("\n--- prompt")[0].strip()) > 0 for part in sampled.split("--- model\n")[1:])


def test_a_prompt_is_of_one_document():
    text = b"\0".join(b"story %d of a fox\nand more" % index for index in range(300))
    pieces = sample._pieces(text)
    assert not any("\0" in piece for piece in pieces)
    assert all(piece for piece in pieces)
