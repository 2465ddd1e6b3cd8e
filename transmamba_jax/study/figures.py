"""The plots of a study, each as PNG and SVG: means over seeds, with 95 % intervals."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transmamba_jax import schedule
from transmamba_jax.study import results
from transmamba_jax.study.results import Choice, Record
from transmamba_jax.study.spec import Study

_COLOURS = (
    "#3a74b5",
    "#b8402f",
    "#3f8f5b",
    "#e2a04a",
    "#7a5ea8",
    "#667079",
    "#2aa5a0",
    "#c65a9a",
    "#8a6d3b",
    "#22272e",
)
_LINES = ("-", "--", ":")
"""Arms beyond the colours have them again, in another style."""
_FEWEST = 3
"""Least number of seeds for which an interval is drawn. With two, Student's t makes it useless."""

_SALT = "transmamba"  # makes the ids of an SVG, and so the file, the same every time

Drawing = Callable[[Any, Study, Sequence[Record], dict[str, Choice]], bool]


def draw(study: Study, records: Sequence[Record], choices: dict[str, Choice], out: Path) -> list[str]:
    """Draw the figures that the study names and that its results allow so far; return their names."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    for name in study.figures:
        figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e8ea", linewidth=0.8)
        axes.set_axisbelow(True)
        if not DRAWINGS[name](axes, study, records, choices):
            continue
        _limit(axes, study, records)
        with matplotlib.rc_context({"svg.hashsalt": _SALT}):
            figure.savefig(out / f"{name}.png")
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        drawn.append(name)
    return drawn


def _bars(axes: Any, study: Study, records: Sequence[Record], _: dict[str, Choice]) -> bool:
    """Draw each arm's mean and interval, and a dot for each seed."""
    arms, shares = results.reported(study, records), _are_shares(study, records)
    for place, found in enumerate(arms.values()):
        value = results.interval([results.metric_of(study, record) for record in found])
        colour = _COLOURS[place % len(_COLOURS)]
        if shares:  # other metrics are never near zero: bars from there would hide the differences
            axes.bar(place, _shown(value.mean), 0.65, color=colour, alpha=0.35)
        axes.errorbar(place, _shown(value.mean), _half(value), color=colour, marker="_", capsize=5, linewidth=1.6)
        spread = np.linspace(-0.18, 0.18, len(found)) if len(found) > 1 else [0.0]
        axes.plot(place + np.asarray(spread), list(map(_shown, value.values)), "o", color=colour, markersize=3.5)
    axes.set_xticks(range(len(arms)), [arm.replace("/", "\n") for arm in arms], rotation=20, ha="right")
    axes.set(ylabel=study.metric, title=f"{study.name}: {study.metric} by arm, mean and 95 % interval over seeds")
    return bool(arms)


def _curves(axes: Any, study: Study, records: Sequence[Record], _: dict[str, Choice]) -> bool:
    """Draw the metric over the examples seen."""
    arms = results.reported(study, records)
    for place, (arm, found) in enumerate(arms.items()):
        points: dict[float, list[float]] = {}
        for record in found:
            for examples, value in record["curve"]:
                points.setdefault(examples, []).append(math.inf if value is None else value)
        _line(axes, sorted(points.items()), arm, place)
    if study.target is not None:
        axes.axhline(study.target, color="#8a929a", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(xlabel="training examples (rows)", ylabel=study.metric, title=f"{study.name}: learning curves")
    _legend(axes)
    return bool(arms)


def _time(axes: Any, study: Study, records: Sequence[Record], _: dict[str, Choice]) -> bool:
    """Draw the metric over the seconds of training steps, at each run's median speed; evaluations take no time."""
    arms = results.reported(study, records)
    for place, (arm, found) in enumerate(arms.items()):
        points: dict[float, tuple[list[float], list[float]]] = {}
        for record in found:
            if record["tokens_per_second"]:
                seconds_per_row = record["config"]["data"]["seq_len"] / record["tokens_per_second"]
                for examples, value in record["curve"]:
                    seconds, values = points.setdefault(examples, ([], []))
                    seconds.append(examples * seconds_per_row)
                    values.append(math.inf if value is None else value)
        line = [(sum(seconds) / len(seconds), values) for _, (seconds, values) in sorted(points.items())]
        _line(axes, line, arm, place)
    axes.set(xlabel="seconds of training steps", ylabel=study.metric, title=f"{study.name}: equal time")
    _legend(axes)
    return bool(axes.containers)


def _rates(axes: Any, study: Study, records: Sequence[Record], choices: dict[str, Choice]) -> bool:
    """Draw the search: the metric over the learning rate, and a ring around each arm's choice."""
    search = [record for record in records if record["stage"] == "search" and record["error"] is None]
    arms = dict.fromkeys(record["arm"] for record in search)
    for place, arm in enumerate(arms):
        points: dict[float, list[float]] = {}
        for record in search:
            if record["arm"] == arm:
                points.setdefault(record["learning_rate"], []).append(results.metric_of(study, record))
        _line(axes, sorted(points.items()), arm, place, fewest=math.inf)  # intervals of three seeds hide one another
        if arm in choices:
            chosen = _shown(dict(choices[arm].means)[choices[arm].rate])
            colour = _COLOURS[place % len(_COLOURS)]
            axes.plot(choices[arm].rate, chosen, "o", markersize=11, fillstyle="none", color=colour)
    axes.set_xscale("log")
    axes.set_xticks(study.learning_rates, [f"{rate:g}" for rate in study.learning_rates])
    axes.minorticks_off()
    axes.set(xlabel="peak learning rate", ylabel=study.metric, title=f"{study.name}: search on the validation split")
    _legend(axes)
    return bool(search)


def _lines(axes: Any, study: Study, records: Sequence[Record], _: dict[str, Choice]) -> bool:
    """Draw the metric over the variants of the last axis, one line for each arm of the others."""
    arms = results.reported(study, records)
    variants = list(list(study.axes.values())[-1])
    groups: dict[str, list[tuple[float, list[float]]]] = {}
    for arm, found in arms.items():
        group, variant = arm.rpartition("/")[::2]
        values = [results.metric_of(study, record) for record in found]
        groups.setdefault(group or "all", []).append((variants.index(variant), values))
    for place, (group, points) in enumerate(groups.items()):
        _line(axes, sorted(points), group, place)
    axes.set_xticks(range(len(variants)), variants)
    axes.set(xlabel=list(study.axes)[-1], ylabel=study.metric, title=f"{study.name}: {study.metric}")
    _legend(axes)
    return bool(arms)


def _positions(axes: Any, study: Study, records: Sequence[Record], _: dict[str, Choice]) -> bool:
    """Draw accuracy by the position of the question, or loss by position, and mark the arms' TransPoints."""
    arms = results.reported(study, records)
    if not arms:
        return False
    metrics = next(iter(arms.values()))[0]["metrics"]
    field = "eval/answers_by_query" if "eval/answers_by_query" in metrics else "eval/by_position"
    marks: set[int] = set()
    length, places = 1, set[float]()
    for place, (arm, found) in enumerate(arms.items()):
        points: dict[float, list[float]] = {}
        for record in found:
            for start, stop, value, *_count in record["metrics"][field]:
                points.setdefault(math.sqrt((start + 0.5) * (stop + 0.5)), []).append(value)
            model, length = record["config"]["model"], record["config"]["data"]["seq_len"]
            marks.update(schedule.expand(model["transpoints"], model["num_layers"]))
        _line(axes, sorted(points.items()), arm, place)
        places |= points.keys()
    if len(places) < 2:
        return False  # questions at one place say nothing about places
    for mark in marks:
        axes.axvline(min(mark, length) + 0.5, color="#c3c8cc", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8 * min(places), length + 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    name = "answers that are right" if field == "eval/answers_by_query" else "held-out loss, nats per token"
    axes.set(xlabel="tokens read (position + 1); dashed: TransPoints", ylabel=name, title=f"{study.name}: by position")
    _legend(axes)
    return True


def _measures(axes: Any, study: Study, records: Sequence[Record], _: dict[str, Choice]) -> bool:
    """Draw the metric of the evaluations after training, in the order of the file: one colour for each arm."""
    arms = results.reported(study, records)
    fields = {name: f"measure/{name}/{study.metric.removeprefix('eval/')}" for name in study.measure}
    for place, (arm, found) in enumerate(arms.items()):
        aside = 0.6 * ((place + 0.5) / len(arms) - 0.5)
        values = [[record["metrics"].get(field) for record in found] for field in fields.values()]
        points = [(at + aside, each) for at, each in enumerate(values) if None not in each]
        _line(axes, points, arm, place, linestyle="none")  # the evaluations have no order of their own
    axes.set_xticks(range(len(fields)), list(fields), rotation=20, ha="right")
    axes.set(ylabel=study.metric.removeprefix("eval/"), title=f"{study.name}: evaluations after training")
    _legend(axes)
    return bool(arms and fields)


def _are_shares(study: Study, records: Sequence[Record]) -> bool:
    values = [results.metric_of(study, record) for record in records if record["error"] is None]
    return study.better == "higher" and all(0 <= value <= 1 for value in values if math.isfinite(value))


def _limit(axes: Any, study: Study, records: Sequence[Record]) -> None:
    """Show shares from 0 to 1, and what of an interval lies a little beyond."""
    if _are_shares(study, records):
        axes.set_ylim(0, min(max(1.03, axes.get_ylim()[1]), 1.2))


def _shown(value: float) -> float:
    """Return the value, or NaN for one that is not finite, which matplotlib leaves out."""
    return value if math.isfinite(value) else math.nan


def _half(value: results.Interval, fewest: float = _FEWEST) -> float:
    """Return the half width of an interval; 0 where it has fewer values than `fewest`."""
    return 0.0 if len(value.values) < fewest or math.isnan(value.half_width) else value.half_width


def _line(
    axes: Any,
    points: Sequence[tuple[float, list[float]]],
    label: str,
    place: int,
    linestyle: str | None = None,
    fewest: float = _FEWEST,
) -> None:
    """Draw a line through the means; at each place an interval, or a dot for each of fewer values than `fewest`.

    A mean that is not finite is left out.
    """
    if not points:
        return
    values = [results.interval(found) for _, found in points]
    halves = [_half(value, fewest) for value in values]
    places = [at for at, _ in points]
    colour = _COLOURS[place % len(_COLOURS)]
    options: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
    options |= {"label": label, "capsize": 3, "linewidth": 1.5}
    options["linestyle"] = linestyle or _LINES[place // len(_COLOURS) % len(_LINES)]
    axes.errorbar(places, [_shown(value.mean) for value in values], halves, **options)
    dots = [(at, _shown(each)) for at, found in points if 1 < len(found) < fewest for each in found]
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=3, alpha=0.45)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


DRAWINGS: dict[str, Drawing] = {
    "bars": _bars,
    "curves": _curves,
    "rates": _rates,
    "time": _time,
    "lines": _lines,
    "positions": _positions,
    "measures": _measures,
}
