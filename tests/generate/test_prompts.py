"""Prompts that are not lists of token ids are refused with what to pass."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from transmamba_jax.generate.prompts import check_prompts


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2], [3]],
        ((1, 2), (3,)),
        [np.array([1, 2]), np.array([3], np.uint8)],
        [jnp.array([1, 2]), [jnp.int32(3)]],
        [range(1, 3), b"\x03"],
    ],
)
def test_integers_of_any_container_are_prompts(prompts: Any) -> None:
    checked = check_prompts(prompts, 9)
    assert checked == [[1, 2], [3]]
    assert {type(token) for row in checked for token in row} == {int}


def test_rows_of_an_array_are_prompts() -> None:
    assert check_prompts(np.arange(6).reshape(2, 3), 9) == [[0, 1, 2], [3, 4, 5]]
    assert check_prompts(jnp.arange(6).reshape(2, 3), 9) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            [1, 2, 3],
            r"prompts must be a list of lists of token ids, found int 1 at prompts\[0\]; pass .* as \[prompt\]",
        ),
        (np.array([1, 2]), r"found int64 .*1.* at prompts\[0\]; pass a single prompt as \[prompt\]"),
        (b"abc", r"found int 97 at prompts\[0\]"),
        (3, "prompts must be a list of lists of token ids, found int 3"),
        ({"a": [1]}, "prompts must be a list of lists of token ids, found dict"),
        ((row for row in [[1]]), "prompts must be a list of lists of token ids, found generator"),
        ("text", r"prompts must be token ids, found the text 'text'; pass tokenizer.encode\(text\), or .*tm\.load"),
        (["text"], r"prompts\[0\] must be token ids, found the text 'text'; pass tokenizer.encode\(text\)"),
        ([[1], ["a"]], r"prompts\[1\] must hold token ids, which are integers, found str 'a'"),
        ([[1.0, 2.0]], r"prompts\[0\] must hold token ids, which are integers, found float 1.0"),
        ([np.array([1.0])], r"prompts\[0\] must hold token ids, which are integers, found float64 \[1\]"),
        ([[[1, 2]]], r"prompts\[0\] must hold token ids, which are integers, found list \[1, 2\]"),
        (np.zeros((1, 2, 3), int), r"prompts\[0\] must hold token ids, which are integers, found int64 \[2, 3\]"),
        ([[None]], r"prompts\[0\] must hold token ids, which are integers, found NoneType None"),
        ([[2**70]], r"prompts\[0\] must hold token ids, found 1180591620717411303424"),
        ([[1], [9]], r"prompts\[1\] has token 9, outside the vocabulary 0..8"),
        ([[-1]], r"prompts\[0\] has token -1, outside the vocabulary 0..8"),
        ([[1], []], r"prompts\[1\] is empty; it needs at least one token"),
        ([], "prompts must hold at least one prompt, found none"),
        (np.zeros((0, 3), int), "prompts must hold at least one prompt, found none"),
    ],
)
def test_anything_else_is_refused_with_what_to_pass(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts, 9)
