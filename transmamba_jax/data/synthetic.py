"""Synthetic tasks as data: rows that are a function of (seed, split, index), whose answer tokens alone carry loss.

    data.source: synthetic:recall?keys=32&values=32

A row has `tokens` int32 [T + 1] and `weights` float32 [T + 1]: weights[t] = 1 where tokens[t] is part of an answer, so
that predicting it from the tokens before is scored, else 0. For measurements it also has `answers` int32 [T + 1], the
number of the answer from 1 on that a token is part of (0: none), and `facts` int32 [T + 1], the position of the token
that determines it (-1: none). Random access lets rows be shuffled, resumed and shared among processes like any other.

`tasks` defines them.
"""

import dataclasses
import difflib
import math
import zlib
from urllib.parse import parse_qsl

import numpy as np

from transmamba_jax.data.task_rows import Row, Task
from transmamba_jax.data.tasks import TASKS

PREFIX = "synthetic:"


def is_synthetic(source: str) -> bool:
    """Tell whether a `data.source` names a synthetic task."""
    return source.startswith(PREFIX)


def parse(source: str) -> Task:
    """Return the task of a `data.source` such as `synthetic:recall?keys=32&values=32`.

    Raises:
        ValueError: there is no such task or option, or an option's value does not fit; the message lists them.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    if name not in TASKS:
        raise ValueError(f"data.source {source!r} names no task{_nearest(name, list(TASKS))}")
    fields = {field.name: field.type for field in dataclasses.fields(TASKS[name])}  # type: ignore[arg-type]
    options: dict[str, float] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"data.source {source!r}: options are written key=value&key=value; {error}") from None
    for key, text in pairs:
        if key in options:
            raise ValueError(f"data.source {source!r} gives {key} twice; keep one of them")
        if key not in fields:
            raise ValueError(f"data.source {source!r}: {name} has no option {key!r}{_nearest(key, list(fields))}")
        try:
            options[key] = int(text) if fields[key] is int else float(text)
            if not math.isfinite(options[key]):
                raise ValueError
        except ValueError:
            kind = "an integer" if fields[key] is int else "a number"
            raise ValueError(f"data.source {source!r}: {key} must be {kind}, found {text!r}") from None
    return TASKS[name](**options)


class Rows:
    """The rows of a split, by index: a sequence that Grain can shuffle, share out and resume."""

    def __init__(self, task: Task, length: int, seed: int, split: str, count: int) -> None:
        """Prepare `count` rows of `length` tokens.

        Raises:
            ValueError: the task does not fit into `length` tokens.
        """
        if length < task.least_length():
            raise ValueError(
                f"{task} needs rows of at least {task.least_length()} tokens, found data.seq_len + 1 = {length}; "
                "raise data.seq_len or ask for less"
            )
        self._task, self._length, self._count = task, length, count
        self._key = (seed, zlib.crc32(split.encode()))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return self._task.row(np.random.default_rng((*self._key, int(index))), self._length)

    def __repr__(self) -> str:
        return f"Rows({self._task}, length={self._length}, count={self._count})"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
