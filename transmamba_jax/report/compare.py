"""Compare runs on one page: `transmamba report RUN RUN ... --output DIR` writes DIR/index.html and DIR/results.csv."""

import csv
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from transmamba_jax import config_io
from transmamba_jax.report import charts, page, svg
from transmamba_jax.report.charts import Point
from transmamba_jax.report.summary import Run, read_run
from transmamba_jax.runtime import storage, tensor_files
from transmamba_jax.runtime.paths import expand_path

COLUMNS = (
    "run", "step", "tokens", "training hours", "training loss", "held-out loss", "bits per byte", "tokens per second",
)  # fmt: skip
TIME_UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}


def write_comparison(workdirs: Sequence[str | Path], output: str | Path) -> Path:
    """Write the page that shows runs side by side, and its table as CSV; return the page's path.

    Raises:
        ValueError: a folder is not the work directory of a run, or the page cannot be written.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    folder = expand_path(output)
    names = run_names([run.workdir for run in runs])
    rows = [results(name, run) for name, run in zip(names, runs, strict=True)]
    tensor_files.make(folder)
    with tensor_files.raise_as_value_error(folder), storage.staged(folder) as local:
        with (local / "results.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        (local / "index.html").write_text(_page(names, runs, rows), encoding="utf-8")
    return folder / "index.html"


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of one length, that tell the runs apart."""
    paths = [workdir.resolve().parts for workdir in workdirs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    raise AssertionError("whole paths tell runs apart")


def results(name: str, run: Run) -> tuple[str | float, ...]:
    """Return a row of COLUMNS; empty where a run has no such number."""

    def last(key: str) -> str | float:
        values = [record[key] for record in run.records if key in record]
        return "" if not values else "not finite" if values[-1] is None else values[-1]

    step = max(record["step"] for record in run.records)
    speeds = [value for _, value in page.numbers(run.records, "tokens_per_second")]
    hours = _seconds(run, [step])[0] / 3600 if speeds else ""
    rate = statistics.median(speeds) if speeds else ""
    losses = (last("loss"), last("eval/loss"), last("eval/bits_per_byte"))
    return name, step, step * _tokens_per_step(run), hours, *losses, rate


def _tokens_per_step(run: Run) -> int:
    return run.config.data.batch_size * run.config.data.seq_len


def _seconds(run: Run, steps: Sequence[float]) -> list[float]:
    """Return the seconds of training until each step; compilation, evaluations and saves are not among them."""
    ends, seconds = [0.0], [0.0]
    for step, rate in page.numbers(run.records, "tokens_per_second"):
        seconds.append(seconds[-1] + (step - ends[-1]) * _tokens_per_step(run) / rate)
        ends.append(step)
    return [float(value) for value in np.interp(steps, ends, seconds)]


def _page(names: Sequence[str], runs: Sequence[Run], rows: Sequence[tuple[str | float, ...]]) -> str:
    cells = [[value if isinstance(value, str) else _written(value) for value in row] for row in rows]
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        f'<div class="scroll">{page.table(cells, COLUMNS, named=True)}</div>',
        "<p>Thin lines: training batches. Dots: held-out text. Training time leaves out compilation, evaluations and "
        "saves.</p>",
    ]
    for xlabel in ("steps", "tokens", _time_unit(runs)):
        series = [
            (name, _curve(run, "loss", xlabel), _curve(run, "eval/loss", xlabel))
            for name, run in zip(names, runs, strict=True)
        ]
        if any(training or held_out for _, training, held_out in series):
            parts.append(f"<figure>{svg.inline(charts.curves(xlabel, series))}</figure>")
    parts.append(f"<h2>Configurations</h2>{_differences(names, runs)}")
    return page.document(" · ".join(names), "".join(parts))


def _time_unit(runs: Sequence[Run]) -> str:
    """Return the largest unit of which the longest run has two."""
    longest = max(_seconds(run, [max(record["step"] for record in run.records)])[0] for run in runs)
    return next(unit for unit, size in TIME_UNITS.items() if longest >= 2 * size or size == 1)


def _curve(run: Run, key: str, xlabel: str) -> list[Point]:
    points = page.numbers(run.records, key)
    if xlabel in TIME_UNITS:
        if not page.numbers(run.records, "tokens_per_second"):
            return []
        times = _seconds(run, [step for step, _ in points])
        return [(seconds / TIME_UNITS[xlabel], value) for seconds, (_, value) in zip(times, points, strict=True)]
    scale = _tokens_per_step(run) if xlabel == "tokens" else 1
    return [(step * scale, value) for step, value in points]


def _differences(names: Sequence[str], runs: Sequence[Run]) -> str:
    """List for every run what its configuration changes against the first one's."""
    parts = []
    for name, run in list(zip(names, runs, strict=True))[1:]:
        changes = [line for line in config_io.differences(runs[0].config, run.config) if not line.startswith("workdir")]
        lines = escape("\n".join(changes) or "no difference")
        parts.append(f"<p>{escape(names[0])} -> {escape(name)}</p><pre>{lines}</pre>")
    return "".join(parts)


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
