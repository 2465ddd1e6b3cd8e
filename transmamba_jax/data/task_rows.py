"""Rows of synthetic tasks, and the interface of a task; see `synthetic`."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Row(NamedTuple):
    """One row of a task; see the module's docstring."""

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    facts: np.ndarray


@runtime_checkable
class Task(Protocol):
    """A task with its parameters: a frozen dataclass whose fields are the options of a source's name."""

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""

    def least_length(self) -> int:
        """Return the smallest number of tokens of a row, T + 1, that the task fits into."""

    def most_answers(self, length: int) -> int:
        """Return a bound of the answer tokens of a row of `length` tokens."""

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row of `length` tokens."""


class Writer:
    """Collects a row token by token."""

    def __init__(self, length: int) -> None:
        self.tokens: list[int] = []
        self._length = length
        self._answers: dict[int, tuple[int, int]] = {}
        self._count = 0

    def put(self, *tokens: int) -> None:
        """Append tokens that are not scored."""
        self.tokens.extend(map(int, tokens))

    def answer(self, tokens: list[int], facts: list[int]) -> None:
        """Append one answer; `facts` are the positions that determine its tokens."""
        self._count += 1
        for token, fact in zip(tokens, facts, strict=True):
            self._answers[len(self.tokens)] = self._count, fact
            self.tokens.append(int(token))

    @property
    def room(self) -> int:
        """Return how many tokens are left."""
        return self._length - len(self.tokens)

    def row(self, filler: int = 0) -> Row:
        """Fill up and return the row."""
        tokens = np.full(self._length, filler, np.int32)
        tokens[: len(self.tokens)] = self.tokens
        answers, facts = np.zeros(self._length, np.int32), np.full(self._length, -1, np.int32)
        for place, (number, fact) in self._answers.items():
            answers[place], facts[place] = number, fact
        return Row(tokens, (answers > 0).astype(np.float32), answers, facts)
