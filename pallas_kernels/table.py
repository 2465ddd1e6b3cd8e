"""Tables of measured implementations: what the dispatch of an operator takes in place of a name."""

import dataclasses
import math
from typing import NamedTuple


class Candidate(NamedTuple):
    """An implementation, and the chunk size that it was measured with."""

    name: str
    chunk_size: int | None = None
    """Tokens; None: that of the call."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Implementations in the order of their measured speed, the fastest first, at one length of rows."""

    length: int
    """Tokens."""
    order: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Implementations by the length of a call. Hashable, so that it may be a static argument of `jax.jit`."""

    source: str
    """Record of the measurements, for the log."""
    calls: tuple[Measured, ...]
    """Of whole calls, by length."""
    states: tuple[Measured, ...] = ()
    """Of calls that return the final state alone, by length. None: as `calls`."""
    excluded: tuple[tuple[str, str], ...] = ()
    """Implementations that did not pass, and why: the choice by platform leaves them out."""

    def order(self, length: object, state_alone: bool = False) -> tuple[Candidate, ...]:
        """Return the order at the measured length that is nearest by ratio; a symbolic length takes the longest."""
        rows = self.states if state_alone and self.states else self.calls
        if not rows:
            return ()
        if not isinstance(length, int):
            return max(rows, key=lambda row: row.length).order
        return min(rows, key=lambda row: abs(math.log(max(length, 1) / row.length))).order
