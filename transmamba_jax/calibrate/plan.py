"""Plan the TransPoints of a model by the speed of a device: measure, recommend, and check the prediction."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from transmamba_jax import schedule
from transmamba_jax.calibrate import absent, costs, stopwatch
from transmamba_jax.calibrate.costs import Budget, Costs
from transmamba_jax.calibrate.stopwatch import Objective, Timed
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.report.charts import byte_count
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.logs import LOGGER
from transmamba_jax.schedule import Schedule
from transmamba_jax.training import kernels, schedule_sampling

GOAL = 0.1
"""Relative error of a prediction that is allowed."""

_CHECKED = ("V9", "hybrid", "recommended")
_NOUN: dict[Objective, str] = {"train": "step", "prefill": "reading of a row", "decode": "generation of a row"}


class Machine(Protocol):
    """Times of layers and of whole steps, measured or predicted."""

    def layer(self, point: int) -> Timed:
        """Time one layer."""

    def whole(self, points: Schedule) -> Timed:
        """Time a whole step."""

    def unrolled(self) -> Timed | None:
        """Time a whole Mamba-2 step without a loop over layers; None: there is no loop, or it is not measured."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One schedule of the comparison."""

    name: str
    points: Schedule
    """One per layer."""
    predicted: float
    """Seconds."""
    measured: float | None
    """Seconds of the whole step; None: it was not run."""
    cache: int
    """Bytes of the decoding cache of one row, at its largest."""

    @property
    def error(self) -> float | None:
        """The prediction over the measurement, less 1."""
        return None if self.measured is None else self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Result of a plan."""

    device: str
    how: str
    """"measured", or "predicted by the compiler of" a topology."""
    objective: Objective
    num_layers: int
    costs: Costs
    parts: dict[int, dict[str, float]]
    """TransPoint -> operator -> seconds alone; empty where operators were not timed."""
    recommended: Schedule
    reason: str
    drift: float
    """Seconds of a Mamba-2 step at the check over those before, by which the predictions of `rows` are scaled."""
    rows: tuple[Row, ...]


def make_plan(
    config: Config,
    objective: Objective = "train",
    budget: Budget | None = None,
    topology: str | None = None,
    quick: bool = False,
) -> Plan:
    """Measure layers and steps of the config at its `data.seq_len`, recommend a schedule, and check the prediction.

    Raises:
        ValueError: the budget is below every schedule, the topology is unknown, or it is asked for another objective
            than "train".
    """
    # Rows that draw their own TransPoints would not run the schedules that are compared.
    config = schedule_sampling.without(config)
    rounds, machine, device, how = _machine(config, objective, topology, quick)
    length, layers = config.data.seq_len, config.model.num_layers
    zero: Schedule = (0,) * layers

    points = costs.grid(length, quick)
    LOGGER.info("layers with TransPoints %s, and a whole Mamba-2 %s", ", ".join(map(str, points)), _NOUN[objective])
    calls: dict[int | str, Timed] = {point: machine.layer(point) for point in points}
    mamba2 = machine.whole(zero)
    unrolled = machine.unrolled()
    both = {"loop": mamba2} if unrolled is None else {"loop": mamba2, "unrolled": unrolled}
    found = stopwatch.medians({**calls, **both}, rounds)
    measured = Costs(length, {point: found[point] for point in points}, found["loop"], found.get("unrolled"))
    if not quick and (near := costs.neighbours(measured)):
        # Beside P*: timed with it again, and scaled by it, for the machine may be slower or faster by now.
        again = stopwatch.medians({point: machine.layer(point) for point in (*near, measured.optimum())}, rounds)
        scale = measured.layer[measured.optimum()] / again[measured.optimum()]
        added = {point: scale * again[point] for point in near}
        measured = dataclasses.replace(measured, layer={**measured.layer, **added})
    parts = _parts(machine, points, objective, rounds)
    recommended, reason = costs.recommend(measured, config.model, budget)
    drift, rows = _compare(machine, measured, config.model, recommended, mamba2, rounds)
    return Plan(device, how, objective, layers, measured, parts, recommended, reason, drift, rows)


def _machine(config: Config, objective: Objective, topology: str | None, quick: bool) -> tuple[int, Machine, str, str]:
    if topology is None:
        model, options = config.model, config.kernels
        training = objective == "train"
        chosen = kernels.for_training(model, options) if training else calibration.kernels(model, options, "read")
        machine = stopwatch.Stopwatch(config, chosen, objective)
        return 3 if quick else 9, machine, calibration.device_name(), "measured"
    if objective != "train":
        raise ValueError(f"--topology predicts --objective train alone, found {objective}: decoding is many programs")
    absent_chip = absent.Topology(config, topology)
    return 1, absent_chip, f"{topology}, {absent_chip.kind}", "predicted by the compiler of the chip, not measured"


def _parts(machine: Machine, points: Sequence[int], objective: Objective, rounds: int) -> dict[int, dict[str, float]]:
    if not isinstance(machine, stopwatch.Stopwatch) or objective == "decode":
        return {}
    LOGGER.info("attention(P), convert(P) and SSD(T - P) alone")
    calls = {(point, name): call for point in points for name, call in machine.parts(point).items()}
    found = stopwatch.medians(calls, rounds)
    return {point: {name: found[each, name] for each, name in calls if each == point} for point in points}


def _compare(
    machine: Machine, measured: Costs, model: ModelConfig, recommended: Schedule, mamba2: Timed, rounds: int
) -> tuple[float, tuple[Row, ...]]:
    """Predict the schedules, and run V9, the hybrid and the recommended one in rounds; the drift comes first.

    Mamba-2, of which the prediction is a measurement, runs beside them. A shared machine may be a quarter slower or
    faster by now, for every schedule alike: the predictions are scaled to its speed at the check.
    """
    length, layers = measured.length, model.num_layers
    named: dict[str, Schedule] = {
        "Transformer": (length,),
        "Mamba-2": (0,),
        "V9": schedule.named("v9" if layers >= 8 else "log_spaced", length, layers),
        "hybrid": schedule.named("hybrid", length, layers),
        "recommended": recommended,
    }
    expanded = {name: schedule.expand(points, layers) for name, points in named.items()}
    LOGGER.info("whole steps under %s", ", ".join(_CHECKED))
    calls = {name: machine.whole(expanded[name]) for name in _CHECKED}
    found = stopwatch.medians({**calls, "Mamba-2": mamba2}, rounds)
    drift = found["Mamba-2"] / measured.mamba2
    return drift, tuple(
        Row(name, points, drift * measured.predict(points), found.get(name), costs.cache_peak(model, points, length))
        for name, points in expanded.items()
    )


def text(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan."""
    found, milliseconds = plan.costs, lambda seconds: "" if seconds is None else f"{1e3 * seconds:.2f}"
    yield f"{plan.device}: {plan.how}; {plan.objective}, rows of {found.length} tokens, {plan.num_layers} layers"
    operators = ("attention", "convert", "SSD") if plan.parts else ()
    yield "one layer's mixer in ms by its TransPoint" + ("; the operators alone beside it" if operators else "")
    yield f"{'P':>8}{'layer':>12}" + "".join(f"{name:>12}" for name in operators)
    for point in sorted(found.layer):
        cells = [plan.parts.get(point, {}).get(name) for name in operators]
        star = "  P*" if point == found.optimum() else ""
        yield (
            f"{point:>8}{milliseconds(found.layer[point]):>12}"
            + "".join(f"{milliseconds(c):>12}" for c in cells)
            + star
        )
    rest = found.rest(plan.num_layers)
    yield f"the rest of a {_NOUN[plan.objective]} (MLPs, embeddings, loss, optimizer): {milliseconds(rest)} ms"
    if found.unrolled is not None:
        yield f"a loop over layers, in schedules that repeat: {milliseconds(found.mamba2 - found.unrolled)} ms"
    yield f"speed-optimal common TransPoint P* = {found.optimum()}"
    yield f"recommended: {plan.reason}"
    if plan.drift != 1:
        yield f"the machine now takes {plan.drift:.2f} times as long as above; the predictions below are scaled by it"
    checked = "whole ms" if plan.how == "measured" else "compiled ms"
    yield f"{'':<14}{'predicted ms':>14}{checked:>14}{'error':>9}{'of Transformer':>16}{'cache of a row':>16}"
    for row in plan.rows:
        error = "" if row.error is None else f"{row.error:+.1%}"
        share = row.predicted / plan.rows[0].predicted
        shown = f"{row.name:<14}{milliseconds(row.predicted):>14}{milliseconds(row.measured):>14}"
        yield f"{shown}{error:>9}{share:>16.2f}{byte_count(row.cache):>16}"
    worst = max(abs(row.error) for row in plan.rows if row.name in _CHECKED and row.error is not None)
    yield f"largest error of the prediction {worst:.1%}; goal {GOAL:.0%}: {'met' if worst <= GOAL else 'missed'}"
    yield "for the config:"
    yield f"model: {{transpoints: [{', '.join(map(str, plan.recommended))}]}}"


def write(plan: Plan, file: Path) -> None:
    """Write a plan as JSON."""
    tree: dict[str, Any] = dataclasses.asdict(plan)
    for row, found in zip(tree["rows"], plan.rows, strict=True):
        row["error"] = found.error
    tree["optimum"] = plan.costs.optimum()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def curve(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return TransPoints and the seconds of a whole step in which every layer has that one."""
    points = np.array(sorted(plan.costs.layer))
    common: Callable[[int], float] = lambda point: plan.costs.predict((point,) * plan.num_layers)
    return points, np.array([common(int(point)) for point in points])
