"""The report: the numbers beside the pictures are the run's own, whatever a killed run left behind."""

import csv
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.text import Text

from transmamba_jax import report
from transmamba_jax.config import Config, DataConfig, ModelConfig
from transmamba_jax.config_io import to_yaml
from transmamba_jax.report import __main__ as report_command
from transmamba_jax.report import charts

pytestmark = pytest.mark.draws

SPANS = [[0, 1, 4.5], [1, 2, 3.5], [2, 4, 3.0], [4, 8, 2.5], [8, 16, 2.25]]


def make_run(folder: Path, records: list[dict[str, Any]], end: str = "") -> Path:
    config = Config(model=ModelConfig(num_layers=4, transpoints=(0, 4, 8, 99)), data=DataConfig(seq_len=16))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return folder


def evaluation(step: int, loss: float, **more: Any) -> dict[str, Any]:
    spans = [[start, stop, value + step / 100] for start, stop, value in SPANS]
    return {"step": step, "eval/loss": loss, "eval/bits_per_byte": loss / 2, "eval/by_position": spans, **more}


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.fixture
def run(tmp_path):
    records = [
        {"step": 10, "loss": 3.0, "grad_norm": 1.0},
        {"step": 20, "loss": 2.0},
        evaluation(20, 2.5),
        {"step": 30, "loss": 9.0},
        {"step": 20, "loss": 2.125},  # a resumed run writes steps again
        {"step": 30, "loss": math.nan},
        evaluation(30, 2.25, **{"baseline/gzip_bits_per_byte": 1.96}),
    ]
    return make_run(tmp_path, records, end='{"step": 40, "lo')


def test_numbers_are_the_runs_own(run):
    (run / "report").mkdir()
    (run / "report" / "sample.txt").write_text("def")
    assert report.write_report(run) == run / "report" / "index.html"
    assert table(run / "report" / "loss.csv") == [
        ["step", "loss", "eval_loss", "eval_bits_per_byte"],
        ["10", "3.0", "", ""],
        ["20", "2.125", "", ""],
        ["20", "", "2.5", "1.25"],
        ["30", "nan", "", ""],
        ["30", "", "2.25", "1.125"],
    ]
    rows = table(run / "report" / "loss_by_position.csv")
    assert rows[0] == ["start", "stop", "loss", "attention_layers_at_start"]
    found = [(int(start), int(stop), float(loss), int(layers)) for start, stop, loss, layers in rows[1:]]
    attending = [3, 3, 3, 2, 1]  # TransPoints 0, 4, 8 and one beyond the row
    assert found == [(start, stop, loss + 0.3, n) for (start, stop, loss), n in zip(SPANS, attending, strict=True)]
    assert is_png(run / "report" / "loss.png")
    assert is_png(run / "report" / "loss_by_position.png")
    page = (run / "report" / "index.md").read_text()
    for text in (
        "| held-out loss, nats per token | 2.2500 (step 30) |",
        "**1.1250**",
        "| gzip bits per byte | 1.9600 |",
        "| TransPoints | 0, 4, 8, 99 |",
        "(loss.png)",
        "(loss_by_position.png)",
        "(sample.txt)",
        "sAAA",
    ):
        assert text in page


def test_a_run_without_evaluations(tmp_path):
    make_run(tmp_path, [{"step": 1, "loss": 5.0}])
    report.write_report(tmp_path)
    page = (tmp_path / "report" / "index.md").read_text()
    assert "by_position" not in page
    assert "sample" not in page
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["index.html", "index.md", "loss.csv", "loss.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 2.0}\n{"step": 2,\n', "line 2 is not a JSON object with a step"),
        ('{"loss": 2.0}\n', "line 1 is not a JSON object with a step"),
        ("", "has no line with a loss"),
    ],
)
def test_refuses_metrics_that_no_run_writes(tmp_path, text, message, capsys):
    make_run(tmp_path, []).joinpath("metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.write_report(tmp_path)
    assert report_command.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_save_leaves_the_lines_of_its_step(tmp_path):
    lines = [{"step": 4, "loss": 1.0}, {"step": 4, "eval/loss": 2.0}, {"step": 4, "checkpoint/failed_saves": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read_metrics(tmp_path / "metrics.jsonl") == lines


def test_command(run, capsys):
    assert report_command.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "index.html")
    (run / "metrics.jsonl").unlink()
    assert report_command.main([str(run)]) == 2
    assert "cannot read the metrics" in capsys.readouterr().err


def test_what_is_no_work_directory_is_refused(run, capsys):
    (run / "empty").mkdir()
    places = {"nowhere": "no such folder", "empty": "nothing", "config.yaml": "a file"}
    for folder, found in ((run / name, found) for name, found in places.items()):
        assert report_command.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{folder} must be the work directory of a run, which holds config.yaml" in error
        assert f"found {found}" in error
        assert error.count("\n") == 1


def drawn(points: tuple[int, ...], seq_len: int, width: int = charts.WIDE) -> tuple[Any, Any]:
    figure = Figure(figsize=(width / 72, 5.5), layout="constrained")
    axes = figure.add_subplot()
    charts.position_axis(axes, seq_len, width < charts.WIDE)
    charts.mark_transpoints(axes, points, seq_len, width < charts.WIDE)
    figure.draw_without_rendering()
    return figure, axes


SCHEDULES = {
    "v9": ((0, 8, 16, 32, 64, 128, 256, 512), 512),
    "two periods": ((0, 128, 256, 512, 1024, 2048, 4096, 8192) * 2, 8192),
    "close together": ((0, 1, 2, 3000, 3072, 3100, 3200, 3300, 4096, 5120, 5200, 6144, 6200, 7000, 8000, 9000), 8192),
    "all at the end": ((512,) * 4, 512),
}


@pytest.mark.parametrize(
    ("name", "width"),
    [*((name, charts.WIDE) for name in SCHEDULES), ("v9", charts.NARROW), ("all at the end", charts.NARROW)],
)
def test_transpoints_stand_where_they_are_and_labels_do_not_overlap(name, width):
    points, seq_len = SCHEDULES[name]
    figure, axes = drawn(points, seq_len, width)
    clamped = sorted({min(point, seq_len) for point in points})
    assert [line.get_xdata()[0] for line in axes.lines] == [point + 0.5 for point in clamped]
    # An annotation's own extent includes its leader line.
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == len(clamped)
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0
    whole = figure.get_window_extent().width
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= whole


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_is_cut_off_at_the_edges_of_a_picture(name):
    points, seq_len = SCHEDULES[name]
    file = io.BytesIO()
    charts.save(charts.loss_by_position([(0, 1, 2.6), (1, 2, 2.2), (2, seq_len, 1.5)], points, seq_len), file)
    file.seek(0)
    pixels = image.imread(file)
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 1).all()


def test_labels_name_the_layers():
    _, axes = drawn((0, 8, 8, 8, 99, 0, 8, 0, 8, 0), 16)
    assert [text.get_text() for text in axes.texts] == [
        "layers 0, 5 ... 9\nSSM only",
        "layers 1-3, 6, 8\nP = 8",
        "layer 4\nattention only",
    ]


def test_labels_move_as_little_as_it_must():
    np.testing.assert_allclose(charts.move_apart(np.array([0.1, 0.5, 0.9]), 0.1), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(charts.move_apart(np.array([0.9, 0.95, 1.0]), 0.1), [0.8, 0.9, 1.0])
    np.testing.assert_allclose(charts.move_apart(np.zeros(3), 0.1), [0.0, 0.1, 0.2])


def test_a_report_that_cannot_be_read_or_written_is_an_error_in_a_line(tmp_path, capsys):
    run = make_run(tmp_path, [{"step": 10, "loss": 3.0}])
    (run / "report").write_text("a file")
    assert report_command.main([str(run)]) == 2
    assert capsys.readouterr().err == f"cannot make the folder {run / 'report'}: File exists\n"
    (run / "report").unlink()
    (run / "report").mkdir()
    (run / "report" / "sample.txt").write_bytes(b"\xff")
    assert report_command.main([str(run)]) == 2
    assert f"cannot read the samples {run / 'report' / 'sample.txt'}: 'utf-8' codec" in capsys.readouterr().err
