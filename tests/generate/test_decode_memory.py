"""The memory of a decoder: its bytes, its capacities, and the programs that it compiles."""

import dataclasses

import pytest

import transmamba_jax as tm
from tests.generate.decoding import CONFIG, POINTS, PROMPT, SMALL, TOKENS, TOTAL, TWO, decoder_of, make
from transmamba_jax import cache as memory
from transmamba_jax.generate import decode, prompts
from transmamba_jax.generate.decode import Decoder


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_cache_bytes_equal_the_formula(lazy: bool) -> None:
    # As many tokens as there is capacity for, so that the formula's length is the capacity.
    for capacity in (0, 4, 5, 13, 99):
        cache = memory.init_cache(CONFIG, 3, capacity, POINTS, lazy)
        for point, layer in zip(POINTS, cache.layers, strict=True):
            tokens = min(point, capacity)
            assert memory.nbytes(layer) == _formula(3, tokens, lazy and tokens > 0)
            if capacity < point and capacity > 0:
                assert memory.nbytes(layer) == memory.cache_bytes(CONFIG, 3, capacity, point, lazy)
            assert layer.capacity == tokens


def _formula(batch: int, tokens: int, pending: bool) -> int:
    window = 3 * (4 + 4 + 12) * 4
    state = 0 if pending else 2 * 6 * 4 * 4
    return batch * (window + state + tokens * ((4 + 12) * 4 + (2 * 4 if pending else 0)))


def test_memory_falls_at_every_transpoint_and_stays() -> None:
    decoder = decoder_of()
    state = decoder.prefill(TOKENS[:, :PROMPT].tolist(), total=TOTAL)
    after = {PROMPT: state}
    for position in range(PROMPT, TOTAL):
        state = decoder.extend(state, TOKENS[:, position : position + 1].tolist(), total=TOTAL)
        after[position + 1] = state
    capacities = {length: [layer.capacity for layer in state.cache.layers] for length, state in after.items()}
    for length, state in after.items():
        for point, layer in zip(POINTS, state.cache.layers, strict=True):
            capacity = min(point, memory.choose_capacity(length + 1, TOTAL, POINTS))
            assert memory.nbytes(layer) == memory.cache_bytes(CONFIG, 1, length, point, capacity=capacity)
    assert capacities[12] == [0, 0, 16]
    assert capacities[15] == [0, 0, 16]
    assert capacities[16] == [0, 0, 0]
    assert memory.nbytes(after[16].cache) == memory.nbytes(after[20].cache)
    rest = sum(memory.cache_bytes(CONFIG, 1, 20, point) for point in POINTS)
    assert memory.nbytes(after[20].cache.layers) == rest


@pytest.mark.slow
def test_a_stage_has_one_program_whatever_the_lengths() -> None:
    config = dataclasses.replace(TWO, transpoints=(6, 14), vocab_size=51)  # no other test's, so nothing is compiled yet
    decoder, before = Decoder(*make(config)), decode._decode_block._cache_size()
    for length in (1, 3, 5):
        state = decoder.prefill(TOKENS[:, :length].tolist(), total=TOTAL)
        assert [layer.capacity for layer in state.cache.layers] == [6, 6]
        decoder.decode(state, TOTAL - length, total=TOTAL)
    assert decode._decode_block._cache_size() - before == 3
    # Turns without a known end: a line is given, and continued.
    state = decoder.prefill(TOKENS[:, :1].tolist())
    for _ in range(6):
        state = decoder.decode(decoder.extend(state, [[1, 2]], donate=True), 1, donate=True)[1]
    assert state.lengths.tolist() == [19]
    assert decode._decode_block._cache_size() - before == 3


@pytest.mark.slow
def test_short_prompts_are_read_by_few_programs() -> None:
    config = dataclasses.replace(TWO, vocab_size=52)  # no other test's, so nothing is compiled yet
    decoder, before = Decoder(*make(config)), decode._prefill_program._cache_size()
    for length in (5, 9, 16, 17, 31, 33, 48, 49, 64):
        assert decoder.prefill([[1] * length], total=64).lengths.tolist() == [length]
    assert decode._prefill_program._cache_size() - before == 3
    widths = [prompts.padded_length(length) for length in range(1, decode.PREFILL_CHUNK_SIZE + 1)]
    assert all(length <= width <= max(16, 2 * length) for length, width in enumerate(widths, start=1))
    assert len(set(widths[:256])) == 5
    assert len(set(widths)) == 17


def capacities_along(tokens: int, points: tuple[int, ...], total: int | None) -> list[int]:
    """The capacities that a layer without end gets, one token after another."""
    capacities = [0]
    for end in range(1, tokens + 1):
        if capacities[-1] < end:
            capacities.append(memory.choose_capacity(end, total, points))
    return capacities[1:]


def test_capacities_grow_in_few_steps_and_end_at_the_transpoint() -> None:
    never = (10**9,)
    assert capacities_along(20_000, never, 20_000) == [2048, 8192, 32768]
    assert capacities_along(2000, never, None) == [2048]
    assert [memory.choose_capacity(1, total, never) for total in (1, 256, 257, 2000)] == [256, 256, 512, 2048]
    assert memory.choose_capacity(300, 10, never) == 512  # more than was said
    for seq_len in (8192, 10_000):
        points = tm.schedule.v9(seq_len)
        assert capacities_along(seq_len, points, None) == list(points[1:])  # one a stage


@pytest.mark.parametrize(("total", "capacity"), [(300, 512), (None, 2048)])
def test_bytes_of_a_long_stage_are_those_of_its_capacity(total: int | None, capacity: int) -> None:
    config = dataclasses.replace(SMALL, transpoints=(10**9,))
    state = decoder_of(config).prefill(TOKENS.tolist(), total=total)
    assert memory.nbytes(state.cache.layers) == memory.cache_bytes(config, 1, TOTAL, 10**9, capacity=capacity)
    assert memory.cache_bytes(config, 1, TOTAL, 10**9) == memory.cache_bytes(config, 1, TOTAL, 10**9, capacity=TOTAL)
