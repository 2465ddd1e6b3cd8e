"""The iterator of batches: streams that are shared out among processes, and a position that can be saved."""

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


SOURCES = "sources"
"""Array of a stream's batch, int32 [B, 1]: the number of the source of each row of a mixture. It is counted here."""


class BatchIterator(Iterator[Batch]):
    """Endless batches of one process, whose position can be saved and restored bit for bit.

    The documents are read in `streams`, each of which gives the same share of every batch's rows. A process has one or
    more of them, in order, so what all processes read together does not depend on how many there are.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], tuple[grain.IterDataset, dict[str, Any]]],
        plan: "Plan",
        sources: Sequence[str] = (),
        skipped_rows: int | None = None,
    ):
        """Start at the beginning; `open_stream(index, count)` gives a stream and what its position must agree with.

        `sources` are those of a mixture; `skipped_rows` those that were left out, None where none may be.
        """
        self._open_stream, self._plan, self._sources, self._skipped = open_stream, plan, sources, skipped_rows
        # Grain's iterators fail noisily when they go after Grain's modules: let go of them before the program ends.
        self._opened: list[grain.DatasetIterator] = []
        self._finalizer = weakref.finalize(self, _close, self._opened)
        self._open(plan.streams)

    def _open(self, count: int) -> None:
        _close(self._opened)
        self._indices = self._plan.mine(count)
        datasets, self._settings = zip(*(self._open_stream(index, count) for index in self._indices), strict=True)
        self._opened.extend(iter(dataset) for dataset in datasets)
        self._seen = [[0] * len(self._sources) for _ in self._indices]

    @property
    def _iterators(self) -> list[grain.DatasetIterator]:
        if not self._opened:
            raise ValueError("the batches were closed; call train_batches again")
        return self._opened

    def __next__(self) -> Batch:
        parts = [self._count(next(iterator), seen) for iterator, seen in zip(self._iterators, self._seen, strict=True)]
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _count(self, batch: Batch, seen: list[int]) -> Batch:
        """Add the tokens of each source of a mixture to those that a stream has seen; padding is none."""
        if SOURCES not in batch:
            return batch
        tokens = np.sum(batch.get("segment_ids", np.ones_like(batch["tokens"])) > 0, axis=1)
        for source, count in enumerate(np.bincount(batch[SOURCES][:, 0], tokens, len(seen))):
            seen[source] += int(count)
        return {name: rows for name, rows in batch.items() if name != SOURCES}

    def facts(self) -> dict[str, float]:
        """Return the metrics of the data that this process has read since the run began.

        `data/share/<source>` is the share of tokens that a source of a mixture gave, and `data/skipped_rows` the number
        of broken rows that `data.on_error: skip` leaves out.
        """
        seen = np.sum(self._seen, axis=0)
        shares = {
            f"data/share/{name}": float(count / max(1, seen.sum()))
            for name, count in zip(self._sources, seen, strict=True)
        }
        return shares if self._skipped is None else {**shares, "data/skipped_rows": self._skipped}

    def get_state(self) -> dict[str, Any]:
        """Return the position behind the last batch, as a tree that JSON keeps."""
        streams = [
            {"settings": settings, "iterator": iterator.get_state(), **({"seen": seen} if seen else {})}
            for settings, iterator, seen in zip(self._settings, self._iterators, self._seen, strict=True)
        ]
        return json.loads(json.dumps({"streams": streams}))

    def set_state(self, *states: dict[str, Any]) -> None:
        """Continue from the positions that `get_state` returned, in all processes that then were.

        Positions without a stream are those of a run that has read nothing: they change nothing.

        Raises:
            ValueError: they belong to streams with other settings, or so many streams cannot be shared out here.
        """
        if not all("streams" in state for state in states):
            raise ValueError("the saved data position was written by an older version and has no streams")
        saved = {stream["settings"]["stream"][0]: stream for state in states for stream in state["streams"]}
        if not saved:
            return
        _, count = next(iter(saved.values()))["settings"]["stream"]
        self._plan.check(count)
        if count != self._settings[0]["stream"][1]:
            self._open(count)
        for settings, index in zip(self._settings, self._indices, strict=True):
            if index not in saved:
                there = ", ".join(map(str, sorted(saved)))
                raise ValueError(f"the saved data position has no stream {index} of {count}, only {there}")
            found = saved[index]["settings"]
            differences = [
                f"{name}: saved {found.get(name)!r}, now {settings.get(name)!r}"
                for name in sorted({*found, *settings})
                if found.get(name) != settings.get(name)
            ]
            if differences:
                raise ValueError(f"the saved data position belongs to another stream: {'; '.join(differences)}")
        for iterator, index in zip(self._iterators, self._indices, strict=True):
            iterator.set_state(_with_tuples(saved[index]["iterator"]))
        if self._sources:
            self._seen = [list(saved[index]["seen"]) for index in self._indices]

    def close(self) -> None:
        """End the worker processes and reading threads; also done when the iterator goes or the program ends."""
        self._finalizer()


def _close(opened: list[grain.DatasetIterator]) -> None:
    while opened:
        opened.pop().close()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Share of a process in the streams: part `part` of `parts` of the rows is this process's."""

    part: int
    parts: int
    rows: int
    asked: int

    @property
    def streams(self) -> int:
        """Return how many a new run has."""
        return self.asked or self.parts

    def mine(self, count: int) -> range:
        """Return which of `count` streams this process reads."""
        each = count // self.parts
        return range(self.part * each, (self.part + 1) * each)

    def check(self, count: int) -> None:
        """Refuse a number of streams that a checkpoint has and this run cannot read."""
        if self.asked not in (0, count):
            raise ValueError(f"the saved data position has {count} streams, found data.streams={self.asked}")
        if count % self.parts or self.rows % count:
            raise ValueError(
                f"the saved data position has {count} streams, which {self.parts} processes cannot share out evenly "
                f"over data.batch_size={self.rows}; continue with a number of processes that divides {count}"
            )


def _with_tuples(state: Any) -> Any:
    """Undo JSON: Grain tells "no remainder" by comparing a slice with a tuple, and a list never equals one."""
    if isinstance(state, dict):
        return {
            key: {name: tuple(bounds) for name, bounds in value.items()}
            if key == "remainder_slices"
            else _with_tuples(value)
            for key, value in state.items()
        }
    return [_with_tuples(value) for value in state] if isinstance(state, list) else state
