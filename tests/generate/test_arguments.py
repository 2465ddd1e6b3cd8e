"""Arguments of other types than the documented ones: they mean the same, or are refused with what to pass."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.generate.decoding import SMALL, make
from transmamba_jax.generate import Decoder, Sampling, stream
from transmamba_jax.generate.arguments import check_params, real_number, whole_number

PROMPTS = [[3, 1, 4], [9]]
MODEL, PARAMS = make(SMALL)


def generate(**options: Any) -> list[list[int]]:
    asked = {"model": MODEL, "params": PARAMS, "prompts": PROMPTS, "max_new_tokens": 3, **options}
    return tm.generate(**asked)


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return generate()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": np.int64(3)},
        {"max_new_tokens": jnp.int32(3)},
        {"prompts": [np.array([3, 1, 4]), jnp.array([9])]},
        {"params": jax.tree.map(np.asarray, PARAMS)},
        {"params": jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)},
        {"params": flax.core.freeze(PARAMS)},
        {"transpoints": np.array(SMALL.transpoints)},
        {"transpoints": jnp.array(SMALL.transpoints)},
        {"transpoints": list(SMALL.transpoints)},
        {"stop": np.array([[49, 49, 49]])},
        {"vocab_size": np.int64(50)},
        {"temperature": np.float32(0)},
        {"temperature": jnp.float32(1e-40)},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_numbers_and_arrays_of_any_type_mean_the_same(plain: list[list[int]], options: dict[str, Any]) -> None:
    assert generate(**options) == plain


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_any_type_sample_the_same() -> None:
    one = Sampling(temperature=np.float32(0.5), top_k=np.int64(5), top_p=jnp.float32(0.5), min_p=np.array(0.25))
    assert one == Sampling(temperature=0.5, top_k=5, top_p=0.5, min_p=0.25)
    assert hash(one) == hash(Sampling(temperature=0.5, top_k=5, top_p=0.5, min_p=0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 3.0}, "max_new_tokens must be an integer, found float 3.0"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be an integer, found str '3'"),
        ({"prefill_chunk_size": 2.0}, "prefill_chunk_size must be an integer, found float 2.0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be >= 1, found 0"),
        ({"top_k": 5.0}, "top_k must be an integer, found float 5.0"),
        ({"temperature": None}, "temperature must be a number, found NoneType None"),
        ({"temperature": "0.8"}, "temperature must be a number, found str '0.8'"),
        ({"top_p": [0.9]}, r"top_p must be a number, found list \[0.9\]"),
        ({"stop": None}, "stop must be a list of lists of token ids, found NoneType None"),
        ({"stop": [5]}, r"stop must be a list of lists of token ids, found int 5 at stop\[0\]"),
        ({"stop": "end"}, "stop must be token ids, found the text 'end'"),
        ({"transpoints": "mamba2"}, r"transpoints must be a sequence of integers, .*, found 'mamba2'"),
        ({"transpoints": 0}, "transpoints must be a sequence of integers, .*, found 0"),
        ({"transpoints": [0.5]}, r"transpoints\[0\] must be an int, found 0.5"),
        ({"params": {"params": PARAMS}}, r'params is {"params": ...}, .*; pass variables\["params"\]'),
        ({"params": None}, "params must be the nested dict of a model's parameters, found NoneType"),
        ({"params": MODEL}, "params must be the nested dict of a model's parameters, found TransMamba"),
        ({"params": {k: v for k, v in PARAMS.items() if k != "lm_head"}}, r"lm_head \[16, 50\]"),
        ({"params": make(dataclasses.replace(SMALL, d_model=8))[1]}, r"embedding: .*\[50, 16\], .*\[50, 8\]"),
        (
            {"params": jax.tree.map(lambda leaf: leaf.astype(np.int32), PARAMS)},
            "params must be of a floating dtype, found int32 in embedding",
        ),
        ({"model": SMALL}, r"model must be a TransMamba, found ModelConfig; .* tm.TransMamba\(config\) first"),
        ({"model": PARAMS, "params": MODEL}, "model must be a TransMamba, found dict"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_anything_else_is_refused_before_a_compilation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**options)


def test_under_a_transformation_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params are traced: .* runs outside jax.jit"):
        jax.jit(lambda params: jnp.array(generate(params=params)))(PARAMS)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "key": jax.random.key(0)}])
@pytest.mark.usefixtures("unchecked")
def test_a_model_of_nan_has_no_next_token(options: dict[str, Any]) -> None:
    """NaN is the largest of all logits to argmax: every token was 0."""
    broken = {**PARAMS, "final_norm": {"scale": PARAMS["final_norm"]["scale"].at[3].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"logits are NaN, .* parameters that are not finite: final_norm/scale$"):
        generate(params=broken, **options)


def test_extreme_penalties_leave_numbers() -> None:
    for penalty in (1e-45, 1e-39, 1e-30, 1e30, 1e38, 1e300):
        for options in ({}, {"temperature": 1.0, "key": jax.random.key(0)}):
            rows = generate(repetition_penalty=penalty, **options)
            assert all(0 <= token < 50 for row in rows for token in row)


@pytest.mark.usefixtures("unchecked")
def test_streams_of_one_state_do_not_meet(plain: list[list[int]]) -> None:
    decoder = Decoder(MODEL, PARAMS)
    state = decoder.prefill(PROMPTS)
    pairs = list(zip(stream(decoder, state, 3, block=1), stream(decoder, state, 3, block=1), strict=True))
    assert [one for one, _ in pairs] == [other for _, other in pairs]
    assert [[token for one, _ in pairs for token in one[row]] for row in range(2)] == plain
    with pytest.raises(ValueError, match=r"block must be an integer, found float 1.0"):
        stream(decoder, state, 3, block=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps must be an integer, found float 2.0"):
        decoder.decode(state, 2.0)  # type: ignore[arg-type]


def test_checks_of_single_values() -> None:
    assert [whole_number("n", value, 0) for value in (0, True, np.uint8(7))] == [0, 1, 7]
    assert real_number("x", jnp.float32(0.5)) == 0.5
    check_params(MODEL, PARAMS)
