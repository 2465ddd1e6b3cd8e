"""Prefill and decode against the model's own forward, which is tested against float64; and what the memory is."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transmamba_jax as tm
from tests import oracle
from tests.generate.decoding import (
    CONFIG,
    KERNELS,
    PROMPT,
    SMALL,
    TOKENS,
    TOTAL,
    decoder_of,
    forward,
    logits_of,
    make,
    read_on,
)
from transmamba_jax import cache as memory
from transmamba_jax.config import ModelConfig
from transmamba_jax.generate import decode_step
from transmamba_jax.generate.decode import Decoder


@pytest.mark.parametrize(("config", "lazy"), [(CONFIG, True), (SMALL, False)], ids=["lazy", "eager"])
def test_prefill_and_decode_equal_the_forward_at_every_position(config: ModelConfig, lazy: bool) -> None:
    expected = logits_of(config, TOKENS, config.transpoints)
    decoder = decoder_of(config, lazy=lazy)
    state = decoder.prefill(TOKENS[:, :PROMPT].tolist(), total=TOTAL)
    assert oracle.relative_error(state.logits, expected[:, PROMPT - 1]) < 2e-6
    logits, state = read_on(decoder, state, TOKENS[:, PROMPT:])
    for position in range(PROMPT, TOTAL):
        assert oracle.relative_error(logits[:, position - PROMPT], expected[:, position]) < 2e-6, position
    assert state.lengths.tolist() == [TOTAL]
    assert all(layer.keys is None for layer in state.cache.layers)


NARROW = dataclasses.replace(
    CONFIG, d_model=8, num_heads=1, head_dim=4, state_dim=2, mlp_dim=0, num_layers=1, transpoints=(0,)
)


_MARKS = {name: () if name in ("v9", "hybrid") else (pytest.mark.slow,) for name in tm.schedule.NAMED}


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in _MARKS.items()])
def test_every_position_under_every_schedule(name: str) -> None:
    """Prefixes of every length in one batch, each read at once and then one token further.

    Under `descending` a change of the last bit of the parameters moves the logits by 8e-5: there that is the tolerance.
    """
    points = tm.schedule.named(name, 16)
    config = dataclasses.replace(NARROW, num_layers=len(points))
    decoder, expected = Decoder(*make(config), points), logits_of(config, TOKENS, points)[0]
    state = decoder.prefill([TOKENS[0, :length].tolist() for length in range(1, TOTAL)], total=TOTAL)
    after = decoder.extend(state, TOKENS[0, 1:, None].tolist(), total=TOTAL)
    draw, plain = np.random.default_rng(0), dataclasses.replace(config, transpoints=(0,))
    bit = lambda leaf: leaf * np.float32(1 + 6e-8 * draw.choice([-1, 0, 1], leaf.shape))
    tolerance = 2e-5
    for _ in range(6 if name == "descending" else 0):
        moved = forward(plain, jax.tree.map(bit, make(config)[1]), TOKENS, np.array(points))[0]
        tolerance = max(tolerance, *(oracle.relative_error(moved[row], expected[row]) for row in range(TOTAL)))
    assert tolerance < 2e-4
    for row in range(TOTAL - 1):
        assert oracle.relative_error(state.logits[row], expected[row]) < tolerance, row
        assert oracle.relative_error(after.logits[row], expected[row + 1]) < tolerance, row


def test_lazy_conversion_gives_the_eager_state() -> None:
    states = []
    for lazy in (True, False):
        decoder = decoder_of(SMALL, lazy=lazy)
        state = decoder.prefill(TOKENS[:, :PROMPT].tolist(), total=TOTAL)
        assert (state.cache.layers[0].state is None) == lazy
        _, state = read_on(decoder, state, TOKENS[:, PROMPT:16])
        states.append(state.cache.layers[0].state)
    assert oracle.relative_error(states[0], states[1]) < 1e-6


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, TOTAL])
def test_any_prefill_chunk_size_gives_the_same_state(size: int) -> None:
    # Chunks that are all before the TransPoint, end at it, hold it, and are all after it.
    state = decoder_of(SMALL).prefill(TOKENS.tolist(), size)
    assert oracle.relative_error(state.logits, logits_of(SMALL, TOKENS, SMALL.transpoints)[:, -1]) < 2e-6
    whole = decoder_of(SMALL).prefill(TOKENS.tolist())
    assert oracle.relative_error(state.cache.layers, whole.cache.layers) < 2e-6


@given(st.lists(st.integers(1, TOTAL - 1), unique=True).map(sorted))
@settings(max_examples=10)
def test_any_split_of_the_prompt_gives_the_same_state(cuts: list[int]) -> None:
    decoder = decoder_of(SMALL)
    state = decoder.start(1)
    for start, stop in itertools.pairwise([0, *cuts, TOTAL]):
        state = decoder.extend(state, TOKENS[:, start:stop].tolist(), total=TOTAL)
    assert oracle.relative_error(state.logits, logits_of(SMALL, TOKENS, SMALL.transpoints)[:, -1]) < 2e-6
    whole = decoder.prefill(TOKENS.tolist())
    assert oracle.relative_error(state.cache.layers, whole.cache.layers) < 2e-6


def test_a_chunk_after_others_continues_them() -> None:
    # Rows of different lengths: the second chunk begins before the TransPoint, and only one row comes to it.
    decoder = decoder_of(SMALL)
    rows = [TOKENS[0, :19].tolist(), TOKENS[0, ::-1][:14].tolist()]
    state = decoder.prefill(rows, prefill_chunk_size=11)
    assert state.lengths.tolist() == [19, 14]
    assert state.cache.layers[0].capacity >= 16
    for row, prompt in enumerate(rows):
        padded = np.pad(prompt, (0, TOTAL - len(prompt)))[None]
        expected = logits_of(SMALL, padded, SMALL.transpoints)[0, len(prompt) - 1]
        assert oracle.relative_error(state.logits[row], expected) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"transpoints": (0, 99), "num_layers": 2},
        {"dtype": "bfloat16"},
        {"rotary": "both", "attention_norm": False, "use_d_skip": False},
    ],
    ids=["hybrid", "bfloat16", "options"],
)
def test_dtypes_and_options_equal_the_forward(change: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **change)
    decoder = decoder_of(config)
    expected = logits_of(config, TOKENS, config.transpoints)
    state = decoder.prefill(TOKENS[:, :PROMPT].tolist(), total=TOTAL)
    logits, after = read_on(decoder, state, TOKENS[:, PROMPT:])
    together = np.concatenate([np.asarray(state.logits)[:, None], logits], axis=1)
    tolerance = 2e-6 if config.dtype == "float32" else 1.5e-2
    assert oracle.relative_error(together, expected[:, PROMPT - 1 :]) < tolerance
    assert after.logits.dtype == jnp.float32
    for point, layer in zip(decoder.transpoints, after.cache.layers, strict=True):
        assert layer.window.dtype == config.dtype
        assert (layer.state is None) == (point > TOTAL)
        assert layer.state is None or layer.state.dtype == jnp.float32


def test_blocks_of_steps_do_not_matter() -> None:
    decoder = decoder_of()
    state = decoder.prefill(TOKENS[:, :PROMPT].tolist(), total=TOTAL)
    whole, end = decoder.decode(state, 8)
    parts = []
    for steps in (3, 0, 1, 4):
        tokens, state = decoder.decode(state, steps)
        parts.append(tokens)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(state.logits, end.logits)


def test_bad_arguments_are_refused() -> None:
    decoder = decoder_of()
    empty = decoder.start(2)
    with pytest.raises(ValueError, match="prompts must be one per row, found 1 for 2 rows"):
        decoder.extend(empty, [[1]])
    with pytest.raises(ValueError, match=r"prompts\[1\] has token 50, outside the vocabulary 0..49"):
        decoder.extend(empty, [[1], [50]])
    with pytest.raises(ValueError, match="prefill_chunk_size must be >= 1, found 0"):
        decoder.extend(empty, [[1], [2]], prefill_chunk_size=0)
    with pytest.raises(ValueError, match="read a prompt first"):
        decoder.decode(empty, 1)
    with pytest.raises(ValueError, match="steps must be >= 0, found -1"):
        decoder.decode(empty, -1)
    with pytest.raises(ValueError, match=r"state must come from a decoder with the TransPoints \(5, 12, 16\), found"):
        decoder.decode(decoder_of(SMALL).start(1), 1)
    uneven = dataclasses.replace(empty, cache=dataclasses.replace(empty.cache, lengths=jnp.array([1, 2])))
    with pytest.raises(ValueError, match=r"as many tokens each, found rows of \[1, 2\] tokens and prompts of \[1, 2\]"):
        decoder.extend(uneven, [[1], [2, 3]])
    with pytest.raises(ValueError, match="batch must be >= 1 and capacity >= 0"):
        memory.init_cache(CONFIG, 0, 4)
    with pytest.raises(ValueError, match=r"softmax, which is how the cache is read, found TransMamba\(attention"):
        tm.Decoder(tm.TransMamba(CONFIG, attention=lambda *arrays: arrays[2]), {})
    with pytest.raises(ValueError, match="keys, values and steps"):
        decode_step.convert(CONFIG, KERNELS, decoder._weights.layers[0], memory.init_layer(CONFIG, 1, 0, True))
