"""Arithmetic of results against figures worked out by hand."""

import math

import pytest

from tests.study.support import write_study
from transmamba_jax.study import results
from transmamba_jax.study.spec import Cell


def record(out, cell: Cell, value: float | None, error: str | None = None) -> None:
    entry = {"arm": cell.arm, "stage": cell.stage, "error": error, "metrics": {"eval/accuracy": value}}
    results.write_result(out, cell, entry)


def search(out, values: dict[float, list[float]], arm=("ssm", "n4")) -> None:
    for rate, found in values.items():
        for seed, value in enumerate(found):
            record(out, Cell(arm, "search", rate, seed), value)


def test_a_value_that_is_not_finite_has_no_interval():
    found = results.interval([1.0, math.inf, 2.0])
    assert found.mean == math.inf
    assert math.isnan(found.half_width)


def test_the_interval_is_students():
    # Mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776 (any table): 2.776 * 1.5811 / 2.2361 = 1.963.
    value = results.interval([1, 2, 3, 4, 5])
    assert value.mean == 3
    assert value.half_width == pytest.approx(1.963, abs=1e-3)
    assert math.isnan(results.interval([1.0]).half_width)


def test_the_best_mean_wins_and_not_the_best_seed(tmp_path):
    study = write_study(tmp_path)
    rates = {1e-3: [0.1] * 3, 3e-3: [0.5, 0.5, 0.5], 1e-2: [0.9, 0.1, 0.1], 3e-2: [0.5] * 3, 1e-1: [0.0] * 3}
    search(tmp_path, rates)
    choice = results.choose_rates(study, tmp_path)["ssm/n4"]
    assert (choice.rate, choice.at_edge) == (3e-3, False)  # of equal means the smaller rate
    assert choice.means[2] == (1e-2, pytest.approx(1.1 / 3))


def test_lower_can_be_better_and_an_edge_is_flagged(tmp_path):
    study = write_study(tmp_path, better="lower")
    search(tmp_path, {rate: [rate] * 3 for rate in study.learning_rates})
    choice = results.choose_rates(study, tmp_path)["ssm/n4"]
    assert (choice.rate, choice.at_edge) == (1e-3, True)


def test_an_unfinished_search_chooses_nothing(tmp_path):
    study = write_study(tmp_path)
    search(tmp_path, {rate: [0.5] * 3 for rate in study.learning_rates[:-1]})
    assert results.choose_rates(study, tmp_path) == {}


def test_a_rate_with_a_failed_cell_is_out(tmp_path):
    study = write_study(tmp_path)
    search(tmp_path, {rate: [rate] * 3 for rate in study.learning_rates})
    record(tmp_path, Cell(("ssm", "n4"), "search", 1e-1, 1), None, error="NonFiniteError")
    choice = results.choose_rates(study, tmp_path)["ssm/n4"]
    assert (choice.rate, choice.at_edge) == (3e-2, True)  # the largest that is left


def test_a_value_that_was_not_finite_is_the_worst(tmp_path):
    study = write_study(tmp_path, better="lower", metric="eval/loss")
    assert results.metric_of(study, {"metrics": {"eval/loss": None}}) == math.inf
    with pytest.raises(ValueError, match="'eval/loss' is no field of an evaluation line; there are eval/accuracy"):
        results.metric_of(study, {"metrics": {"eval/accuracy": 1}})


def test_examples_to_target_are_those_of_the_first_evaluation_that_reaches_it():
    curve = [[32, 0.1], [64, 0.95], [96, 0.9], [128, 0.99]]
    assert results.examples_to_target(curve, 0.95, "higher") == 64
    assert results.examples_to_target(curve, 0.999, "higher") is None
    assert results.examples_to_target([[32, None], [64, 2.0], [96, 1.0]], 1.5, "lower") == 96
