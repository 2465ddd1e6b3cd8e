"""Cost of schedules from the cost of one layer by its TransPoint, and the schedule that a rule or a budget asks for.

    seconds(P_1 .. P_L) = seconds(0 .. 0) + sum_l [layer(P_l) - layer(0)]

The first term is a whole Mamba-2 step, measured: so MLPs, embeddings, loss and optimizer are in it. The paper's rule
(arXiv 2503.24067 §3.3): TransPoints that differ by layer, from whole-sequence SSM to whole-sequence attention, spaced
by their logarithm, with a mean a little below the TransPoint P* at which a layer is fastest.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from transmamba_jax import cache, schedule
from transmamba_jax.config import ModelConfig
from transmamba_jax.schedule import Schedule

BELOW = 0.9
"""Mean TransPoint over P* that the paper's rule aims at: a little below."""

_PERIOD = 8
_MULTIPLE = 16  # tokens: slices at such places are aligned in every implementation
_RATIOS = np.linspace(0.02, 0.98, 481)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of one layer by its TransPoint, and of a whole Mamba-2 step."""

    length: int
    """Tokens of a row (T)."""
    layer: dict[int, float]
    """TransPoint -> seconds of a mixer; has 0 and T."""
    mamba2: float
    """Seconds of a step in which every TransPoint is 0."""
    unrolled: float | None = None
    """Seconds of that step without a loop over layers, as schedules are compiled whose period is the depth.

    None: there is no loop, or it was not measured.
    """

    def at(self, point: int) -> float:
        """Return the seconds of a layer, linear between the TransPoints that were measured."""
        points = sorted(self.layer)
        return float(np.interp(min(point, self.length), points, [self.layer[each] for each in points]))

    def predict(self, points: Schedule) -> float:
        """Return the seconds of a step under one TransPoint per layer."""
        looped = schedule.smallest_period([min(point, self.length) for point in points]) < len(points)
        base = self.mamba2 if looped or self.unrolled is None else self.unrolled
        return base + sum(self.at(point) - self.layer[0] for point in points)

    def rest(self, num_layers: int) -> float:
        """Return the seconds of a step besides its mixers and a loop over layers."""
        return (self.mamba2 if self.unrolled is None else self.unrolled) - num_layers * self.layer[0]

    def optimum(self) -> int:
        """Return the TransPoint P* of the fastest layer; the smallest of several."""
        return min(sorted(self.layer), key=lambda point: self.layer[point])


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit: seconds of a step, seconds over those of the Transformer, or bytes of the cache of a row."""

    kind: Literal["seconds", "ratio", "bytes"]
    limit: float


_UNITS: dict[str, tuple[Literal["seconds", "ratio", "bytes"], float]] = {
    "": ("ratio", 1), "x": ("ratio", 1), "%": ("ratio", 0.01), "s": ("seconds", 1), "ms": ("seconds", 1e-3),
    "B": ("bytes", 1), "kB": ("bytes", 1e3), "MB": ("bytes", 1e6), "GB": ("bytes", 1e9),
    "KiB": ("bytes", 2**10), "MiB": ("bytes", 2**20), "GiB": ("bytes", 2**30),
}  # fmt: skip


def parse_budget(text: str) -> Budget:
    """Read `2.5s`, `800ms`, `0.8` (of the Transformer's time), `64MiB`.

    Raises:
        ValueError: it is none of them.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)", text.strip())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"--budget must be like 2.5s, 800ms, 0.8 (of the Transformer's time) or 64MiB, found {text!r}")
    kind, unit = _UNITS[match[2]]
    return Budget(kind, float(match[1]) * unit)


def spread(length: int, period: int, ratio: float) -> Schedule:
    """Return a log-spaced schedule with both ends: 0, T r^(n-2), .., T r, T; r = 1/2 is V9's form, r -> 0 the hybrid's.

    TransPoints between the ends are rounded to 16 tokens where they have as many.
    """
    inner = [length * ratio**power for power in range(period - 2, 0, -1)]
    rounded = [_MULTIPLE * round(point / _MULTIPLE) if point >= _MULTIPLE else round(point) for point in inner]
    return (0, *(min(point, length) for point in rounded), length)


def cache_peak(model: ModelConfig, points: Schedule, length: int) -> int:
    """Return the largest size of one row's decoding cache, in bytes, over a row of `length` tokens."""
    places = {min(place, length) for point in points for place in (point, point - 1) if place >= 0} | {length}
    return max(sum(cache.cache_bytes(model, 1, place, point) for point in points) for place in places)


def recommend(costs: Costs, model: ModelConfig, budget: Budget | None) -> tuple[Schedule, str]:
    """Return a schedule of at most 8 TransPoints, repeated over the layers, and the reason for it.

    Without a budget its mean is the largest up to 0.9 P*. With one it is the largest that the budget allows.

    Raises:
        ValueError: the model has one layer, or no schedule of this form is within the budget.
    """
    if model.num_layers < 2:
        raise ValueError(f"a schedule with both ends needs model.num_layers >= 2, found {model.num_layers}")
    most = min(_PERIOD, model.num_layers)
    period = next((n for n in range(most, most // 2, -1) if model.num_layers % n == 0), most)
    family = sorted({spread(costs.length, period, ratio) for ratio in _RATIOS}, key=sum)
    whole = lambda points: schedule.expand(points, model.num_layers)
    if budget is None:
        aim = BELOW * costs.optimum()
        fitting = [points for points in family if np.mean(points) <= aim]
        if fitting:
            return fitting[-1], f"its mean is the largest up to {BELOW} P* = {aim:.0f} tokens, with both ends"
        least = f"both ends alone have a mean of {np.mean(family[0]):.0f} tokens, and {BELOW} P* is {aim:.0f}"
        return family[0], f"the smallest mean with both ends: {least}"
    limit = budget.limit
    if budget.kind == "ratio":
        limit *= costs.predict(whole((costs.length,)))
    cost = lambda points: (
        cache_peak(model, whole(points), costs.length) if budget.kind == "bytes" else costs.predict(whole(points))
    )
    fitting = [points for points in family if cost(points) <= limit]
    unit = "bytes" if budget.kind == "bytes" else "seconds"
    if not fitting:
        raise ValueError(
            f"no log-spaced schedule with both ends is within the budget of {limit:.4g} {unit}: the least needs "
            f"{min(map(cost, family)):.4g}; raise --budget, or take mamba2"
        )
    return fitting[-1], f"the most attention within {limit:.4g} {unit}, with both ends"


def grid(length: int, quick: bool) -> tuple[int, ...]:
    """Return the TransPoints to measure."""
    shares: Sequence[float] = (0, 1 / 16, 1 / 4, 1 / 2, 1)
    if not quick:
        shares = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
    return tuple(sorted({round(length * share) for share in shares}))


def neighbours(costs: Costs) -> tuple[int, ...]:
    """Return the TransPoints half-way from P* to those measured next to it."""
    points = sorted(costs.layer)
    place = points.index(costs.optimum())
    beside = [points[index] for index in (place - 1, place + 1) if 0 <= index < len(points)]
    return tuple(sorted({(points[place] + each) // 2 for each in beside} - set(points)))
