"""Training under random schedules: the draws, that a step runs what was drawn, and exact resumption."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import transmamba_jax as tm
from tests.training.support import relative
from transmamba_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from transmamba_jax.training import schedule_sampling
from transmamba_jax.training.step import loss_and_gradient

MODEL = ModelConfig(
    vocab_size=8, num_layers=2, d_model=16, num_heads=2, num_groups=1, head_dim=8, state_dim=8, mlp_dim=0,
    transpoints=(0, 16), dtype="float32",
)  # fmt: skip
POOL = ("transformer", "mamba2", "4, 8")


def config_of(sampling="pool", pool=POOL, **sections):
    return Config(
        model=MODEL,
        data=DataConfig(source="synthetic:recall?keys=4&values=4", seq_len=16, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=6, log_every=1, schedule_sampling=sampling, schedule_pool=pool),
        checkpoint=CheckpointConfig(every=3),
        **{"eval": EvalConfig(every=0), **sections},
    )


def test_a_pool_has_names_and_lists():
    assert schedule_sampling.pool(config_of()) == [(16, 16), (0, 0), (4, 8)]
    with pytest.raises(ValueError, match=r"train\.schedule_pool: 'v9': v9 has 8 TransPoints"):
        schedule_sampling.pool(config_of(pool=("v9",)))
    with pytest.raises(ValueError, match=r"needs train\.schedule_pool"):
        config_of(pool=())
    with pytest.raises(ValueError, match=r"is for train\.schedule_sampling pool or rows"):
        config_of("none")


def test_draws_follow_seed_and_step_and_are_even():
    config = config_of()
    draws = [schedule_sampling.of_step(config, step) for step in range(3000)]
    assert draws[:20] == [schedule_sampling.of_step(config, step) for step in range(20)]
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert draws[:50] != [schedule_sampling.of_step(other, step) for step in range(50)]
    assert np.bincount(draws).min() > 900
    assert {schedule_sampling.of_step(config_of("none", ()), step) for step in range(9)} == {0}


def test_rows_draw_zero_powers_of_two_and_the_whole_row():
    rows = np.concatenate([schedule_sampling.of_rows(config_of("rows", ()), step) for step in range(200)])
    assert rows.shape == (1600, 2)
    values, counts = np.unique(rows, return_counts=True)
    assert values.tolist() == [0, 1, 2, 4, 8, 16]
    assert counts.min() > 0.8 * rows.size / 6
    from_pool = schedule_sampling.of_rows(config_of("rows"), 0)
    assert {tuple(row) for row in from_pool} <= {(16, 16), (0, 0), (4, 8)}


def test_processes_draw_the_same_and_take_their_rows():
    config = config_of("rows", ())
    batch = {"tokens": np.zeros((4, 17), np.int32)}
    parts = [schedule_sampling.with_transpoints(config, batch, 5, part, 2)["transpoints"] for part in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), schedule_sampling.of_rows(config, 5))
    assert schedule_sampling.with_transpoints(config_of(), batch, 5, 0, 2) is batch


@pytest.mark.parametrize("accumulation", [1, 4])
def test_rows_of_a_batch_run_under_their_own_transpoints(accumulation):
    model = tm.TransMamba(MODEL)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8, (4, 17), dtype=np.int32)
    points = np.array([[0, 16], [16, 16], [4, 8], [0, 0]], np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    run = jax.jit(lambda batch, count: loss_and_gradient(params, model, batch, count, 1024), static_argnums=1)
    mixed = run({"tokens": tokens, "transpoints": points}, accumulation)
    alone = []
    for row, schedule in zip(tokens, points, strict=True):
        under = model.clone(config=dataclasses.replace(MODEL, transpoints=tuple(map(int, schedule))))
        alone.append(
            jax.jit(lambda row, under=under: loss_and_gradient(params, under, {"tokens": row}, 1, 1024))(row[None])
        )
    assert relative(mixed, jax.tree.map(lambda *parts: sum(parts) / 4, *alone)) < 1e-5


@pytest.mark.parametrize("sampling", ["pool", "rows"])
def test_a_resumed_run_equals_the_run_without_a_break(tmp_path, sampling):
    schedules = EvalConfig(every=6, windows=8, schedules=("transformer", "mamba2") if sampling == "pool" else ())

    def train(name):
        assert tm.train(config_of(sampling, eval=schedules, workdir=str(tmp_path / name))) == 0
        text = (tmp_path / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()], tm.restore(tmp_path / name / "checkpoints").params

    whole, params = train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoints/6")
    lines, resumed = train("broken")
    jax.tree.map(np.testing.assert_array_equal, params, resumed)
    losses = lambda lines: {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses(lines) == losses(whole)
    assert len(losses(whole)) == 6
    if sampling == "pool":
        (result,) = [line for line in whole if "eval/loss" in line]
        # The config's own schedule is (0, T): neither of the others.
        assert len({result[f"eval/{name}loss"] for name in ("", "transformer/", "mamba2/")}) == 3
        assert 0 <= result["eval/mamba2/accuracy"] <= 1
        assert {"eval/transformer/by_position", "eval/transformer/answers_by_query"} <= result.keys()
