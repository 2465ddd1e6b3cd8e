"""Rows of several sources, drawn in given shares.

Row n of the run comes from the source that Grain's mix has at position n, whichever process reads it: every batch of
all processes together has the sources in their shares.
"""

import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from transmamba_jax.config import DataConfig
from transmamba_jax.data.batch_iterator import SOURCES, Batch
from transmamba_jax.data.file_patterns import find_files
from transmamba_jax.data.sources import OF_FILES, copy_bucket
from transmamba_jax.runtime.paths import show_path

_ENDLESS = 2**50
_OF_PATTERNS = OF_FILES - {"hf"}  # which names a folder


def refuse_shared_files(config: DataConfig) -> None:
    """Refuse a mixture in which one file is in two sources and may be in two splits.

    The split of a text file follows from its name below the first wildcard, that of a row from its number.

    Raises:
        ValueError: a file is in two sources, under two names or with rows; the message names it.
    """
    seen: dict[str, tuple[str, str]] = {}
    for source, _ in config.mixture:
        kind, _, pattern = source.partition(":")
        if kind not in _OF_PATTERNS:
            continue
        copied = copy_bucket(config, source)
        for path, name in find_files(kind, pattern if copied is None else copied.pattern).items():
            file = os.path.realpath(path) if copied is None else copied.told(path)
            other, earlier = seen.setdefault(file, (source, name))
            if other != source and (kind != "text" or name != earlier):
                raise ValueError(
                    f"data.mixture: {show_path(file)} is in '{show_path(other)}' and in '{show_path(source)}', where "
                    "its splits differ: held-out text would be trained on. Name it in one source"
                )


class _Endless:
    """The number of a source, again and again."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, _: int) -> int:
        return self._number


def plan(shares: Sequence[float], rows: int, index: int, count: int) -> grain.IterDataset:
    """Return, for batch after batch, the numbers of the sources of the `rows` rows of stream `index` of `count`."""
    numbers = grain.MapDataset.mix([grain.MapDataset.source(_Endless(n)) for n in range(len(shares))], list(shares))
    return numbers.batch(rows, batch_fn=list)[index::count].to_iter_dataset(grain.ReadOptions(num_threads=0))


class DrawRows(grain.IterDataset):
    """Batches whose rows are taken, one by one, from the sources that a plan names."""

    def __init__(self, numbers: grain.IterDataset, sources: Sequence[grain.IterDataset]) -> None:
        """Take a plan and a data set of single rows, arrays [1, ...], for each source."""
        super().__init__([numbers, *sources])

    def __iter__(self) -> "_Drawing":
        return _Drawing([iter(parent) for parent in self.parents])


class _Drawing(grain.DatasetIterator):
    """Iterator of `DrawRows`; its position is that of the plan and of every source."""

    def __next__(self) -> Batch:
        numbers = next(self._parents[0])
        rows = [next(self._parents[1 + number]) for number in numbers]
        batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return {**batch, SOURCES: np.array(numbers, np.int32)[:, None]}

    def get_state(self) -> dict[str, Any]:
        return {"parents": [parent.get_state() for parent in self._parents]}

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, saved in zip(self._parents, state["parents"], strict=True):
            parent.set_state(saved)
