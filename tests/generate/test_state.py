"""Decoding states that are kept, forked, rolled back, saved and read back."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.generate.decoding import CONFIG, PROMPT, SMALL, TOKENS, TOTAL, TWO, decoder_of, make, read_on
from transmamba_jax.config import ModelConfig
from transmamba_jax.generate import state as decode_state
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.runtime import tensor_files


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


@pytest.mark.slow
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
