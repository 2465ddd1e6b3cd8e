"""The page of a run: complete, self-contained, and, where there is a browser, drawn as it should be."""

import dataclasses
import html
import json
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
VOID = {"meta", "circle", "rect", "line", "path"}


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


def test_nothing_comes_from_elsewhere(text):
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "a"}
    for tag, attrs in page.tags:
        assert not {name for name in attrs if name in ("src", "href", "srcset", "style") or name.startswith("on")}, tag
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
    labels = [attrs["aria-label"] for attrs in page.all("svg")]
    assert labels == [
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
    assert {"if", " a:"} < set(Page(report_page.page("one", CONFIG, RECORDS, one)).texts)
    for other in ("a <sample> of another form", f"{SAMPLES}\n--- model\nagain"):
        assert other in Page(report_page.page("other", CONFIG, RECORDS, other)).texts


def _fields(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []


def test_the_schedule_is_drawn_where_it_is():
    page = Page(report_charts.schedule_chart("layers", (0, 4, 8, 99), 16))
    axis = report_charts.position_axis(16)
    assert (axis(0.5), axis(16.5)) == (0, 1)
    right = {at: float(axis(at + 0.5)) for at in (0, 4, 8, 16)}
    span = [float(attrs["width"]) for attrs in page.all("rect", "attention")]  # layer 0 has none
    whole = float(page.all("rect", "ssm")[0]["width"])
    assert span == pytest.approx([right[at] * whole for at in (4, 8, 16)], abs=0.1)
    rest = [float(attrs["width"]) for attrs in page.all("rect", "ssm")]
    assert rest == pytest.approx([(1 - right[at]) * whole for at in (0, 4, 8)], abs=0.1)  # layer 3 has none
    assert "layer 1: attention before position 4, SSM from there on" in page.texts
    assert "layer 3: attention at every position, P = 99" in page.texts


def test_the_memory_is_that_of_the_cache(text):
    """At most: just before the last TransPoint, or wherever it is; beyond: four times as far."""
    model = CONFIG.model
    total = [sum(cache.cache_bytes(model, 1, count, point) for point in model.transpoints) for count in range(1, 65)]
    most, last = report_charts.byte_count(max(total)), report_charts.byte_count(total[-1])
    assert f"At most {most} under this schedule, and {last} beyond" in text


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
    assert len(hints) == len(SPANS) + 2


def test_a_run_that_has_hardly_begun():
    text = report_page.page("new", CONFIG, [{"step": 1, "loss": 5.0}], None)
    page = Page(text)
    assert "The run has written no sample." in page.texts
    assert "The run has no evaluation." in page.texts
    assert len(page.all("circle", "training")) == 1  # a line of one point
    Page(report_page.page("broken", CONFIG, [{"step": 1, "loss": None}], None))


def test_a_long_run_makes_a_small_page():
    records = [{"step": step, "loss": 2 + 1 / step, "tokens_per_second": 1e5} for step in range(1, 20_001)]
    text = report_page.page("long", V9, records, None)
    assert len(text) < 100_000
    Page(text)


def test_axes_end_at_round_numbers_around_the_values():
    axis = report_charts.linear([1.52, 2.68], "loss")
    assert list(map(axis.label, axis.ticks)) == ["1.4", "1.6", "1.8", "2.0", "2.2", "2.4", "2.6", "2.8"]
    axis = report_charts.linear([0, 13], "loss")
    assert list(map(axis.label, axis.ticks)) == ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5", "15.0"]
    axis = report_charts.linear([0, 340], "step", tight=True)
    assert list(map(axis.label, axis.ticks)) == ["0", "100", "200", "300"]
    assert report_charts.linear([7.0], "one")(7.0) == pytest.approx(0.5)
    assert report_charts.position_axis(21).ticks == [1, 2, 4, 8, 21]
    axis = report_charts.doubling(3, 1000, "bytes", report_charts.byte_count, base=4)
    assert list(axis.ticks) == [1, 4, 16, 64, 256, 1024]
    assert report_charts.byte_count(999) == "999 B"
    assert report_charts.byte_count(1.39 * 2**30) == "1.39 GiB"


MEASURE = """<script>
const box = e => e.getBoundingClientRect(), found = [];
const within = (a, b, low, high) => a[low] >= b[low] - 1 && a[high] <= b[high] + 1;
const inside = (a, b) => within(a, b, "left", "right") && within(a, b, "top", "bottom");
for (const svg of document.querySelectorAll("svg")) {
  const frame = box(svg), texts = [...svg.querySelectorAll("text")];
  if (frame.width < 600 || frame.height < 60) found.push("a chart of " + frame.width + " x " + frame.height);
  texts.forEach((text, i) => {
    const a = box(text);
    if (!inside(a, frame)) found.push("outside: " + text.textContent);
    texts.slice(i + 1).forEach(other => {
      const b = box(other), gap = 2;
      if (a.left < b.right && b.left < a.right && a.top + gap < b.bottom && b.top + gap < a.bottom)
        found.push("overlap: " + text.textContent + " / " + other.textContent);
    });
  });
}
if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
const shown = getComputedStyle(document.body);
document.title = JSON.stringify({found, charts: document.querySelectorAll("svg").length, page: shown.backgroundColor});
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
    assert [attrs["class"] for attrs in page.all("circle", "held")] == ["mark held"] * len(page.all("circle", "held"))
    assert len(page.all("svg")) == 6
    if name == "tiny":
        assert len(page.all("circle", "held")) == len(SPANS) + 2  # and two evaluations


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
    (tmp_path / "measured.html").write_text(measured, encoding="utf-8")
    for width, scheme in ((1100, 1), (500, 0)):
        options = ("--dump-dom", f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}")
        title = re.search(r"<title>(\{.*?\})</title>", look(tmp_path / "measured.html", *options).stdout)
        assert title is not None
        result = json.loads(title[1])
        assert result["found"] == []
        assert result["charts"] == 6
        assert result["page"] == ("rgb(21, 24, 28)" if scheme == 0 else "rgb(251, 250, 247)")
