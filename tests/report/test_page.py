"""The page of a run: complete, self-contained, and, where there is a browser, drawn as it should be."""

import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report import SPANS, evaluation
from transmamba_jax import cache, schedule
from transmamba_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from transmamba_jax.report import charts as report_charts
from transmamba_jax.report import page as report_page
from transmamba_jax.report import svg

pytestmark = pytest.mark.draws

CONFIG = Config(
    model=ModelConfig(num_layers=4, d_model=64, num_heads=2, num_groups=1, mlp_dim=0, transpoints=(0, 4, 8, 16)),
    data=DataConfig(seq_len=16, batch_size=8, source="text:<b>&amp;*.txt"),
    train=TrainConfig(steps=30),
)
RECORDS: list[dict[str, Any]] = [
    {"step": 10, "loss": 3.0, "tokens_per_second": 900.0, "peak_memory_bytes": 3 * 2**20, "skipped_steps": 0},
    {"step": 20, "loss": 2.0, "tokens_per_second": 1100.0, "peak_memory_bytes": 2 * 2**20, "skipped_steps": 2},
    evaluation(20, 2.5),
    {"step": 30, "loss": None, "tokens_per_second": 1000.0, "compile_seconds": 12.5, "skipped_steps": 2},
    evaluation(30, 2.25, **{"baseline/order2_bits_per_byte": 2.7, "baseline/gzip_bits_per_byte": 1.96}),
]
HEADING = "step 30, temperature 0.8: up to 4 tokens of prompt, then the model's own"
SAMPLES = f"{HEADING}\n--- prompt\nif a <\n--- model\n b & c:\n\n--- prompt\n<b>\n--- model\n</b>\n"
V9 = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, num_layers=64, transpoints=schedule.v9(8192)),
    data=dataclasses.replace(CONFIG.data, seq_len=8192),
)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and css in (attrs.get("class") or "")]


@pytest.fixture(scope="module")
def text() -> str:
    return report_page.page("tiny <1>", CONFIG, RECORDS, SAMPLES)


@pytest.fixture(scope="module")
def pages(text) -> dict[str, str]:
    spans = [[start, stop, 3.0 - start / 9000] for start, stop in ((0, 1), (1, 1024), (1024, 8192))]
    records = [*RECORDS, {**evaluation(40, 2.0), "eval/by_position": spans}]
    never = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, transpoints=(0, 10**9)))
    return {
        "tiny": text,
        "v9": report_page.page("v9", V9, records, SAMPLES),
        "never": report_page.page("never", never, RECORDS, SAMPLES),
    }


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(text):
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "a"}
    for tag, attrs in page.tags:
        found = {name for name in attrs if name in ("src", "srcset", "id") or "href" in name or name.startswith("on")}
        assert not found - ({"id"} if tag == "section" else set()), tag
    assert not re.search(r"https?:|//|url\(|@import|@font-face", text)
    (policy,) = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in text


def test_all_that_a_run_has_is_there(text):
    page = Page(text)
    assert tuple(attrs["id"] for attrs in page.all("section") if "id" in attrs) == report_page.SECTIONS
    for value in (
        "tiny <1>",  # what was given is text, not markup
        "1.125",
        "2.250",
        "2.000",  # the last training loss is not finite
        "1,000",
        "3 MiB",
        "12.5",
        "byte model of order 2",
        "1.960",
        "2 steps were skipped because their loss or gradient was not finite.",
        "P = 16 = T",
        "text:<b>&amp;*.txt",
        "0, 4, 8, 16",
    ):
        assert value in page.texts, value
    wide, narrow = ([attrs["aria-label"] for attrs in page.all("svg", css)] for css in ("wide", "narrow"))
    assert wide == narrow
    assert wide == [
        "Training and held-out loss",
        "Bits per byte beside baselines",
        "Held-out loss by position",
        "Layers by position: attention or SSM",
        "Training speed",
        "Memory while generating",
    ]
    fields = [field for section in dataclasses.fields(CONFIG) for field in _fields(getattr(CONFIG, section.name))]
    headings = [name for name in page.texts if name in fields]
    assert set(headings) == set(fields)


def test_every_sample_is_there_its_prompt_and_the_model_apart(text):
    spans = re.findall(r'<span class="(prompt|own)">(.*?)</span>', text, re.DOTALL)
    expected = [("prompt", "if a <"), ("own", " b & c:\n"), ("prompt", "<b>"), ("own", "</b>")]
    assert [(css, html.unescape(shown)) for css, shown in spans] == expected
    page = Page(text)  # none of it is markup
    assert len(page.all("pre")) == 2
    assert HEADING.replace("step", "Step") + ", shaded." in page.texts
    for css in ("prompt", "own"):
        assert f"pre .{css} {{" in text
    # Runs of before wrote one sample, in the same form; and a text that is not in this form is shown as it is.
    one = "step 3: 1 token of prompt\n--- prompt\nif\n--- model\n a:\n"
    assert {"if", " a:"} < set(Page(report_page._samples(one)).texts)
    for other in ("a <sample> of another form", f"{SAMPLES}\n--- model\nagain"):
        assert other in Page(report_page._samples(other)).texts


def _fields(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []


def test_the_schedule_is_drawn_where_it_is():
    text = svg.inline(report_charts.layers_by_position((0, 4, 8, 99), 16))
    for css, width in (("wide", report_charts.WIDE), ("narrow", report_charts.NARROW)):
        (drawn,) = re.findall(rf'<svg class="{css}".*?</svg>', text)
        found = re.findall(r'd="M ([\d.]+) [^"]*?L ([\d.]+) [^"]*" style="[^"]*var\(--(attention|ssm)\)', drawn)
        bars = [(colour, float(left), float(right)) for left, right, colour in found]
        assert all(0 < left < right < width for _, left, right in bars)
        start, end = bars[0][1:]  # layer 0 is an SSM at every position
        # A TransPoint P is at P + 1/2 of an axis that is logarithmic from 1/2 to T + 1/2.
        middle = {p: start + (end - start) * math.log(2 * p + 1) / math.log(33) for p in (4, 8)}
        expected = [("ssm", start, end), ("attention", start, middle[4]), ("ssm", middle[4], end)]
        expected += [("attention", start, middle[8]), ("ssm", middle[8], end), ("attention", start, end)]
        assert [colour for colour, *_ in bars] == [colour for colour, *_ in expected]
        for bar, right in zip(bars, expected, strict=True):
            assert bar[1:] == pytest.approx(right[1:], abs=0.2)
    page = Page(text)
    assert "layer 1: attention before position 4, SSM from there on" in page.texts
    assert "layer 3: attention at every position, P = 99" in page.texts


def test_charts_of_positions_have_the_same_axis():
    points, spans = (0, 4, 8, 99), [(0, 1, 4.5), (1, 4, 3.5), (4, 16, 2.5)]
    loss, layers = report_charts.loss_by_position(spans, points, 16), report_charts.layers_by_position(points, 16)
    for width in (report_charts.WIDE, report_charts.NARROW):
        ticks = []
        for chart in (loss, layers):
            buffer = io.StringIO()
            report_charts.save(chart, buffer, "svg", width)
            ticks.append(re.findall(r'x="([\d.]+)" y="[\d.]+"[^>]*>(\d+)</text>', buffer.getvalue()))
        labelled = [[tick for tick in found if tick[1] in ("1", "2", "4", "8", "16")] for found in ticks]
        assert labelled[0]
        assert {label: x for x, label in labelled[0]} == {label: x for x, label in labelled[1] if float(x) > 60}


def test_the_memory_is_that_of_the_cache(text):
    """At most: just before the last TransPoint, or wherever it is; beyond: four times as far."""
    model = CONFIG.model
    total = [sum(cache.cache_bytes(model, 1, count, point) for point in model.transpoints) for count in range(1, 65)]
    most, last = report_charts.byte_count(max(total)), report_charts.byte_count(total[-1])
    assert f"At most {most} under this schedule, and {last} beyond" in text


@pytest.mark.slow
def test_a_transpoint_that_never_comes_does_not_stretch_the_page(pages):
    page = Page(pages["never"])
    assert "P > T" in page.texts
    after = 2 * sum(cache.cache_bytes(CONFIG.model, 1, 64, point) for point in (0, 10**9))
    assert f"{report_charts.byte_count(after)} after 64 tokens, and more with every token" in pages["never"]
    assert not re.search("[GT]iB", pages["never"])


def test_dots_say_where_they_are(pages):
    hints = [hint for hint in Page(pages["tiny"]).texts if hint.startswith("held out: ")]
    assert "held out: 2.25 at step 30" in hints
    assert "held out: 4.8 at position 0" in hints
    assert "held out: 2.55 at positions 8 to 15" in hints
    assert len(hints) == 2 * (len(SPANS) + 2)  # of each width


def test_a_run_that_has_hardly_begun():
    text = report_page.page("new", CONFIG, [{"step": 1, "loss": 5.0}], None)
    page = Page(text)
    assert "The run has written no sample." in page.texts
    assert "The run has no evaluation." in page.texts
    assert "var(--training)" in text.partition("</figure>")[0].partition("<figure>")[2]  # a line of one point
    Page(report_page.page("broken", CONFIG, [{"step": 1, "loss": None}], None))


def test_a_mixture_is_named_and_rows_are_as_long_as_they_are():
    mixed = dataclasses.replace(CONFIG.data, source="stdlib", mixture={"text:a": 1.0, "text:b": 2.0})
    seen = {"step": 1, "eval/loss": 2.0, "eval/bits_per_byte": 3.0, "eval/by_position": [[0, 1, 3.0], [1, 2, 2.0]]}
    text = report_page.page("mixed", dataclasses.replace(CONFIG, data=mixed), [seen], None)
    assert "trained on text:a, text:b in rows" in text
    buffer = io.StringIO()  # the last positions of these rows have no token that is trained on
    report_charts.save(report_charts.loss_by_position([(0, 1, 3.0), (1, 2, 2.0)], (4, 8), 16), buffer, "svg")
    assert "P = 8" in buffer.getvalue()
    assert not {"= T", "&gt; T"} & set(re.findall(r"= T|&gt; T", buffer.getvalue()))


def test_a_long_run_makes_a_small_page():
    records = [{"step": step, "loss": 2 + 1 / step, "tokens_per_second": 1e5} for step in range(1, 20_001)]
    text = report_page.page("long", V9, records, None)
    assert len(text) < 100_000
    Page(text)


def test_numbers_are_written_shortly():
    assert report_charts.byte_count(999) == "999 B"
    assert report_charts.byte_count(1.39 * 2**30) == "1.39 GiB"
    assert [report_charts.token_count(value) for value in (512, 1024, 1500, 65536)] == ["512", "1k", "1500", "64k"]


def test_long_lines_are_averaged():
    points = [(float(step), float(step % 2)) for step in range(1000)]
    shown = report_charts.thinned(points)
    assert len(shown) == 334
    assert shown[0] == (2.0, pytest.approx(1 / 3))
    assert report_charts.thinned(points[:400]) == points[:400]


MEASURE = """<script>
const box = e => e.getBoundingClientRect(), found = [];
let shown = 0;
const within = (a, b, low, high) => a[low] >= b[low] - 1 && a[high] <= b[high] + 1;
const inside = (a, b) => within(a, b, "left", "right") && within(a, b, "top", "bottom");
for (const svg of document.querySelectorAll("svg")) {
  const frame = box(svg), texts = [...svg.querySelectorAll("text")];
  if (frame.width == 0) continue;  // the other of the two widths
  shown += 1;
  if (frame.width < 0.8 * Math.min(innerWidth, 500) || frame.height < 60)
    found.push("a chart of " + frame.width + " x " + frame.height);
  texts.forEach((text, i) => {
    const a = box(text);
    if (parseFloat(text.style.fontSize) * frame.width / svg.viewBox.baseVal.width < 7.4)
      found.push("small: " + text.textContent);
    if (!inside(a, frame)) found.push("outside: " + text.textContent);
    texts.slice(i + 1).forEach(other => {
      const b = box(other), upright = a.height > a.width && b.height > b.width;
      const x = upright ? 2 : 0, y = upright ? 0 : 2;  // boxes of lines are higher than their letters
      if (a.left + x < b.right && b.left + x < a.right && a.top + y < b.bottom && b.top + y < a.bottom)
        found.push("overlap: " + text.textContent + " / " + other.textContent);
    });
  });
}
if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
const style = getComputedStyle(document.body);
top.document.title = JSON.stringify({found, charts: shown, page: style.backgroundColor, width: innerWidth});
</script>"""


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def look(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("name", ["tiny", "v9", "never"])
def test_every_page_is_well_formed(pages, name):
    page = Page(pages[name])
    assert len(page.all("svg", "wide")) == len(page.all("svg", "narrow")) == 6


@pytest.mark.slow
@pytest.mark.hardware  # a browser is a tool that a machine has or has not
@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("name", ["tiny", "v9", "never"])
def test_a_browser_draws_it(pages, name, tmp_path):
    source = pages[name]
    policy = "script-src 'unsafe-inline';"
    measured = source.replace("default-src 'none';", policy).replace("</main>", f"</main>{MEASURE}")
    assert measured.count("<script>") == 1
    (tmp_path / "plain.html").write_text(source, encoding="utf-8")
    picture = tmp_path / "plain.png"
    plain = look(tmp_path / "plain.html", f"--screenshot={picture}", "--window-size=1100,1400")
    assert "Content Security Policy" not in plain.stderr
    assert picture.stat().st_size > 30_000
    for width, scheme in ((1100, 1), (800, 0), (375, 0)):
        # In a frame, because a window is never narrower than 500 pixels.
        frame = f'<!doctype html><title></title><iframe width="{width}" height="900" srcdoc="{html.escape(measured)}">'
        (tmp_path / "measured.html").write_text(f"{frame}</iframe>", encoding="utf-8")
        options = ("--dump-dom", "--window-size=1200,900", f"--blink-settings=preferredColorScheme={scheme}")
        title = re.search(r"<title>(\{.*?\})</title>", look(tmp_path / "measured.html", *options).stdout)
        assert title is not None
        result = json.loads(title[1])
        assert result["width"] == width
        assert result["found"] == []
        assert result["charts"] == 6
        assert result["page"] == ("rgb(21, 24, 28)" if scheme == 0 else "rgb(251, 250, 247)")
