"""Charts of one checkpoint under several schedules (`eval.schedules`): loss by position, quality against cost."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from transmamba_jax import schedule
from transmamba_jax.config import Config
from transmamba_jax.report import charts, svg
from transmamba_jax.report.charts import Chart, Span, Tips
from transmamba_jax.report.costs import flops_per_token, largest_cache_bytes

Record = dict[str, Any]

OWN = "model.transpoints"
"""Name of the config's own schedule in a legend."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """An evaluation under one schedule."""

    name: str
    points: schedule.Schedule
    spans: tuple[Span, ...]
    """Loss by position."""
    quality: float | None
    """Accuracy of answers where the data has answers, else bits per byte; None: not finite."""
    flops: float
    """Predicted FLOPs of the forward pass per token of a row."""
    cache_bytes: int
    """The most bytes that decoding one row keeps."""


def quality_field(record: Record) -> str:
    """Name the field of an evaluation line that says how good the model is."""
    return "accuracy" if "eval/accuracy" in record else "bits_per_byte"


def measured(config: Config, record: Record) -> list[Measured]:
    """Return the results of an evaluation line for the config's schedule and for each of `eval.schedules`."""
    model, seq_len, field = config.model, config.data.seq_len, quality_field(record)
    found = []
    for name in ("", *config.eval.schedules):
        prefix = f"eval/{name}/" if name else "eval/"
        if f"{prefix}by_position" not in record:
            continue  # the option was added later
        points = schedule.expand(schedule.choose(name, seq_len, model.num_layers) if name else model.transpoints,
                                 model.num_layers)  # fmt: skip
        under = dataclasses.replace(model, transpoints=points)
        found.append(
            Measured(
                name or OWN,
                points,
                tuple((start, stop, loss) for start, stop, loss in record[f"{prefix}by_position"]),
                record[f"{prefix}{field}"],
                flops_per_token(under, seq_len, config.kernels.chunk_size) / 3,
                largest_cache_bytes(model, seq_len, points),
            )
        )
    return found


def loss_by_position(found: Sequence[Measured]) -> Chart:
    """Chart the held-out loss per span of positions: a line for each schedule, the config's own one thick."""

    def draw(axes: Any, narrow: bool) -> Tips:
        charts.position_axis(axes, found[0].spans[-1][1], narrow)
        for index, each in enumerate(found):
            middles = [math.sqrt((start + 0.5) * (stop + 0.5)) for start, stop, _ in each.spans]
            losses = [loss for _, _, loss in each.spans]
            axes.plot(middles, losses, label=each.name, linewidth=1.4 if index else 2.4, **_style(index))
        axes.set_ylabel("held-out nats per token")
        columns = 1 if narrow else 3
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2)
        return {}

    return Chart("Held-out loss by position, by schedule", 300 + 14 * len(found), draw)


def quality_by_cost(found: Sequence[Measured], field: str, quality: str) -> Chart:
    """Chart the quality of each schedule against its predicted cost; `field` of `Measured`: flops or cache_bytes."""
    from matplotlib import ticker

    def draw(axes: Any, narrow: bool) -> Tips:
        for index, each in enumerate(found):
            if each.quality is not None:
                style = {**_style(index), "linestyle": "none", "markersize": 11 if index == 0 else 8}
                axes.plot(getattr(each, field), each.quality, label=each.name, **style)
        words = {"flops": "predicted FLOPs per token, forward pass", "cache_bytes": "largest cache of one row"}
        axes.set(xlabel=words[field], ylabel=quality)
        axes.margins(0.08)
        if field == "cache_bytes":
            step = 2 ** math.ceil(math.log2(axes.get_xlim()[1] / (4 if narrow else 8)))
            axes.xaxis.set_major_locator(ticker.MultipleLocator(step))
            axes.xaxis.set_major_formatter(lambda value, _: charts.byte_count(value))
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if narrow else 8))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("e+0", "e"))
        columns = 1 if narrow else 3
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2)
        return {}

    return Chart(f"Quality against {'FLOPs' if field == 'flops' else 'cache'}", 270 + 14 * len(found), draw)


def section(config: Config, record: Record) -> str:
    """Write the part of the page about schedules; empty where the evaluation has one alone."""
    found = measured(config, record)
    if len(found) < 2:
        return ""
    quality = {"accuracy": "accuracy of answers", "bits_per_byte": "held-out bits per byte"}[quality_field(record)]
    drawn = [quality_by_cost(found, field, quality) for field in ("flops", "cache_bytes")]
    pictures = "".join(f"<figure>{svg.inline(chart)}</figure>" for chart in (loss_by_position(found), *drawn))
    return (
        f"<p>The same parameters under {len(found)} schedules. Costs are predictions: FLOPs of the forward pass, and "
        f"the most bytes that decoding a row keeps.</p>{pictures}"
    )


def _style(index: int) -> dict[str, Any]:
    line = ("-", "--", ":")[index // len(charts.RUNS) % 3]
    return {
        "color": charts.RUNS[index % len(charts.RUNS)],
        "linestyle": line,
        "marker": "osD^v"[index % 5],
        "markersize": 5,
    }
