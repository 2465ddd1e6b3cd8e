"""Write the report of a run: `transmamba report WORKDIR` writes WORKDIR/report/.

    index.html               one page that needs no other file: configuration, curves, schedule, speed, memory, samples
    index.md                 the same in short, for a terminal
    loss.png                 training and held-out loss against the step; the numbers are in loss.csv
    loss_by_position.png     held-out loss along the row, the layers' TransPoints marked; the numbers are in the .csv

Everything is read from WORKDIR/config.yaml and WORKDIR/metrics.jsonl (and WORKDIR/report/sample.txt where it exists),
so the page can be written again at any time.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transmamba_jax import schedule
from transmamba_jax.config import Config
from transmamba_jax.config_io import load_config
from transmamba_jax.report import charts, schedules
from transmamba_jax.report import page as report_page
from transmamba_jax.runtime import storage, tensor_files
from transmamba_jax.runtime.paths import expand_path

Record = dict[str, Any]


class Run(NamedTuple):
    """The configuration and metrics of a run."""

    workdir: Path
    config: Config
    records: list[Record]


def read_run(workdir: str | Path) -> Run:
    """Read the configuration and the metrics in a work directory.

    Raises:
        ValueError: config.yaml or metrics.jsonl is missing or not what a run writes.
    """
    workdir = expand_path(workdir)
    if not (workdir / "config.yaml").is_file():
        raise ValueError(
            f"{workdir} must be the work directory of a run, which holds config.yaml and metrics.jsonl, found "
            f"{tensor_files.inside(workdir)}"
        )
    config = load_config(workdir / "config.yaml")
    records = read_metrics(workdir / "metrics.jsonl")
    if not any("loss" in record or "eval/loss" in record for record in records):
        raise ValueError(f"{workdir / 'metrics.jsonl'} has no line with a loss")
    return Run(workdir, config, records)


def write_report(workdir: Path) -> Path:
    """Write the report of the run in `workdir` and return its index.html.

    Raises:
        ValueError: config.yaml, metrics.jsonl or sample.txt is missing or not what a run writes, or the report cannot
            be written.
    """
    workdir, config, records = read_run(workdir)
    training = [record for record in records if "loss" in record]
    held_out = [record for record in records if "eval/loss" in record]
    folder = workdir / "report"
    samples = _read_samples(folder / "sample.txt")
    tensor_files.make(folder)
    page = report_page.page(workdir.resolve().name, config, records, samples)
    with tensor_files.raise_as_value_error(folder), storage.staged(folder) as local:
        _write_files(local, config, records, training, held_out, sampled=samples is not None)
        (local / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def is_written(workdir: Path, step: int) -> bool:
    """Tell whether the report in a work directory is that of `step`, and not of a run that was shorter."""
    try:
        return f"tokens: {report_page.progress(step)} " in (workdir / "report" / "index.html").read_text(
            encoding="utf-8"
        )
    except (OSError, UnicodeDecodeError):
        return False


def _read_samples(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the samples {path}: {error}; mend or delete it") from None


def _write_files(
    folder: Path,
    config: Config,
    records: list[Record],
    training: list[Record],
    held_out: list[Record],
    sampled: bool,
) -> None:
    """Write the files beside the page."""
    _write_csv(folder / "loss.csv", ("step", "loss", "eval_loss", "eval_bits_per_byte"), _loss_rows(training, held_out))
    charts.save(report_page.loss_chart(records), folder / "loss.png")
    positions = [record for record in held_out if record.get("eval/by_position")]
    if positions:
        by_position = [(start, stop, loss) for start, stop, loss in positions[-1]["eval/by_position"]]
        points = schedule.expand(config.model.transpoints, config.model.num_layers)
        rows = [(*span, sum(point > span[0] for point in points)) for span in by_position]
        _write_csv(folder / "loss_by_position.csv", ("start", "stop", "loss", "attention_layers_at_start"), rows)
        charts.save(charts.loss_by_position(by_position, points, config.data.seq_len), folder / "loss_by_position.png")
        found = schedules.measured(config, positions[-1])
        if len(found) > 1:
            charts.save(schedules.loss_by_position(found), folder / "loss_by_schedule.png")
    (folder / "index.md").write_text("\n".join(_page(config, records, folder, sampled)) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> list[Record]:
    """Read the lines of a metrics.jsonl in the order of their steps.

    A line that a killed run left unfinished at the end is dropped. Where a resumed run wrote a step again, its line
    replaces the earlier one of the same kind.

    Raises:
        ValueError: the file cannot be read, or a line inside it is not a JSON object with a step.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the metrics {str(path)!r}: {error.strerror}") from None
    complete = text[: text.rfind("\n") + 1]
    latest: dict[tuple[int, str], Record] = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            record = json.loads(line)
            key = (int(record["step"]), next((kind for kind in ("eval/loss", "loss") if kind in record), "other"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a JSON object with a step: {error!r}") from None
        latest.pop(key, None)
        latest[key] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def _loss_rows(training: list[Record], held_out: list[Record]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [(record["step"], record["loss"], "", "") for record in training]
    rows += [(record["step"], "", record["eval/loss"], record["eval/bits_per_byte"]) for record in held_out]
    return sorted(rows, key=lambda row: row[0])


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _page(config: Config, records: list[Record], folder: Path, sampled: bool) -> list[str]:
    model, points = config.model, schedule.expand(config.model.transpoints, config.model.num_layers)
    lines = [
        "# Report",
        "",
        "| | |",
        "|---|---|",
        f"| model | {model.num_layers} layers, width {model.d_model}, {model.num_heads} heads of {model.head_dim}, "
        f"state {model.state_dim}, MLP {model.mlp_dim}, vocabulary {model.vocab_size}, {model.dtype} |",
        f"| TransPoints | {', '.join(map(str, points))} |",
        f"| data | {', '.join(config.data.sources)}, tokenizer {config.data.tokenizer}, rows of {config.data.seq_len} "
        "tokens |",
        f"| optimizer | {config.optimizer.name}, {config.train.steps} steps of {config.data.batch_size} rows |",
        *_figures(records),
        "",
        "The resolved configuration is [config.yaml](../config.yaml).",
        "",
        "![Training and held-out loss](loss.png)",
        "",
        "Numbers: [loss.csv](loss.csv)",
    ]
    if (folder / "loss_by_position.png").exists():
        lines += ["", "![Held-out loss by position](loss_by_position.png)", ""]
        lines += ["Numbers: [loss_by_position.csv](loss_by_position.csv)"]
    if sampled:
        lines += ["", "Samples: [sample.txt](sample.txt)"]
    lines += ["", "Which layers attend where:", "", "```"]
    return [*lines, schedule.table(model.transpoints, model.num_layers, config.data.seq_len), "```"]


def _figures(records: list[Record]) -> list[str]:
    """Write the last value of each figure that a run is judged by as table rows."""
    last: Record = {}
    for record in records:
        # null is a loss that was not finite
        last.update({name: (value, record["step"]) for name, value in record.items() if value is not None})
    rows = []
    for name, text in (("loss", "training loss, nats per token"), ("eval/loss", "held-out loss, nats per token")):
        if name in last:
            rows.append(f"| {text} | {last[name][0]:.4f} (step {last[name][1]}) |")
    if "eval/bits_per_byte" in last:
        rows.append(f"| **held-out bits per byte** | **{last['eval/bits_per_byte'][0]:.4f}** |")
    for name in sorted(name for name in last if name.startswith("baseline/")):
        rows.append(f"| {name.removeprefix('baseline/').replace('_', ' ')} | {last[name][0]:.4f} |")
    return rows
