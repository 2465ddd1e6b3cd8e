"""Round-robin timing: contenders take turns in one process, so that noise of the machine meets all of them alike."""

import dataclasses
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

from transmamba_jax.runtime.hardware import processor

Contender = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each timed call of one contender, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest call: what the code costs when nothing else runs."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle call."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """Ratio of minima, self over other (below 1: self is faster)."""
        return self.minimum / other.minimum

    def paired_ratio(self, other: "Timing") -> float:
        """Median over the rounds of self over other within one round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def round_robin(
    contenders: Mapping[str, Contender], *, rounds: int = 10, warmup: int = 1, seconds: float = math.inf
) -> dict[str, Timing]:
    """Call every contender once a round, starting one place further each round, and keep the wall times.

    Args:
        contenders: name -> function of the round's number (use it to rotate input sets) that returns only when its
            result is ready (`jax.block_until_ready`).
        rounds: timed rounds.
        warmup: untimed calls of each contender before the first round (compilation, page faults).
        seconds: stop early once this much time has gone into timed rounds; at least three rounds are run.
    """
    for call in contenders.values():
        for index in range(warmup):
            call(index)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - begin > seconds:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contenders[name](index)
            times[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log(values)))."""
    return statistics.geometric_mean(values)


def heading(*packages: str) -> str:
    """One line a reader needs beside any figure: Python, package versions, processor.

    Raises:
        importlib.metadata.PackageNotFoundError: a package is not installed.
    """
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return ", ".join([f"Python {platform.python_version()}", *versions, processor()])
