"""Results of a study: one record per finished cell, the choice of learning rates, and intervals over seeds."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from transmamba_jax.study.spec import Cell, Study

Record = dict[str, Any]

RESULT = "result.json"
"""File of a cell's work directory that says that the cell is finished, or has failed: its line of results.jsonl."""

CELLS = "cells"
"""Folder of the work directories, below the study's own."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval by Student's t."""

    mean: float
    half_width: float
    """NaN for a single value."""
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The learning rate of an arm."""

    rate: float
    at_edge: bool
    """The rate is the smallest or the largest of those that did not fail: a better one may lie outside."""
    means: tuple[tuple[float, float], ...]
    """(rate, mean of the metric over the search's seeds) of every rate without a failed cell; none: chosen earlier."""


def cell_folder(out: Path, cell: Cell) -> Path:
    """Return the work directory of a cell."""
    return out / CELLS / cell.name


def read_result(out: Path, cell: Cell) -> Record | None:
    """Return the record of a cell, or None where it is not finished."""
    path = cell_folder(out, cell) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_result(out: Path, cell: Cell, record: Record) -> None:
    """Write the record of a cell; a kill leaves the complete record or none."""
    path = cell_folder(out, cell) / RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.new")
    part.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_file(study: Study, file: Path) -> list[tuple[Cell, Record]]:
    """Return the cells and records of a results.jsonl.

    Raises:
        ValueError: the file is none of this study.
        OSError: it cannot be read.
    """
    read = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            found = record["study"], record["quick"]
            cell = Cell(tuple(record["variants"].values()), record["stage"], record["learning_rate"], record["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no record of a cell ({type(error).__name__}: {error})") from None
        if found != (study.name, study.quick):
            raise ValueError(
                f"{file}, line {number}: a cell of {found[0]}{' --quick' * found[1]}, not of "
                f"{study.name}{' --quick' * study.quick}"
            )
        read.append((cell, record))
    return read


def read_results(study: Study, out: Path) -> list[Record]:
    """Return the records of the study's cells, those of the search first, in the order of the file."""
    search = [read_result(out, cell) for cell in study.search_cells()]
    rates = {arm: choice.rate for arm, choice in choose_rates(study, out).items()}
    report = [read_result(out, cell) for cell in study.report_cells(rates)]
    return [record for record in [*search, *report] if record is not None]


def choose_rates(study: Study, out: Path) -> dict[str, Choice]:
    """Choose a learning rate for every arm whose search is complete, or return those that an earlier study chose.

    The rate with the best mean of the metric over the search's seeds wins, of equal ones the smallest. A rate with a
    failed cell is out. An arm all of whose rates failed has no choice.
    """
    if study.chosen_rates:
        return {arm: Choice(rate, False, ()) for arm, rate in study.chosen_rates.items()}
    values: dict[str, dict[float, list[float]]] = {}
    unfinished, failed = set(), set()
    for cell in study.search_cells():
        record = read_result(out, cell)
        if record is None:
            unfinished.add(cell.arm)
        elif record["error"] is not None:
            failed.add((cell.arm, cell.learning_rate))
        else:
            values.setdefault(cell.arm, {}).setdefault(cell.learning_rate, []).append(metric_of(study, record))
    choices = {}
    for arm, by_rate in values.items():
        means = [(rate, statistics.fmean(found)) for rate, found in by_rate.items() if (arm, rate) not in failed]
        if arm in unfinished or not means:
            continue
        sign = 1 if study.better == "higher" else -1
        rate = max(means, key=lambda pair: (sign * pair[1], -pair[0]))[0]
        edges = min(rate for rate, _ in means), max(rate for rate, _ in means)  # of those that did not fail
        choices[arm] = Choice(rate, rate in edges, tuple(means))
    return choices


def metric_of(study: Study, record: Record) -> float:
    """Return the study's metric at the last step; a value that was not finite is the worst there is.

    Raises:
        ValueError: evaluation lines have no such field.
    """
    metrics = record["metrics"]
    if study.metric not in metrics:
        raise ValueError(f"metric {study.metric!r} is no field of an evaluation line; there are {', '.join(metrics)}")
    value = metrics[study.metric]
    worst = -math.inf if study.better == "higher" else math.inf
    return worst if value is None else float(value)


def interval(values: Sequence[float]) -> Interval:
    """Return mean and 95 % interval: mean ± t(0.975, n - 1) · s / √n; no interval where a value is not finite."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, tuple(values))
    quantile = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), tuple(values))


def examples_to_target(curve: Sequence[Sequence[float]], target: float, better: str) -> float | None:
    """Return the examples of the first evaluation that reaches the target; None: none does.

    Args:
        curve: (examples, value) of the evaluations in order.
        target: the value.
        better: `higher` or `lower` values are better.
    """
    reached = (lambda value: value >= target) if better == "higher" else (lambda value: value <= target)
    return next((examples for examples, value in curve if value is not None and reached(value)), None)


def reported(study: Study, records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return arm -> the records of its reported cells that did not fail, for arms that have any."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["stage"] == "report" and record["error"] is None:
            found.setdefault(record["arm"], []).append(record)
    return {arm: found[arm] for arm in ("/".join(variants) for variants in study.arms()) if arm in found}
