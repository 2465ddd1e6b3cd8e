"""Picture of a plan: time by a common TransPoint, the optimum, and the TransPoints of the schedule."""

from pathlib import Path
from typing import Any

import numpy as np

from transmamba_jax.calibrate.plan import Plan, curve
from transmamba_jax.report import charts

_KINDS = (".png", ".svg")


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

    def paint(axes: Any, narrow: bool) -> charts.Tips:
        charts.position_axis(axes, plan.costs.length, narrow)
        colours, optimum = charts.COLOURS, plan.costs.optimum()
        place = np.asarray(points) + 0.5
        axes.plot(place, 1e3 * seconds, color=colours["attention"], marker="o", markersize=4, linewidth=1.8,
                  label="every layer at P", clip_on=False)  # fmt: skip
        best = 1e3 * plan.costs.predict((optimum,) * plan.num_layers)
        axes.plot(optimum + 0.5, best, "o", markersize=10, fillstyle="none", markeredgewidth=1.8, color=colours["held"],
                  label=f"P* = {optimum}", clip_on=False)  # fmt: skip
        axes.axhline(1e3 * row.predicted, color=colours["ssm"], linewidth=1.6, label="recommended schedule")
        charts.mark_transpoints(axes, plan.recommended, plan.costs.length, narrow)
        axes.set_ylim(bottom=0, top=1.1e3 * max(seconds.max(), row.predicted))
        how = "measured" if plan.how == "measured" else "predicted"
        axes.set(xlabel="TransPoint (tokens), and where the schedule's lie", ylabel=f"ms of {plan.objective}, {how}")
        axes.legend(loc="lower left", ncols=1 if narrow else 3)
        return {}

    return charts.Chart("Time by TransPoint", 420, paint)
