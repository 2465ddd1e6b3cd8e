"""Runs side by side: numbers are the runs' own, whatever their length, speed and configuration."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_page import Page
from tests.report.test_report import evaluation
from transmamba_jax.config import Config, DataConfig, ModelConfig
from transmamba_jax.config_io import to_yaml
from transmamba_jax.report import __main__ as report_command
from transmamba_jax.report import compare
from transmamba_jax.report.summary import Run

pytestmark = pytest.mark.draws

DATA = DataConfig(seq_len=16, batch_size=8)  # 128 tokens per step


def write_run(folder: Path, records: list[dict[str, Any]], **data: Any) -> Path:
    folder.mkdir(parents=True)
    config = Config(model=ModelConfig(num_layers=4, transpoints=(0, 8)), data=dataclasses.replace(DATA, **data))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    slow = [{"step": step, "loss": 4.0 - step / 10, "tokens_per_second": 128.0} for step in (10, 20)]
    fast = [{"step": step, "loss": 3.0, "tokens_per_second": rate} for step, rate in ((10, 256.0), (30, 512.0))]
    return [
        write_run(tmp_path / "one" / "tiny", [*slow, evaluation(20, 2.5)]),
        write_run(tmp_path / "two" / "tiny", fast, batch_size=16, source="text:a&b"),
    ]


def test_the_table_has_the_runs_own_numbers(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report_command.main([*map(str, runs), "--output", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "both" / "index.html")
    with (tmp_path / "both" / "results.csv").open(newline="") as file:
        heading, first, second = csv.reader(file)
    assert tuple(heading) == compare.COLUMNS
    # 20 steps of 128 tokens at 128 tokens per second; 10 steps of 256 at 256, then 20 at 512.
    assert first[:3] == ["one/tiny", "20", "2560"]
    assert [float(cell) for cell in first[3:]] == pytest.approx([20 / 3600, 2.0, 2.5, 1.25, 128])
    assert second[:3] == ["two/tiny", "30", str(30 * 256)]
    assert float(second[3]) == pytest.approx((10 + 10) / 3600)
    assert second[4:] == ["3.0", "", "", "384.0"]


def test_a_run_that_diverged_is_not_shown_by_an_earlier_step(tmp_path: Path) -> None:
    last = {"step": 20, "loss": None, "eval/loss": None, "eval/bits_per_byte": None, "tokens_per_second": 128.0}
    run = write_run(tmp_path / "run", [{"step": 10, "loss": 4.0}, evaluation(10, 2.5), last])
    row = compare.results("run", compare.read_run(run))
    assert row[1] == 20
    assert row[4:7] == ("not finite",) * 3
    text = compare.write_comparison([run, run], tmp_path / "both").read_text()
    assert text.count("not finite") >= 3


def test_the_page_shows_three_curves_and_what_differs(runs: list[Path], tmp_path: Path) -> None:
    text = compare.write_comparison(runs, tmp_path / "both").read_text()
    page = Page(text)
    labels = [attrs["aria-label"] for attrs in page.all("svg", "narrow")]
    assert labels == ["Loss over steps", "Loss over tokens", "Loss over seconds"]
    assert page.texts.count("one/tiny") >= 6  # in every legend
    assert "<td>one/tiny</td>" in text
    assert '<td class="number">2,560</td>' in text
    (changes,) = [each for each in page.texts if "data.batch_size" in each]
    source, size = sorted(changes.splitlines(), reverse=True)
    assert source == f"data.source: {DATA.source!r} -> 'text:a&b'"
    assert size == "data.batch_size: 8 -> 16"


def test_time_at_a_step_is_interpolated(runs: list[Path]) -> None:
    run = compare.read_run(runs[1])
    assert isinstance(run, Run)
    assert compare._curve(run, "loss", "seconds") == [(10, 3.0), (20, 3.0)]
    assert compare._curve(run, "loss", "hours") == [(10 / 3600, 3.0), (20 / 3600, 3.0)]
    assert compare._seconds(run, [0, 5, 20]) == [0, 5, 15]


@pytest.mark.parametrize(
    ("seconds", "unit"), [(1, "seconds"), (119, "seconds"), (120, "minutes"), (7199, "minutes"), (7200, "hours")]
)
def test_time_is_in_the_largest_unit_that_the_longest_run_fills_twice(tmp_path: Path, seconds: int, unit: str) -> None:
    runs = [
        compare.read_run(write_run(tmp_path / name, [{"step": steps, "loss": 2.0, "tokens_per_second": 128.0}]))
        for name, steps in (("short", 1), ("long", seconds))  # a step takes a second
    ]
    assert compare._time_unit(runs) == unit


def test_runs_without_speeds_have_no_curve_over_time(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [{"step": 1, "loss": 2.0}]) for name in ("a", "b")]
    page = Page(compare.write_comparison(runs, tmp_path / "both").read_text())
    assert [attrs["aria-label"] for attrs in page.all("svg", "wide")] == ["Loss over steps", "Loss over tokens"]
    assert "no difference" in page.texts


def test_names_are_the_shortest_that_differ() -> None:
    paths = [Path("/runs/a/tiny"), Path("/runs/b/tiny"), Path("/runs/a/large")]
    assert compare.run_names(paths) == ["a/tiny", "b/tiny", "a/large"]
    assert compare.run_names(paths[1:]) == ["tiny", "large"]


def test_a_folder_that_is_no_run_is_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report_command.main([str(runs[0]), str(tmp_path / "none"), "--output", str(tmp_path / "both")]) == 2
    assert "none must be the work directory of a run" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()
