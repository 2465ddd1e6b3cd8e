"""Which split a document belongs to: a stable rule per document, about 90 : 5 : 5."""

import hashlib

SPLITS = ("train", "validation", "test")
"""Splits that the project makes itself, for sources that come without any."""

RECORDS_PER_ROUND = 20
"""Of this many records in a row the last is for test, the middle one for validation."""


def split_of(name: str) -> str:
    """Return the split of the document called `name` (a relative path with slashes).

    SHA-256 of the name modulo 100: below 90 train, below 95 validation, else test. Adding files moves no other file.
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") % 100
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
