"""The part of a page about several schedules: what is read, what it costs, and that it is drawn."""

import dataclasses

import pytest

from tests.report.test_page import CONFIG, Page
from tests.report.test_report import evaluation
from transmamba_jax import cache
from transmamba_jax.config import EvalConfig
from transmamba_jax.report import costs, page, schedules
from transmamba_jax.report.costs import flops_per_token

pytestmark = pytest.mark.draws

ELASTIC = dataclasses.replace(CONFIG, eval=EvalConfig(schedules=("mamba2", "16 8")))
OTHERS = {
    f"eval/{name}/{field}": value
    for name, bits in (("mamba2", 3.5), ("16 8", None))
    for field, value in {**evaluation(30, 2.0), "bits_per_byte": bits}.items()
    if "/" not in field
} | {f"eval/{name}/by_position": evaluation(30, 2.0)["eval/by_position"] for name in ("mamba2", "16 8")}
RECORD = {**evaluation(30, 2.25), **OTHERS}


def test_every_schedule_of_the_evaluation_is_measured_with_its_costs():
    own, mamba2, other = schedules.measured(ELASTIC, RECORD)
    assert [each.name for each in (own, mamba2, other)] == ["model.transpoints", "mamba2", "16 8"]
    assert [each.points for each in (own, mamba2, other)] == [(0, 4, 8, 16), (0, 0, 0, 0), (16, 8, 16, 8)]
    assert (own.quality, mamba2.quality, other.quality) == (RECORD["eval/bits_per_byte"], 3.5, None)
    under = dataclasses.replace(CONFIG.model, transpoints=(16, 8))
    assert other.flops == pytest.approx(flops_per_token(under, 16, CONFIG.kernels.chunk_size) / 3)
    assert other.cache_bytes == costs.largest_cache_bytes(CONFIG.model, 16, (16, 8))
    later = dataclasses.replace(ELASTIC, eval=EvalConfig(schedules=("mamba2", "transformer")))
    assert [each.name for each in schedules.measured(later, RECORD)] == ["model.transpoints", "mamba2"]


def test_the_largest_cache_is_found_at_every_length():
    for points in ((8, 16), (0, 3, 16, 40), (5,)):
        found = [
            sum(cache.cache_bytes(CONFIG.model, 1, length, point) for point in (points * 4)[:4])
            for length in range(1, 17)
        ]
        assert costs.largest_cache_bytes(CONFIG.model, 16, points) == max(found)


def test_answers_are_the_quality_where_there_are_any():
    accurate = {key.replace("bits_per_byte", "accuracy"): value for key, value in RECORD.items()}
    assert schedules.measured(ELASTIC, accurate)[1].quality == 3.5
    assert "accuracy of answers" in schedules.section(ELASTIC, accurate)


@pytest.mark.slow
def test_the_page_draws_a_line_for_each_schedule_and_nothing_more_for_one():
    drawn = page.page("run", ELASTIC, [RECORD], None)
    texts = Page(drawn).texts
    assert all(texts.count(name) >= 3 for name in ("model.transpoints", "mamba2"))
    for name in ("Held-out loss by position, by schedule", "Quality against FLOPs", "Quality against cache"):
        assert drawn.count(f'aria-label="{name}"') == 2
    assert "by schedule" not in page.page("run", CONFIG, [evaluation(30, 2.25)], None)
