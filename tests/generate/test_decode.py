"""Prefill and decode against the model's own forward, which is tested against float64; and what the memory is."""

import dataclasses
import itertools
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transmamba_jax as tm
from tests import oracle
from transmamba_jax import cache as memory
from transmamba_jax.config import ModelConfig
from transmamba_jax.generate import decode, decode_step, prompts
from transmamba_jax.generate import state as decode_state
from transmamba_jax.generate.decode import Decoder, DecodeState
from transmamba_jax.runtime import tensor_files

PROMPT, TOTAL = 12, 20
# TransPoints inside the prompt, at its last token and inside the continuation; never and 0 are among the schedules.
POINTS = (5, 12, 16)
CONFIG = ModelConfig(
    vocab_size=50,
    num_layers=3,
    d_model=16,
    num_heads=2,
    num_groups=1,
    head_dim=6,
    state_dim=4,
    mlp_dim=20,
    transpoints=POINTS,
    dtype="float32",
)
KERNELS = tm.KernelsConfig(ssd="reference", chunk_size=8)
# One layer whose TransPoint is inside the continuation.
SMALL = dataclasses.replace(CONFIG, num_layers=1, mlp_dim=0, tie_embeddings=False, transpoints=(16,))
TWO = dataclasses.replace(SMALL, num_layers=2, transpoints=(4, 99))
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, TOTAL))


def random_params(config: ModelConfig) -> Any:
    """Parameters of about the sizes of a trained model's, drawn by numpy: nothing to compile."""
    shapes = jax.eval_shape(tm.TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    draw = np.random.default_rng(1)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, normal = path[-1].key, draw.normal(size=shape.shape)
        if name in ("scale", "skip"):
            normal = 1 + normal / 5
        elif name == "dt_bias":
            normal = normal - 2
        elif name == "kernel":
            normal = normal / np.sqrt(shape.shape[-2])
        return jnp.asarray(normal, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@cache
def make(config: ModelConfig = CONFIG) -> tuple[tm.TransMamba, Any]:
    return tm.TransMamba(config, KERNELS), random_params(config)


@partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params: Any, tokens: Any, points: Any) -> jax.Array:
    return tm.TransMamba(config, KERNELS).apply({"params": params}, tokens, points)


def logits_of(config: ModelConfig, tokens: np.ndarray, points: tuple[int, ...]) -> np.ndarray:
    """The forward at every position, [B, T, V]; any schedule without compiling again."""
    config = dataclasses.replace(config, transpoints=(0,))  # given as an argument, so not part of the program
    _, params = make(config)
    return np.asarray(forward(config, params, tokens, np.array(tm.schedule.expand(points, config.num_layers))))


def read_on(decoder: Decoder, state: DecodeState, tokens: np.ndarray) -> tuple[np.ndarray, DecodeState]:
    """Read the tokens one by one and return the logits after each, [B, n, V], and the last state."""
    logits = []
    for column in tokens.T:
        state = decoder.extend(state, column[:, None].tolist(), total=TOTAL)
        logits.append(np.asarray(state.logits))
    return np.stack(logits, axis=1), state


@cache
def decoder_of(config: ModelConfig = CONFIG, points: tuple[int, ...] | None = None, lazy: bool = True) -> Decoder:
    return Decoder(*make(config), points, lazy)


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


@pytest.mark.parametrize("name", tm.schedule.NAMED)
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


def test_states_are_kept_forked_and_rolled_back() -> None:
    decoder = decoder_of()
    kept = decoder.prefill(TOKENS[:, :PROMPT].tolist(), total=TOTAL)
    before = jax.tree.map(np.array, kept)
    first, later = decoder.decode(kept, 8)
    again, _ = decoder.decode(kept, 8)
    np.testing.assert_array_equal(first, again)
    for leaf, old in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(leaf, old)
    forked = later.rows([0, 0])
    left, right = (
        read_on(decoder_of(), forked.rows([0]), np.array([[7]])),
        read_on(decoder_of(), later, np.array([[7]])),
    )
    np.testing.assert_array_equal(left[0], right[0])
    assert forked.lengths.tolist() == [TOTAL, TOTAL]
    with pytest.raises(ValueError, match=r"indices must name rows 0..0, found \[1\]"):
        kept.rows([1])


@pytest.mark.parametrize(
    ("config", "lengths"),
    [(CONFIG, (14, 14)), (TWO, (2, 5)), (dataclasses.replace(TWO, dtype="bfloat16"), (2, 2))],
    ids=["several_stages", "ragged", "bfloat16"],
)
def test_a_saved_state_is_read_back_bit_for_bit(config: ModelConfig, lengths: tuple[int, ...], tmp_path: Path) -> None:
    decoder = decoder_of(config)
    state = decoder.prefill([TOKENS[0, :length].tolist() for length in lengths], total=TOTAL)
    decoder.save(state, tmp_path / "state.safetensors")
    again = Decoder(*make(config)).load(tmp_path / "state.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(decoder.decode(again, 3, total=TOTAL)[0], decoder.decode(state, 3, total=TOTAL)[0])


def test_a_saved_state_of_something_else_is_refused(tmp_path: Path) -> None:
    decoder, file = decoder_of(TWO), tmp_path / "state.safetensors"
    state = decoder.prefill(TOKENS[:, :2].tolist(), total=TOTAL)
    decoder.save(state, file)
    other = dataclasses.replace(TWO, head_dim=8, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"another model, whose config has head_dim: 6, not 8; dtype: 'float32', not"):
        decode_state.load(file, other, TWO.transpoints)
    with pytest.raises(ValueError, match=r"under the TransPoints \[4, 99\], not \[4, 4\]"):
        decode_state.load(file, TWO, (4, 4))
    with pytest.raises(ValueError, match="TransPoints"):
        decoder_of(SMALL).save(state, file)
    with pytest.raises(ValueError, match="cannot write /proc"):
        decoder.save(state, "/proc/state.safetensors")
    with pytest.raises(ValueError, match="nowhere cannot be read as safetensors"):
        decoder.load(tmp_path / "nowhere")
    arrays, metadata = tensor_files.read(file)
    for change, message in (
        ({"cache/layers/0/keys": None}, r"missing: cache/layers/0/keys float32\[1,1,2,4\]"),
        ({"cache/layers/1/window": np.zeros((1, 3, 19), np.float32)}, r"window: expected .*20\], found .*19\]"),
        (
            {"logits": np.zeros((1, 50), np.int32)},
            r"shape or dtype mismatch: logits: expected float32\[1,50\], found int32\[1,50\]",
        ),
        ({"more": np.zeros(1)}, r"unexpected: more float64\[1\]"),
        ({"cache/lengths": np.array([150], np.int32)}, r"missing: cache/layers/1/state"),
    ):
        held = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        tensor_files.write(tmp_path / "changed", held, metadata)
        with pytest.raises(ValueError, match=message):
            decoder.load(tmp_path / "changed")
    tensor_files.write(tmp_path / "changed", arrays, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must be a transmamba_jax decode state 1, .* found 'pt'"):
        decoder.load(tmp_path / "changed")


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
