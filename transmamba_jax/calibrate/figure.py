"""Picture of a plan: time by a common TransPoint, the optimum, and the TransPoints of the schedule."""

from pathlib import Path
from typing import Any

from transmamba_jax.calibrate.plan import Plan, curve
from transmamba_jax.report import charts

_KINDS = (".png", ".svg")
_WHAT = {"train": "step", "prefill": "row read", "decode": "row generated"}


def check_name(file: Path) -> None:
    """Raise a ValueError unless the file is of a kind that can be drawn."""
    if file.suffix not in _KINDS:
        raise ValueError(f"--figure must end in {' or '.join(_KINDS)}, found {str(file)!r}")


def draw(plan: Plan, file: Path) -> None:
    """Draw a plan into a file.

    Raises:
        ValueError: its name ends neither in .png nor in .svg.
    """
    check_name(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w" if file.suffix == ".svg" else "wb") as stream:
        charts.save(chart(plan), stream, file.suffix[1:])


def chart(plan: Plan) -> charts.Chart:
    """Chart the seconds of a step by a common TransPoint; lines mark the schedule, a dot P*."""
    points, seconds = curve(plan)
    row = {each.name: each for each in plan.rows}["recommended"]
    most = max(float(seconds.max()), row.predicted)
    unit, scale = ("s", 1.0) if most >= 1 else ("ms", 1e3)

    def paint(axes: Any, narrow: bool) -> charts.Tips:
        charts.position_axis(axes, plan.costs.length, narrow)
        colours, optimum = charts.COLOURS, plan.costs.optimum()
        best = scale * plan.costs.predict((optimum,) * plan.num_layers)
        line: dict[str, Any] = {"color": colours["attention"], "marker": "o", "markersize": 4, "linewidth": 1.8}
        ring: dict[str, Any] = {"color": colours["held"], "markersize": 10, "fillstyle": "none", "markeredgewidth": 1.8}
        axes.plot(points + 0.5, scale * seconds, label="every layer at P", clip_on=False, **line)
        axes.plot(optimum + 0.5, best, "o", label=f"P* = {optimum}", clip_on=False, **ring)
        axes.axhline(scale * row.predicted, color=colours["ssm"], linewidth=1.6, label="recommended schedule")
        charts.mark_transpoints(axes, plan.recommended, plan.costs.length, narrow)
        axes.set_ylim(0, 1.1 * scale * most)
        what = _WHAT[plan.objective]
        how = "measured" if plan.how == "measured" else "predicted"
        axes.set(xlabel="TransPoint P, tokens; dashed: those of the schedule", ylabel=f"{unit} per {what}, {how}")
        axes.legend(loc="lower left", ncols=1 if narrow else 3, frameon=True, facecolor=colours["panel"], framealpha=1)
        return {}

    return charts.Chart("Time by TransPoint", 420, paint, aligned=True)
