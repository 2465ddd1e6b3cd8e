"""Charts as SVG inside a page: no ids, links or fonts of their own, and colours that follow the page's theme."""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html import escape

from transmamba_jax.report import charts
from transmamba_jax.report.charts import Chart

_KEPT = ("class", "d", "x", "y", "transform", "style")
_VARIABLES = {value: f"var(--{name})" for name, value in charts.COLOURS.items()}


def inline(chart: Chart) -> str:
    """Return a chart twice, for wide and for narrow windows; the page's style shows one of the two."""
    return _svg(chart, charts.WIDE, "wide") + _svg(chart, charts.NARROW, "narrow")


def _svg(chart: Chart, width: int, css: str) -> str:
    buffer = io.StringIO()
    tips = charts.save(chart, buffer, "svg", width)
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    marks = {f"#{path.get('id')}": path for defs in root.iter("defs") for path in defs if path.tag == "path"}
    for group in root.iter("g"):
        drawn = list(group.iter("use")) or list(group.iter("path"))
        for mark, tip in zip(drawn, tips.get(group.get("id", ""), ()), strict=False):
            mark.set("class", "tip")
            ET.SubElement(mark, "title").text = tip
    body = "".join(ET.tostring(leaf, encoding="unicode") for leaf in _drawn(root, marks))
    name = escape(chart.name)
    return f'<svg class="{css}" viewBox="{root.attrib["viewBox"]}" role="img" aria-label="{name}">{body}</svg>'


def _drawn(parent: ET.Element, marks: dict[str, ET.Element]) -> Iterator[ET.Element]:
    """Give what is drawn, out of its groups; marks take the place of the links to them."""
    for child in parent:
        if child.tag == "g":
            yield from _drawn(child, marks)
        elif child.tag in ("path", "use", "text"):
            kept = {name: child.attrib[name] for name in _KEPT if name in child.attrib}
            if child.tag == "use":
                link = next(value for name, value in child.attrib.items() if name.endswith("href"))
                place = f"translate({kept.pop('x')} {kept.pop('y')})"
                kept = {"d": marks[link].attrib["d"], "transform": place, **kept}
            if kept.get("style") == "fill: none":
                continue
            child.tag, child.tail = "text" if child.tag == "text" else "path", None
            child.attrib = {name: text for name, value in kept.items() if (text := _value(name, value))}
            yield child


def _value(name: str, value: str) -> str:
    """Round coordinates, and take colours and the font from the page."""
    if name == "style":
        value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
        value = re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), value)
        return re.sub(r"font-family: [^;]*; *|(?<=[:;]) +", "", value)
    if name == "class":
        return value
    value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
    return "" if value.startswith("rotate(-0 ") else " ".join(value.split())
