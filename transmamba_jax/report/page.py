"""One HTML page about a run, with nothing from anywhere else: no scripts, pictures or fonts; light or dark by CSS.

Its content security policy lets a browser load nothing, so what the page shows is in the page.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from transmamba_jax import cache, schedule
from transmamba_jax.config import Config
from transmamba_jax.report import charts, schedules, svg
from transmamba_jax.report.costs import parameter_count

Record = dict[str, Any]

SECTIONS = ("loss", "positions", "speed", "samples", "evaluations", "configuration")
"""Ids of the page's sections, in order."""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --panel: #fff; --ink: #22272e; --soft: #667079; --rule: #e4e2dc;
  --training: #8fa9c2; --held: #b8402f; --other: #8a929a; --attention: #3a74b5; --ssm: #e2a04a; --accent: #b8402f;
  --own: #f6ecd9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --panel: #1c2026; --ink: #e4e7ea; --soft: #9aa4ad; --rule: #2e343b;
    --training: #5f7f9e; --held: #ff8a73; --other: #7d8790; --attention: #5b98dc; --ssm: #d59a4c; --accent: #ff8a73;
    --own: #37301f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .3rem; }
p { margin: .3rem 0 1rem; max-width: 44rem; } .lead, .note { color: var(--soft); }
.note { font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 12px; margin: 1.6rem 0 0; }
.card { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; white-space: nowrap; font-size: 1.4rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; } .card.main b { color: var(--accent); }
figure { margin: 0 0 1rem; background: var(--panel); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px; }
figure svg { display: block; width: 100%; height: auto; } figure svg.narrow { display: none; }
figure svg + svg { margin-top: 4px; }
@media (max-width: 760px) {
  main { padding: 24px 12px 48px; } figure { padding: 8px 4px; }
  figure svg.wide { display: none; } figure svg.narrow { display: block; max-width: 460px; margin: 0 auto; } }
.alarm { border-left: 4px solid var(--accent); padding: .4rem 1rem; background: var(--panel); }
svg text { font-variant-numeric: tabular-nums; } svg .tip:hover { stroke-width: 3; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 .8em; }
.key.attention { background: var(--attention); margin-left: 0; } .key.ssm { background: var(--ssm); }
table { border-collapse: collapse; margin: 0 0 1.2rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 500; color: var(--soft); } td.number, th.number { text-align: right; }
pre { white-space: break-spaces; overflow-wrap: anywhere; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 10px; padding: 14px 16px; margin: 0 0 1rem; tab-size: 4;
  font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
pre .prompt { color: var(--soft); } pre .own { background: var(--own); }
.scroll { overflow-x: auto; } .scroll td { white-space: nowrap; } .scroll th { vertical-align: bottom; }
.columns { columns: 2 380px; column-gap: 28px; }
.columns section { break-inside: avoid; margin-bottom: 1.2rem; } .columns table { width: 100%; }
.columns td { overflow-wrap: anywhere; } h3 { margin: 0 0 .3rem; font-size: 1rem; }
.set td, .set th { font-weight: 700; color: var(--ink); }
"""


def page(name: str, config: Config, records: Sequence[Record], samples: str | None) -> str:
    """Write the page.

    Args:
        name: heading.
        config: the run's.
        records: lines of its metrics, in the order of their steps.
        samples: sample.txt, as the training loop writes it.
    """
    bodies = {
        "loss": ("Loss", _loss(records)),
        "positions": ("Loss by position, and who is at work there", _positions(config, records)),
        "speed": ("Speed and memory", _speed(config, records)),
        "samples": ("Samples", _samples(samples)),
        "evaluations": ("Evaluations", _evaluations(records)),
        "configuration": ("Configuration", _configuration(config)),
    }
    sections = "".join(f'<section id="{key}"><h2>{bodies[key][0]}</h2>{bodies[key][1]}</section>' for key in SECTIONS)
    return document(name, f"<header>{_header(name, config, records)}</header>{sections}")


def document(title: str, body: str) -> str:
    """Write a page of the report's style around its content."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def progress(step: int) -> str:
    """Return the words that name the last step in the first paragraph, behind "tokens: ": a page is known by them."""
    return f"step {step:,} of"


def numbers(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    """Return (step, value) where there is a finite one; null is one that was not."""
    pairs = [(record["step"], record[name]) for record in records if name in record]
    return [(step, value) for step, value in pairs if value is not None and np.isfinite(value)]


def _header(name: str, config: Config, records: Sequence[Record]) -> str:
    model, train, rows = config.model, config.train, config.data
    parameters = parameter_count(model)
    step = max(record["step"] for record in records)
    lead = (
        f"{_millions(parameters)} parameters in {model.num_layers} layers of width {model.d_model}, "
        f"trained on {', '.join(rows.sources)} in rows of {rows.seq_len:,} tokens: {progress(step)} {train.steps:,}."
    )
    cards = []
    for key, text, css in (
        ("eval/bits_per_byte", "held-out bits per byte", "card main"),
        ("eval/loss", "held-out loss, nats per token", "card"),
        ("loss", "last training loss", "card"),
    ):
        if found := numbers(records, key):
            cards.append((f"{found[-1][1]:.3f}", text, css))
    cards.append((_millions(step * rows.batch_size * rows.seq_len), "tokens read in training", "card"))
    if speeds := numbers(records, "tokens_per_second"):
        cards.append((f"{statistics.median(value for _, value in speeds):,.0f}", "tokens per second, median", "card"))
    if peaks := numbers(records, "peak_memory_bytes"):
        cards.append((charts.byte_count(max(value for _, value in peaks)), "peak memory", "card"))
    drawn = "".join(f'<div class="{css}"><b>{value}</b><span>{text}</span></div>' for value, text, css in cards)
    return (
        f'<h1>{escape(name)}</h1><p class="lead">{escape(lead)}</p>{_alarms(records)}<div class="cards">{drawn}</div>'
    )


def _alarms(records: Sequence[Record]) -> str:
    """Say what went wrong, where something did."""
    skipped = numbers(records, "skipped_steps")
    failed = numbers(records, "checkpoint/failed_saves")
    lines = []
    if skipped and skipped[-1][1] > 0:
        lines.append(f"{skipped[-1][1]:,.0f} steps were skipped because their loss or gradient was not finite.")
    if failed and failed[-1][1] > 0:
        lines.append(f"{failed[-1][1]:,.0f} saves of a checkpoint failed.")
    return "".join(f'<p class="alarm">{line}</p>' for line in lines)


def loss_chart(records: Sequence[Record]) -> charts.Chart:
    """Chart the losses of a run that are finite."""
    return charts.loss(numbers(records, "loss"), numbers(records, "eval/loss"))


def _loss(records: Sequence[Record]) -> str:
    parts = [f"<figure>{svg.inline(loss_chart(records))}</figure>"]
    last: Record = {}
    for record in records:
        last.update(record)
    bars = [("this run, held out", last["eval/bits_per_byte"], "held")] if last.get("eval/bits_per_byte") else []
    peers = [(key.removeprefix("baseline/"), value) for key, value in last.items() if key.startswith("baseline/")]
    if bars and peers:
        bars += [(_words(key.removesuffix("_bits_per_byte")), value, "other") for key, value in peers]
        parts.append("<p>Bits per byte on the held-out text, beside models that need no training:</p>")
        parts.append(f"<figure>{svg.inline(charts.bars('Bits per byte beside baselines', bars))}</figure>")
    return "".join(parts)


def _positions(config: Config, records: Sequence[Record]) -> str:
    points = schedule.expand(config.model.transpoints, config.model.num_layers)
    length = config.data.seq_len
    evaluations = [record for record in records if record.get("eval/by_position")]
    figure, more, note = "", "", "The run has no evaluation, so there is no loss by position. "
    if evaluations:
        spans = evaluations[-1]["eval/by_position"]
        figure = svg.inline(charts.loss_by_position([tuple(span) for span in spans], points, length))
        more = schedules.section(config, evaluations[-1])
        note = f"Held-out loss at step {evaluations[-1]['step']:,}, each dot the mean over a span of positions. "
    note += (
        "Below, the schedule: a layer is attention up to its TransPoint P and a state space model from there on; "
        "where the colours meet, the Memory Converter hands the prefix over."
    )
    legend = '<span class="key attention"></span>attention<span class="key ssm"></span>SSM'
    drawn = svg.inline(charts.layers_by_position(points, length))
    return f'<p>{note}</p><figure>{figure}{drawn}</figure><p class="note">{legend}</p>{more}'


def _speed(config: Config, records: Sequence[Record]) -> str:
    parts, rows = [], []
    speeds = numbers(records, "tokens_per_second")
    if len(speeds) > 1:
        parts.append(f"<figure>{svg.inline(charts.speed(speeds))}</figure>")
    for key, text, write in (
        ("tokens_per_second", "tokens per second, median", lambda values: f"{statistics.median(values):,.0f}"),
        ("model_flops_per_second", "model FLOP/s, median", lambda values: f"{statistics.median(values):.3g}"),
        ("utilisation", "of the devices' peak FLOP/s, median", lambda values: f"{statistics.median(values):.1%}"),
        ("compile_seconds", "compilation of the step, seconds", lambda values: f"{values[-1]:.1f}"),
        ("peak_memory_bytes", "peak memory", lambda values: charts.byte_count(max(values))),
    ):
        if values := [value for _, value in numbers(records, key)]:
            rows.append((text, write(values)))
    parts.append(table(rows))
    return f"{''.join(parts)}{_decode_memory(config)}"


def _decode_memory(config: Config) -> str:
    """Draw the bytes that one sequence needs while it is generated, by the cache's own formula."""
    model = config.model
    points = schedule.expand(model.transpoints, model.num_layers)
    end = 4 * config.data.seq_len
    places = {int(2 ** (power / 8)) for power in range(int(8 * np.log2(end)) + 1)}
    around = {place for point in points for place in (point - 1, point) if 0 < place <= end}
    tokens = sorted({*places, *around, end})
    total = lambda count, schedule_: sum(cache.cache_bytes(model, 1, count, point) for point in schedule_)
    own = [(float(count), float(total(count, points))) for count in tokens]
    peer = [(float(count), float(total(count, [end + 1] * model.num_layers))) for count in tokens]
    drawn = svg.inline(charts.memory(own, peer))
    most, last = charts.byte_count(max(value for _, value in own)), charts.byte_count(own[-1][1])
    ends = f"and {last} beyond the last TransPoint"
    if max(points) > end:
        ends = f"{last} after {end:,} tokens, and more with every token: the last TransPoint is further on"
    return (
        "<p>Memory of one sequence while it is generated: keys and values up to each layer's TransPoint, then a state "
        f"of fixed size. At most {most} under this schedule, {ends}.</p>"
        f"<figure>{drawn}</figure>"
    )


def _samples(text: str | None) -> str:
    """Show each prompt and what the model made of it; the file's format is the training loop's."""
    if text is None:
        return '<p class="note">The run has written no sample.</p>'
    heading, *samples = text.removesuffix("\n").split("\n--- prompt\n")
    parts = [sample.split("\n--- model\n") for sample in samples]
    if not parts or any(len(part) != 2 for part in parts):
        return f"<pre>{escape(text)}</pre>"
    shown = "".join(
        f'<pre><span class="prompt">{escape(prompt)}</span><span class="own">{escape(own)}</span></pre>'
        for prompt, own in parts
    )
    return f"<p>{escape(heading[:1].upper() + heading[1:])}, shaded.</p>{shown}"


def _evaluations(records: Sequence[Record]) -> str:
    rows = [record for record in records if "eval/loss" in record]
    if not rows:
        return '<p class="note">The run has no evaluation.</p>'
    cells = [
        (f"{record['step']:,}", *(_figure(record[key]) for key in ("eval/loss", "eval/bits_per_byte")))
        for record in rows
    ]
    return table(cells, ("step", "nats per token", "bits per byte"))


def _configuration(config: Config) -> str:
    """List every field; what differs from the default is in bold."""
    sections = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            continue
        rows = []
        for each in dataclasses.fields(value):
            now = getattr(value, each.name)
            css = "" if now == each.default else ' class="set"'
            rows.append(f"<tr{css}><th>{each.name}</th><td>{escape(_plain(now))}</td></tr>")
        sections.append(f"<section><h3>{field.name}</h3><table>{''.join(rows)}</table></section>")
    note = '<p class="note">Bold: other than the default.</p>'
    return f'{note}<div class="columns">{"".join(sections)}</div>'


def table(rows: Sequence[Sequence[str]], heading: Sequence[str] = (), named: bool = False) -> str:
    """Write a table of figures, whose first column is text where there is no heading or rows are `named`."""
    text = named or not heading
    number = lambda index: "" if text and index == 0 else ' class="number"'
    cell = lambda tag, index, value: f"<{tag}{number(index)}>{escape(value)}</{tag}>"
    line = lambda tag, values: f"<tr>{''.join(cell(tag, index, value) for index, value in enumerate(values))}</tr>"
    head = line("th", heading) if heading else ""
    return f"<table>{head}{''.join(line('td', row) for row in rows)}</table>"


def _figure(value: float | None) -> str:
    return "not finite" if value is None or not np.isfinite(value) else f"{value:.4f}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("order2", "byte model of order 2").replace("_", " ")


def _millions(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"
