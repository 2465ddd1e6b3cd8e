"""The runner: what runs, what never runs again, what is recorded, and one cell trained for real, twice."""

import dataclasses
import itertools
import json
import time

import pytest

from tests.study.support import CHOSEN, Trainer, accuracy, without_search, write_study
from tests.training.support import Little
from transmamba_jax import config_io
from transmamba_jax.report import read_metrics
from transmamba_jax.runtime import logs
from transmamba_jax.study import __main__ as study_command
from transmamba_jax.study import measure, report, results, runner
from transmamba_jax.study.runner import COMPLETE, UNFINISHED, Selection, run_study
from transmamba_jax.study.spec import Cell, load_study
from transmamba_jax.training.lock_owner import RunningElsewhereError
from transmamba_jax.training.loop import EXIT_NOT_SAVED, train
from transmamba_jax.training.metrics import TIMING
from transmamba_jax.training.preemption import EXIT_PREEMPTED
from transmamba_jax.training.step_log import NonFiniteError

_WIDER = {
    "schedule": {"attention": {"model": {"transpoints": ["T"]}}, "ssm": {"model": {"transpoints": [0]}}},
    "state": {"n2": {"model": {"state_dim": 4}}, "n4": {"model": {"state_dim": 4}}},
}
FIRST = "attention/n2/search-rate0.001-seed0"


@pytest.fixture(name="trainer")
def _trainer():
    return Trainer()


def test_a_study_searches_and_then_reports_the_chosen_rates(tmp_path, trainer):
    study = write_study(tmp_path)
    assert run_study(study, tmp_path / "out", train_cell=trainer) == COMPLETE
    assert len(trainer.trained) == len(set(trainer.trained)) == 60 + 20
    choices = results.choose_rates(study, tmp_path / "out")
    assert {arm: (choice.rate, choice.at_edge) for arm, choice in choices.items()} == {
        "attention/n2": (1e-2, False),
        "attention/n4": (1e-2, False),
        "ssm/n2": (1e-1, True),
        "ssm/n4": (1e-1, True),
    }
    reported = [name for name in trainer.trained if "/report-" in name]
    assert len(reported) == 20
    assert all(("rate0.01-" in name) == name.startswith("attention") for name in reported)
    found = results.reported(study, results.read_results(study, tmp_path / "out"))["ssm/n2"]
    assert [record["seed"] for record in found] == [10, 11, 12, 13, 14]
    config = study.cell_config(Cell(("ssm", "n2"), "report", 1e-1, 10), tmp_path)
    assert results.metric_of(study, found[0]) == accuracy(config)
    assert found[0]["curve"] == [[8, pytest.approx(accuracy(config) / 2)], [16, accuracy(config)]]
    assert found[0]["examples_to_target"] == 16


def test_rates_of_an_earlier_study_are_reported_without_a_search(tmp_path, trainer):
    study = load_study(without_search(tmp_path))
    assert run_study(study, tmp_path / "out", train_cell=trainer) == COMPLETE
    assert len(trainer.trained) == 20
    assert {name.split("/report-")[0] for name in trainer.trained} == set(CHOSEN)
    assert all("/report-rate0.03-" in name for name in trainer.trained if name.startswith("ssm/n4"))
    text = (report.write_report(study, tmp_path / "out").parent / "table.md").read_text(encoding="utf-8")
    assert "given in the study's file, whose header says why; reported on 5 seeds" in text
    assert "![rates]" not in text


@pytest.mark.slow
def test_a_finished_cell_is_never_run_again(tmp_path, trainer):
    study = write_study(tmp_path)
    run_study(study, tmp_path / "out", train_cell=trainer)
    again = Trainer()
    assert run_study(study, tmp_path / "out", train_cell=again) == COMPLETE
    assert again.trained == []


def test_a_stopped_study_continues_where_it_was(tmp_path, trainer):
    study = write_study(tmp_path)
    stopped = "ssm/n2/search-rate0.01-seed1"
    trainer.failures[stopped] = EXIT_PREEMPTED
    assert run_study(study, tmp_path / "out", train_cell=trainer) == UNFINISHED
    assert trainer.trained[-1] == stopped
    before = set(trainer.trained[:-1])
    again = Trainer()
    assert run_study(study, tmp_path / "out", train_cell=again) == COMPLETE
    assert again.trained[0] == stopped
    assert not before & set(again.trained)
    assert len(before) + len(again.trained) == 80


def test_the_seconds_of_a_cell_that_was_stopped_are_kept(tmp_path, trainer, monkeypatch):
    study, folder = write_study(tmp_path), tmp_path / "out" / "cells" / FIRST
    folder.mkdir(parents=True)
    seconds = itertools.count(step=10)
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    trainer.failures[FIRST] = EXIT_PREEMPTED
    for _ in range(2):
        assert run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=trainer) == UNFINISHED
    trainer.failures.clear()
    assert run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=trainer) == COMPLETE
    (record,) = results.read_results(study, tmp_path / "out")
    assert record["seconds"] == 30


def test_an_unreadable_time_fails_no_cell(tmp_path, trainer):
    study, folder = write_study(tmp_path), tmp_path / "out" / "cells" / FIRST
    folder.mkdir(parents=True)
    (folder / "seconds.txt").touch()
    assert run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=trainer) == COMPLETE
    assert results.read_results(study, tmp_path / "out")[0]["error"] is None


def test_no_cell_begins_when_the_given_hours_are_spent(tmp_path, trainer, capsys):
    assert run_study(write_study(tmp_path), tmp_path / "out", hours=0.0, train_cell=trainer) == UNFINISHED
    assert trainer.trained == []
    assert "the hours of the budget are spent; the same command continues" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (NonFiniteError("3 steps in a row"), "NonFiniteError: 3 steps in a row"),
        (ValueError("bad"), "ValueError: bad"),
        (OSError("no space"), "OSError: no space"),
        (EXIT_NOT_SAVED, "the last state could not be saved"),
    ],
)
def test_a_failing_cell_is_recorded_and_the_others_run(tmp_path, trainer, failure, message):
    study = write_study(tmp_path, axes={"schedule": {"attention": {"model": {"transpoints": ["T"]}}}})
    name = "attention/search-rate0.001-seed0"
    trainer.failures[name] = failure
    assert run_study(study, tmp_path / "out", train_cell=trainer) == COMPLETE
    assert len(trainer.trained) == 15 + 5
    (record,) = [each for each in results.read_results(study, tmp_path / "out") if each["error"] is not None]
    assert (record["cell"], record["error"]) == (name, message)
    run_study(study, tmp_path / "out", train_cell=trainer)
    assert len(trainer.trained) == 20
    trainer.failures.clear()
    run_study(study, tmp_path / "out", retry=True, train_cell=trainer)
    assert trainer.trained[20:] == [name]


def test_a_cell_that_runs_elsewhere_gets_no_result_here(tmp_path, trainer):
    trainer.failures[FIRST] = RunningElsewhereError("it belongs to another run")
    study = write_study(tmp_path)
    assert run_study(study, tmp_path / "out", train_cell=trainer) == UNFINISHED
    assert trainer.trained == [FIRST]
    assert results.read_results(study, tmp_path / "out") == []


def test_an_error_that_is_a_bug_is_not_swallowed(tmp_path, trainer):
    trainer.failures[FIRST] = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        run_study(write_study(tmp_path), tmp_path / "out", train_cell=trainer)


@pytest.mark.parametrize("failure", [ZeroDivisionError("a bug"), KeyboardInterrupt(), EXIT_PREEMPTED])
def test_a_study_that_ends_early_hides_no_line_of_what_comes_after_it(tmp_path, trainer, failure, caplog):
    trainer.failures["attention/n2/search-rate0.001-seed1"] = failure
    try:
        run_study(write_study(tmp_path), tmp_path / "out", train_cell=trainer)
    except (ZeroDivisionError, KeyboardInterrupt) as error:
        kept = error  # with its traceback, as a notebook keeps the last error
        assert kept is failure
    logs.LOGGER.warning("a line")
    assert caplog.messages == ["a line"]


def test_a_metric_that_no_evaluation_has_ends_the_study_and_leaves_no_result(tmp_path, trainer):
    with pytest.raises(ValueError, match="'eval/acuracy' is no field of an evaluation line; there are eval/loss"):
        run_study(write_study(tmp_path, metric="eval/acuracy"), tmp_path / "out", train_cell=trainer)
    assert run_study(write_study(tmp_path), tmp_path / "out", Selection(only=FIRST), train_cell=trainer) == COMPLETE
    assert trainer.trained == [FIRST, FIRST]


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_partition_the_cells(tmp_path, shards):
    cells = write_study(tmp_path).search_cells()
    parts = [Selection(shard=shard, shards=shards).of(cells) for shard in range(shards)]
    assert sorted(itertools.chain(*parts), key=cells.index) == cells
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
def test_reported_cells_wait_for_the_search_of_other_shards(tmp_path):
    study = write_study(tmp_path)
    trainers = [Trainer(), Trainer()]
    codes = []
    for _, shard in itertools.product(range(2), range(2)):
        selection = Selection(shard=shard, shards=2)
        codes.append(run_study(study, tmp_path / "out", selection, train_cell=trainers[shard]))
    assert codes == [UNFINISHED, COMPLETE, COMPLETE, COMPLETE]
    first, second = (set(trainer.trained) for trainer in trainers)
    assert not first & second
    assert len(first | second) == 80


@pytest.mark.slow
def test_a_shard_numbers_reported_cells_alike_before_and_after_rates_are_chosen(tmp_path):
    study, trained = write_study(tmp_path), []
    for shard in (7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6):  # the first one searches alone, and then waits
        trainer = Trainer()
        run_study(study, tmp_path / "out", Selection(shard=shard, shards=8), train_cell=trainer)
        trained += trainer.trained
    assert len(trained) == len(set(trained)) == 80


def test_shards_divide_the_cells_of_a_pattern(tmp_path):
    cells = write_study(tmp_path).search_cells()
    parts = [Selection("*-seed1", shard, 4).of(cells) for shard in range(4)]
    assert [len(part) for part in parts] == [5, 5, 5, 5]


def test_only_names_cells_by_pattern(tmp_path, trainer):
    run_study(write_study(tmp_path), tmp_path / "out", Selection(only="ssm/n2/*seed1*"), train_cell=trainer)
    assert trainer.trained == [f"ssm/n2/search-rate{rate}-seed1" for rate in ("0.001", "0.003", "0.01", "0.03", "0.1")]


def test_the_budget_ends_a_call_between_two_cells(tmp_path, trainer, monkeypatch):
    clock = itertools.count(step=1000)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert run_study(write_study(tmp_path), tmp_path / "out", train_cell=trainer) == UNFINISHED
    assert 0 < len(trainer.trained) < 4


def test_a_result_of_another_config_is_refused(tmp_path, trainer):
    run_study(write_study(tmp_path), tmp_path / "out", Selection(only=FIRST), train_cell=trainer)
    tree = {"model": {"transpoints": ["T"], "d_model": 16}}
    changed = write_study(
        tmp_path, axes={"schedule": {"attention": tree}, "state": {"n2": {"model": {"state_dim": 2}}}}
    )
    with pytest.raises(ValueError, match=r"another config: model.d_model: 8 -> 16; choose another --out"):
        run_study(changed, tmp_path / "out", Selection(only=FIRST), train_cell=trainer)


def test_the_beginning_of_a_cell_with_another_config_is_refused(tmp_path, trainer):
    study = write_study(tmp_path)
    begun = results.cell_folder(tmp_path / "out", study.search_cells()[0]) / "config.yaml"
    begun.parent.mkdir(parents=True)
    config = study.cell_config(study.search_cells()[0], begun.parent)
    begun.write_text(config_io.to_yaml(config), encoding="utf-8")
    assert run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=trainer) == COMPLETE
    assert trainer.trained == [FIRST]
    (begun.parent / results.RESULT).unlink()
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.25))
    begun.write_text(config_io.to_yaml(other), encoding="utf-8")
    with pytest.raises(ValueError, match=r"begun with another config: optimizer.weight_decay: 0.25 -> .*or delete"):
        run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=trainer)
    assert trainer.trained == [FIRST]


@pytest.mark.parametrize("change", [{"metric": "eval/loss"}, {"better": "lower", "metric": "eval/loss"}])
def test_a_result_of_another_metric_is_refused(tmp_path, trainer, change):
    run_study(write_study(tmp_path), tmp_path / "out", Selection(only=FIRST), train_cell=trainer)
    with pytest.raises(ValueError, match=r"another config: metric: eval/accuracy -> eval/loss; choose another --out"):
        run_study(write_study(tmp_path, **change), tmp_path / "out", Selection(only=FIRST), train_cell=trainer)


def test_a_failed_cell_of_another_config_is_run_again_on_request(tmp_path, trainer):
    trainer.failures[FIRST] = ValueError("no")
    run_study(write_study(tmp_path), tmp_path / "out", Selection(only=FIRST), train_cell=trainer)
    trainer.failures.clear()
    tree = {"model": {"transpoints": ["T"], "d_model": 16}}
    changed = write_study(tmp_path, axes={"schedule": {"attention": tree}, "state": {"n2": {}}})
    runner.check_results(changed, tmp_path / "out", retry=True)
    assert run_study(changed, tmp_path / "out", Selection(only=FIRST), True, train_cell=trainer) == COMPLETE
    assert trainer.trained == [FIRST, FIRST]


def test_a_result_of_another_rounding_is_kept(tmp_path, trainer):
    study = write_study(tmp_path)
    run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=trainer)
    file = tmp_path / "out" / "cells" / FIRST / results.RESULT
    record = json.loads(file.read_text(encoding="utf-8"))
    record["config"]["train"]["loss_chunk"] = 8192
    file.write_text(json.dumps(record), encoding="utf-8")
    assert run_study(study, tmp_path / "out", Selection(only=FIRST), train_cell=Trainer()) == COMPLETE
    assert json.loads(file.read_text(encoding="utf-8")) == record


def test_a_result_of_another_config_leaves_the_file_beside_it(tmp_path, trainer, capsys):
    run_study(write_study(tmp_path), tmp_path / "out", Selection(only=FIRST), train_cell=trainer)
    file, kept = tmp_path / "little.yaml", tmp_path / "out" / "little.yaml"
    study_command.keep_file(file, load_study(file), tmp_path / "out")
    before = kept.read_text(encoding="utf-8")
    file.write_text(before.replace("steps: 4", "steps: 40"), encoding="utf-8")
    assert study_command.main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert "train.steps: 4 -> 40" in capsys.readouterr().err
    assert kept.read_text(encoding="utf-8") == before


def test_a_study_that_is_stopped_before_its_first_result_asks_to_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_study", lambda *_: UNFINISHED)
    write_study(tmp_path)
    assert study_command.main([str(tmp_path / "little.yaml"), "--out", str(tmp_path / "out")]) == UNFINISHED


def test_flops_are_those_of_the_schedules_that_steps_run(tmp_path):
    study = write_study(tmp_path)
    base = study.cell_config(Cell(("ssm", "n4"), "report", 1e-2, 10), tmp_path)
    under = lambda points: dataclasses.replace(base, model=dataclasses.replace(base.model, transpoints=points))
    flops = lambda config, **train: measure.model_facts(
        dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    )["training_flops"]
    ssm, attention = flops(under((0,))), flops(under((12,)))
    assert ssm != attention
    pool = {"schedule_sampling": "pool", "schedule_pool": ("transformer", "mamba2")}
    assert flops(base, **pool) == pytest.approx((ssm + attention) / 2)
    assert flops(base, **pool, schedule_sampling_steps=2) == pytest.approx((3 * ssm + attention) / 4)  # of four steps
    assert flops(base, schedule_sampling="rows") is None
    assert flops(base, schedule_distillation=0.5) is None


def test_times_are_estimated_from_the_finished_cells_of_the_arm(tmp_path):
    study = write_study(tmp_path)
    cells = study.search_cells()
    assert set(runner.estimate(study, tmp_path / "out", cells)) == {30}
    for cell, seconds in ((cells[0], 10.0), (cells[1], 20.0), (cells[-1], 60.0)):
        entry = {"arm": cell.arm, "stage": "search", "error": None, "seconds": seconds, "metrics": {"eval/accuracy": 1}}
        results.write_result(tmp_path / "out", cell, entry)
    found = dict(zip((cell.arm for cell in cells), runner.estimate(study, tmp_path / "out", cells), strict=True))
    assert found == {"attention/n2": 15, "attention/n4": 30, "ssm/n2": 30, "ssm/n4": 60}


@pytest.mark.slow
def test_a_cell_is_an_ordinary_run_and_is_reproduced_to_the_digit(tmp_path):
    study = write_study(tmp_path)
    cell = Cell(("attention", "n2"), "search", 1e-2, 1)
    real = lambda config: train(config, Little(config.model))
    curves = []
    for name in ("one", "two"):
        assert run_study(study, tmp_path / name, Selection(only=cell.name), train_cell=real) == COMPLETE
        folder = results.cell_folder(tmp_path / name, cell)
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "result.json"} <= {
            path.name for path in folder.iterdir()
        }
        lines = [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder / "metrics.jsonl")]
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        curves.append((lines, record["metrics"], record["curve"]))
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_finished_cells_are_taken_from_an_earlier_part(tmp_path):
    study, first, second = write_study(tmp_path), tmp_path / "first", tmp_path / "second"
    trainer = Trainer()
    failing = study.search_cells()[0].name
    trainer.failures[failing] = ValueError("no")
    run_study(study, first, Selection("attention/n2/*"), train_cell=trainer)
    report.write_report(study, first)
    report.publish(study, first, tmp_path / "published")
    records = len((tmp_path / "published" / "results.jsonl").read_text(encoding="utf-8").splitlines())
    changed = write_study(tmp_path / "first", budget_hours=1, axes=_WIDER)
    with pytest.raises(ValueError, match=r"state_dim: 2 -> 4.*results\.jsonl is of another version of little"):
        runner.take_results(changed, tmp_path / "other", tmp_path / "published" / "results.jsonl")
    assert not (tmp_path / "other").exists()

    assert runner.take_results(study, second, tmp_path / "published" / "results.jsonl") == records - 1
    assert runner.take_results(study, second, tmp_path / "published" / "results.jsonl") == 0
    trainer = Trainer()
    run_study(study, second, Selection("attention/n2/search*"), train_cell=trainer)
    assert trainer.trained == [failing]


@pytest.mark.parametrize("change", [{"study": "another"}, {"quick": True}])
def test_results_of_another_study_are_not_taken(tmp_path, change):
    study, out = write_study(tmp_path), tmp_path / "out"
    run_study(study, out, Selection("attention/n2/*"), train_cell=Trainer())
    record = results.read_result(out, study.search_cells()[0])
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({**record, **change}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: a cell of .*, not of little"):
        runner.take_results(study, tmp_path / "new", file)
    file.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: no record of a cell"):
        runner.take_results(study, tmp_path / "new", file)
