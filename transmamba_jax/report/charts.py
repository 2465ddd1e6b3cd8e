"""Charts of a run, drawn by matplotlib: the same for the pictures of a report and for its page.

Axes of positions count tokens read, on a base-2 logarithm: position t is the interval (t + 1/2, t + 3/2), so a
TransPoint P, which separates the positions P - 1 and P, is at P + 1/2, and the TransPoints 0 and T are the two ends.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from transmamba_jax import schedule

if TYPE_CHECKING:
    from pathlib import Path

Point = tuple[float, float]
Span = tuple[int, int, float]  # start, stop, nats per token
Tips = dict[str, list[str]]
"""Id of an artist -> one tooltip per mark."""

WIDE, NARROW = 880, 360
"""Widths in pixels: of a desktop page, of a phone."""

COLOURS = {
    "ink": "#22272e", "soft": "#667079", "rule": "#e4e2dc", "panel": "#ffffff", "training": "#8fa9c2",
    "held": "#b8402f", "other": "#8a929a", "attention": "#3a74b5", "ssm": "#e2a04a",
}  # fmt: skip
"""Name of a colour on the page -> its value in a picture; no two are equal."""

RUNS = ("#3a74b5", "#b8402f", "#e2a04a", "#4d9a6a", "#8a63b3", "#4aa3b0")
"""Colours of runs and schedules, readable on light and on dark."""

_MAX_POINTS = 400  # of a line; more are averaged, which no screen could tell apart


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart that can be drawn at any width."""

    name: str
    height: float
    """Pixels."""
    draw: Callable[[Any, bool], Tips]
    """Draw into matplotlib axes; True: as narrow as a phone."""
    aligned: bool = False
    """Give the axes fixed margins at the sides, so that charts below one another share their x-axis."""


def save(chart: Chart, file: "Path | IO[str]", kind: str = "png", width: int = WIDE) -> Tips:
    """Draw a chart into a file, whatever display or pyplot state the program has; return its tooltips."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(chart.name, width < WIDE)):
        # Labels are laid out at the resolution that they are drawn at: hinting changes their lengths.
        dpi = 72 if kind == "svg" else 110
        figure = Figure(figsize=(width / 72, chart.height / 72), dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        tips = chart.draw(axes, width < WIDE)
        if chart.aligned:
            figure.draw_without_rendering()  # lays out
            figure.set_layout_engine("none")
            left, right = (46, 84) if width < WIDE else (60, 104)
            box = axes.get_position()
            axes.set_position((left / width, box.y0, 1 - (left + right) / width, box.height))
        metadata = {"Date": None, "Creator": None} if kind == "svg" else None
        figure.savefig(file, format=kind, dpi=dpi, transparent=kind == "svg", metadata=metadata)
    return tips


def _style(name: str, narrow: bool) -> dict[str, Any]:
    soft = COLOURS["soft"]
    return {
        "font.family": "DejaVu Sans", "font.size": 10 if narrow else 11, "text.color": COLOURS["ink"],
        "axes.labelcolor": soft, "axes.edgecolor": soft, "xtick.color": soft, "ytick.color": soft,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": COLOURS["rule"], "grid.linewidth": 0.8,
        "axes.axisbelow": True, "legend.frameon": False, "legend.labelcolor": COLOURS["ink"],
        "figure.facecolor": COLOURS["panel"], "axes.facecolor": COLOURS["panel"],
        "svg.fonttype": "none", "svg.hashsalt": name,
    }  # fmt: skip


def loss(training: Sequence[Point], held_out: Sequence[Point]) -> Chart:
    """Chart (step, nats per token) of training batches and of held-out text."""

    def draw(axes: Any, _: bool) -> Tips:
        tips: Tips = {}
        if training:
            tips |= _line(axes, "training", "training batch", training, linewidth=1.2)
        if held_out:
            tips |= _line(axes, "held", "held out", held_out, dots=[f"step {step:,.0f}" for step, _ in held_out])
            step, value = held_out[-1]
            axes.annotate(f"{value:.3f}", (step, value), (0, 9), textcoords="offset points", ha="right")
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_xlim(0, max([1.0, *(step for step, _ in [*training, *held_out])]))
        _legend(axes)
        return tips

    return Chart("Training and held-out loss", 300, draw)


def curves(xlabel: str, series: Sequence[tuple[str, Sequence[Point], Sequence[Point]]]) -> Chart:
    """Chart losses of several runs: per run its name, the training loss (thin) and the held-out loss (dots)."""

    def draw(axes: Any, narrow: bool) -> Tips:
        for index, (name, training, held_out) in enumerate(series):
            colour = RUNS[index % len(RUNS)]
            style = ("-", "--", ":")[index // len(RUNS) % 3]
            label = name if len(name) <= 24 or not narrow else f"{name[:11]}...{name[-11:]}"
            if training:
                xs, ys = zip(*thinned(training), strict=True)
                axes.plot(xs, ys, color=colour, linestyle=style, linewidth=0.7, label=None if held_out else label)
            if held_out:
                xs, ys = zip(*held_out, strict=True)
                axes.plot(xs, ys, color=colour, linestyle=style, linewidth=1.6, label=label, marker="o", markersize=4)
        axes.set(xlabel=xlabel, ylabel="nats per token")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5 if narrow else 8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        columns = 1 if narrow else 3
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.2)
        return {}

    from matplotlib import ticker

    return Chart(f"Loss over {xlabel}", 300 + 14 * len(series), draw)


def speed(speeds: Sequence[Point]) -> Chart:
    """Chart (step, tokens per second)."""

    def draw(axes: Any, _: bool) -> Tips:
        _line(axes, "training", "training", speeds)
        axes.set(xlabel="step", ylabel="tokens per second")
        axes.set_xlim(0, speeds[-1][0])
        axes.set_ylim(0, 1.08 * max(value for _, value in speeds))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        return {}

    return Chart("Training speed", 220, draw)


def bars(name: str, values: Sequence[tuple[str, float, str]]) -> Chart:
    """Chart one bar per (label, value, colour)."""

    def draw(axes: Any, _: bool) -> Tips:
        labels, lengths, colours = zip(*values, strict=True)
        drawn = axes.barh(range(len(values)), lengths, height=0.6, color=[COLOURS[colour] for colour in colours])
        axes.bar_label(drawn, fmt="%.3f", padding=5)
        axes.set_yticks(range(len(values)), labels)
        axes.set_xlim(0, 1.2 * max(lengths))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        return {}

    return Chart(name, 14 + 34 * len(values), draw)


def memory(own: Sequence[Point], transformer: Sequence[Point]) -> Chart:
    """Chart (tokens, bytes) of one sequence that is generated, beside a Transformer's."""

    def draw(axes: Any, narrow: bool) -> Tips:
        _line(axes, "other", "Transformer", transformer)
        _line(axes, "held", "this schedule", own)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=4)
        axes.set(xlabel="tokens of the sequence", ylabel="memory")
        axes.set_xlim(own[0][0], own[-1][0])
        axes.set_xticks(_powers_of_two(int(own[-1][0]), narrow))
        axes.xaxis.set_major_formatter(lambda value, _: token_count(value))
        axes.yaxis.set_major_formatter(lambda value, _: byte_count(value))
        axes.minorticks_off()
        _legend(axes)
        return {}

    return Chart("Memory while generating", 280, draw)


def loss_by_position(spans: Sequence[Span], points: schedule.Schedule, seq_len: int) -> Chart:
    """Chart the held-out loss per span of positions of rows of `seq_len` tokens, and mark where layers go to the SSM.

    The last positions may have no span: none of their tokens is trained on.
    """

    def draw(axes: Any, narrow: bool) -> Tips:
        position_axis(axes, seq_len, narrow)
        # A mark in the middle of its span: stairs would show a drop at every power of two, where TransPoints often are.
        middles = [(((start + 0.5) * (stop + 0.5)) ** 0.5, value) for start, stop, value in spans]
        tips = _line(axes, "held", "held out", middles, dots=[_span(start, stop - 1) for start, stop, _ in spans])
        axes.set_ylabel("held-out nats per token")
        mark_transpoints(axes, points, seq_len, narrow)
        return tips

    return Chart("Held-out loss by position", 420, draw, aligned=True)


def layers_by_position(points: Sequence[int], seq_len: int) -> Chart:
    """Chart which layers attend at which positions: one row per layer, in two colours that meet at its TransPoint."""
    row = min(26.0, max(7.0, 420 / len(points)))

    def draw(axes: Any, narrow: bool) -> Tips:
        tips = {}
        position_axis(axes, seq_len, narrow)
        labelled = range(0, len(points), math.ceil(16 / row))
        for layer, point in enumerate(points):
            inside = min(point, seq_len)
            title = {0: "SSM at every position", seq_len: f"attention at every position, P = {point:,}"}.get(
                inside, f"attention before position {point:,}, SSM from there on"
            )
            for kind, left, width in (("attention", 0.5, inside), ("ssm", inside + 0.5, seq_len - inside)):
                if width > 0:
                    (bar,) = axes.barh(layer, width, left=left, height=1 - 2 / row, color=COLOURS[kind])
                    bar.set_gid(f"{kind}-{layer}")
                    tips[f"{kind}-{layer}"] = [f"layer {layer}: {title}"]
            if layer in labelled:
                share = "P > T" if point > seq_len else f"P = {point:,}{' = T' * (point == seq_len)}"
                axes.text(1.01, layer, share, transform=axes.get_yaxis_transform(), va="center", color=COLOURS["soft"])
        axes.set_yticks(labelled)
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        return tips

    height = round(row * len(points)) + 50
    return Chart("Layers by position: attention or SSM", height, draw, aligned=True)


def position_axis(axes: Any, seq_len: int, narrow: bool) -> None:
    """Make the x-axis that of positions of a row of `seq_len` tokens, with ticks at powers of two."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.5, seq_len + 0.5)
    axes.set_xticks(_powers_of_two(seq_len, narrow))
    axes.xaxis.set_major_formatter(lambda value, _: token_count(value))
    axes.minorticks_off()
    axes.set_xlabel("tokens read (position + 1)")


def mark_transpoints(axes: Any, points: Sequence[int], seq_len: int, narrow: bool) -> None:
    """Draw one line per TransPoint, labelled above the axes with its layers; labels too close are moved apart."""
    layers: dict[int, list[int]] = {}
    for layer, point in enumerate(points):
        layers.setdefault(min(point, seq_len), []).append(layer)
    marks = sorted(layers)
    low, high = np.log2([0.5, seq_len + 0.5])
    exact = (np.log2(np.array(marks) + 0.5) - low) / (high - low)  # in axes fractions
    two_lines = 0.11 if narrow else 0.04  # of the axes' width
    for mark, at, text_at in zip(marks, exact, move_apart(exact, two_lines), strict=True):
        axes.axvline(mark + 0.5, color=COLOURS["soft"], linewidth=0.9, linestyle=(0, (4, 3)), clip_on=False)
        leader = {"arrowstyle": "-", "color": COLOURS["soft"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            _mark_label(mark, layers[mark], seq_len),
            xy=(at, 1.0),
            xytext=(text_at, 1.07),
            xycoords="axes fraction",
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=9 if narrow else 9.5,
            color=COLOURS["soft"],
            arrowprops={**leader, "relpos": (0.5, 0)},
        )


def move_apart(positions: np.ndarray, gap: float) -> np.ndarray:
    """Move sorted positions in [0, 1] as little as keeps them `gap` apart and inside."""
    gap = min(gap, 1 / max(len(positions) - 1, 1))
    moved = np.array(positions, float)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    limit = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


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


def _short(value: float) -> str:
    """Write a number of steps, tokens or hours: 0.5, 200, 1.5k, 2M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """Average runs of neighbours where there are more points than can be seen."""
    run = math.ceil(len(points) / _MAX_POINTS)
    runs = [points[start : start + run] for start in range(0, len(points), run)] if points else []
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in runs]


def _line(
    axes: Any, colour: str, name: str, points: Sequence[Point], linewidth: float = 1.8, dots: Sequence[str] = ()
) -> Tips:
    """Draw a line, with a dot per point where `dots` say for the tooltip which point it is; one point is a dot."""
    shown = points if dots else thinned(points)
    steps, values = zip(*shown, strict=True)
    marked = bool(dots) or len(shown) == 1
    axes.plot(
        steps, values, color=COLOURS[colour], linewidth=linewidth, label=name, clip_on=False, gid=colour,
        marker="o" if marked else None, markersize=5.5, markeredgecolor=COLOURS["panel"], markeredgewidth=0.8,
    )  # fmt: skip
    return {colour: [f"{name}: {value:.4g} at {which}" for value, which in zip(values, dots, strict=False)]}


def _legend(axes: Any) -> None:
    if axes.lines:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2, handlelength=1.2)


def _powers_of_two(last: int, narrow: bool) -> list[int]:
    """Return the powers of two up to `last`, and `last`; every second where there is no space for all."""
    powers = [2**power for power in range(last.bit_length())]
    if last not in powers:
        powers = [*(power for power in powers if power * 1.4 < last), last]
    return powers[::-1][:: 2 if narrow and len(powers) > 7 else 1][::-1]


def _mark_label(mark: int, layers: Sequence[int], seq_len: int) -> str:
    where = {0: "SSM only", seq_len: "attention only"}.get(mark, f"P = {mark}")
    return f"{'layer' if len(layers) == 1 else 'layers'} {_ranges(layers)}\n{where}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers shortly: 0, 2-4, 7; more than three parts are counted."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(texts) if len(texts) <= 3 else f"{texts[0]}, {texts[1]} ... {texts[-1]}"


def _span(first: int, last: int) -> str:
    return f"position {first:,}" if first == last else f"positions {first:,} to {last:,}"
