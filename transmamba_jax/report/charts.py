"""Charts as inline SVG, for a page without scripts: colours are the page's CSS variables, so they follow its theme.

Positions count tokens read, on a base-2 logarithm: position t is the interval (t + 1/2, t + 3/2), so a TransPoint P,
which separates the positions P - 1 and P, is at P + 1/2, and the TransPoints 0 and T are the two ends of the axis.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH = 880
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 132, 30, 44
_MAX_POINTS = 400  # of a line; more are averaged, which no screen could tell apart

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    css: str
    """Class that gives the colour: `training`, `held`, `other`."""
    points: Sequence[Point]
    marks: bool = False
    """Draw a dot at each point, with its numbers as tooltip; the only point has one anyway."""
    places: Sequence[str] = ()
    """What tooltips call the points' places; none: what the axis calls them."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where values lie between the ends of an axis."""

    low: float
    high: float
    title: str
    ticks: Sequence[float]
    log: bool = False
    label: Callable[[float], str] = lambda value: f"{value:g}"

    def __call__(self, value: float) -> float:
        """Return 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(values: Sequence[float], title: str, tight: bool = False) -> Axis:
    """Make an axis around the values with ticks at round numbers; it begins and ends at one, or, `tight`, at values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (f"{step:e}"[0:3] == "2.5"))
    label = lambda value: f"{value:,.{digits}f}"
    if tight:
        return Axis(low, high, title, [tick for tick in ticks if low <= tick <= high], label=label)
    return Axis(ticks[0], ticks[-1], title, ticks, label=label)


def position_axis(seq_len: int) -> Axis:
    """Make the axis of positions of a row of `seq_len` tokens, with ticks at powers of two."""
    ticks = [2**power for power in range(seq_len.bit_length()) if 2**power <= seq_len]
    if seq_len not in ticks:
        ticks = [*(tick for tick in ticks if tick * 1.4 < seq_len), seq_len]
    return Axis(0.5, seq_len + 0.5, "tokens read (position + 1)", ticks, log=True, label=token_count)


def doubling(low: float, high: float, title: str, label: Callable[[float], str], base: int = 2) -> Axis:
    """Make a logarithmic axis with ticks at powers of `base`; it begins and ends at one."""
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    ticks = [float(base) ** power for power in range(first, max(last, first + 1) + 1)]
    return Axis(ticks[0], ticks[-1], title, ticks, log=True, label=label)


def byte_count(value: float) -> str:
    """Write a number of bytes with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def token_count(value: float) -> str:
    """Write a number of tokens: 512, 1k, 64k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def line_chart(name: str, x: Axis, y: Axis, lines: Sequence[Line], height: int = 300, cuts: Sequence[int] = ()) -> str:
    """Draw lines, named at their ends; `cuts` are TransPoints, drawn as dashed lines from top to bottom."""
    parts = [_frame(x, y, height), *(_cut(x, point, _TOP, height - _BOTTOM) for point in cuts)]
    labels = []
    for line in lines:
        places = [(_x(x, at), _y(y, value, height)) for at, value in _thinned(line.points)]
        if not places:
            continue
        path = "M" + "L".join(f"{left:.1f},{top:.1f}" for left, top in places)
        parts.append(f'<path class="line {line.css}" d="{path}"/>')
        if line.marks or len(places) == 1:
            shown = _thinned(line.points)
            names = line.places or [f"{x.title} {at:,g}" for at, _ in shown]
            parts += [
                f'<circle class="mark {line.css}" cx="{left:.1f}" cy="{top:.1f}" r="3.5">'
                f"<title>{escape(f'{line.name}: {value:.4g} at {name}')}</title></circle>"
                for (left, top), (_, value), name in zip(places, shown, names, strict=True)
            ]
        labels.append((places[-1][1], line))
    for top, line in _apart(labels, 16, height):
        parts.append(_text(WIDTH - _RIGHT + 10, top + 4, line.name, f"name {line.css}"))
    return _svg(name, height, parts)


def schedule_chart(name: str, points: Sequence[int], seq_len: int) -> str:
    """Draw which layers attend at which positions: one row a layer, in two colours that meet at its TransPoint."""
    x = position_axis(seq_len)
    row = min(26.0, max(7.0, 420 / len(points)))
    height = round(row * len(points)) + _TOP + _BOTTOM
    every = math.ceil(15 / row)  # rows a label needs
    parts = []
    for layer, point in enumerate(points):
        top, inside = _TOP + row * layer, min(point, seq_len)
        middle = _x(x, inside + 0.5)
        title = {0: "SSM at every position", seq_len: f"attention at every position, P = {point:,}"}.get(
            inside, f"attention before position {point:,}, SSM from there on"
        )
        for css, left, right in (("attention", _x(x, 0.5), middle), ("ssm", middle, _x(x, seq_len + 0.5))):
            if right > left:
                parts.append(
                    f'<rect class="{css}" x="{left:.1f}" y="{top + 1:.1f}" width="{right - left:.1f}" '
                    f'height="{row - 2:.1f}"><title>{escape(f"layer {layer}: {title}")}</title></rect>'
                )
        if layer % every == 0:
            parts.append(_text(_LEFT - 10, top + row / 2 + 4, str(layer), "tick end"))
            share = "P > T" if point > seq_len else f"P = {point:,}{' = T' * (point == seq_len)}"
            parts.append(_text(WIDTH - _RIGHT + 10, top + row / 2 + 4, share, "tick"))
    parts += [_x_ticks(x, height), _text(8, 14, "layer", "title")]
    return _svg(name, height, parts)


def bar_chart(name: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """Draw horizontal bars: label, value, class."""
    row, left, right = 34, 190, 90
    most = max(value for _, value, _ in bars)
    parts = []
    for index, (label, value, css) in enumerate(bars):
        top, length = 6 + row * index, (WIDTH - left - right) * value / most
        parts.append(_text(left - 12, top + 18, label, "tick end"))
        parts.append(f'<rect class="bar {css}" x="{left}" y="{top}" width="{length:.1f}" height="{row - 10}" rx="3"/>')
        parts.append(_text(left + length + 10, top + 18, f"{value:.3f}", "value"))
    return _svg(name, 6 + row * len(bars), parts)


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _x(axis: Axis, value: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * axis(value)


def _y(axis: Axis, value: float, height: int) -> float:
    return height - _BOTTOM - (height - _BOTTOM - _TOP) * axis(value)


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _frame(x: Axis, y: Axis, height: int) -> str:
    parts = []
    for tick in y.ticks:
        top = _y(y, tick, height)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(_text(_LEFT - 10, top + 4, y.label(tick), "tick end"))
    parts.append(_text(8, 14, y.title, "title"))
    return "".join(parts) + _x_ticks(x, height)


def _x_ticks(x: Axis, height: float) -> str:
    bottom = height - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    for tick in x.ticks:
        left = _x(x, tick)
        parts.append(f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(left, bottom + 17, x.label(tick), "tick middle"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, height - 6, x.title, "title middle"))
    return "".join(parts)


def _cut(x: Axis, point: int, top: float, bottom: float) -> str:
    left = _x(x, point + 0.5)
    return (
        f'<line class="cut" x1="{left:.1f}" x2="{left:.1f}" y1="{top}" y2="{bottom}">'
        f"<title>TransPoint {point:,}</title></line>"
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Average runs of neighbours where there are more points than can be seen."""
    run = math.ceil(len(points) / _MAX_POINTS)
    runs = [points[start : start + run] for start in range(0, len(points), run)] if points else []
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in runs]


def _apart(labels: Sequence[tuple[float, Line]], gap: float, height: int) -> list[tuple[float, Line]]:
    """Move the labels down, and up again from the bottom, until they do not overlap."""
    ordered = sorted(labels, key=lambda label: label[0])
    tops: list[float] = []
    for top, _ in ordered:
        tops.append(max(top, tops[-1] + gap) if tops else top)
    limit = float(height - _BOTTOM)
    for index in reversed(range(len(tops))):
        tops[index] = min(tops[index], limit)
        limit = tops[index] - gap
    return [(top, line) for top, (_, line) in zip(tops, ordered, strict=True)]
