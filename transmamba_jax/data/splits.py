"""Splits of sources that come without any: a stable rule per document, about 90 : 5 : 5."""

import difflib
import hashlib
from collections.abc import Sequence

from transmamba_jax.config import DataConfig
from transmamba_jax.runtime.paths import show_path

SPLITS = ("train", "validation", "test")
"""Splits that the project makes itself, for sources that come without any."""

RECORDS_PER_ROUND = 20
"""Of this many records in a row the last is for test, the middle one for validation."""


def split_of(name: str) -> str:
    """Return the split of the document called `name` (a relative path with slashes).

    SHA-256 of the bytes of the name modulo 100: below 90 train, below 95 validation, else test. Adding files moves no
    other file.
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 100
    if bucket < 90:
        return "train"
    return "validation" if bucket < 95 else "test"


def split_of_record(index: int) -> str:
    """Return the split of record number `index`: of every 20, number 9 is validation and number 19 is test."""
    position = index % RECORDS_PER_ROUND
    if position == RECORDS_PER_ROUND - 1:
        return "test"
    return "validation" if position == RECORDS_PER_ROUND // 2 - 1 else "train"


def records_of_split(count: int, split: str) -> "RecordNumbers":
    """Return the numbers of the records of `split` among `count`, without listing them."""
    return RecordNumbers(count, tuple(i for i in range(RECORDS_PER_ROUND) if split in (split_of_record(i), "all")))


class RecordNumbers:
    """Numbers below `count` whose remainder modulo the round is one of `positions`, in order."""

    def __init__(self, count: int, positions: tuple[int, ...]):
        """Keep the rule: a corpus may have more records than a list should."""
        self._positions = positions
        rounds, rest = divmod(count, RECORDS_PER_ROUND)
        self._length = rounds * len(positions) + sum(position < rest for position in positions)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(index)
        rounds, position = divmod(index, len(self._positions))
        return rounds * RECORDS_PER_ROUND + self._positions[position]


def require_name(what: str, name: str, names: Sequence[str], where: str) -> None:
    """Refuse a `name` that is none of `names`.

    Raises:
        ValueError: the message has all of them and the nearest.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} {name!r} {where}; there are {', '.join(names)}{hint}")


def too_few(config: DataConfig, split: str, what: str, counts: dict[str, int]) -> str:
    """Say that a split is empty, how many `what` each one has, and what to do."""
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    ways = [f"give more {what}"]
    if split == config.train_split:
        ways.append("train on all of them with --data.train-split all")
    if split == config.eval_split:
        ways.append("measure on what is trained on with --data.eval-split all")
        ways.append("train without a held-out loss with --eval.every 0")
    return (
        f"data.source '{show_path(config.source)}' has too few {what} for a non-empty {split!r} split ({found}); "
        f"{', or '.join(ways)}"
    )
