"""The greedy search of TransPoints: on losses by hand, and on a model whose parameters stay as they are."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import transmamba_jax as tm
from tests.evaluate.test_token_classes import MODEL
from transmamba_jax import data
from transmamba_jax.config import Config, DataConfig, EvalConfig
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.evaluate.search import greedy, search, table
from transmamba_jax.report.costs import flops_per_token

CANDIDATES = (0, 16, 64)


def loss_by_hand(points):
    """Layer 1 gains 1.0 of full attention and nothing of less, layer 0 gains 0.3 of 16 tokens and 0.1 of more."""
    return 3 - (points[1] == 64) - {0: 0.0, 16: 0.3, 64: 0.4}[points[0]]


def test_the_move_that_gains_most_for_its_cost_is_taken_until_the_budget():
    paths = [
        [step.transpoints for step in greedy(loss_by_hand, sum, 2, CANDIDATES, budget)] for budget in (0, 63, 80, 200)
    ]
    assert paths == [
        [(0, 0)],
        [(0, 0), (16, 0)],  # 0.3 for 16 before 0.4 for 64
        [(0, 0), (16, 0), (16, 64)],  # a candidate may be skipped
        [(0, 0), (16, 0), (16, 64), (64, 64)],
    ]


def test_every_step_has_its_loss_and_fits_the_budget():
    path = greedy(loss_by_hand, sum, 2, CANDIDATES, 80)
    assert [(step.loss, step.cost) for step in path] == [(3, 0), (pytest.approx(2.7), 16), (pytest.approx(1.7), 80)]
    assert len(table(path)) == 4


@pytest.mark.parametrize(
    ("candidates", "budget", "message"),
    [((), 1, "found none"), ((4, 0), 9, "found 4, 0"), ((4, 8), 7, "budget=7 is below the cost of TransPoint 4")],
)
def test_a_search_that_has_no_start_is_refused(candidates, budget, message):
    with pytest.raises(ValueError, match=message):
        greedy(loss_by_hand, sum, 2, candidates, budget)


@pytest.mark.slow
def test_the_losses_of_a_search_are_those_of_an_evaluation_under_the_schedule():
    config = Config(
        model=MODEL,
        data=DataConfig(source="synthetic:recall?keys=4&values=4", seq_len=32, batch_size=4),
        eval=EvalConfig(windows=4, batch_size=4),
    )
    model, tokenizer = tm.TransMamba(MODEL), data.open_tokenizer(config.data)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    path, budget = search(model, config, tokenizer, params, 1.0)
    cost = lambda points: flops_per_token(dataclasses.replace(MODEL, transpoints=points), 32, 64) / 3
    assert budget == max(cost((0,)), cost((32,)))
    assert path[0].transpoints == (0, 0)
    assert all(before.loss > after.loss for before, after in itertools.pairwise(path))
    last = path[-1]
    assert last.cost == cost(last.transpoints)
    assert last.loss == pytest.approx(
        Evaluator(model, config, tokenizer).under(last.transpoints)(params).loss, rel=1e-5
    )
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], found 2"):
        search(model, config, tokenizer, params, 2)
