"""Run the cells of a study, one after another in one process, so that they share compiled programs.

A cell is an ordinary work directory with a `result.json` beside the run's own files. The search comes first; an arm's
reported cells follow when its learning rate is chosen. A finished cell is never run again, and a cell that was killed
continues from its checkpoint.
"""

import contextlib
import dataclasses
import fnmatch
import itertools
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from transmamba_jax import config_io
from transmamba_jax.config import Config
from transmamba_jax.report import read_metrics
from transmamba_jax.runtime import logs, storage
from transmamba_jax.study import after, measure, results
from transmamba_jax.study.results import Record
from transmamba_jax.study.spec import Cell, Stage, Study
from transmamba_jax.training.lock_owner import RunningElsewhereError
from transmamba_jax.training.loop import EXIT_NOT_SAVED, train
from transmamba_jax.training.preemption import EXIT_PREEMPTED
from transmamba_jax.training.step import share_programs
from transmamba_jax.training.step_log import NonFiniteError

COMPLETE, UNFINISHED = 0, 75
"""Exit codes: every cell that was asked for has a result; the same command continues (EX_TEMPFAIL)."""

_SECONDS = "seconds.txt"
"""File of a cell: the time of its training so far."""

Train = Callable[[Config], int]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The cells of a study that one call runs."""

    only: str = "*"
    """Shell pattern of the cells' names, such as `mamba2/*`."""
    shard: int = 0
    shards: int = 1
    """Of the cells with such names, in order, this call runs those whose number modulo `shards` is `shard`."""
    stage: Stage | None = None
    """None: both."""

    def of(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the selected ones of all cells of a stage."""
        named = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, self.only)]
        return [cell for number, cell in enumerate(named) if number % self.shards == self.shard]


def run_study(
    study: Study,
    out: Path,
    selection: Selection = Selection(),
    retry: bool = False,
    hours: float | None = None,
    train_cell: Train = train,
) -> int:
    """Run the selected cells that have no result, and return an exit code.

    Args:
        study: the study.
        out: its folder, with work directories in `cells/`.
        selection: which cells.
        retry: run cells that failed again.
        hours: no further cell begins after them; None: the study's `budget_hours`.
        train_cell: trains one config and returns an exit code; replaced in tests.

    Returns:
        COMPLETE, or UNFINISHED: the budget is spent, a signal asked to stop, or reported cells wait for the search of
        another shard.
    """
    begin = time.perf_counter()
    hours = study.budget_hours if hours is None else hours
    out.mkdir(parents=True, exist_ok=True)
    for stage in ("search", "report") if selection.stage is None else (selection.stage,):
        cells = [cell for cell in selected_cells(study, out, stage, selection) if _is_due(study, out, cell, retry)]
        # The runs' own lines are hidden, except what needs a person, until the stage ends in whatever way.
        with logs.shown(logging.ERROR), _bar(cells, stage) as bar:
            for _, of_arm in itertools.groupby(cells, key=lambda cell: cell.arm):
                jax.clear_caches()  # other arms trace functions of their own
                with share_programs():
                    for cell in of_arm:
                        if time.perf_counter() - begin > 3600 * hours:
                            logs.write_line("the hours of the budget are spent; the same command continues")
                            return UNFINISHED
                        if not run_cell(study, out, cell, retry, train_cell):
                            return UNFINISHED
                        bar.update()
    return UNFINISHED if selection.stage != "search" and _waiting(study, out, selection) else COMPLETE


def stage_cells(study: Study, out: Path, stage: Stage) -> list[Cell]:
    """Return the cells of a stage; reported ones only of arms whose learning rate is chosen."""
    if stage == "search":
        return study.search_cells()
    return study.report_cells({arm: choice.rate for arm, choice in results.choose_rates(study, out).items()})


def selected_cells(study: Study, out: Path, stage: Stage, selection: Selection) -> list[Cell]:
    """Return the selected cells of a stage; reported ones only of arms whose learning rate is chosen."""
    ready = {cell.arm for cell in stage_cells(study, out, stage)}
    every = study.search_cells() if stage == "search" else _all_reported(study, out)
    return [cell for cell in selection.of(every) if cell.arm in ready]


def run_cell(study: Study, out: Path, cell: Cell, retry: bool, train_cell: Train = train) -> bool:
    """Train a cell and write its result, or why it failed; return False if it was stopped or another run has it."""
    folder = results.cell_folder(out, cell)
    if not _is_due(study, out, cell, retry):  # by now: another process may have finished it
        return True
    if retry and (folder / results.RESULT).exists():
        shutil.rmtree(folder)
    config = study.cell_config(cell, folder)
    begin, seconds = time.perf_counter(), _earlier_seconds(folder)
    error, extra = None, {}
    try:
        try:
            code = train_cell(config)
        finally:
            seconds += time.perf_counter() - begin  # without the evaluations after training
            _keep_seconds(folder, seconds)
        if code == EXIT_PREEMPTED:
            return False
        if code == EXIT_NOT_SAVED:
            error = "the last state could not be saved"
        if error is None and cell.stage == "report":
            extra = after.evaluate(study, config)
    except RunningElsewhereError as failure:  # no result: the other run writes it
        logs.write_line(f"{cell.name}: {failure}")
        return False
    except (ValueError, OSError, NonFiniteError, jax.errors.JaxRuntimeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    record = _record(study, cell, config, error, seconds, extra)
    results.write_result(out, cell, record)
    logs.write_line(_line(study, cell, record))
    return True


def check_results(study: Study, out: Path, retry: bool = False) -> None:
    """Check that the results of a folder are of the study's configs; those of failed cells not where they run again.

    Raises:
        ValueError: one is of another config.
    """
    for stage in ("search", "report"):
        for cell in stage_cells(study, out, stage):
            _is_due(study, out, cell, retry)


def take_results(study: Study, out: Path, file: Path) -> int:
    """Take the cells that a results.jsonl has and the folder `out` has not, and return their number.

    Failed cells stay behind. Nothing is taken where a record is of another config.

    Raises:
        ValueError: the file is none of this study, or a record is of another config.
        OSError: it cannot be read.
    """
    found = [(cell, record) for cell, record in results.read_file(study, file) if record["error"] is None]
    for cell, record in found:
        if cell.arm in map("/".join, study.arms()):
            refuse_other_config(study, cell, record, f"{file} is of another version of {study.name}")
    new = [(cell, record) for cell, record in found if results.read_result(out, cell) is None]
    for cell, record in new:
        results.write_result(out, cell, record)
    return len(new)


def estimate(study: Study, out: Path, cells: Sequence[Cell]) -> list[float]:
    """Estimate the seconds of each cell: the mean of its arm's finished ones, else of all, else the file's figure."""
    by_arm: dict[str, list[float]] = {}
    for record in results.read_results(study, out):
        if record["error"] is None:
            by_arm.setdefault(record["arm"], []).append(record["seconds"])
    every = [seconds for found in by_arm.values() for seconds in found] or [study.seconds_per_cell]
    mean = lambda values: sum(values) / len(values)
    return [mean(by_arm[cell.arm]) if cell.arm in by_arm else mean(every) for cell in cells]


def _is_due(study: Study, out: Path, cell: Cell, retry: bool) -> bool:
    """Tell whether a cell has to run; refuse a result, or the beginning of one, of another config than the study's."""
    record, folder = results.read_result(out, cell), results.cell_folder(out, cell)
    if record is not None and record["error"] is not None and retry:
        return True
    begun = folder / "config.yaml"
    if record is not None:
        refuse_other_config(study, cell, record, f"choose another --out, or delete {folder}")
    elif begun.exists():
        was = config_io.read_config_file(begun)
        changes = _changes(study, cell, was)
        if changes:
            raise ValueError(
                f"cell {cell.name} was begun with another config: {'; '.join(changes)}; choose another --out, or "
                f"delete {folder}"
            )
    return record is None


def refuse_other_config(study: Study, cell: Cell, record: Record, advice: str) -> None:
    """Refuse a record of another config than the study's, or with another metric or other evaluations after training.

    Raises:
        ValueError: it is one; the message ends with `advice`.
    """
    changes = _changes(study, cell, config_io.from_tree(record["config"]))
    for name, now in (("metric", study.metric), ("measure", study.measure if cell.stage == "report" else {})):
        if name in record and record[name] != now:
            changes.append(f"{name}: {record[name]} -> {now}")
    if changes:
        raise ValueError(f"cell {cell.name} has a result of another config: {'; '.join(changes)}; {advice}")


def _changes(study: Study, cell: Cell, was: Config) -> list[str]:
    """Return what differs from the study's config; `train.loss_chunk` decides how sums are rounded and nothing else."""
    now = study.cell_config(cell, Path(was.workdir))
    return [line for line in config_io.differences(was, now) if not line.startswith("train.loss_chunk:")]


def _all_reported(study: Study, out: Path) -> list[Cell]:
    """Return the reported cells of every arm, so that shards number them alike before and after a rate is chosen.

    An arm whose rate is not chosen has the smallest one.
    """
    rates = dict.fromkeys(map("/".join, study.arms()), min(study.learning_rates, default=0.0))
    return study.report_cells(rates | {arm: choice.rate for arm, choice in results.choose_rates(study, out).items()})


def _waiting(study: Study, out: Path, selection: Selection) -> bool:
    """Tell whether reported cells are missing because another shard's search is not finished."""
    searching = {cell.arm for cell in study.search_cells() if results.read_result(out, cell) is None}
    arms = sorted(searching & {cell.arm for cell in selection.of(_all_reported(study, out))})
    if arms:
        logs.write_line(f"the search of {', '.join(arms)} is not finished; run the same command again afterwards")
    return bool(arms)


def _keep_seconds(folder: Path, seconds: float) -> None:
    """Keep the time of a cell's training so far, for a start that continues it; that of a killed start is lost."""
    if folder.exists():  # else it was stopped before it began
        with contextlib.suppress(OSError):
            storage.replace_text(folder / _SECONDS, f"{seconds:.3f}\n", f"{_SECONDS}.new")


def _earlier_seconds(folder: Path) -> float:
    try:
        return float((folder / _SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _record(
    study: Study, cell: Cell, config: Config, error: str | None, seconds: float, extra: dict[str, Any]
) -> Record:
    record: Record = {
        "study": study.name,
        "quick": study.quick,
        "cell": cell.name,
        "arm": cell.arm,
        "variants": dict(zip(study.axes, cell.variants, strict=True)),
        "stage": cell.stage,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "metric": study.metric,
        "measure": study.measure if cell.stage == "report" else {},
        "error": error,
        "seconds": seconds,
        "config": config_io.to_tree(config),
        **measure.environment(),
    }
    if error is not None:
        return record
    logged = read_metrics(Path(config.workdir) / "metrics.jsonl")
    lines = [line for line in logged if "eval/loss" in line]
    if not lines:
        return {**record, "error": "no evaluation line in metrics.jsonl; set eval.every"}
    metrics = {name: value for name, value in lines[-1].items() if name != "step"} | extra
    speeds = [line["tokens_per_second"] for line in logged if "tokens_per_second" in line]
    results.metric_of(study, {"metrics": metrics})  # refuses a metric that evaluation lines do not have
    curve = [[line["step"] * config.data.batch_size, line[study.metric]] for line in lines]
    target = study.target
    return {
        **record,
        **measure.model_facts(config),
        "metrics": metrics,
        "curve": curve,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "examples_to_target": None if target is None else results.examples_to_target(curve, target, study.better),
    }


def _line(study: Study, cell: Cell, record: Record) -> str:
    if record["error"] is not None:
        return f"{cell.name}  FAILED: {record['error']}"
    return f"{cell.name}  {study.metric} {results.metric_of(study, record):.4f}  {record['seconds']:.0f} s"


def _bar(cells: Sequence[Cell], stage: str) -> tqdm:
    """Return a progress bar over cells, shown on a terminal alone."""
    return tqdm(total=len(cells), desc=stage, unit="cell", dynamic_ncols=True, disable=None)
