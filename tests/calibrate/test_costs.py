"""Costs of schedules, the family of log-spaced schedules, and the rule and budgets that pick one."""

import dataclasses
import itertools

import numpy as np
import pytest

from transmamba_jax import cache, schedule
from transmamba_jax.calibrate import costs
from transmamba_jax.calibrate.costs import Budget, Costs
from transmamba_jax.config import ModelConfig

T = 8192
MODEL = ModelConfig(num_layers=16)
POINTS = costs.grid(T, quick=False)


def formula(point: int) -> float:
    """Seconds of a layer by the paper's terms, a P^2 + c (T - P) + e: fastest at 2048."""
    return 1e-9 * point**2 + 4.096e-6 * (T - point) + 0.01


COSTS = Costs(T, {point: formula(point) for point in POINTS}, mamba2=2.0)


def test_the_grid_has_the_points_of_v9_that_matter_and_both_ends() -> None:
    assert set(schedule.v9(T)) <= set(POINTS)
    assert costs.grid(T, quick=True) == (0, 512, 2048, 4096, 8192)
    assert costs.grid(3, quick=False)[0] == 0
    assert costs.grid(3, quick=False)[-1] == 3


def test_a_step_is_the_sum_of_its_layers() -> None:
    points = schedule.expand(schedule.v9(T), 16)
    wanted = 2.0 - 16 * formula(0) + sum(formula(point) for point in points)
    assert COSTS.predict(points) == pytest.approx(wanted, rel=1e-12)
    assert COSTS.predict((0,) * 16) == 2.0
    assert COSTS.rest(16) == pytest.approx(2.0 - 16 * formula(0))
    assert COSTS.at(2 * T) == COSTS.at(T)
    middle = (formula(4096) + formula(6144)) / 2
    assert COSTS.at(5120) == pytest.approx(middle)


def test_a_schedule_without_a_loop_counts_from_a_step_without_one() -> None:
    unrolled = dataclasses.replace(COSTS, unrolled=1.5)
    extra = formula(T) - formula(0)
    assert unrolled.predict((0,) * 7 + (T,)) == pytest.approx(1.5 + extra, rel=1e-12)
    assert unrolled.predict(((0,) * 3 + (T,)) * 2) == pytest.approx(2.0 + 2 * extra, rel=1e-12)
    assert unrolled.predict((T, 2 * T) * 4) == pytest.approx(2.0 + 8 * extra, rel=1e-12)  # the same beyond the row
    assert unrolled.rest(8) == pytest.approx(1.5 - 8 * formula(0))


def test_the_optimum_and_the_points_beside_it() -> None:
    assert COSTS.optimum() == 2048
    assert costs.neighbours(COSTS) == ((1024 + 2048) // 2, (2048 + 3072) // 2)
    rising = Costs(4, {0: 1.0, 1: 2.0, 4: 3.0}, 1.0)
    assert (rising.optimum(), costs.neighbours(rising)) == (0, ())


def test_the_family_has_v9_and_tends_to_the_hybrid() -> None:
    assert costs.spread(T, 8, 0.5) == schedule.v9(T)
    assert costs.spread(T, 8, 1e-6) == schedule.hybrid(T)
    for ratio in (0.1, 0.3, 0.7, 0.95):
        points = costs.spread(T, 8, ratio)
        assert (points[0], points[-1], len(points)) == (0, T, 8)
        assert all(one <= other for one, other in itertools.pairwise(points))
        assert all(point % 16 == 0 for point in points if point >= 16)
    means = [np.mean(costs.spread(T, 8, ratio)) for ratio in np.linspace(0.05, 0.95, 50)]
    assert means == sorted(means)


def test_without_a_budget_the_mean_is_a_little_below_the_optimum() -> None:
    points, reason = costs.recommend(COSTS, MODEL, None)
    assert 0.85 * 2048 <= np.mean(points) <= 0.9 * 2048
    assert (points[0], points[-1], len(points)) == (0, T, 8)
    assert len(set(points)) == 8
    assert "0.9 P* = 1843" in reason
    # An optimum that both ends alone exceed: the smallest mean, and the text says so.
    slow = Costs(T, {point: 1.0 + point for point in POINTS}, 20.0)
    points, reason = costs.recommend(slow, MODEL, None)
    assert (points[0], points[-1]) == (0, T)
    assert np.mean(points) < 1.1 * T / 8
    assert "both ends alone have a mean of" in reason


@pytest.mark.parametrize(("layers", "period"), [(2, 2), (4, 4), (6, 6), (8, 8), (11, 8), (12, 6), (24, 8), (32, 8)])
def test_the_period_divides_the_layers_where_it_can(layers: int, period: int) -> None:
    points, _ = costs.recommend(COSTS, dataclasses.replace(MODEL, num_layers=layers, transpoints=(0,)), None)
    assert len(points) == period
    schedule.expand(points, layers)


def test_one_layer_has_no_schedule_with_both_ends() -> None:
    with pytest.raises(ValueError, match=r"needs model\.num_layers >= 2, found 1"):
        costs.recommend(COSTS, dataclasses.replace(MODEL, num_layers=1, transpoints=(0,)), None)


@pytest.mark.parametrize("kind", ["seconds", "ratio", "bytes"])
def test_a_budget_is_used_up_and_not_exceeded(kind: str) -> None:
    expand = lambda points: schedule.expand(points, 16)
    transformer = COSTS.predict((T,) * 16)
    size = lambda points: costs.cache_peak(MODEL, expand(points), T)
    cost = {
        "seconds": lambda points: COSTS.predict(expand(points)),
        "ratio": lambda points: COSTS.predict(expand(points)) / transformer,
        "bytes": size,
    }[kind]
    limit = float(cost(costs.spread(T, 8, 0.7)))
    points, reason = costs.recommend(COSTS, MODEL, Budget(kind, limit))  # type: ignore[arg-type]
    assert 0.97 * limit <= cost(points) <= limit
    assert "the most attention within" in reason
    with pytest.raises(ValueError, match="no log-spaced schedule with both ends is within the budget"):
        costs.recommend(COSTS, MODEL, Budget(kind, 1e-3))  # type: ignore[arg-type]


def test_the_cache_is_at_its_largest_somewhere_in_the_row() -> None:
    points = schedule.expand(schedule.v9(1024), 8)
    everywhere = [sum(cache.cache_bytes(MODEL, 1, place, point) for point in points) for place in range(1025)]
    assert costs.cache_peak(MODEL, points, 1024) == max(everywhere)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2.5s", Budget("seconds", 2.5)),
        ("800ms", Budget("seconds", 0.8)),
        ("0.8", Budget("ratio", 0.8)),
        ("80%", Budget("ratio", 0.8)),
        ("1.5x", Budget("ratio", 1.5)),
        ("64 MiB", Budget("bytes", 64 * 2**20)),
        ("1GB", Budget("bytes", 1e9)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    found = costs.parse_budget(text)
    assert found.kind == budget.kind
    assert found.limit == pytest.approx(budget.limit)


@pytest.mark.parametrize("text", ["", "s", "-1s", "0", "12 parsecs", "1,5s", "nan"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--budget must be like 2\.5s"):
        costs.parse_budget(text)
