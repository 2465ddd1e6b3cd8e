"""Evaluations of a trained cell after its training, on a real run."""

import dataclasses

import pytest

import transmamba_jax as tm
from tests.study.support import TREE, write_study
from transmamba_jax import data
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.evaluate.search import search
from transmamba_jax.study import results
from transmamba_jax.study.runner import COMPLETE, Selection, run_study
from transmamba_jax.study.spec import Cell, merge


@pytest.mark.slow
def test_a_reported_cell_has_its_evaluations_and_a_cell_of_the_search_has_none(tmp_path):
    model = {"num_layers": 1, "d_model": 4, "num_heads": 1, "head_dim": 4}
    changes = {"model": model, "train": {"steps": 1}, "eval": {"every": 1, "windows": 2, "batch_size": 2}}
    study = write_study(
        tmp_path,
        quick=True,
        config=merge(TREE["config"], changes),
        axes={"schedule": {"ssm": {"model": {"transpoints": [0]}}}},
        measure={"3T": {"data": {"seq_len": 36}, "classes": True}, "searched": {"search": 1.0}},
    )
    assert run_study(study, tmp_path / "out", Selection(only="ssm/*[01]")) == COMPLETE
    searched = Cell(("ssm",), "search", 1e-2, 0)
    assert not [key for key in results.read_result(tmp_path / "out", searched)["metrics"] if "measure" in key]
    cell = Cell(("ssm",), "report", 1e-2, 10)
    record = results.read_result(tmp_path / "out", cell)
    config = study.measure_config(study.cell_config(cell, results.cell_folder(tmp_path / "out", cell)), "3T")
    assert config.data.eval_split == "test"
    assert study.search_split == "validation"
    params = tm.restore(results.cell_folder(tmp_path / "out", cell) / "checkpoints").params
    expected = Evaluator(tm.TransMamba(config.model, config.kernels), config, data.open_tokenizer(config.data))(params)
    metrics = record["metrics"]
    assert metrics["measure/3T/loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert metrics["measure/3T/by_position"][-1][1] == 36
    assert metrics["measure/3T/class/all"] == pytest.approx(expected.loss, rel=1e-6)
    low, high = metrics["measure/3T/class/all/interval"]
    assert low <= expected.loss <= high
    assert metrics["eval/loss"] != metrics["measure/3T/loss"]
    rows = dataclasses.replace(config.data, seq_len=12, eval_split="validation")
    under = dataclasses.replace(config, data=rows)
    step = search(tm.TransMamba(config.model), under, data.open_tokenizer(rows), params, 1.0)[0][-1]
    assert metrics["measure/searched/transpoints"] == list(step.transpoints)
    assert metrics["measure/searched/cost"] == step.cost
    read = Evaluator(
        tm.TransMamba(config.model),
        dataclasses.replace(under, data=dataclasses.replace(rows, eval_split="test")),
        data.open_tokenizer(rows),
    )
    assert metrics["measure/searched/loss"] == pytest.approx(read.under(step.transpoints)(params).loss, rel=1e-5)
