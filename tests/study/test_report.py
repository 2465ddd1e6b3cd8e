"""Tables, plots and the page, from results of a stand-in."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.study.support import Trainer, write_study
from transmamba_jax.study import figures, report, results
from transmamba_jax.study.__main__ import main
from transmamba_jax.study.results import Interval
from transmamba_jax.study.runner import Selection, run_study
from transmamba_jax.study.spec import FIGURES, keep_file

pytestmark = pytest.mark.draws


@pytest.fixture(name="out", scope="module")
def _out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    trainer = Trainer()
    trainer.failures["ssm/n4/search-rate0.001-seed0"] = ValueError("it broke")
    run_study(write_study(folder), folder / "out", train_cell=trainer)
    return folder / "out"


@pytest.fixture(name="study", scope="module")
def _study(out):
    return write_study(out.parent)


@pytest.fixture(name="index", scope="module")
def _index(study, out):
    return report.write_report(study, out)


@pytest.mark.slow
def test_the_table_has_every_arm_with_its_interval_and_cost(study, out):
    records, choices = results.read_results(study, out), results.choose_rates(study, out)
    header, rows = report.table(study, records, choices)
    assert header[:3] == ["schedule", "state", "eval/accuracy (mean ± 95 %)"]
    by_arm = {tuple(row[:2]): dict(zip(header, row, strict=True)) for row in rows}
    assert list(by_arm) == [("attention", "n2"), ("attention", "n4"), ("ssm", "n2"), ("ssm", "n4")]
    # Seeds 10 to 14 take 0.010 to 0.014 off 0.95; t(0.975, 4) = 2.776, s = 0.001581.
    assert by_arm["attention", "n2"]["eval/accuracy (mean ± 95 %)"] == "0.9380 ± 0.0020"
    assert by_arm["attention", "n2"]["learning rate"] == "0.01"
    assert by_arm["ssm", "n4"]["learning rate"] == "0.1 (edge of the grid)"
    assert by_arm["ssm", "n4"]["examples to 0.9"] == "16"
    assert int(by_arm["attention", "n4"]["state bytes"].replace(",", "")) > 0


def test_the_table_shows_other_fields_where_an_arm_has_them(out):
    study = write_study(out.parent / "also", also=["eval/loss", "eval/mamba2/loss"])
    header, rows = report.table(study, results.read_results(study, out), results.choose_rates(study, out))
    row = dict(zip(header, rows[0], strict=True))
    assert (row["eval/loss"], row["eval/mamba2/loss"]) == ("1.0000 ± 0.0000", "–")
    assert row["tokens/s"] == "60"  # the median of 5, 70 and 60
    records = [{**record, "tokens_per_second": None} for record in results.read_results(study, out)]
    assert "tokens/s" not in report.table(study, records, results.choose_rates(study, out))[0]


def test_results_are_one_line_a_cell(index):
    lines = [json.loads(line) for line in index.with_name("results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 80
    wanted = {
        "config",
        "seed",
        "commit",
        "versions",
        "machine",
        "metrics",
        "tokens_per_second",
        "seconds",
        "learning_rate",
        "stage",
        "curve",
    }
    assert all(wanted <= line.keys() for line in lines if line["error"] is None)


def test_the_report_names_what_failed_and_what_lies_at_the_edge(index):
    for text in (index.with_name("table.md").read_text(encoding="utf-8"), index.read_text(encoding="utf-8")):
        assert "ssm/n4/search-rate0.001-seed0: ValueError: it broke" in text
        assert "edge of the grid for ssm/n2, ssm/n4" in text
        assert "quick variant" not in text


def test_figures_are_drawn_as_png_and_svg_and_are_the_same_again(study, index):
    pictures = lambda: {
        path.name: path.read_bytes() for path in index.parent.iterdir() if path.suffix in (".png", ".svg")
    }
    first = pictures()
    assert sorted(first) == sorted(f"{name}.{kind}" for name in study.figures for kind in ("png", "svg"))
    assert index.read_text(encoding="utf-8").count("<svg") == len(study.figures)
    report.write_report(study, index.parent)
    assert pictures() == first


def test_a_value_that_is_not_finite_stands_in_the_report(study, out, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(out, there)
    for file in there.glob("cells/ssm/n2/report-*/result.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["seed"] == 10:
            record["metrics"][study.metric], record["curve"][-1][1] = None, None
            file.write_text(json.dumps(record), encoding="utf-8")
    report.write_report(study, there)
    assert "| ssm | n2 | not finite |" in (there / "table.md").read_text(encoding="utf-8")


def test_differences_by_seed_leave_out_what_seeds_do_to_all_arms(study, out, capsys):
    report.write_report(study, out)
    keep_file(out.parent / "little.yaml", study, out)
    lines = report.differences(study, out, "ssm/n2")
    assert lines[0] == "eval/accuracy less that of ssm/n2, by seed"
    by_arm = dict(line.split(maxsplit=1) for line in lines[1:])
    # The stand-in's accuracy has the same share of the seed in every arm.
    assert by_arm.keys() == {"attention/n2", "attention/n4", "ssm/n4"}
    assert all(value.endswith("± 0.0000 (5 seeds)") for value in by_arm.values())
    assert main(["report", str(out), "--against", "ssm/n2"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["report", str(out), "--against", "ssm"]) == 2
    assert "--against must be one of attention/n2, " in capsys.readouterr().err


def test_two_seeds_have_dots_and_three_an_interval(study, out):
    records = results.reported(study, results.read_results(study, out))["attention/n2"]
    for count in (2, 3):
        axes = Figure().add_subplot()
        assert figures.DRAWINGS["curves"](axes, study, records[:count], {})
        ((_, caps, _),) = axes.containers
        reach = [abs(float(high) - float(low)) for low, high in zip(*(cap.get_ydata() for cap in caps), strict=True)]
        assert any(reach) == (count == 3)
        dots = [line for line in axes.lines if line.get_marker() == "o" and line.get_linestyle() == "None"]
        assert len(dots) == (count == 2)


def test_a_seed_that_diverged_leaves_a_gap_in_the_curve(study, out):
    records = json.loads(json.dumps(results.reported(study, results.read_results(study, out))["attention/n2"]))
    records[0]["curve"][-1][1] = None
    axes = Figure().add_subplot()
    assert figures.DRAWINGS["curves"](axes, study, records, {})
    ((line, *_),) = axes.containers
    finite = np.isfinite(np.asarray(line.get_ydata(), float))
    assert finite.tolist() == [True] * (len(finite) - 1) + [False]


def test_seeds_that_failed_are_counted(study, out):
    records, choices = results.read_results(study, out), results.choose_rates(study, out)
    for record in records:
        if record["stage"] == "report" and record["arm"] == "ssm/n4" and record["seed"] in (10, 12):
            record["error"] = "NonFiniteError: the loss is nan"
    header, rows = report.table(study, records, choices)
    by_arm = {tuple(row[:2]): dict(zip(header, row, strict=True)) for row in rows}
    assert by_arm["ssm", "n4"]["seeds"] == "3 of 5"
    assert by_arm["ssm", "n4"]["examples to 0.9"] == "16 (3 of 5 seeds)"
    assert by_arm["ssm", "n2"]["seeds"] == "5"


def test_examples_are_those_to_the_target_of_the_file(study, out):
    lower = dataclasses.replace(study, target=0.4)
    header, rows = report.table(lower, results.read_results(study, out), results.choose_rates(study, out))
    assert {dict(zip(header, row, strict=True))["examples to 0.4"] for row in rows} == {"8"}


def test_questions_at_one_place_are_not_drawn_by_place(study, out):
    records = json.loads(json.dumps(results.read_results(study, out)))
    for record in records:
        if record["error"] is None:
            record["metrics"]["eval/answers_by_query"] = [[32, 63, 0.5, 10]]
    assert not figures.DRAWINGS["positions"](Figure().add_subplot(), study, records, {})


def test_arms_beyond_the_colours_have_another_line():
    axes = Figure().add_subplot()
    for place in range(12):
        figures._line(axes, [(1, [0.1]), (2, [0.2])], str(place), place)
    lines = [container[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_only_shares_have_bars_from_zero(study, out):
    records = results.read_results(study, out)
    for better, bars in (("higher", True), ("lower", False)):
        axes = Figure().add_subplot()
        assert figures.DRAWINGS["bars"](axes, dataclasses.replace(study, better=better), records, {})
        assert bool(axes.patches) == bars


def test_a_study_without_results_is_refused(study, tmp_path):
    with pytest.raises(ValueError, match="has no result of study 'little'; run it first"):
        report.write_report(study, tmp_path)


def test_a_half_done_study_says_what_is_missing(study, tmp_path):
    run_study(study, tmp_path, Selection(only="ssm/n2/search*"), train_cell=Trainer())
    report.write_report(dataclasses.replace(study, figures=()), tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "The search is not complete for attention/n2, attention/n4, ssm/n4" in text
    assert "5 reported cells have no result yet" in text


def test_an_arm_whose_rates_all_failed_is_named(study, tmp_path):
    trainer = Trainer()
    trainer.failures |= {cell.name: OSError("no space") for cell in study.search_cells() if cell.arm == "ssm/n2"}
    run_study(study, tmp_path, Selection(only="ssm/n2/search*"), train_cell=trainer)
    report.write_report(dataclasses.replace(study, figures=()), tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "Every learning rate has a failed cell for ssm/n2; --retry-failed runs them again" in text
    assert "The search is not complete for attention/n2, attention/n4, ssm/n4." in text


def test_a_single_value_has_no_interval():
    assert report.format_interval(Interval(0.5, float("nan"), (0.5,))) == "0.5000"


def test_the_command_lists_and_refuses(tmp_path, capsys):
    study = write_study(tmp_path)
    file = str(tmp_path / "little.yaml")
    assert main([file, "--list", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["to", "run", "30", "s", study.search_cells()[0].name]
    assert lines[-1] == "60 cells, 0.50 h to run; 20 reported cells follow when their rates are chosen"
    assert main([file, "--list", "--shard", "0/2", "--only", "ssm/*"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("15 cells")
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 2
    with pytest.raises(SystemExit):
        main([file, "--shard", "2/2"])
    assert "must be I/N with 0 <= I < N, found '2/2'" in capsys.readouterr().err


def test_evaluations_after_training_are_drawn_where_arms_have_them(out, tmp_path):
    study = write_study(tmp_path, measure={"2T": {"data": {"seq_len": 24}}}, figures=["measures"])
    records, choices = results.read_results(study, out), results.choose_rates(study, out)
    for record in records:
        if record["error"] is None:
            record["metrics"]["measure/2T/accuracy"] = record["metrics"]["eval/accuracy"] / 2
    assert figures.draw(study, records, choices, tmp_path) == ["measures"]
    text = (tmp_path / "measures.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in ("2T", "attention/n2", "ssm/n4"))
    assert figures.draw(dataclasses.replace(study, measure={}), records, choices, tmp_path) == []
    assert set(study.figures) < set(FIGURES)


@pytest.mark.slow
def test_equal_time_is_read_off_the_speed_of_each_run(study, out):
    records = [record for record in results.read_results(study, out) if record["arm"] == "attention/n2"]
    for record in records:
        # 12 tokens a row at the speed 3 + seed: 16 rows of seed 13 take 12 seconds.
        record["tokens_per_second"] = 3.0 + record["seed"]
    axes = Figure().add_subplot()
    assert figures.DRAWINGS["time"](axes, study, records, {})
    ((line, *_),) = axes.containers
    seconds = [sum(examples * 12 / (3 + seed) for seed in range(10, 15)) / 5 for examples, _ in records[0]["curve"]]
    assert list(line.get_xdata()) == pytest.approx(seconds)
    unknown = [{**record, "tokens_per_second": None} for record in records]
    assert not figures.DRAWINGS["time"](Figure().add_subplot(), study, unknown, {})


@pytest.mark.slow
def test_publishing_keeps_the_report_and_no_work_directory(study, out, index, tmp_path, capsys):
    (out / "little.yaml").write_text((out.parent / "little.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["report", str(out), "--publish", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "kept/table.md")
    drawn = {f"{name}.{kind}" for name in study.figures for kind in ("png", "svg")}
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"little.yaml", "results.jsonl", "table.md", "index.html", *drawn}
    text = (tmp_path / "kept/results.jsonl").read_text(encoding="utf-8")
    assert str(out) not in text
    first = json.loads(text.splitlines()[0])
    assert first["config"]["workdir"] == f"cells/{first['cell']}"
    assert index.with_name("results.jsonl").read_text(encoding="utf-8").count("\n") == text.count("\n")


def test_a_quick_variant_is_not_published(out, tmp_path):
    with pytest.raises(ValueError, match="holds the quick variant of little, which proves no claim"):
        report.publish(write_study(tmp_path, quick=True), out, tmp_path / "kept")


def test_the_page_of_findings_lists_exactly_the_published_studies():
    docs = Path(__file__).parents[2] / "docs"
    published = {path.parent.name for path in docs.glob("results/*/table.md")}
    text = (docs / "findings.md").read_text(encoding="utf-8")
    assert set(re.findall(r'^--8<-- "results/(\w+)/table.md:table"$', text, re.MULTILINE)) == published
    assert ("No study has published results yet" in text) == (not published)
    for name in published:
        for line in (docs / "results" / name / "results.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            assert (record["study"], record["config"]["workdir"]) == (name, f"cells/{record['cell']}")
