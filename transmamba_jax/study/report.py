"""Write the results of a study: results.jsonl, a Markdown table, plots as PNG and SVG, and one HTML page."""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from transmamba_jax.study import figures, results
from transmamba_jax.study.results import Choice, Interval, Record
from transmamba_jax.study.spec import Study

Row = list[str]

_SECTION = "--8<--"
"""Marks the part of a file that a page of the documentation includes (pymdownx.snippets)."""

_STYLE = """
:root { color-scheme: light; } body { margin: 0; color: #22272e; background: #fbfaf7;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 20px 80px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #e4e2dc; }
th { font-weight: 500; color: #667079; } .scroll { overflow-x: auto; } .note { color: #667079; }
figure { margin: 1.5rem 0; padding: 12px; background: #fff; border: 1px solid #e4e2dc; border-radius: 10px; }
svg { width: 100%; height: auto; }
"""


def write_report(study: Study, out: Path) -> Path:
    """Write the report of the results that a folder has so far, and return its index.html.

    Raises:
        ValueError: no cell has a result.
    """
    records = results.read_results(study, out)
    if not records:
        raise ValueError(f"{out} has no result of study {study.name!r}; run it first")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (out / "results.jsonl").write_text(lines, encoding="utf-8")
    choices = results.choose_rates(study, out)
    drawn = figures.draw(study, records, choices, out)
    header, rows = table(study, records, choices)
    notes = _notes(study, records, choices)
    (out / "table.md").write_text(_markdown(study, header, rows, notes, drawn), encoding="utf-8")
    index = out / "index.html"
    index.write_text(_page(study, header, rows, notes, drawn, out), encoding="utf-8")
    return index


def publish(study: Study, out: Path, folder: Path) -> Path:
    """Write the report, and copy into a folder what is worth keeping of a study; return the folder's table.

    Kept: the study's file, results.jsonl, table.md, the plots and index.html; no work directories and no checkpoints.
    Work directories in results.jsonl become paths relative to the study's own folder.

    Raises:
        ValueError: no cell has a result, or it is a quick variant.
    """
    if study.quick:
        raise ValueError(f"{out} holds the quick variant of {study.name}, which proves no claim; publish a whole study")
    write_report(study, out)
    folder.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["config"]["workdir"] = f"{results.CELLS}/{record['cell']}"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    names = [f"{study.name}.yaml", "table.md", "index.html"]
    names += [f"{name}.{kind}" for name in study.figures for kind in ("png", "svg")]
    for name in names:
        if (out / name).exists():
            shutil.copyfile(out / name, folder / name)
    return folder / "table.md"


def table(study: Study, records: Sequence[Record], choices: dict[str, Choice]) -> tuple[Row, list[Row]]:
    """Return header and rows of the table: one row for each arm with reported cells."""
    reached = [] if study.target is None else [f"examples to {study.target:g}"]
    speeds = {arm: _speed(found) for arm, found in results.reported(study, records).items()}
    timed = ["tokens/s"] if any(speeds.values()) else []
    header = [
        *study.axes,
        f"{study.metric} (mean ± 95 %)",
        *study.also,
        "seeds",
        "learning rate",
        *reached,
        "parameters",
        "state bytes",
        "training FLOPs",
        *timed,
        "seconds",
    ]
    rows = []
    for arm, found in results.reported(study, records).items():
        first, choice = found[0], choices[arm]
        ended = sum(record["stage"] == "report" and record["arm"] == arm for record in records)  # failed ones too
        value = results.interval([results.metric_of(study, record) for record in found])
        rows.append(
            [
                *first["variants"].values(),
                format_interval(value),
                *(_also(found, field) for field in study.also),
                str(len(found)) if len(found) == ended else f"{len(found)} of {ended}",
                f"{choice.rate:g}{' (edge of the grid)' if choice.at_edge else ''}",
                *([] if study.target is None else [_examples(found, study.target, study.better, ended)]),
                f"{first['parameters']:,}",
                f"{first['state_bytes']:,}",
                f"{first['training_flops']:.3g}" if first["training_flops"] is not None else "–",
                *([speeds[arm] or "–"] if timed else []),
                f"{statistics.fmean(record['seconds'] for record in found):.0f}",
            ]
        )
    return header, rows


def differences(study: Study, folder: Path, against: str) -> list[str]:
    """Return a line for each arm: the metric's differences to the arm `against` by seed, mean ± 95 %.

    Args:
        study: the study.
        folder: has its results.jsonl, of a study that ran or was published.
        against: an arm with reported cells.

    Raises:
        ValueError: there are no results, or none of that arm.
    """
    file = folder / "results.jsonl"
    if not file.exists():
        raise ValueError(f"{folder} has no results.jsonl; write the report first")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    by_seed = {
        arm: {record["seed"]: results.metric_of(study, record) for record in found}
        for arm, found in results.reported(study, records).items()
    }
    if against not in by_seed:
        raise ValueError(f"--against must be one of {', '.join(by_seed)}, found {against!r}")
    base = by_seed.pop(against)
    lines = [f"{study.metric} less that of {against}, by seed"]
    for arm, values in by_seed.items():
        shared = [value - base[seed] for seed, value in values.items() if seed in base]
        found = f"{format_interval(results.interval(shared))} ({len(shared)} seeds)" if shared else "no seed in common"
        lines.append(f"{arm:<32}{found}")
    return lines


def format_interval(value: Interval) -> str:
    """Write mean ± half width with four decimals."""
    if not math.isfinite(value.mean):
        return "not finite"
    return f"{value.mean:.4f}" if math.isnan(value.half_width) else f"{value.mean:.4f} ± {value.half_width:.4f}"


def _also(found: Sequence[Record], field: str) -> str:
    """Write the interval of another field; a dash where the arm does not have it."""
    values = [record["metrics"][field] for record in found if field in record["metrics"]]
    return format_interval(results.interval(values)) if values and None not in values else "–"


def _speed(found: Sequence[Record]) -> str:
    """Write the mean speed of training; "" where a run logged none, or its record has none."""
    speeds = [record["tokens_per_second"] for record in found if "tokens_per_second" in record]
    return f"{statistics.fmean(speeds):,.0f}" if speeds and None not in speeds else ""


def _examples(found: Sequence[Record], target: float, better: str, ended: int) -> str:
    """Write the median of the seeds that reached the target, and how many of all that ended, failed ones too, did."""
    needed = [results.examples_to_target(record["curve"], target, better) for record in found]
    reached = [examples for examples in needed if examples is not None]
    if not reached:
        return "not reached"
    share = "" if len(reached) == ended else f" ({len(reached)} of {ended} seeds)"
    return f"{statistics.median(reached):,.0f}{share}"


def _notes(study: Study, records: Sequence[Record], choices: dict[str, Choice]) -> list[str]:
    """Say what a reader must know before believing the table."""
    notes = []
    if study.quick:
        notes.append("This is the quick variant: it proves that the pipeline works, and no claim.")
    edges = [arm for arm, choice in choices.items() if choice.at_edge]
    if edges:
        notes.append(
            f"The best learning rate lies at the edge of the grid for {', '.join(edges)}: a better one may lie outside."
        )
    without = ["/".join(arm) for arm in study.arms() if "/".join(arm) not in choices]
    searched = {arm: sum(record["stage"] == "search" and record["arm"] == arm for record in records) for arm in without}
    grid = len(study.learning_rates) * len(study.search_seeds)
    if failed := [arm for arm in without if searched[arm] == grid]:
        notes.append(f"Every learning rate has a failed cell for {', '.join(failed)}; --retry-failed runs them again.")
    if waiting := [arm for arm in without if searched[arm] < grid]:
        notes.append(f"The search is not complete for {', '.join(waiting)}.")
    missing = len(study.report_cells({arm: choice.rate for arm, choice in choices.items()}))
    missing -= sum(record["stage"] == "report" for record in records)
    if missing:
        notes.append(f"{missing} reported cells have no result yet.")
    notes += [f"Failed: {record['cell']}: {record['error']}" for record in records if record["error"] is not None]
    return notes


def _facts(study: Study, records_path: str) -> list[tuple[str, str]]:
    seeds = f"{len(study.seeds)} {'' if study.chosen_rates else 'other '}seeds"
    reported = f"reported on {seeds} and the {study.report_split} split"
    grid = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    searched = f"of {grid}, chosen for each arm over {len(study.search_seeds)} seeds on the {study.search_split} split"
    rates = "given in the study's file, whose header says why" if study.chosen_rates else searched
    return [
        ("Question", study.question),
        ("Claim", f"{study.claim} ({study.source})"),
        ("Learning rate", f"{rates}; {reported}"),
        ("Every cell", records_path),
    ]


def _markdown(study: Study, header: Row, rows: Sequence[Row], notes: Sequence[str], drawn: Sequence[str]) -> str:
    line = lambda cells: f"| {' | '.join(cells)} |"
    parts = [f"# {study.name}", ""]
    parts += [f"**{name}.** {text}" + "\n" for name, text in _facts(study, "[results.jsonl](results.jsonl)")]
    parts += [f"<!-- {_SECTION} [start:table] -->", ""]
    parts += [line(header), line(["---"] * len(header)), *map(line, rows), ""]
    parts += [f"<!-- {_SECTION} [end:table] -->", ""]
    parts += [f"- {note}" for note in notes] + [""] * bool(notes)
    parts += [f"![{name}]({name}.png)\n" for name in drawn]
    return "\n".join(parts)


def _page(study: Study, header: Row, rows: Sequence[Row], notes: Sequence[str], drawn: Sequence[str], out: Path) -> str:
    row = lambda cells, tag: f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
    facts = "".join(f"<p><b>{name}.</b> {escape(text)}</p>" for name, text in _facts(study, "results.jsonl"))
    pictures = "".join(f"<figure>{_svg(out / f'{name}.svg')}</figure>" for name in drawn)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(study.name)}</title>'
        f"<style>{_STYLE}</style><main><h1>{escape(study.name)}</h1>{facts}"
        f'<div class="scroll"><table>{row(header, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'
        f'<ul class="note">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>{pictures}</main></html>\n'
    )


def _svg(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
