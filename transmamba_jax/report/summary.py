"""The page to look at after a run: `python -m transmamba_jax.report WORKDIR` writes WORKDIR/report/.

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
from typing import Any

import numpy as np

from transmamba_jax import schedule
from transmamba_jax.config import Config
from transmamba_jax.config_io import load_config
from transmamba_jax.report import page as report_page
from transmamba_jax.runtime import tensor_files
from transmamba_jax.runtime.paths import expand_path

Record = dict[str, Any]
Span = tuple[int, int, float]  # start, stop, nats per token

_LABEL_GAP = 0.042  # of the axes' width: two lines of a TransPoint's label
_TRAINING, _HELD_OUT, _MARK = "#9bb7d4", "#c0392b", "#5b6770"


def write_report(workdir: Path) -> Path:
    """Write the report of the run in `workdir` and return its index.html.

    Raises:
        ValueError: config.yaml, metrics.jsonl or sample.txt is missing or not what a run writes, or the report cannot
            be written.
    """
    workdir = expand_path(workdir)
    if not (workdir / "config.yaml").is_file():
        raise ValueError(
            f"{workdir} must be the work directory of a run, which holds config.yaml and metrics.jsonl, found "
            f"{tensor_files.inside(workdir)}"
        )
    config = load_config(workdir / "config.yaml")
    records = read_metrics(workdir / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    held_out = [record for record in records if "eval/loss" in record]
    if not training and not held_out:
        raise ValueError(f"{workdir / 'metrics.jsonl'} has no line with a loss")
    folder = workdir / "report"
    samples = _read_samples(folder / "sample.txt")
    tensor_files.make(folder)
    with tensor_files.explained(folder):
        _write_files(folder, config, records, training, held_out)
        index = folder / "index.html"
        index.write_text(report_page.page(workdir.resolve().name, config, records, samples), encoding="utf-8")
    return index


def _read_samples(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the samples {path}: {error}; mend or delete it") from None


def _write_files(
    folder: Path, config: Config, records: list[Record], training: list[Record], held_out: list[Record]
) -> None:
    """Write what lies beside the page."""
    _write_csv(folder / "loss.csv", ("step", "loss", "eval_loss", "eval_bits_per_byte"), _loss_rows(training, held_out))
    _draw_loss(folder / "loss.png", training, held_out)
    positions = [record for record in held_out if "eval/by_position" in record]
    if positions:
        by_position = [(start, stop, loss) for start, stop, loss in positions[-1]["eval/by_position"]]
        points = schedule.expand(config.model.transpoints, config.model.num_layers)
        rows = [(*span, sum(point > span[0] for point in points)) for span in by_position]
        _write_csv(folder / "loss_by_position.csv", ("start", "stop", "loss", "attention_layers_at_start"), rows)
        _draw_positions(folder / "loss_by_position.png", by_position, points, positions[-1]["step"])
    (folder / "index.md").write_text("\n".join(_page(config, records, folder)) + "\n", encoding="utf-8")


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
    latest: dict[tuple[int, bool], Record] = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            record = json.loads(line)
            key = (int(record["step"]), "eval/loss" in record)
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


def _figure(height: float) -> tuple[Any, Any]:
    """Make a figure that draws into memory, whatever display or pyplot state the program has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_loss(path: Path, training: list[Record], held_out: list[Record]) -> None:
    figure, axes = _figure(4.5)
    if training:
        steps, losses = [record["step"] for record in training], [record["loss"] for record in training]
        axes.plot(steps, losses, color=_TRAINING, linewidth=1, label="training batch")
    if held_out:
        steps, losses = [record["step"] for record in held_out], [record["eval/loss"] for record in held_out]
        axes.plot(steps, losses, color=_HELD_OUT, marker="o", markersize=4, label="held out")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), (6, 6), textcoords="offset points", color=_HELD_OUT)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Loss")
    axes.legend(frameon=False)
    figure.savefig(path)


def _draw_positions(path: Path, spans: Sequence[Span], points: schedule.Schedule, step: int) -> None:
    """Draw the loss of each span of positions, and a line where layers go from attention to the SSM.

    The axis counts tokens read: position t is the interval (t + 1/2, t + 3/2), so a TransPoint P, which separates the
    positions P - 1 and P, is at P + 1/2 and the TransPoints 0 and T are the two ends of the axis.
    """
    figure, axes = _figure(5.5)
    seq_len = spans[-1][1]
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.5, seq_len + 0.5)
    # A mark in the middle of its span: stairs would show a drop at every power of two, where TransPoints like to be.
    middles = [((start + 0.5) * (stop + 0.5)) ** 0.5 for start, stop, _ in spans]
    axes.plot(middles, [loss for *_, loss in spans], color=_HELD_OUT, marker="o", markersize=4, linewidth=1.5)
    axes.set_xticks([1, *(stop for _, stop, _ in spans[1:])])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.tick_params(axis="x", labelrotation=45 if seq_len > 2048 else 0)
    axes.set(xlabel="tokens read (position in the row + 1)", ylabel="held-out loss, nats per token")
    _mark_transpoints(axes, points, seq_len)
    figure.suptitle(f"Held-out loss by position, step {step}")
    figure.savefig(path)


def _mark_transpoints(axes: Any, points: schedule.Schedule, seq_len: int) -> None:
    """Draw one line a TransPoint, labelled above the axes with its layers; labels too close are spread apart."""
    layers: dict[int, list[int]] = {}
    for layer, point in enumerate(points):
        layers.setdefault(min(point, seq_len), []).append(layer)
    marks = sorted(layers)
    low, high = np.log2([0.5, seq_len + 0.5])
    exact = (np.log2(np.array(marks) + 0.5) - low) / (high - low)  # in axes fractions
    for mark, at, text_at in zip(marks, exact, _spread(exact, _LABEL_GAP), strict=True):
        axes.axvline(mark + 0.5, color=_MARK, linewidth=0.9, linestyle=(0, (4, 3)), clip_on=False)
        axes.annotate(
            _mark_label(mark, layers[mark], seq_len),
            xy=(at, 1.0),
            xytext=(text_at, 1.07),
            xycoords="axes fraction",
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            color=_MARK,
            arrowprops={
                "arrowstyle": "-",
                "color": _MARK,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0.5, 0),
            },
        )


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


def _spread(positions: np.ndarray, gap: float) -> np.ndarray:
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


def _page(config: Config, records: list[Record], folder: Path) -> list[str]:
    model, points = config.model, schedule.expand(config.model.transpoints, config.model.num_layers)
    lines = [
        "# Report",
        "",
        "| | |",
        "|---|---|",
        f"| model | {model.num_layers} layers, width {model.d_model}, {model.num_heads} heads of {model.head_dim}, "
        f"state {model.state_dim}, MLP {model.mlp_dim}, vocabulary {model.vocab_size}, {model.dtype} |",
        f"| TransPoints | {', '.join(map(str, points))} |",
        f"| data | {config.data.source}, tokenizer {config.data.tokenizer}, rows of {config.data.seq_len} tokens |",
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
    if (folder / "sample.txt").exists():
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
