"""Check prompts, and the lengths up to which they are padded."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np

from transmamba_jax import cache as memory

_SHORT = 256  # tokens: to read twice as many costs far less than to compile for one more length


def check_prompts(prompts: Any, vocab_size: int, name: str = "prompts") -> list[list[int]]:
    """Return prompts as lists of Python integers.

    Args:
        prompts: a sequence of sequences of token ids, or integer arrays.
        vocab_size: of the model; ids are below it.
        name: of the argument, for messages.

    Raises:
        ValueError: there is no prompt, one is empty, is text, is not a sequence of integers, or has an id outside the
            vocabulary.
    """
    _refuse_text(prompts, name)
    if not isinstance(prompts, Sequence) and not _is_array(prompts):
        raise ValueError(f"{name} must be a list of lists of token ids, found {_describe(prompts)}")
    if len(prompts) == 0:
        raise ValueError(f"{name} must hold at least one prompt, found none")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) and not (_is_array(prompt) and prompt.ndim):
            raise ValueError(
                f"{name} must be a list of lists of token ids, found {_describe(prompt)} at {name}[{index}]; pass a "
                "single prompt as [prompt]"
            )
    return [check_prompt(prompt, vocab_size, f"{name}[{index}]") for index, prompt in enumerate(prompts)]


def check_prompt(row: Any, vocab_size: int, place: str, least: int = 1) -> list[int]:
    """Return one prompt of `least` tokens or more as a list of Python integers; `place` names it in messages.

    Raises:
        ValueError: as for `check_prompts`.
    """
    _refuse_text(row, place)
    if not isinstance(row, Sequence) and not (_is_array(row) and row.ndim):
        raise ValueError(f"{place} must be a list of token ids, found {_describe(row)}")
    if len(row) < least:
        raise ValueError(f"{place} is empty; it needs at least one token")
    ids = _as_array(row, place)
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(f"{place} has token {ids[outside][0]}, outside the vocabulary 0..{vocab_size - 1}")
    return ids.tolist()


def _as_array(row: Any, place: str) -> np.ndarray:
    if _is_array(row):
        ids = np.asarray(row)
        if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer):
            return ids
        raise ValueError(f"{place} must hold token ids, which are integers, found {ids.dtype} {list(ids.shape)}")
    try:
        return np.array([operator.index(value) for value in row], np.int64)  # no float, no text, no list
    except TypeError:
        wrong = next((value for value in row if not isinstance(value, SupportsIndex)), row)
        raise ValueError(f"{place} must hold token ids, which are integers, found {_describe(wrong)}") from None
    except OverflowError:
        raise ValueError(f"{place} must hold token ids, found {max(row, key=abs)}") from None


def _refuse_text(value: Any, place: str) -> None:
    if isinstance(value, str):
        raise ValueError(
            f"{place} must be token ids, found the text {value[:20]!r}; pass tokenizer.encode(text), or give text to "
            "tm.load(path).generate(text)"
        )


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]


def padded_length(tokens: int) -> int:
    """Round a number of prompt tokens up: to a power of two where they are few, by a quarter at most where not."""
    power = max(16, 1 << (tokens - 1).bit_length())
    return power if power <= _SHORT else memory.bucket(tokens)
